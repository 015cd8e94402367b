"""What is closed when a device refuses to close something: all the rest."""

from __future__ import annotations

import errno
import threading
from typing import Any, cast

import pytest

from tests.support.transfers.engines import Directory, make_engine
from transfer.discovery.base import PeerEventKind
from transfer.engine.engine import EngineState
from transfer.errors import RegistrationError, TransportUnavailable
from transfer.transports.base import Listener
from transfer.transports.rdma import owner as owner_module
from transfer.transports.rdma.handshake import End, decode_answer, encode_request
from transfer.transports.rdma.memory import RegisteredMemory
from transfer.transports.rdma.owner import RdmaAttachment
from transfer.transports.rdma.rails import Rail, close_rails
from transfer.transports.rdma.verbs.error import VerbsError
from transfer.transports.rdma.verbs.port import Port
from transfer.transports.registry import Transports
from transfer.types import DmaBuf

PORT = Port(1, True, False, 1, 5, 1 << 30, ())
END = End(rail=0, ethernet=False, number=17, psn=9, lid=1, mtu=5, reads=16, gid=bytes(16))


class Part:
    """Something of a device's that is closed once, or cannot be."""

    base = local_key = remote_key = 0

    def __init__(self, *, fails: bool) -> None:
        self.fails = fails
        self.closed = 0

    def close(self) -> None:
        self.closed += 1
        if self.fails:
            raise VerbsError(errno.EBUSY, "the device is busy")


class Device(Part):
    """Registers what it is given; takes no memory of other devices."""

    name = "mlx5_0"

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__(fails=fails)
        self.made: list[Part] = []

    def register(self, address: int, length: int, dmabuf: DmaBuf | None) -> Part:
        if dmabuf is not None and self.fails:
            raise VerbsError(errno.EOPNOTSUPP, "no such memory")
        self.made.append(Part(fails=not self.made))
        return self.made[-1]


def rails(*devices: Device) -> list[Rail]:
    return [Rail(cast(Any, device), PORT, cast(Any, None)) for device in devices]


def test_all_registrations_are_closed_though_one_cannot_be(
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory, devices = RegisteredMemory(), [Device(), Device()]
    memory.open(rails(*devices))
    for address in (4096, 8192):
        memory.add(address, 4096)
    memory.remove(4096, 4096)
    assert [part.closed for device in devices for part in device.made] == [1, 0, 1, 0]
    memory.close()
    assert [part.closed for device in devices for part in device.made] == [1, 1, 1, 1]
    assert caplog.text.count("stays registered with a device: [Errno 16] the device is busy") == 2


def test_memory_that_is_not_taken_is_told_so_whatever_closing_says() -> None:
    memory = RegisteredMemory()
    memory.open(rails(Device(), Device(fails=True)))
    with pytest.raises(RegistrationError, match="does not take memory of other devices"):
        memory.add(4096, 4096, DmaBuf(3))


def test_all_devices_are_closed_though_one_cannot_be(caplog: pytest.LogCaptureFixture) -> None:
    devices = [Device(fails=True), Device(), Device(fails=True)]
    close_rails([*rails(*devices), *rails(*devices)][:4])
    assert [device.closed for device in devices] == [1, 1, 1]
    assert caplog.text.count("mlx5_0 stays open") == 2


class StubbornEnd:
    """A queue pair that cannot be closed, nor connected if told so."""

    def __init__(self, *_: object) -> None:
        self.pair = Part(fails=True)

    def describe(self, rail: int) -> End:
        return END

    def connect(self, peer: End) -> None:
        if peer.number != END.number:
            raise VerbsError(errno.EINVAL, "no such peer")


@pytest.fixture
def attachment(monkeypatch: pytest.MonkeyPatch) -> RdmaAttachment:
    monkeypatch.setattr(owner_module, "LocalEnd", StubbornEnd)
    device = Device()
    cast(Any, device).completion_queue = lambda *_, **__: Part(fails=False)
    cast(Any, device).limits = type("Limits", (), {"reads_served": 16})
    return RdmaAttachment(rails(device), RegisteredMemory())


def test_what_a_reader_gave_up_and_cannot_be_closed_is_no_affair_of_the_next(
    attachment: RdmaAttachment, caplog: pytest.LogCaptureFixture
) -> None:
    decode_answer(attachment.exchange(encode_request([END], ())), 1)
    answer = attachment.exchange(encode_request([END], [END.name]))
    assert decode_answer(answer, 1) == [END]
    assert "queue pair stays open: [Errno 16]" in caplog.text


def test_what_cannot_be_connected_is_told_so_whatever_closing_says(
    attachment: RdmaAttachment,
) -> None:
    other = End(0, False, 18, 9, 1, 5, 16, bytes(16))
    with pytest.raises(TransportUnavailable, match=r"cannot connect a queue pair: .*no such peer"):
        attachment.exchange(encode_request([other], ()))
    assert repr(attachment) == "<RdmaAttachment 0 queue pairs>"


class Busy(Listener):
    """Serves nobody and cannot be closed."""

    closed = 0

    @property
    def address(self) -> str:
        return "rdma://busy"

    def close(self) -> None:
        self.closed += 1
        raise VerbsError(errno.EBUSY, "the device is busy")


def test_an_engine_closes_all_it_has_though_one_part_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    busy = [Busy(), Busy()]
    monkeypatch.setattr(Transports, "listen", lambda *_: busy)
    directory = Directory()
    engine = make_engine(directory, "owner")
    engine.start()
    left = []
    directory.subscribe(lambda event: left.append(event.kind))
    with pytest.raises(VerbsError):
        engine.close()
    assert [one.closed for one in busy] == [1, 1]
    assert left == [PeerEventKind.LEFT]
    assert engine._state is EngineState.CLOSED
    assert engine.addresses == ()
    assert "baton-timer-owner/0" not in [thread.name for thread in threading.enumerate()]
    engine.close()
