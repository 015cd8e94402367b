"""How a read goes over TCP: its streams, what is asked for at once, and what is used again."""

from __future__ import annotations

import logging
import socket
import threading
from contextlib import ExitStack, closing
from io import BufferedReader

import numpy as np
import pytest

from tests.support.network.raw_connections import Message, welcome
from tests.support.processes.waiting import wait_until
from tests.support.transfers.engines import Buffer, engine_pair, fails, succeeds
from transfer.engine.handoff import Offer
from transfer.errors import PeerUnreachable, Phase
from transfer.settings import TransferSettings
from transfer.transports.base import ReadSession
from transfer.transports.interrupt import Interrupt
from transfer.transports.tcp.dialer import Dialer
from transfer.transports.tcp.transport import TcpTransport
from transfer.transports.tcp.wire import protocol as wire
from transfer.transports.tcp.wire.protocol import MessageType
from transfer.types import Credentials, PeerId, PeerInfo, ReaderProcess, ReadPlan

BLOCK_BYTES = 64 << 10
NUM_BLOCKS = 256
PROOF = Credentials("f" * 32, "owner-1", 1, "secret", "reader")


def tcp(**tuning: object) -> TransferSettings:
    return TransferSettings(transports=("tcp",), **tuning)  # type: ignore[arg-type]


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that were connected to, in order."""
    connect, addresses = Dialer.connect, []

    def noted(
        dialer: Dialer, address: str, reader: ReaderProcess, proof: Credentials, timeout_s: float
    ) -> object:
        addresses.append(address)
        return connect(dialer, address, reader, proof, timeout_s)

    monkeypatch.setattr(Dialer, "connect", noted)
    return addresses


@pytest.mark.parametrize("streams", [1, 2, 5])
def test_a_read_goes_over_so_many_streams_which_the_next_one_uses_again(
    streams: int, dialled: list[str]
) -> None:
    settings = tcp(streams_per_peer=streams)
    with engine_pair(NUM_BLOCKS, BLOCK_BYTES, settings=settings) as pair:
        for _ in range(3):
            succeeds(pair.read(pair.offer()))
        assert len(dialled) == 1 + streams
        assert len(serving()) == 1 + streams


def serving() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("baton-serve")]


def test_readers_that_wait_for_an_offer_keep_their_streams(
    dialled: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "transfer")
    with engine_pair(NUM_BLOCKS, BLOCK_BYTES, settings=tcp(streams_per_peer=2)) as pair:
        grant = pair.remote.spans(range(NUM_BLOCKS))
        pair.owner.offer(
            Offer(PROOF.handoff_id, PROOF.fence, PROOF.secret, grant, 1, 30.0, ready=False)
        )
        handle = pair.read(PROOF)
        assert wait_until(lambda: caplog.text.count("refused READ") >= 20)
        assert pair.owner.make_ready(PROOF.handoff_id)
        succeeds(handle)
        assert pair.local_is_remote()
        assert len(dialled) == 1 + 2


def test_a_stream_asks_for_a_slice_before_the_one_before_has_come() -> None:
    asked: list[int] = []

    def own(server: socket.socket) -> None:
        for _ in range(2):  # the connection for control, and a stream
            sock = accepted.enter_context(server.accept()[0])
            stream = accepted.enter_context(sock.makefile("rb"))
            answer, _ = welcome(info, take(stream).body, PROOF.secret)
            sock.sendall(answer)
            assert take(stream).header.type is MessageType.PROVE
        asked.extend(take(stream).header.request_id for _ in range(2))

    def take(stream: BufferedReader) -> Message:
        header = wire.decode_header(stream.read(wire.HEADER.size))
        return Message(header, stream.read(header.body_bytes))

    info = PeerInfo(PeerId("owner", 0), "owner-1", "same", b"")
    local = Buffer(NUM_BLOCKS, BLOCK_BYTES, fill=0)
    spans = local.spans(range(NUM_BLOCKS))
    process = ReaderProcess(PeerId("reader", 0), "reader-1")
    transport = TcpTransport(tcp(streams_per_peer=1, slice_bytes=1 << 20))
    with ExitStack() as accepted, socket.create_server(("127.0.0.1", 0)) as server:
        owner = threading.Thread(target=own, args=(server,))
        owner.start()
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with closing(transport.open_control(address, process, PROOF, 5.0)) as control:
            data = transport.open_data(address, process, control)
            interrupt = Interrupt()
            with closing(data), data.open_read(PROOF, ReadPlan(spans, spans), 5.0) as session:
                reader = threading.Thread(target=runs_until_stopped, args=(session, interrupt))
                reader.start()
                owner.join(5.0)
                interrupt.set(PeerUnreachable("enough", phase=Phase.READ))
                reader.join(5.0)
    assert asked == [1, 2]


def runs_until_stopped(session: ReadSession, interrupt: Interrupt) -> None:
    with pytest.raises(PeerUnreachable, match="enough"):
        session.run(interrupt)


def test_requests_of_many_rows_fit_small_buffers() -> None:
    """The owner takes nothing in while it sends, so a request that does not fit waits for it."""
    rows, settings = 10_000, tcp(socket_buffer_bytes=8192)
    with engine_pair(rows, 64, settings=settings) as pair:
        order = np.random.default_rng(1).permutation(rows)
        succeeds(
            pair.read(pair.offer(), ReadPlan(pair.local.spans(order), pair.remote.spans(order)))
        )
        assert pair.local_is_remote()


def test_an_owner_without_a_thread_to_spare_turns_readers_away_and_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = threading.Thread.start

    def none_for_serving(thread: threading.Thread) -> None:
        if thread.name.startswith("baton-serve"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with engine_pair(settings=tcp()) as pair:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", none_for_serving)
            fails(pair.read(pair.offer()), PeerUnreachable, "can't start new thread")
        succeeds(pair.read(pair.offer()))


def test_a_reader_without_a_thread_to_spare_reads_on_the_one_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = threading.Thread.start

    def none_to_help(thread: threading.Thread) -> None:
        if thread.name == "baton-read":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", none_to_help)
    with engine_pair(NUM_BLOCKS, BLOCK_BYTES, settings=tcp(streams_per_peer=3)) as pair:
        for _ in range(2):
            succeeds(pair.read(pair.offer()))
            assert pair.local_is_remote()
            pair.local.bytes.fill(0)
