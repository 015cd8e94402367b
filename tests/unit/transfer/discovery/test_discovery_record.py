from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.scripted.records import worker_record
from transfer.discovery.record import (
    MAX_RANK,
    MAX_RECORD_BYTES,
    decode_record,
    encode_record,
    record_key,
    workers_prefix,
)
from transfer.errors import ConfigurationError, ProtocolError
from transfer.types import PeerId, WorkerRecord

GOOD: dict[str, Any] = json.loads(encode_record(worker_record()))

texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40)
names = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=40)
records = st.builds(
    WorkerRecord,
    peer=st.builds(PeerId, names, st.integers(0, MAX_RANK)),
    incarnation=texts,
    role=names,
    tp_size=st.integers(1, 64),
    addresses=st.lists(names.map("tcp://{}:1".format), min_size=1, max_size=5).map(tuple),
    layout_hash=texts,
    started_at_s=st.floats(0, 1e12),
    http_url=st.just("") | names.map("http://{}:8100".format),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def test_key_is_the_documented_one() -> None:
    assert record_key("blue", PeerId("engine-a", 3)) == "/baton/blue/workers/engine-a/3"


def test_wire_format_is_the_documented_one() -> None:
    assert GOOD == {
        "version": 1,
        "engine_id": "engine-a",
        "rank": 0,
        "incarnation": "first",
        "role": "prefill",
        "tp_size": 1,
        "addresses": ["tcp://127.0.0.1:7000"],
        "layout_hash": "layout",
        "started_at_s": 1_700_000_000.5,
    }


@given(records)
def test_what_is_encoded_is_decoded(record: WorkerRecord) -> None:
    key = record_key("default", record.peer)
    assert decode_record(encode_record(record), key=key) == record


@given(st.binary(max_size=300))
def test_any_bytes_are_a_record_or_a_typed_error(data: bytes) -> None:
    try:
        record = decode_record(data)
    except ProtocolError:
        return
    assert encode_record(record)


@given(st.sampled_from(sorted(GOOD)), json_values)
def test_any_value_of_a_field_is_a_record_or_a_typed_error(field: str, value: object) -> None:
    data = json.dumps({**GOOD, field: value}).encode()
    try:
        record = decode_record(data)
    except ProtocolError:
        return
    assert decode_record(encode_record(record)) == record


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[" * MAX_RECORD_BYTES,
        b"9" * 5000,
        b"null",
        b"[]",
        b'{"version": NaN}',
        json.dumps({**GOOD, "started_at_s": 10**400}).encode(),
        json.dumps(GOOD).replace("1700000000.5", "1e999").encode(),
    ],
)
def test_malformed_data_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_record(data)


@pytest.mark.parametrize("version", [0, 2, "1", 1.0, True, None])
def test_another_version_is_refused(version: object) -> None:
    with pytest.raises(ProtocolError, match=r"record version .* reads 1"):
        decode_record(json.dumps({**GOOD, "version": version}).encode())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("engine_id", ""),
        ("engine_id", "a/b"),
        ("engine_id", "a b"),
        ("engine_id", 7),
        ("engine_id", "\ud800"),
        ("engine_id", "x" * 513),
        ("rank", -1),
        ("rank", True),
        ("rank", 1.0),
        ("rank", MAX_RANK + 1),
        ("incarnation", None),
        ("incarnation", "a\nb"),
        ("role", ""),
        ("tp_size", 0),
        ("addresses", []),
        ("addresses", "tcp://h:1"),
        ("addresses", [1]),
        ("addresses", ["h:1"]),
        ("addresses", ["tcp://h:1"] * 65),
        ("layout_hash", 3),
        ("http_url", None),
        ("http_url", "10.0.0.1:8100"),
        ("http_url", "ftp://10.0.0.1"),
        ("http_url", "http://10.0.0.1:8100/?a=b"),
        ("http_url", "http://user@10.0.0.1"),
        ("started_at_s", True),
        ("started_at_s", -1),
        ("started_at_s", "now"),
    ],
)
def test_a_wrong_field_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ProtocolError, match="address" if field == "addresses" else field):
        decode_record(json.dumps({**GOOD, field: value}).encode())


@pytest.mark.parametrize("field", sorted(GOOD))
def test_a_missing_field_is_refused(field: str) -> None:
    with pytest.raises(ProtocolError):
        decode_record(json.dumps({k: v for k, v in GOOD.items() if k != field}).encode())


def test_fields_of_the_future_are_ignored() -> None:
    assert decode_record(json.dumps({**GOOD, "zone": "a"}).encode()) == worker_record()


def test_an_oversized_record_is_refused_on_both_sides() -> None:
    data = json.dumps({**GOOD, "more": "x" * MAX_RECORD_BYTES}).encode()
    with pytest.raises(ProtocolError, match="16384 are allowed"):
        decode_record(data)
    long = tuple(f"tcp://{'h' * 400}:{port}" for port in range(64))
    with pytest.raises(ConfigurationError, match="16384 are allowed"):
        encode_record(dataclasses.replace(worker_record(), addresses=long))


def test_a_record_under_another_workers_key_is_refused() -> None:
    key = record_key("default", PeerId("engine-b", 0))
    with pytest.raises(ProtocolError, match="another worker's key") as caught:
        decode_record(encode_record(worker_record("engine-a")), key=key)
    assert caught.value.peer == key


def test_an_unpublishable_record_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="engine_id"):
        encode_record(worker_record("a/b"))


@pytest.mark.parametrize("cluster", ["", "a/b", "a b", "x" * 129])
def test_a_cluster_name_is_one_key_segment(cluster: str) -> None:
    with pytest.raises(ConfigurationError, match="cluster"):
        workers_prefix(cluster)
