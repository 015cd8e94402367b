"""What a client must not say, and within which numbers it must stay. Pure; needs no engine.

The ingress and ``baton proxy`` both ask here before anything else sees a request: what is behind
them may rely on it. Bodies are looked at before any model reads them, but as models read them
(:func:`~serve_app.edge.lax_fields.as_read`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

PRIORITY_HEADER: Final = "x-vllm-priority"
MAX_DEPTH: Final = 100
"""Objects and lists within each other; what pickles and renders a body recurses."""

INT64: Final = range(-(1 << 63), 1 << 63)
TOKEN_IDS: Final = range(1 << 32)
"""What tokenizers take for a token."""

_WIRE: Final = range(INT64.start, 1 << 64)
"""What the engine's messages hold."""
_MAX_NAME: Final = 256
_MAX_LENGTH_PENALTY: Final = 40
"""Beam search raises lengths to this power; a float holds that for any length there is."""
_PATH_CHARACTERS: Final = 200

_RESERVED: Final = frozenset(
    {
        # Tickets, and what else Baton's replicas tell each other about a request.
        *("kv_transfer_params", "sent_token_ids", "do_remote_prefill", "do_remote_decode"),
        # The same for encoders that vLLM keeps apart from the model; nothing here speaks it.
        "ec_transfer_params",
    }
)


class Fault(NamedTuple):
    """What is wrong with a request.

    Attributes:
        field: which it is, with a dot before what is inside it, or which header; empty: the body.
        what: is wrong with it, or what would be right; of the body a whole sentence.
    """

    field: str
    what: str

    @property
    def param(self) -> str:
        """For the client, as OpenAI's errors name it."""
        return self.field or "body"

    @property
    def message(self) -> str:
        """For the client."""
        return f"{self.field}: {self.what}" if self.field else self.what


def body_fault(fields: Mapping[str, Any]) -> Fault | None:
    """Why a body must not be passed on; None if it may.

    Args:
        fields: the JSON object :func:`~serve_app.edge.lax_fields.as_read`, those fields that the
            API does not know included.
    """
    return _unfit(fields) or _reserved(fields) or _out_of_range(fields) or _name(fields)


def answers_fault(prompts: int, samples: int, most: int) -> Fault | None:
    """Why a request asks for more answers than it may; None if it does not.

    Args:
        samples: of each prompt.
    """
    if prompts * samples <= most:
        return None
    return Fault(
        "prompt" if prompts > 1 else "n",
        f"{prompts} prompts with {samples} samples each are more than {most} answers; send several "
        "requests",
    )


def copies_fault(prompts: int, rest_bytes: int, most: int) -> Fault | None:
    """Why a request's prompts must not go out one by one, each with all else; None if they may.

    Args:
        rest_bytes: of the body without its prompts, as JSON.
        most: bytes that a body may have; the copies of a small one may not have more.
    """
    if prompts == 1 or prompts * rest_bytes <= most:
        return None
    return Fault(
        "prompt",
        f"{prompts} prompts, each with the {rest_bytes} bytes of the body's other fields, are more "
        f"than {most} bytes; send several requests",
    )


def header_fault(headers: Mapping[str, str]) -> Fault | None:
    """Why a request with these headers must not be passed on; None if it may.

    Args:
        headers: looked up by lower-case name.
    """
    priority = _whole(headers.get(PRIORITY_HEADER, ""))
    if priority is None or priority in INT64:
        return None
    return number_fault(PRIORITY_HEADER, INT64)


def number_fault(field: str, allowed: range) -> Fault:
    """A whole number outside ``allowed``."""
    return Fault(field, f"it must be between {allowed.start} and {allowed.stop - 1}")


def _reserved(fields: Mapping[str, Any]) -> Fault | None:
    extra = fields.get("vllm_xargs")
    places = [("", fields), ("vllm_xargs.", extra if isinstance(extra, Mapping) else {})]
    for place, names in places:
        for name, value in names.items():
            if _plain(name) in _RESERVED and (place or value is not None):
                return Fault(f"{place}{name}", "only Baton itself may set it")
    return None


def _out_of_range(fields: Mapping[str, Any]) -> Fault | None:
    priority = fields.get("priority")
    if type(priority) is int and priority not in INT64:
        return number_fault("priority", INT64)
    penalty = fields.get("length_penalty")
    beam_search = fields.get("use_beam_search")
    if beam_search and isinstance(penalty, int | float) and abs(penalty) > _MAX_LENGTH_PENALTY:
        bounds = f"-{_MAX_LENGTH_PENALTY} and {_MAX_LENGTH_PENALTY}"
        return Fault("length_penalty", f"with use_beam_search it must be between {bounds}")
    return None


def _name(fields: Mapping[str, Any]) -> Fault | None:
    name = fields.get("request_id")
    if name is None or (isinstance(name, str) and len(name) <= _MAX_NAME):
        return None
    return Fault("request_id", f"it must be a text of at most {_MAX_NAME} characters")


class _Inside(NamedTuple):
    """A list or an object, and the way to it, which becomes a text only if it must be told."""

    value: Any
    name: Any = None
    outer: _Inside | None = None

    def fault(self, what: str, *names: Any) -> Fault:
        """What is wrong with this, or with what ``names`` lead to from here."""
        if self.outer is not None:
            return self.outer.fault(what, self.name, *names)
        path = ".".join(map(str, names))
        return Fault(path if len(path) <= _PATH_CHARACTERS else path[:_PATH_CHARACTERS] + "…", what)


def _unfit(fields: Mapping[str, Any]) -> Fault | None:
    """The first value that JSON, UTF-8 or the engine's messages do not have."""
    level = [_Inside(fields)]
    for _ in range(MAX_DEPTH):
        deeper: list[_Inside] = []
        for place in level:
            items: Iterable[tuple[Any, Any]]
            if isinstance(place.value, Mapping):
                items = place.value.items()
                if what := next(filter(None, map(_unfit_text, place.value)), ""):
                    return place.fault(f"a name in it is no text: {what}")
            elif _all_token_ids(place.value):
                continue
            else:
                items = enumerate(place.value)
            for name, value in items:
                if isinstance(value, dict | list):
                    deeper.append(_Inside(value, name, place))
                elif what := _unfit_leaf(value):
                    return place.fault(what, name)
        if not deeper:
            return None
        level = deeper
    return level[0].fault(f"there are more than {MAX_DEPTH} lists and objects in each other")


def _all_token_ids(values: list[Any]) -> bool:
    """Whether a list, which may be long, holds nothing else than numbers that fit."""
    return set(map(type, values)) == {int} and min(values) in _WIRE and max(values) in _WIRE


def _unfit_leaf(value: Any) -> str:
    if isinstance(value, str):
        return _unfit_text(value)
    if type(value) is int and value not in _WIRE:
        return number_fault("", _WIRE).what
    if isinstance(value, float) and not math.isfinite(value):
        return "it must be a finite number"
    return ""


def _unfit_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"the character {error.start} is half of a surrogate pair"
    return ""


def _plain(name: str) -> str:
    """A name as another program might read it that is not strict about spelling."""
    return name.strip().casefold().replace("-", "_")


def _whole(text: str) -> int | None:
    """The number that vLLM would read, or one that is out of range if it has too many digits."""
    digits = text.strip().lstrip("+-").replace("_", "")
    if not digits.isdecimal():
        return None
    if len(digits) > 20:
        return INT64.stop
    try:
        return int(text)
    except ValueError:
        return None
