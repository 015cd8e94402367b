"""Both ends prove that they know a ticket's secret, which never crosses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.network import raw_connections
from tests.support.network.meddling_relay import MeddlingRelay, forged, greet_only
from tests.support.network.raw_connections import Message, RawReader, receive, until_closed
from tests.support.processes.waiting import wait_until
from tests.support.transfers.cases import TransferCase
from tests.support.transfers.engines import (
    Pair,
    engine_pair,
    fails,
    live_offers,
    never_planned,
    succeeds,
    take_ended,
)
from transfer.engine.handle import TransferHandle
from transfer.errors import HandoffRefused, OwnerUnproven, ProtocolError
from transfer.transports.tcp.transport import TcpTransport
from transfer.transports.tcp.wire import protocol as wire
from transfer.transports.tcp.wire.proofs import PROOF_BYTES
from transfer.transports.tcp.wire.protocol import MessageType
from transfer.types import Credentials, PeerId, PeerInfo, ReaderProcess


def read_through(
    pair: Pair, meddle: Callable[[Message], bytes | Message | None]
) -> tuple[MeddlingRelay, Credentials, TransferHandle]:
    """A read whose every message passes somebody who sits at the owner's address."""
    proof = pair.offer()
    with MeddlingRelay(pair.owner.addresses[0], meddle, pair.settings) as relay:
        pair.directory.move(pair.owner_id, relay.address)
        handle = pair.read(proof)
        assert handle.wait(20)
    pair.directory.move(pair.owner_id, pair.owner.addresses[0])
    return relay, proof, handle


def is_as_if_nothing_had_been(pair: Pair, proof: Credentials, relay: MeddlingRelay) -> None:
    """The hand-off was released by nobody, its secret is one, and the true owner gives it."""
    assert proof.secret.encode() not in relay.seen
    assert [offer.readers_left for offer in live_offers(pair.owner)] == [1]
    pair.local.bytes[:] = 0
    succeeds(pair.read(proof))
    assert pair.local_is_remote()


def test_an_owner_that_repeats_what_any_stranger_is_told(pair: Pair) -> None:
    relay, proof, handle = read_through(pair, greet_only)
    fails(handle, OwnerUnproven, "has not proved")
    assert proof.handoff_id.encode() in relay.seen
    is_as_if_nothing_had_been(pair, proof, relay)


def test_the_secret_never_crosses(pair: Pair) -> None:
    proofs = {name: pair.offer() for name in ("read", "renewed", "forfeited", "aborted")}
    with MeddlingRelay(pair.owner.addresses[0], settings=pair.settings) as relay:
        pair.directory.move(pair.owner_id, relay.address)
        succeeds(pair.read(proofs["read"]))
        pair.reader.submit_renew(pair.owner_id, [proofs["renewed"]])
        pair.reader.submit_release(pair.owner_id, proofs["forfeited"], used=False)
        control = TcpTransport(pair.settings).open_control(
            relay.address, ReaderProcess(PeerId("proxy", 0), "p"), proofs["aborted"], 5.0
        )
        control.abort(proofs["aborted"], "given up", 5.0)
        control.close()
        assert wait_until(lambda: len(live_offers(pair.owner)) == 1)
        assert wait_until(lambda: MessageType.RENEWED in [one.header.type for one in relay.answers])
    for proof in proofs.values():
        assert proof.secret.encode() not in relay.seen
        assert proof.handoff_id.encode() in relay.seen
    assert pair.local_is_remote()
    assert {one.handoff_id for one in take_ended(pair.owner)} == {
        proofs[name].handoff_id for name in ("read", "forfeited", "aborted")
    }


def an_old_answer(pair: Pair) -> bytes:
    """The proof of a confirmation that was overheard."""
    relay, _, handle = read_through(pair, lambda _: None)
    succeeds(handle)
    take_ended(pair.owner)
    (proof,) = [one.body for one in relay.answers if one.header.type is MessageType.OK][-1:]
    return proof


@pytest.mark.parametrize("how", ["zeros", "overheard", "that of the request"])
def test_a_forged_confirmation_confirms_nothing(pair: Pair, how: str) -> None:
    proof_of_before = an_old_answer(pair) if how == "overheard" else bytes(PROOF_BYTES)

    def forge_the_end(message: Message) -> bytes | None:
        if message.header.type is not MessageType.RELEASE:
            return None
        own = message.body[:PROOF_BYTES]
        return forged(message, own if how == "that of the request" else proof_of_before)

    relay, proof, handle = read_through(pair, forge_the_end)
    fails(handle, OwnerUnproven, "has not proved")
    is_as_if_nothing_had_been(pair, proof, relay)


def test_a_confirmation_without_a_proof_is_none(pair: Pair) -> None:
    def shorten(message: Message) -> bytes | None:
        if message.header.type is not MessageType.RELEASE:
            return None
        return wire.message(MessageType.OK, message.header.request_id)

    relay, proof, handle = read_through(pair, shorten)
    fails(handle, ProtocolError, "no proof")
    is_as_if_nothing_had_been(pair, proof, relay)


def test_a_request_that_is_changed_on_the_way_is_refused(pair: Pair) -> None:
    def say_unused(message: Message) -> Message | None:
        if message.header.type is not MessageType.RELEASE:
            return None
        assert message.body[-1] == 1
        return message._replace(body=message.body[:-1] + b"\0")

    relay, proof, handle = read_through(pair, say_unused)
    fails(handle, HandoffRefused, "wrong secret")
    is_as_if_nothing_had_been(pair, proof, relay)


def test_a_reader_that_does_not_know_the_secret_of_a_further_hand_off(pair: Pair) -> None:
    succeeds(pair.read(pair.offer()))
    proof = pair.offer()
    guess = Credentials(
        proof.handoff_id, proof.incarnation, proof.fence, "0" * 32, proof.reader, proof.share
    )
    fails(pair.read(guess), HandoffRefused, "wrong secret")
    pair.reader.submit_renew(pair.owner_id, [guess])
    pair.reader.submit_release(pair.owner_id, guess, used=False)
    pair.local.bytes[:] = 0
    succeeds(pair.read(proof))
    assert pair.local_is_remote()


def test_renewals_go_on_when_the_first_one_is_of_a_hand_off_nobody_knows(pair: Pair) -> None:
    def left_s() -> float:
        return live_offers(pair.owner)[0].deadline_s - time.monotonic()

    proof = pair.offer(ttl_s=30.0)
    gone = Credentials("f" * 32, "owner-1", 3, "s", "r")
    assert wait_until(lambda: left_s() < 29.5)
    pair.reader.submit_renew(pair.owner_id, [gone, proof])
    assert wait_until(lambda: left_s() > 29.5)


# What follows speaks the protocol itself.


@pytest.fixture
def plain() -> Iterator[Pair]:
    """As ``pair``, over TCP."""
    case = TransferCase("tcp", {"transports": ["tcp"]})
    with engine_pair(settings=case.settings()) as made:
        yield made


@pytest.mark.parametrize("type_", [MessageType.READ, MessageType.RELEASE])
def test_what_was_overheard_is_of_no_use_on_another_connection(
    plain: Pair, type_: MessageType
) -> None:
    """Not even to who has a ticket of his own; and without, he gets no further than PROVE."""
    proof, other = plain.offer(), plain.offer()
    contents = {
        MessageType.READ: wire.encode_read(proof.claim, plain.remote.spans([0])),
        MessageType.RELEASE: wire.encode_release(proof.claim, used=False, read_id=""),
    }
    with RawReader(plain.owner.addresses[0], proof) as honest:
        overheard = honest.request(type_, 1, contents[type_])
        greeting = honest.sent
    with raw_connections.connect(plain.owner.addresses[0]) as sock:
        sock.sendall(greeting + overheard)
        answer = receive(sock)
        assert answer is not None
        assert answer.header.type is MessageType.WELCOME
        assert until_closed(sock) == b""
    with RawReader(plain.owner.addresses[0], other) as thief:
        thief.sock.sendall(overheard)
        _is_refused(thief.receive(), "wrong secret")
    assert [offer.readers_left for offer in live_offers(plain.owner)] == [1, 1]
    assert {offer.state for offer in live_offers(plain.owner)} == {"offered"}


def test_a_request_counts_once_and_under_its_own_id(plain: Pair) -> None:
    proof = plain.offer()
    content = wire.encode_read(proof.claim, plain.remote.spans([0]))
    with RawReader(plain.owner.addresses[0], proof) as reader:
        message = reader.request(MessageType.READ, 5, content)
        reader.sock.sendall(message)
        answer = reader.receive()
        assert answer is not None
        assert answer.body[PROOF_BYTES:] == plain.remote.block(0)
        body = message[wire.HEADER.size :]
        reader.sock.sendall(wire.message(MessageType.READ, 6, body))
        _is_refused(reader.receive(), "wrong secret")
        reader.sock.sendall(wire.message(MessageType.BEGIN, 7, body))
        _is_refused(reader.receive(), "wrong secret")
        reader.sock.sendall(message)
        assert reader.receive() is None


def test_nothing_but_a_request_follows_the_greeting(plain: Pair) -> None:
    for type_ in (MessageType.HELLO, MessageType.PROVE, MessageType.OK, MessageType.DATA):
        with RawReader(plain.owner.addresses[0], plain.offer()) as reader:
            reader.ask(type_, 1, b"")
            last = reader.receive()
            assert last is None or last.header.type is MessageType.ERROR


INFO = PeerInfo(PeerId("owner", 0), "owner-1", "same", b"layout")


@pytest.mark.parametrize("secret", ["", "0" * 32], ids=["no key", "a guess"])
def test_nothing_is_planned_by_the_layout_of_who_proves_nothing(plain: Pair, secret: str) -> None:
    def greet(message: Message) -> bytes:
        return raw_connections.welcome(INFO, message.body, secret)[0]

    proof = plain.offer()
    with MeddlingRelay(plain.owner.addresses[0], greet) as relay:
        plain.directory.move(plain.owner_id, relay.address)
        fails(plain.read(proof, never_planned), OwnerUnproven, "has not proved")
    assert [message.header.type for message in relay.messages] == [MessageType.HELLO]


def _is_refused(answer: Message | None, why: str) -> None:
    assert answer is not None
    assert answer.header.type is MessageType.ERROR
    assert why in answer.body.decode()
