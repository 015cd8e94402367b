"""Which of pydantic's many complaints about a body is the one to tell a client. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serve_app.edge.request_edge import Fault

_WHERE_IN_HTTP = ("body", "query", "path", "header")
_OTHER_KIND = ("_type", "literal_error", "_parsing")
"""Ends of the types of faults that say no more than: it is not this kind of thing."""


def first_fault(faults: Sequence[Mapping[str, Any]], fields: Any = None) -> Fault:
    """The fault to tell of what pydantic's ``errors()`` lists; never one without a message.

    A value that may be of several kinds gets complaints from each. The kind that comes nearest, by
    how many places are wrong with it, is taken for what the client meant.

    Args:
        faults: as pydantic lists them, or as FastAPI does, with where in the request first.
        fields: the body. With it, names of kinds are left out of the places.
    """
    placed = [(_place(fault.get("loc", ()), fields, fault), fault) for fault in faults]
    # A fault of the whole body says less than one of a field.
    placed = [item for item in placed if item[0][0]] or placed
    if not placed:
        return Fault("", "the request is malformed")
    field = placed[0][0][0][:1]
    kinds: dict[str, list[tuple[tuple[str, ...], Mapping[str, Any]]]] = {}
    for (path, kind), fault in placed:
        if path[:1] == field:
            kinds.setdefault(kind, []).append((path, fault))
    wrong_places = {kind: len({path for path, _ in told}) for kind, told in kinds.items()}
    fewest = min(wrong_places.values())
    candidates = [item for kind in kinds if wrong_places[kind] == fewest for item in kinds[kind]]
    path, fault = min(
        candidates,
        key=lambda item: (str(item[1].get("type", "")).endswith(_OTHER_KIND), -len(item[0])),
    )
    words = [
        str(other["ctx"]["expected"])
        for where, other in candidates
        if (where, other.get("type")) == (path, "literal_error")
    ]
    if words and fault.get("type") == "literal_error":
        return Fault(".".join(path), f"Input should be {' or '.join(words)}")
    message = str(fault.get("msg", "the request is malformed")).removeprefix("Value error, ")
    return Fault(".".join(path), message)


def _place(
    location: Sequence[Any], fields: Any, fault: Mapping[str, Any]
) -> tuple[tuple[str, ...], str]:
    """The path to a fault, and the kind of thing that was tried; without ``fields`` no kind."""
    parts = list(location)
    if fields is None:
        # FastAPI begins with where the field was; deeper down these are names of fields.
        if parts and parts[0] in _WHERE_IN_HTTP:
            del parts[0]
        return tuple(map(str, parts)), ""
    path: list[str] = []
    kinds: list[str] = []
    value = fields
    for number, part in enumerate(parts):
        last_and_missing = number == len(parts) - 1 and fault.get("type") == "missing"
        if isinstance(value, Mapping) and (part in value or last_and_missing):
            path.append(str(part))
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            path.append(str(part))
            value = value[part]
        else:
            kinds.append(str(part))
    return tuple(path), kinds[0] if kinds else ""
