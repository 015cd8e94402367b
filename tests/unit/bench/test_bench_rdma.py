"""The RDMA benchmark: perftest's figures, the way of a run to its report, and the bar."""

from __future__ import annotations

import pytest

from bench.rdma.measurement import Measurement
from bench.rdma.perftest import parse
from bench.rdma.profile import BATON, PERFTEST, judge, rdma
from bench.rdma.report import render
from bench.transfer.cases import KIB, MIB
from bench.transfer.host import Machine
from bench.transfer.processes import ChildFailed
from bench.transfer.reporting.bars import Verdict
from bench.transfer.reporting.results import Outcome, Run, Sample

OUTPUT = """\
---------------------------------------------------------------------------------------
 local address: LID 0000 QPN 0x0012 PSN 0x2f6a17 OUT 0x10 RKey 0x000b2e VAddr 0x007f1c
---------------------------------------------------------------------------------------
 #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]
 65536      2048             171.25             166.50 \t\t     0.002664
---------------------------------------------------------------------------------------
"""
HOST = Machine("a processor", 2, "6.1.0", "3.11.7", "madvise", "bbr")
LOAD = (0.25, 0.5, 0.75)


def run_of(rates: dict[str, list[float]]) -> Run:
    """For every block size, samples of so many GB/s; none is a failure."""
    profile = rdma(rounds=3)
    run = Run("rdma", 3, profile.cases, list(rates), LOAD)
    for case in profile.cases:
        total = case.total_bytes
        for name, each in rates.items():
            samples = [
                Sample([total / rate / 1e9], total, total, 1.0, 2.0, 3.0, 4.0) for rate in each
            ]
            run.outcomes[case, name] = Outcome(samples, "" if samples else "no | device")
    return run


def test_perftests_average_is_in_mebibytes() -> None:
    moved = parse(OUTPUT, 64 * KIB)
    assert moved.total_bytes == 128 * MIB
    assert moved.bytes_per_s == 166.5 * MIB


@pytest.mark.parametrize(
    "output", ["", "Couldn't listen to port 18515\n", OUTPUT.replace("166.50", "0.00")]
)
def test_output_without_figures_is_a_failure(output: str) -> None:
    with pytest.raises(ChildFailed, match="gave no figures"):
        parse(output, 64 * KIB)


def test_figures_of_another_block_size_are_not_taken() -> None:
    with pytest.raises(ChildFailed, match="gave no figures"):
        parse(OUTPUT, 256 * KIB)


def test_a_measurement_comes_out_as_it_went_in() -> None:
    measured = Measurement("rxe0:1", "6.1.0", True, run_of({BATON: [0.15, 0.16], PERFTEST: []}))
    assert Measurement.from_json(measured.to_json()) == measured


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"device": "rxe0", "run": {}}'])
def test_something_else_is_no_measurement(text: str) -> None:
    with pytest.raises(ValueError, match="not a measurement"):
        Measurement.from_json(text)


def test_the_bar_is_nine_tenths_of_the_peers_median() -> None:
    peer = [0.1, 0.2, 0.9]
    held = judge(run_of({BATON: [0.17, 0.181, 0.5], PERFTEST: peer}))
    missed = judge(run_of({BATON: [0.17, 0.179, 0.5], PERFTEST: peer}))
    assert [bar.verdict for bar in held] == [Verdict.PASS] * 3
    assert [bar.verdict for bar in missed] == [Verdict.FAIL] * 3
    assert missed[0].reached == "0.895 (0.179 to 0.200 GB/s)"


def test_without_the_peer_no_bar_is_passed() -> None:
    bars = judge(run_of({BATON: [0.2], PERFTEST: []}))
    assert [bar.verdict for bar in bars] == [Verdict.NO_FIGURE] * 3


def test_the_report_has_figures_of_both_and_says_where_they_are_from() -> None:
    run = run_of({BATON: [0.16, 0.17, 0.18], PERFTEST: [0.19, 0.2, 0.21]})
    text = render(Measurement("rxe0:1, RoCE, MTU 4096", "6.1.0-9", True, run), HOST, LOAD, LOAD)
    assert "virtual machine with Linux 6.1.0-9, on rxe0:1, RoCE, MTU 4096" in text
    assert "0.25 0.50 0.75 before" in text
    assert f"| {BATON}, 64 KiB blocks, 128 MiB | 0.9 x {PERFTEST} | 0.850 " in text
    assert f"| {BATON} | **0.17** (0.165 to 0.175) |" in text
    assert f"| {PERFTEST} | **0.2** (0.195 to 0.205) |" in text
    assert f"| {BATON} | 7.45 + 14.90 + 22.35 |" in text


def test_a_real_device_is_not_called_emulated() -> None:
    run = run_of({BATON: [0.1], PERFTEST: [0.1]})
    text = render(Measurement("mlx5_0:1", "6.1.0", False, run), HOST, LOAD, LOAD)
    assert "virtual machine" not in text
    assert "emulated" not in text


def test_the_report_shows_failures_with_their_reason() -> None:
    run = run_of({BATON: [0.1], PERFTEST: []})
    text = render(Measurement("rxe0:1", "6.1.0", True, run), HOST, LOAD, LOAD)
    assert f"| {PERFTEST} | 2048 x 64 KiB, 2 streams | no \\| device |" in text
