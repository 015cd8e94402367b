"""Worker records on the wire: JSON in etcd, one key per worker.

Version 1 is an object with ``version`` (1), ``engine_id``, ``rank``, ``incarnation``, ``role``,
``tp_size``, ``addresses``, ``layout_hash``, ``started_at_s``, and ``http_url`` if there is one. A
later field that old readers may ignore can join version 1; anything else needs a new version.
"""

from __future__ import annotations

import json
import math
import re
from typing import NoReturn

from transfer.addressing import is_http_url
from transfer.errors import ConfigurationError, Phase, ProtocolError
from transfer.types import PeerId, WorkerRecord

RECORD_VERSION = 1
MAX_RECORD_BYTES = 16 * 1024
MAX_TEXT_CHARS = 512
MAX_ADDRESSES = 64
MAX_RANK = 1 << 20

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://\S+")
_CLUSTER = re.compile(r"[A-Za-z0-9._-]{1,128}")


def workers_prefix(cluster: str) -> str:
    """The prefix that every worker of a cluster writes under.

    Raises:
        ConfigurationError: the name cannot be one segment of a key.
    """
    if not _CLUSTER.fullmatch(cluster):
        raise ConfigurationError(
            f"cluster {cluster!r} is not a name: use 1 to 128 of A-Z a-z 0-9 . _ -",
            phase=Phase.DISCOVER,
        )
    return f"/baton/{cluster}/workers/"


def record_key(cluster: str, peer: PeerId) -> str:
    """The key of one worker: ``/baton/<cluster>/workers/<engine_id>/<rank>``."""
    return f"{workers_prefix(cluster)}{peer.engine_id}/{peer.rank}"


def check_record(record: WorkerRecord) -> None:
    """Check that a record can be published and read back.

    Raises:
        ConfigurationError: names the field that is wrong.
    """
    encode_record(record)


def encode_record(record: WorkerRecord) -> bytes:
    """Encode one record.

    Raises:
        ConfigurationError: a field is wrong, or the result exceeds ``MAX_RECORD_BYTES``.
    """
    document: dict[str, object] = {
        "version": RECORD_VERSION,
        "engine_id": record.peer.engine_id,
        "rank": record.peer.rank,
        "incarnation": record.incarnation,
        "role": record.role,
        "tp_size": record.tp_size,
        "addresses": list(record.addresses),
        "layout_hash": record.layout_hash,
        "started_at_s": record.started_at_s,
    }
    if record.http_url:
        document["http_url"] = record.http_url
    try:
        _from_document(document)
    except ProtocolError as error:
        raise ConfigurationError(
            f"this worker's record cannot be published: {error.message}",
            phase=Phase.DISCOVER,
            peer=error.peer,
        ) from None
    data = json.dumps(document, separators=(",", ":")).encode()
    if len(data) > MAX_RECORD_BYTES:
        raise ConfigurationError(
            f"this worker's record is {len(data)} bytes; {MAX_RECORD_BYTES} are allowed",
            phase=Phase.DISCOVER,
            peer=str(record.peer),
        )
    return data


def decode_record(data: bytes, *, key: str = "") -> WorkerRecord:
    """Decode and check one record that came from outside.

    Args:
        key: the key it was found under; if given, the record must be that worker's.

    Raises:
        ProtocolError: too large, not JSON, another version, a wrong field, or another's key.
    """
    if len(data) > MAX_RECORD_BYTES:
        _refuse(f"record of {len(data)} bytes; {MAX_RECORD_BYTES} are allowed", key)
    try:
        document = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        _refuse(f"record is not JSON ({error})", key)
    record = _from_document(document, key)
    if key and not key.endswith(f"/{record.peer.engine_id}/{record.peer.rank}"):
        _refuse(f"record is of {record.peer} but lies under another worker's key", key)
    return record


def _from_document(document: object, key: str = "") -> WorkerRecord:
    if not isinstance(document, dict):
        _refuse("record is not a JSON object", key)
    version = document.get("version")
    if type(version) is not int or version != RECORD_VERSION:
        _refuse(f"record version {version!r:.40}; this Baton reads {RECORD_VERSION}", key)
    peer = PeerId(
        engine_id=_text(document, "engine_id", key, segment=True),
        rank=_integer(document, "rank", key, low=0),
    )
    return WorkerRecord(
        peer=peer,
        incarnation=_text(document, "incarnation", key, empty=True),
        role=_text(document, "role", key),
        tp_size=_integer(document, "tp_size", key, low=1),
        addresses=_addresses(document, key),
        layout_hash=_text(document, "layout_hash", key, empty=True),
        started_at_s=_seconds(document, "started_at_s", key),
        http_url=_http_url(document, key),
    )


def _text(
    document: dict[str, object], name: str, key: str, *, empty: bool = False, segment: bool = False
) -> str:
    value = document.get(name)
    if not isinstance(value, str) or len(value) > MAX_TEXT_CHARS or not value.isprintable():
        _refuse(f"{name} is not a printable string of up to {MAX_TEXT_CHARS} characters", key)
    if not value and not empty:
        _refuse(f"{name} is empty", key)
    if segment and ("/" in value or " " in value):
        _refuse(f"{name} {value!r:.80} contains a slash or a blank", key)
    return value


def _integer(document: dict[str, object], name: str, key: str, *, low: int) -> int:
    value = document.get(name)
    if type(value) is not int or not low <= value <= MAX_RANK:
        _refuse(f"{name} is not an integer of {low} to {MAX_RANK}", key)
    return value


def _seconds(document: dict[str, object], name: str, key: str) -> float:
    value = document.get(name)
    # The bound keeps an integer of thousands of digits from overflowing float().
    if type(value) not in (int, float) or not isinstance(value, int | float):
        _refuse(f"{name} is not a number", key)
    if not 0 <= value < 1e15 or not math.isfinite(value):
        _refuse(f"{name} is not a Unix time in seconds", key)
    return float(value)


def _addresses(document: dict[str, object], key: str) -> tuple[str, ...]:
    value = document.get("addresses")
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_ADDRESSES:
        _refuse(f"addresses is not a list of 1 to {MAX_ADDRESSES} addresses", key)
    for address in value:
        if (
            not isinstance(address, str)
            or len(address) > MAX_TEXT_CHARS
            or not address.isprintable()
            or not _ADDRESS.fullmatch(address)
        ):
            _refuse(f"address {address!r:.80} is not of the form scheme://where", key)
    return tuple(value)


def _http_url(document: dict[str, object], key: str) -> str:
    if "http_url" not in document:
        return ""
    url = _text(document, "http_url", key, empty=True)
    if url and not is_http_url(url):
        _refuse(f"http_url {url!r:.80} is not of the form http://host:port", key)
    return url


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _refuse(message: str, key: str) -> NoReturn:
    raise ProtocolError(message, phase=Phase.DISCOVER, peer=key)
