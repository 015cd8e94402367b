"""What was measured, and its statistics."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from bench.transfer.cases import Case


@dataclass(frozen=True)
class Sample:
    """One turn of one system.

    Attributes:
        read_s: seconds of each read that counts.
        cpu_bytes: bytes that ``reader_cpu_s`` and ``owner_cpu_s`` were spent on; those of reads
            that do not count are among them.
        others_cpu_s: processor time that neither end took, in steps of 10 ms.
    """

    read_s: list[float]
    bytes_per_read: int
    cpu_bytes: int
    reader_cpu_s: float
    owner_cpu_s: float
    others_cpu_s: float
    wall_s: float

    @property
    def gb_per_s(self) -> float:
        return self.bytes_per_read * len(self.read_s) / sum(self.read_s) / 1e9


@dataclass
class Outcome:
    """One system in one case.

    Attributes:
        failure: why there is no figure; empty if there is one.
    """

    samples: list[Sample] = field(default_factory=list)
    failure: str = ""

    @property
    def works(self) -> bool:
        return bool(self.samples) and not self.failure

    @property
    def gb_per_s(self) -> float:
        """Median of the samples."""
        return statistics.median(sample.gb_per_s for sample in self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile of the samples' GB/s."""
        rates = [sample.gb_per_s for sample in self.samples]
        if len(rates) < 2:
            return rates[0], rates[0]
        low, _, high = statistics.quantiles(rates, n=4, method="inclusive")
        return low, high

    def latency_s(self, percent: float) -> float:
        """That percentile of all single reads, the nearest rank."""
        reads = sorted(spent for sample in self.samples for spent in sample.read_s)
        rank = -(-len(reads) * percent // 100)
        return reads[max(0, int(rank) - 1)]

    @property
    def reader_cpu_s_per_gb(self) -> float:
        return statistics.median(1e9 * s.reader_cpu_s / s.cpu_bytes for s in self.samples)

    @property
    def cpu_s_per_gb(self) -> float:
        """Both ends."""
        return self.reader_cpu_s_per_gb + self.owner_cpu_s_per_gb

    @property
    def owner_cpu_s_per_gb(self) -> float:
        return statistics.median(1e9 * s.owner_cpu_s / s.cpu_bytes for s in self.samples)

    @property
    def others_cpu_s_per_gb(self) -> float:
        return statistics.median(1e9 * s.others_cpu_s / s.cpu_bytes for s in self.samples)


@dataclass
class Run:
    """Everything of one run. ``outcomes`` lack systems that skip a case."""

    profile: str
    rounds: int
    cases: tuple[Case, ...]
    systems: list[str]
    load_before: tuple[float, float, float]
    load_after: tuple[float, float, float] = (0.0, 0.0, 0.0)
    seconds: float = 0.0
    outcomes: dict[tuple[Case, str], Outcome] = field(default_factory=dict)

    def outcome(self, case: Case, system: str) -> Outcome | None:
        return self.outcomes.get((case, system))

    @property
    def others_cores(self) -> float:
        """Processors that others used while something was measured."""
        samples = [sample for outcome in self.outcomes.values() for sample in outcome.samples]
        wall = sum(sample.wall_s for sample in samples)
        return sum(sample.others_cpu_s for sample in samples) / wall if wall else 0.0
