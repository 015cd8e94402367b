"""The transfer benchmark: its memory notices wrong bytes, and its bars are not lenient."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from bench.transfer.cases import ANEW, KIB, MIB, Case, Profile, case_of, full, quick
from bench.transfer.contestants import Contestant, builds, contestants
from bench.transfer.memory import Pool, Scatter, scatter
from bench.transfer.reporting import report
from bench.transfer.reporting.bars import BEFORE, SHM, TCP, Bar, Verdict, judge
from bench.transfer.reporting.results import Outcome, Run, Sample
from bench.transfer.runner import measure

CASE = Case(12 * KIB, 40)
SIXTY_FOUR = case_of(64 * KIB, 128 * MIB)


@pytest.fixture
def where() -> Scatter:
    return scatter(CASE, 4 * MIB)


def copied(where: Scatter) -> Pool:
    """A reader's pool after a read of the right bytes."""
    owner, reader = Pool(4 * MIB), Pool(4 * MIB)
    owner.fill(where.block_bytes, where.remote)
    for to, source in zip(where.local.tolist(), where.remote.tolist(), strict=True):
        ctypes.memmove(reader.address + to, owner.address + source, where.block_bytes)
    return reader


def test_a_scatter_has_different_blocks_on_both_sides(where: Scatter) -> None:
    for offsets in (where.remote, where.local):
        assert np.unique(offsets).size == CASE.count
        assert offsets.max() + CASE.block_bytes <= 4 * MIB
    assert not np.array_equal(where.remote, where.local)


def test_right_bytes_are_found_right(where: Scatter) -> None:
    reader = copied(where)
    assert reader.holds(where, all_bytes=True)
    assert reader.holds(where, all_bytes=False)


def test_one_wrong_byte_is_noticed(where: Scatter) -> None:
    reader = copied(where)
    reader.bytes[int(where.local[7]) + 5000] ^= 1
    assert not reader.holds(where, all_bytes=True)


def test_a_read_that_did_nothing_is_noticed(where: Scatter) -> None:
    reader = copied(where)
    reader.blur(where.block_bytes, where.local)
    assert not reader.holds(where, all_bytes=False)


def run_of(rates: dict[str, float], case: Case = SIXTY_FOUR) -> Run:
    """One sample each, at so many GB/s; 0 is a failure."""
    run = Run("test", 1, (case,), list(rates), (0.0, 0.0, 0.0))
    for name, rate in rates.items():
        read_s = [case.total_bytes / rate / 1e9] if rate else []
        sample = Sample(read_s, case.total_bytes, case.total_bytes, 0.1, 0.1, 0.0, 1.0)
        failure = "" if rate else "refused"
        run.outcomes[case, name] = Outcome([sample] if rate else [], failure)
    return run


def verdict(bars: list[Bar], wanted: str) -> Verdict:
    (bar,) = (bar for bar in bars if bar.wanted == wanted)
    return bar.verdict


def test_bars_compare_medians_of_the_run() -> None:
    peers = {"mooncake tcp": 1.0, "nixl tcp": 0.5, "iperf3": 2.4, "nixl": 3.0, "memcpy": 8.0}
    bars = judge(run_of({TCP: 3.1, SHM: 4.7, **peers}))
    assert verdict(bars, "3 x mooncake tcp") is Verdict.PASS
    assert verdict(bars, "5 x nixl tcp") is Verdict.PASS
    assert verdict(bars, "1.3 x iperf3") is Verdict.FAIL
    assert verdict(bars, "1.3 x nixl") is Verdict.PASS
    assert verdict(bars, "0.6 x memcpy") is Verdict.FAIL


def test_a_peer_that_fails_is_no_bar_passed() -> None:
    bars = judge(run_of({TCP: 3.1, "mooncake tcp": 0.0}))
    assert verdict(bars, "3 x mooncake tcp") is Verdict.NO_FIGURE


def test_a_failure_of_ours_is_a_bar_missed() -> None:
    bars = judge(run_of({TCP: 0.0, "iperf3": 1.0}))
    assert verdict(bars, "1.3 x iperf3") is Verdict.FAIL


@pytest.mark.parametrize(
    ("now", "right"), [(0.98, Verdict.PASS), (0.96, Verdict.FAIL), (0.0, Verdict.FAIL)]
)
def test_large_reads_are_compared_with_those_of_before(now: float, right: Verdict) -> None:
    bars = judge(run_of({TCP: 5 * now, f"{TCP}{BEFORE}": 5.0}))
    assert verdict(bars, f"0.97 x {TCP}{BEFORE}") is right


@pytest.mark.parametrize(
    ("now", "right"), [(1 / 1.14, Verdict.PASS), (1 / 1.16, Verdict.FAIL), (0.0, Verdict.FAIL)]
)
def test_new_connections_are_compared_with_those_of_before(now: float, right: Verdict) -> None:
    bars = judge(run_of({SHM: now, f"{SHM}{BEFORE}": 1.0}, ANEW))
    assert [bar.verdict for bar in bars] == [right]


def test_only_builds_of_ours_connect_anew(tmp_path: Path) -> None:
    systems = [*builds(tmp_path, MIB, tmp_path), *contestants(tmp_path, MIB, tmp_path)]
    able = [system.name for system in systems if not system.skips(ANEW)]
    assert able == [TCP, f"{TCP}{BEFORE}", SHM, f"{SHM}{BEFORE}", TCP, SHM]
    assert ANEW in quick().for_builds().cases


class Counted(Contestant):
    """Counts its starts, and the samples that each of them gave."""

    missing = ""
    streams_matter = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.samples: list[int] = []
        self._runs = False

    def skips(self, case: Case) -> bool:
        return False

    def load(self, case: Case) -> None:
        if not self._runs:
            self.samples.append(-1)  # the first is the one whose bytes are all checked
        self._runs = True

    def sample(self, *, all_bytes: bool) -> Sample:
        self.samples[-1] += 1
        return Sample([0.1], 1, 1, 0.0, 0.0, 0.0, 0.1)

    def kill(self) -> None:
        self._runs = False

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def unload(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("profile", "samples"),
    [
        (Profile("plain", (CASE,), 3), [3]),
        (Profile("fresh", (CASE,), 3, turns=2, fresh=True), [2, 2, 2]),
    ],
)
def test_every_round_has_processes_of_its_own_where_that_is_wanted(
    profile: Profile, samples: list[int]
) -> None:
    systems = [Counted("one"), Counted("other")]
    run = measure(profile, systems, limit_s=60.0, say=lambda line: None)
    for system in systems:
        assert system.samples == samples
        assert len(run.outcomes[CASE, system.name].samples) == sum(samples)


def test_the_report_shows_failures_with_their_reason() -> None:
    text = report.render(run_of({TCP: 3.1, "mooncake tcp": 0.0}), plot="")
    assert "| mooncake tcp | 2048 x 64 KiB, 2 streams | refused |" in text


def test_a_case_that_a_system_skips_has_a_dash_and_a_reason() -> None:
    run = run_of({TCP: 3.1, "iperf3": 2.0})
    other = case_of(MIB, 128 * MIB)
    run.cases = (*run.cases, other)
    run.outcomes[other, TCP] = run.outcomes[SIXTY_FOUR, TCP]
    text = report.render(run, plot="")
    assert "| iperf3 | **2** (2 to 2) | - |" in text
    assert "A dash is a case that a system does not run." in text


def test_the_full_profile_has_all_of_the_quick_one() -> None:
    assert set(quick().cases) <= set(full().cases)
