"""The parts of RDMA that need no device: keys of memory, what the two ends say, which address."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.errors import ConfigurationError, ProtocolError, RetryableError, TransportUnavailable
from transfer.spans import total_bytes
from transfer.transports.rdma.completion import Status, error_of
from transfer.transports.rdma.handshake import (
    End,
    decode_answer,
    decode_request,
    encode_answer,
    encode_request,
)
from transfer.transports.rdma.keys import KeyMap, cut_at_keys
from transfer.transports.rdma.local_end import needs_gid
from transfer.transports.rdma.rails import (
    Wanted,
    choose_gid,
    choose_port,
    gid_index_wanted,
    parse_devices,
)
from transfer.transports.rdma.verbs import binding
from transfer.transports.rdma.verbs.port import GID_IB, GID_ROCE_V1, GID_ROCE_V2, Gid, Port
from transfer.types import ReadPlan, SpanArray

REGIONS = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), max_size=6)
ROWS = st.lists(st.tuples(st.integers(1, 80), st.integers(1, 25)), min_size=1, max_size=6)


def spans(rows: list[tuple[int, int]]) -> SpanArray:
    return np.array(rows, dtype=np.uint64).reshape(-1, 2)


def key_map(regions: list[tuple[int, int]]) -> KeyMap:
    """Region n has key n on the first device and 100 + n on the second, which call its first byte
    1000 times n."""
    return KeyMap.of(
        (
            (at, size, 1000 * number, (number, 100 + number))
            for number, (at, size) in enumerate(regions)
        ),
        2,
    )


@given(REGIONS, ROWS)
def test_cover_is_every_byte(regions: list[tuple[int, int]], rows: list[tuple[int, int]]) -> None:
    known = {byte for at, size in regions for byte in range(at, at + size)}
    wanted = {byte for at, size in rows for byte in range(at, at + size)}
    assert key_map(regions).cover(spans(rows)) is (wanted <= known)


@given(REGIONS.filter(bool), REGIONS.filter(bool), st.data())
def test_rows_are_cut_where_keys_change(
    ours: list[tuple[int, int]], theirs: list[tuple[int, int]], data: st.DataObject
) -> None:
    local, remote = key_map(ours), key_map(theirs)
    rows: list[tuple[int, int, int]] = data.draw(
        st.lists(
            st.tuples(st.integers(1, 80), st.integers(1, 80), st.integers(1, 25)).filter(
                lambda row: (
                    local.cover(spans([(row[0], row[2])]))
                    and remote.cover(spans([(row[1], row[2])]))
                )
            ),
            max_size=4,
        )
    )
    plan = ReadPlan(
        spans([(at, size) for at, _, size in rows]), spans([(at, size) for _, at, size in rows])
    )
    cut = cut_at_keys(plan, local, remote)
    moves = [(to + byte, since + byte) for to, since, size in rows for byte in range(size)]
    assert moves == [
        (int(to) + byte, int(since) + byte)
        for (to, size), (since, _) in zip(cut.local, cut.remote, strict=True)
        for byte in range(int(size))
    ]
    assert total_bytes(cut.local) == total_bytes(cut.remote)
    for keys, regions, side in ((local, ours, cut.local), (remote, theirs, cut.remote)):
        for (at, size), row in zip(side.tolist(), keys.row_of(side[:, 0]).tolist(), strict=True):
            region_at, region_size = regions[int(keys.keys[row, 0])]
            assert region_at <= at
            assert at + size <= region_at + region_size


@given(REGIONS.filter(bool), ROWS)
def test_only_what_is_touched_is_told(
    regions: list[tuple[int, int]], rows: list[tuple[int, int]]
) -> None:
    keys = key_map(regions)
    told = KeyMap.decode(keys.within(spans(rows)).encode())
    touched = [
        (start, end)
        for start, end in zip(keys.starts.tolist(), keys.ends.tolist(), strict=True)
        if any(at < end and start < at + size for at, size in rows)
    ]
    assert list(zip(told.starts.tolist(), told.ends.tolist(), strict=True)) == touched
    if keys.cover(spans(rows)):
        assert told.cover(spans(rows))


@given(REGIONS.filter(bool))
def test_devices_count_from_the_base_of_a_region(regions: list[tuple[int, int]]) -> None:
    keys = key_map(regions)
    told = KeyMap.decode(keys.encode())
    for start, end in zip(keys.starts.tolist(), keys.ends.tolist(), strict=True):
        addresses = np.arange(start, end, dtype=np.uint64)
        number = int(keys.keys[keys.row_of(addresses[:1])[0], 0])
        called = (addresses - np.uint64(regions[number][0]) + np.uint64(1000 * number)).tolist()
        assert keys.device_addresses(addresses).tolist() == called
        assert told.device_addresses(addresses).tolist() == called


def test_keys_told_in_parts() -> None:
    keys = key_map([(10, 5), (20, 5), (30, 5)])
    parts = [keys.within(spans([(at, 1)])) for at in (30, 10, 11)]
    joined = KeyMap.joined(parts)
    assert joined.starts.tolist() == [10, 30]
    assert joined.keys.tolist() == [[0, 100], [2, 102]]
    assert joined.bases.tolist() == [0, 2000]
    with pytest.raises(ProtocolError):
        KeyMap.joined([])


@given(st.binary(max_size=200))
def test_garbage_is_no_message(data: bytes) -> None:
    for decode in (KeyMap.decode, decode_request):
        with contextlib.suppress(ProtocolError):
            decode(data)


def test_keys_out_of_order_are_refused() -> None:
    keys = key_map([(10, 5), (20, 5)])
    wrong = replace(keys, starts=keys.starts[::-1].copy(), ends=keys.ends[::-1].copy())
    with pytest.raises(ProtocolError, match="order"):
        KeyMap.decode(wrong.encode())


END = End(rail=1, ethernet=True, number=17, psn=99, lid=0, mtu=5, reads=16, gid=bytes(range(16)))


def test_ends_round_trip() -> None:
    ends = [END, replace(END, ethernet=False, lid=9)]
    assert decode_request(encode_request(ends, [3, 4])) == (ends, [3, 4])
    assert decode_answer(encode_answer(ends), 2) == ends
    with pytest.raises(ProtocolError, match="in answer to 1"):
        decode_answer(encode_answer(ends), 1)


def test_pairs_of_two_devices_have_two_names() -> None:
    names = {replace(END, rail=rail, number=17).name for rail in range(3)}
    assert len(names) == 3
    assert decode_request(encode_request([], sorted(names))) == ([], sorted(names))


@pytest.mark.parametrize(
    "wrong", [{"rail": 256}, {"number": 1 << 24}, {"mtu": 0}, {"mtu": 6}, {"reads": 0}]
)
def test_ends_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ProtocolError, match="range"):
        decode_request(encode_request([replace(END, **wrong)], ()))  # type: ignore[arg-type]


def test_device_lists() -> None:
    assert parse_devices("") == []
    assert parse_devices("mlx5_0, mlx5_1:2,") == [Wanted("mlx5_0", 0), Wanted("mlx5_1", 2)]
    for wrong in (":1", "a:0", "a:b", "a:1:2", "a:999"):
        with pytest.raises(ConfigurationError, match="rdma_device"):
            parse_devices(wrong)


def test_whose_gid_index_counts() -> None:
    assert gid_index_wanted(-1, {}) == -1
    assert gid_index_wanted(-1, {"MC_GID_INDEX": "3"}) == 3
    assert gid_index_wanted(5, {"MC_GID_INDEX": "3"}) == 5
    with pytest.raises(ConfigurationError, match="MC_GID_INDEX"):
        gid_index_wanted(-1, {"MC_GID_INDEX": "three"})


LINK_LOCAL = b"\xfe\x80" + bytes(13) + b"\x01"
IPV4 = bytes(10) + b"\xff\xff" + bytes([192, 0, 2, 1])
TABLE = (
    Gid(0, GID_ROCE_V1, LINK_LOCAL),
    Gid(1, GID_ROCE_V2, LINK_LOCAL),
    Gid(2, GID_ROCE_V1, IPV4),
    Gid(3, GID_ROCE_V2, IPV4),
    Gid(4, GID_ROCE_V2, bytes(16)),
)
PORT = Port(1, True, True, 0, 5, 1 << 30, TABLE)


def test_the_best_address() -> None:
    assert choose_gid(PORT, -1) == TABLE[3]
    assert choose_gid(replace(PORT, gids=TABLE[:2]), -1) == TABLE[1]
    assert choose_gid(PORT, 2) == TABLE[2]
    assert choose_gid(PORT, 9) is None
    assert choose_gid(replace(PORT, gids=()), -1) is None
    assert choose_gid(replace(PORT, ethernet=False), -1) == TABLE[0]


def test_the_best_port() -> None:
    down = replace(PORT, active=False)
    poor = replace(PORT, number=2, gids=TABLE[:1])
    good = replace(PORT, number=3)
    assert choose_port([down, poor, good], 0, -1) == (good, TABLE[3])
    assert choose_port([down, poor, good], 2, -1) == (poor, TABLE[0])
    assert choose_port([down], 0, -1) is None
    assert choose_port([poor], 1, -1) is None


def test_when_packets_carry_global_addresses() -> None:
    gid = bytes.fromhex("fec0000000000001") + bytes(8)
    near = End(0, False, 7, 0, lid=12, mtu=5, reads=16, gid=gid[:8] + b"\1" * 8)
    far = replace(near, gid=bytes.fromhex("fec0000000000002") + b"\1" * 8)
    infiniband, roce = replace(PORT, ethernet=False), PORT
    own = Gid(0, GID_IB, gid)
    assert not needs_gid(infiniband, own, near)
    assert needs_gid(infiniband, own, far)
    assert needs_gid(infiniband, own, replace(near, lid=0))
    assert needs_gid(roce, own, near)


def test_without_pyverbs_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pyverbs", None)  # what Python takes for "not there"
    monkeypatch.setattr(binding, "_SYSTEM_PACKAGES", str(tmp_path))
    with pytest.raises(TransportUnavailable, match=r"python3-pyverbs, or baton-serve\[rdma\]"):
        binding.load.__wrapped__()


@pytest.mark.parametrize("status", [*Status, 250])
def test_every_status_has_an_error(status: int) -> None:
    error = error_of(status, "mlx5_0", "owner/0", "f" * 32)
    assert "mlx5_0" in error.message
    retried = {"RETRY_EXC_ERR", "RNR_RETRY_EXC_ERR", "WR_FLUSH_ERR", "REM_OP_ERR"}
    if status in Status.__members__.values():
        if Status(status).name in retried:
            assert isinstance(error, RetryableError)
        elif "ACCESS" in Status(status).name or "PROT" in Status(status).name:
            assert not isinstance(error, RetryableError)
