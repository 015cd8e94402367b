from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from serve_app.ingress.metrics import merge

HEAD = """\
# HELP ray_baton_handoffs Hand-offs by side and outcome.
# TYPE ray_baton_handoffs counter
"""
NODE_1 = (
    HEAD
    + """\
ray_baton_handoffs{side="owner",node="1"} 3.0
ray_baton_handoffs{side="reader",node="1"} 1.0
# HELP ray_node_cpu_count CPUs.
# TYPE ray_node_cpu_count gauge
ray_node_cpu_count{node="1"} 2.0
# HELP ray_vllm_ttft_seconds Time to first token.
# TYPE ray_vllm_ttft_seconds histogram
ray_vllm_ttft_seconds_bucket{le="0.1",node="1"} 1.0
ray_vllm_ttft_seconds_bucket{le="+Inf",node="1"} 2.0
ray_vllm_ttft_seconds_sum{node="1"} 0.5
ray_vllm_ttft_seconds_count{node="1"} 2.0
"""
)
NODE_2 = (
    """\
# HELP ray_vllm_ttft_seconds Time to first token.
# TYPE ray_vllm_ttft_seconds histogram
ray_vllm_ttft_seconds_bucket{le="0.1",node="2"} 0.0
ray_vllm_ttft_seconds_bucket{le="+Inf",node="2"} 4.0
ray_vllm_ttft_seconds_sum{node="2"} 9.0
ray_vllm_ttft_seconds_count{node="2"} 4.0
"""
    + HEAD
    + """\
ray_baton_handoffs{side="owner",node="2"} 5.0
# HELP ray_serve_requests Requests.
# TYPE ray_serve_requests gauge
ray_serve_requests{node="2"} 7.0
"""
)


def families(text: str) -> dict[str, tuple[str, str, set[tuple[str, str, float]]]]:
    """Name -> type, help, samples, as a scraper reads them."""
    return {
        family.name: (
            family.type,
            family.documentation,
            {
                (sample.name, repr(sorted(sample.labels.items())), sample.value)
                for sample in family.samples
            },
        )
        for family in text_string_to_metric_families(text)
    }


def test_nothing_makes_nothing() -> None:
    assert merge([]) == ""
    assert merge(["", "# EOF\n"]) == ""


def test_each_family_comes_once_with_the_samples_of_all_nodes() -> None:
    merged = merge([NODE_1, NODE_2])

    lines = merged.splitlines()
    assert merged.endswith("\n")
    for kind in ("HELP", "TYPE"):
        for name in ("ray_baton_handoffs", "ray_vllm_ttft_seconds", "ray_serve_requests"):
            assert sum(line.startswith(f"# {kind} {name} ") for line in lines) == 1
    start = lines.index("# TYPE ray_baton_handoffs counter")
    assert lines[start - 1] == "# HELP ray_baton_handoffs Hand-offs by side and outcome."
    assert lines[start + 1 : start + 4] == [
        'ray_baton_handoffs{side="owner",node="1"} 3.0',
        'ray_baton_handoffs{side="reader",node="1"} 1.0',
        'ray_baton_handoffs{side="owner",node="2"} 5.0',
    ]


def test_scraper_reads_from_all_what_it_would_read_from_each() -> None:
    merged = families(merge([NODE_1, NODE_2]))

    wanted: dict[str, tuple[str, str, set[tuple[str, str, float]]]] = {}
    for node in (NODE_1, NODE_2):
        for name, (kind, documentation, samples) in families(node).items():
            if name != "ray_node_cpu_count":
                known = wanted.get(name, (kind, documentation, set()))[2]
                wanted[name] = (kind, documentation, known | samples)
    assert merged == wanted
    assert {name: len(samples) for name, (_, _, samples) in merged.items()} == {
        "ray_baton_handoffs": 3,
        "ray_vllm_ttft_seconds": 8,
        "ray_serve_requests": 1,
    }


def test_metrics_of_others_are_left_out() -> None:
    merged = merge([NODE_1, "python_gc_objects 1.0\nray_batonish 1.0\nxray_baton_x 1.0\n"])

    assert "ray_node_cpu_count" not in merged
    assert "python_gc" not in merged
    assert "ray_batonish" not in merged
    assert "xray_baton_x" not in merged


def test_family_without_samples_is_left_out() -> None:
    assert merge([HEAD]) == ""


def test_samples_without_help_are_kept() -> None:
    assert merge(["ray_baton_pinned_blocks 4.0\n"]) == "ray_baton_pinned_blocks 4.0\n"
