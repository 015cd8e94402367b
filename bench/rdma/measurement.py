"""A run as it goes from where it was measured to where it is written down."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from bench.transfer.cases import Case
from bench.transfer.reporting.results import Outcome, Run, Sample


@dataclass(frozen=True)
class Measurement:
    """A run, and the machine that it ran on.

    Attributes:
        device: name and port, network, MTU.
        kernel: release.
        emulated: whether it was the virtual machine of the tests.
    """

    device: str
    kernel: str
    emulated: bool
    run: Run

    def to_json(self) -> str:
        """One line."""
        run = {
            **vars(self.run),
            "cases": [case.as_json() for case in self.run.cases],
            # JSON has no keys but strings.
            "outcomes": [
                {"case": case.as_json(), "system": system, **asdict(outcome)}
                for (case, system), outcome in self.run.outcomes.items()
            ],
        }
        return json.dumps({**vars(self), "run": run})

    @classmethod
    def from_json(cls, text: str) -> Measurement:
        """What :meth:`to_json` made.

        Raises:
            ValueError: it is something else.
        """
        try:
            plain = json.loads(text)
            return cls(**{**plain, "run": _run(**plain["run"])})
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"not a measurement: {text[:200]!r} ({error})") from error


def _run(
    cases: list[dict[str, Any]],
    outcomes: list[dict[str, Any]],
    load_before: list[float],
    load_after: list[float],
    **others: Any,
) -> Run:
    run = Run(
        cases=tuple(Case(**case) for case in cases),
        load_before=(load_before[0], load_before[1], load_before[2]),
        load_after=(load_after[0], load_after[1], load_after[2]),
        **others,
    )
    for outcome in outcomes:
        samples = [Sample(**sample) for sample in outcome["samples"]]
        key = Case(**outcome["case"]), outcome["system"]
        run.outcomes[key] = Outcome(samples, outcome["failure"])
    return run
