"""Takes turns: case by case, round by round, system by system."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from bench.transfer import host
from bench.transfer.cases import Case, Profile
from bench.transfer.contestants import Contestant
from bench.transfer.processes import ChildFailed
from bench.transfer.reporting.results import Outcome, Run


def measure(
    profile: Profile,
    systems: Sequence[Contestant],
    *,
    limit_s: float,
    say: Callable[[str], None],
) -> Run:
    """Run a profile.

    In every round each system has one turn, and every round begins with another one, so that
    what else the machine does hits all alike. Between turns a system's processes are stopped:
    some spin when idle. They serve for all rounds, unless the profile wants fresh ones.

    Args:
        limit_s: rounds and cases that would begin later than that are left out.
    """
    run = Run(profile.name, profile.rounds, profile.cases, [s.name for s in systems], host.load())
    start = time.monotonic()
    able = []
    for system in systems:
        if missing := system.missing:
            say(f"{system.name}: {missing}")
            for case in profile.cases:
                run.outcomes[case, system.name] = Outcome(failure=missing)
        else:
            able.append(system)
    try:
        for number, case in enumerate(profile.cases, 1):
            say(
                f"[{number}/{len(profile.cases)}] {case}, load {host.load()[0]:.1f}, "
                f"{time.monotonic() - start:.0f} s so far"
            )
            _measure_case(run, profile, case, able, start + limit_s, say)
    finally:
        for system in able:
            system.close()
    run.load_after = host.load()
    run.seconds = time.monotonic() - start
    return run


def _measure_case(
    run: Run,
    profile: Profile,
    case: Case,
    systems: Sequence[Contestant],
    deadline: float,
    say: Callable[[str], None],
) -> None:
    taking_part = []
    for system in systems:
        if system.skips(case):
            continue
        if not system.streams_matter and _same_but_for_streams(run, case, system.name):
            continue
        outcome = run.outcomes[case, system.name] = Outcome()
        if time.monotonic() > deadline:
            outcome.failure = "not run: out of time"
        elif _prepared(system, case, outcome):
            taking_part.append(system)
    turns = max(profile.turns, case.turns)
    for number in range(profile.rounds * turns):
        if time.monotonic() > deadline:
            say(f"  out of time after {number} turns")
            break
        if profile.fresh and number and number % turns == 0:
            taking_part = [system for system in taking_part if _renewed(system, case, run.outcomes)]
        turn = number % len(taking_part) if taking_part else 0
        for system in [*taking_part[turn:], *taking_part[:turn]]:
            outcome = run.outcomes[case, system.name]
            try:
                outcome.samples.append(system.sample(all_bytes=False))
                system.pause()
            except ChildFailed as error:
                _fail(system, outcome, error)
                taking_part = [other for other in taking_part if other is not system]
    for system in taking_part:
        outcome = run.outcomes[case, system.name]
        if not outcome.samples:
            outcome.failure = "not run: out of time"
        _unload(system)
    for system in systems:
        done = run.outcome(case, system.name)
        if done is not None:
            say(f"  {system.name:27} {summary(done)}")


def _renewed(system: Contestant, case: Case, outcomes: dict[tuple[Case, str], Outcome]) -> bool:
    system.kill()
    return _prepared(system, case, outcomes[case, system.name])


def _prepared(system: Contestant, case: Case, outcome: Outcome) -> bool:
    """Load, read once with every byte checked, pause."""
    try:
        system.load(case)
        system.sample(all_bytes=True)
        system.pause()
    except ChildFailed as error:
        _fail(system, outcome, error)
        return False
    return True


def _fail(system: Contestant, outcome: Outcome, error: ChildFailed) -> None:
    outcome.failure = str(error)
    # Whatever state it is in, the next case begins in a clean one.
    system.kill()


def _unload(system: Contestant) -> None:
    try:
        system.resume()
        system.unload()
        system.pause()
    except ChildFailed:
        system.kill()


def _same_but_for_streams(run: Run, case: Case, name: str) -> bool:
    return any(
        (done.block_bytes, done.count) == (case.block_bytes, case.count)
        for done, system in run.outcomes
        if system == name
    )


def summary(outcome: Outcome) -> str:
    """One line for the terminal."""
    if not outcome.works:
        return f"FAILED: {outcome.failure}"
    low, high = outcome.spread
    return (
        f"{outcome.gb_per_s:8.3f} GB/s ({low:.3f} to {high:.3f}), "
        f"p50 {1e3 * outcome.latency_s(50):9.3f} ms, p99 {1e3 * outcome.latency_s(99):9.3f} ms, "
        f"CPU s/GB {outcome.reader_cpu_s_per_gb:.2f} + {outcome.owner_cpu_s_per_gb:.2f}"
    )
