"""TLS on the TCP port: who gets in, and what is said to who does not."""

from __future__ import annotations

import errno
import logging
import os
import socket
import ssl
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.network.stalling_proxy import StallingProxy
from tests.support.processes.waiting import SLOWNESS, wait_until
from tests.support.servers.certificates import Authority, TlsFiles
from tests.support.transfers.cases import TransferCase
from tests.support.transfers.engines import (
    Buffer,
    Directory,
    Pair,
    engine_pair,
    fails,
    live_offers,
    make_engine,
    succeeds,
)
from transfer.addressing import parse_address
from transfer.errors import ConfigurationError, TlsRefused
from transfer.settings import TransferSettings
from transfer.transports import process_memory
from transfer.transports.tcp.streams.bounce import BounceBuffer
from transfer.transports.tcp.streams.socket_options import SocketOptions
from transfer.transports.tcp.streams.tls import TlsContexts
from transfer.transports.tcp.streams.tls_stream import InTheClear, TlsStream
from transfer.types import SpanArray


@pytest.fixture
def case(tls: TlsFiles) -> TransferCase:
    """Only TCP with TLS."""
    return TransferCase("tcp+tls", {"transports": ["tcp"], **tls.settings()})


def read_with(pair: Pair, settings: TransferSettings) -> Pair:
    """The pair's owner with a reader of other settings, which is not started."""
    local = Buffer(64, fill=0)
    reader = pair.engine("other", settings=settings)
    reader.register(local.address, local.bytes.nbytes)
    return pair.with_reader(reader, local)


def is_refused(
    pair: Pair, settings: TransferSettings, match: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A reader with ``settings`` gets nothing, and both ends say why."""
    caplog.set_level(logging.WARNING, "transfer")
    other = read_with(pair, settings)
    with other.reader:
        fails(other.read(pair.offer()), TlsRefused, match)
    assert not other.local.bytes.any()
    assert wait_until(lambda: any("closed" in one.getMessage() for one in caplog.records))
    succeeds(pair.read(pair.offer()))


def test_a_plain_reader_of_a_tls_port(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    is_refused(pair, TransferSettings(), "needs TLS: tls_ca", caplog)


def test_a_tls_reader_of_a_plain_port(case: TransferCase, caplog: pytest.LogCaptureFixture) -> None:
    with engine_pair(settings=TransferSettings(transports=("tcp",))) as plain:
        is_refused(plain, case.settings(), "does the other end speak it", caplog)


def test_a_reader_of_another_authority(
    pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = Authority(tmp_path, "foreign").issue("thief", "127.0.0.1")
    is_refused(pair, TransferSettings(**foreign.settings()), "not accepted", caplog)


def test_an_owner_does_not_accept_what_its_reader_shows(
    pair: Pair, tls: TlsFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = Authority(tmp_path, "foreign").issue("thief", "127.0.0.1")
    shown = {**foreign.settings(), "tls_ca": tls.tls_ca}
    is_refused(pair, TransferSettings(**shown), "trust ours.*UNKNOWN_CA", caplog)


def test_a_reader_that_shows_nothing(pair: Pair, tls: TlsFiles) -> None:
    context = ssl.create_default_context(cafile=tls.tls_ca)
    address = parse_address(pair.owner.addresses[0])
    with (
        socket.create_connection((address.host, address.port), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname=address.host) as sock,
        pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"),
    ):
        sock.recv(1)


def test_certificates_that_are_over(
    authority: Authority, tls: TlsFiles, caplog: pytest.LogCaptureFixture
) -> None:
    over = authority.issue("over", "127.0.0.1", days=0)
    with engine_pair(settings=TransferSettings(**tls.settings())) as pair:
        is_refused(pair, TransferSettings(**over.settings()), "trust ours.*EXPIRED", caplog)


def test_old_versions_of_tls(pair: Pair, tls: TlsFiles) -> None:
    context = ssl.create_default_context(cafile=tls.tls_ca)
    context.load_cert_chain(tls.tls_cert, tls.tls_key)
    context.set_ciphers("ALL:@SECLEVEL=0")
    for bound in ("minimum_version", "maximum_version"):
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            setattr(context, bound, ssl.TLSVersion.TLSv1_1)
    address = parse_address(pair.owner.addresses[0])
    with (
        socket.create_connection((address.host, address.port), timeout=5) as plain,
        pytest.raises(ssl.SSLError),
    ):
        context.wrap_socket(plain, server_hostname=address.host)


def test_names_are_checked(authority: Authority) -> None:
    elsewhere = authority.issue("elsewhere", "10.9.9.9", "gpu-7.example")
    strict = TransferSettings(**elsewhere.settings())
    with engine_pair(settings=strict) as pair:
        fails(pair.read(pair.offer()), TlsRefused, "mismatch.*127.0.0.1")
    named = replace(strict, transports=("tcp",), tls_server_name="gpu-7.example")
    with engine_pair(settings=named) as pair:
        succeeds(pair.read(pair.offer()))
        assert pair.local_is_remote()


def test_bytes_on_the_way_cannot_be_read_nor_changed(case: TransferCase) -> None:
    with engine_pair(64, 4096, settings=case.settings()) as pair:
        secret = b"what a passer-by must not see"
        pair.remote.bytes[: len(secret)] = np.frombuffer(secret, dtype=np.uint8)
        with ChangingProxy(pair.owner.addresses[0]) as proxy:
            pair.directory.move(pair.owner_id, proxy.address)
            succeeds(pair.read(pair.offer()))
            assert len(proxy.seen) > pair.remote.bytes.nbytes
            assert secret not in proxy.seen
            proxy.change = True
            proof = pair.offer()
            fails(pair.read(proof), TlsRefused)
            assert [one.offer.handoff_id for one in live_offers(pair.owner)] == [proof.handoff_id]


class ChangingProxy(StallingProxy):
    """Keeps what passes, and flips a bit of every long piece from the owner when told to."""

    def __init__(self, target: str) -> None:
        self.seen = bytearray()
        self.change = False
        super().__init__(target, 1 << 40)

    def _passed_first(self, sink: socket.socket, data: bytes) -> bytes:
        self.seen += data
        if self.change and len(data) > 1000:
            data = data[:500] + bytes([data[500] ^ 1]) + data[501:]
        return super()._passed_first(sink, data)


def test_strangers_that_never_shake_hands_are_cut_off(case: TransferCase) -> None:
    with engine_pair(settings=case.settings(stall_timeout_s=0.2)) as pair:
        address = parse_address(pair.owner.addresses[0])
        for data in (b"", b"B", b"\x16\x03\x01", os.urandom(100)):
            with socket.create_connection((address.host, address.port), timeout=5) as sock:
                sock.sendall(data)
                begun = time.monotonic()
                while _still_open(sock):
                    pass
                assert time.monotonic() - begun < 3
        succeeds(pair.read(pair.offer()))


def _still_open(sock: socket.socket) -> bool:
    try:
        return bool(sock.recv(1000))
    except ConnectionResetError:
        return False


def test_an_owner_that_says_nothing_costs_its_reader_no_more_than_the_deadline(
    case: TransferCase,
) -> None:
    with (
        engine_pair(settings=case.settings(connect_timeout_s=0.2)) as pair,
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        pair.directory.move(pair.owner_id, f"tcp://127.0.0.1:{silent.getsockname()[1]}")
        handle = pair.read(pair.offer(), deadline_s=2)
        assert handle.wait(3)
        assert handle.error is not None
        assert "in time" in str(handle.error)


def test_a_connection_that_is_not_answered_is_tried_once_more(case: TransferCase) -> None:
    with (
        engine_pair(settings=case.settings(connect_timeout_s=0.5 * SLOWNESS)) as pair,
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        (address, *_) = pair.owner.addresses
        pair.directory.move(pair.owner_id, f"tcp://127.0.0.1:{silent.getsockname()[1]}")
        handle = pair.read(pair.offer())
        with silent.accept()[0]:
            pair.directory.move(pair.owner_id, address)
            succeeds(handle)
        assert pair.local_is_remote()


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS])
def test_where_the_kernel_copies_nothing_bytes_go_on_just_so(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(pid: int, local: SpanArray, remote: SpanArray) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(process_memory, "read_process_memory", refuse)
    succeeds(pair.read(pair.offer()))
    assert pair.local_is_remote()


def test_memory_that_is_not_there_is_an_error_and_no_crash() -> None:
    gone = np.array([[4096, 100]], dtype=np.uint64)
    here = Buffer(1).spans([0])
    bounce = BounceBuffer(8192)
    for spans in (gone, np.concatenate((here, gone))):
        with pytest.raises(OSError, match="address"):
            bounce.gather(spans)
        with pytest.raises(OSError, match="address"):
            bounce.scatter(spans)


@pytest.mark.parametrize("wrong", ["missing", "empty", "swapped", "locked"])
def test_files_that_cannot_be_used(
    authority: Authority, tls: TlsFiles, tmp_path: Path, wrong: str
) -> None:
    files = tls.settings()
    if wrong == "missing":
        files["tls_key"] = str(tmp_path / "none.pem")
    elif wrong == "empty":
        files["tls_ca"] = str(tmp_path / "empty.pem")
        Path(files["tls_ca"]).touch()
    elif wrong == "swapped":
        files["tls_cert"], files["tls_key"] = files["tls_key"], files["tls_cert"]
    else:
        files.update(authority.issue("locked", "127.0.0.1", password=b"x").settings())
    result: list[str] = []

    def make() -> None:
        try:
            make_engine(Directory(), "third", settings=TransferSettings(**files))
        except ConfigurationError as error:
            result.append(str(error))

    # In a thread, as asking for a password on a terminal would never return.
    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    thread.join(5)
    assert result
    assert "tls_" in result[0]
    assert "PEM" in result[0]


def put(files: TlsFiles, names: tuple[str, ...], into: TlsFiles) -> None:
    """Write some of ``files`` over those that an engine was given."""
    for name in names:
        Path(getattr(into, name)).write_bytes(Path(getattr(files, name)).read_bytes())


WHOLE = ("tls_ca", "tls_cert", "tls_key")


def test_new_connections_use_new_files(tls: TlsFiles, tmp_path: Path) -> None:
    """Of another authority, even; connections that are there go on."""
    used = TlsFiles(*(str(tmp_path / name) for name in WHOLE))
    put(tls, WHOLE, used)
    with engine_pair(settings=TransferSettings(transports=("tcp",), **used.settings())) as pair:
        succeeds(pair.read(pair.offer()))
        other = read_with(pair, pair.settings)
        new = Authority(tmp_path, "new").issue("worker", "127.0.0.1")
        put(new, WHOLE, used)
        succeeds(pair.read(pair.offer()))
        with other.reader:
            succeeds(other.read(pair.offer()))
        assert other.local_is_remote()
        for files, accepted in ((new, True), (tls, False)):
            third = read_with(pair, TransferSettings(transports=("tcp",), **files.settings()))
            with third.reader:
                handle = third.read(pair.offer())
                if accepted:
                    succeeds(handle)
                else:
                    fails(handle, TlsRefused)


@pytest.mark.parametrize("half", [("tls_cert",), ("tls_key",)])
def test_files_that_do_not_fit_together_yet(
    tls: TlsFiles,
    authority: Authority,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    half: tuple[str, ...],
) -> None:
    used = TlsFiles(*(str(tmp_path / name) for name in WHOLE))
    put(tls, WHOLE, used)
    contexts = TlsContexts(TransferSettings(**used.settings()))
    before = contexts.server, contexts.client
    put(authority.issue("next", "127.0.0.1"), half, used)
    assert (contexts.server, contexts.client) == before
    assert (contexts.server, contexts.client) == before
    assert [one.levelname for one in caplog.records] == ["WARNING"]
    Path(used.tls_ca).unlink()
    assert contexts.server is before[0]
    put(authority.issue("next", "127.0.0.1"), WHOLE, used)
    assert contexts.server is not before[0]
    assert contexts.client is not before[1]
    assert contexts.server is contexts.server


def test_files_are_read_once_they_can_be(
    tls: TlsFiles,
    authority: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As when files may be opened again: they themselves have not changed meanwhile."""
    used = TlsFiles(*(str(tmp_path / name) for name in WHOLE))
    put(tls, WHOLE, used)
    contexts = TlsContexts(TransferSettings(**used.settings()))
    before = contexts.server
    put(authority.issue("next", "127.0.0.1"), WHOLE, used)

    def refused(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as unreadable:
        unreadable.setattr(Path, "read_bytes", refused)
        assert [contexts.server, contexts.server] == [before, before]
    assert [one.levelname for one in caplog.records] == ["WARNING"]
    assert contexts.server is not before


def test_a_connection_that_breaks_as_it_is_accepted_is_closed(
    tls: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> bool:
        raise OSError(errno.EINVAL, "the peer is gone")

    monkeypatch.setattr(SocketOptions, "apply", gone)
    contexts = TlsContexts(TransferSettings(**tls.settings()))
    near, far = socket.socketpair()
    with far:
        far.settimeout(2)
        # What was caught holds the frames, and so all that they had.
        with pytest.raises(OSError, match="is gone") as caught:
            TlsStream.accepted(contexts, near, "peer", SocketOptions(), InTheClear(b"", b""))
        assert far.recv(1) == b""
        assert caught.value.errno == errno.EINVAL


FILES = {"tls_ca": "a", "tls_cert": "b", "tls_key": "c"}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"tls_ca": "a"}, "tls_cert"),
        ({"tls_ca": "a", "tls_cert": "b"}, "tls_key"),
        ({"tls_key": "c"}, "tls_ca"),
        ({"tls_server_name": "x"}, "tls_server_name"),
        ({**FILES, "tls_server_name": ".foo"}, "tls_server_name is '.foo'"),
        ({**FILES, "tls_server_name": "a\0b"}, "tls_server_name is 'a"),
        ({"tls_ca": 5}, "tls_ca"),
        ({"tls_ca": None}, "tls_ca"),
    ],
)
def test_all_or_none_of_the_files(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        TransferSettings(**given)
