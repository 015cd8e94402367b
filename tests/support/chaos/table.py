"""Writes the rows that the chaos suite left behind into docs/reliability.md.

``python -m tests.support.chaos.table [folder of rows]``
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

from tests.support.chaos.faults import ALONE, FAULTS
from tests.support.chaos.run import Row

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "reliability.md"
_PLACE = re.compile(r"(<!-- chaos table -->\n).*?(<!-- end of chaos table -->)", re.DOTALL)
_COUNTS = ("requests", "ok", "degraded", "refused", "wrong", "stuck", "leaked")


def load(folder: Path) -> dict[str, Row]:
    """Rows by name; those of workers that speak TLS with each other say so."""
    rows = [Row(**json.loads(path.read_text())) for path in folder.glob("*.json")]
    for path in (folder / "tls").glob("*.json"):
        row = Row(**json.loads(path.read_text()))
        rows.append(replace(row, fault=f"{row.fault}, over TLS"))
    return {f"{row.fault}, {row.phase}": row for row in rows}


def render(rows: dict[str, Row]) -> str:
    """The table, in the order of the suite, others last; rows that did not run are left out."""
    heads = ["fault", "phase", *_COUNTS, "recovery, s"]
    lines = [f"| {' | '.join(heads)} |", "| --- | --- |" + " ---: |" * (len(heads) - 2)]
    suite = [f"{fault.what}, {fault.phase}" for fault in (*FAULTS, *ALONE)]
    others = sorted(rows.keys() - set(suite))
    for row in (rows[name] for name in (*suite, *others) if name in rows):
        counts = " | ".join(str(getattr(row, name)) for name in _COUNTS)
        lines.append(f"| {row.fault} | {row.phase} | {counts} | {row.recovery_s:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Put the table where the marks in the document are."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/chaos")
    table = render(load(folder))
    text, found = _PLACE.subn(lambda mark: mark[1] + table + mark[2], DOCUMENT.read_text())
    if found != 1:
        raise SystemExit(f"{DOCUMENT} has {found} places for the table, 1 is expected")
    DOCUMENT.write_text(text)
    print(table)


if __name__ == "__main__":
    main()
