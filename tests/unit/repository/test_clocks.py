"""What lasts is measured by a clock that nobody sets."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
WALL_CLOCK = re.compile(
    r"\btime\.(time|time_ns|localtime|gmtime|ctime|asctime|strftime)\b"
    r"|\bfrom time import\b.*\b(time|time_ns|localtime|gmtime|ctime|asctime|strftime)\b"
    r"|\bdatetime\b"
)
MEANT = {
    # Shown to people: when a worker started, and until when a ticket can be used.
    ("transfer/engine/engine.py", "started_at_s=time.time(),"),
    ("transfer/connector/scheduling/ticket_writer.py", "clock: Callable[[], float] = time.time,"),
    # Compared with what the kernel notes of files.
    ("transfer/connector/scheduling/adapters.py", "self._made_ns = time.time_ns()"),
}


def test_the_time_of_day_is_used_only_where_it_is_meant() -> None:
    found = {
        (str(file.relative_to(ROOT)), line.strip())
        for folder in ("transfer", "deployments", "serve_app")
        for file in (ROOT / folder).rglob("*.py")
        for line in file.read_text().splitlines()
        if WALL_CLOCK.search(line)
    }
    assert found == MEANT
