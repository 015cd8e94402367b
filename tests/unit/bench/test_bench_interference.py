"""The report of the interference benchmark."""

from __future__ import annotations

from bench.interference import ELSEWHERE, HERE, Slowdown, render
from bench.transfer.host import Machine


def test_the_report_has_medians_and_ranges_of_both_readers() -> None:
    slower = [
        Slowdown("tcp", HERE, [3.0, 9.0, 4.0], [4.0, 5.0, 1.0]),
        Slowdown("tcp", ELSEWHERE, [2.0, 2.5, 3.0], [6.0, 6.0, 6.0]),
    ]
    machine = Machine("a processor", 2, "6.1.0", "3.11.7", "madvise", "bbr")
    text = render(slower, machine, (0.1, 0.2, 0.3), (1.0, 0.5, 0.4))
    assert f"| tcp | {HERE} | **4.00** | 3.00 to 9.00 | 4.00 |" in text
    assert f"| tcp | {ELSEWHERE} | **2.50** | 2.00 to 3.00 | 6.00 |" in text
    assert "medians of 3 interleaved rounds" in text
    assert "0.10 0.20 0.30 before, 1.00 0.50 0.40 after" in text
