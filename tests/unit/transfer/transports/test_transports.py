"""Which transports an engine has, and which way it goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.servers.certificates import Authority, TlsFiles
from transfer.addressing import SCHEMES_BEST_FIRST
from transfer.engine.reading.routes import DataRoutes
from transfer.errors import ConfigurationError, PeerUnreachable, Phase, TransportUnavailable
from transfer.settings import TransferSettings
from transfer.transports.base import (
    ControlChannel,
    DataChannel,
    Listener,
    OwnerService,
    ReadSession,
    Transport,
)
from transfer.transports.registry import Transports
from transfer.types import Credentials, PeerId, PeerInfo, ReaderProcess, ReadPlan

TCP, SHM = "tcp://10.0.0.1:7000", "shm://there"


def unavailable(why: str) -> TransportUnavailable:
    return TransportUnavailable(why, phase=Phase.CONNECT)


class Channel(DataChannel):
    closed = False

    def open_read(self, credentials: Credentials, plan: ReadPlan, timeout_s: float) -> ReadSession:
        raise AssertionError("routes open channels, not reads")

    def close(self) -> None:
        self.closed = True


class Way(Transport):
    """A transport that does not work when it has a reason."""

    encrypts = False

    def __init__(self, scheme: str, why_not: str = "") -> None:
        self.scheme = scheme
        self.why_not = why_not

    def listen(self, service: OwnerService) -> Listener:
        raise unavailable(self.why_not)

    def open_data(self, address: str, reader: ReaderProcess, control: ControlChannel) -> Channel:
        if self.why_not:
            raise unavailable(self.why_not)
        return Channel()


@dataclass
class Control:
    info: PeerInfo = field(default_factory=lambda: PeerInfo(PeerId("p", 0), "i", "h", b""))


def routes(said: list[str], *ways: Way) -> DataRoutes:
    control: ControlChannel = Control()  # type: ignore[assignment]  # only its info is used
    return DataRoutes(
        [(way, "") for way in ways], ReaderProcess(PeerId("d", 0), "d1"), control, said.append
    )


def test_the_best_way_is_taken_and_said() -> None:
    said: list[str] = []
    routes(said, Way("shm"), Way("tcp"))
    routes(said, Way("tcp"))
    routes(said, Way("shm", "other host"), Way("tcp"))
    assert said == [
        "shm: the best of shm, tcp",
        "tcp: the only one that both ends allow",
        "tcp: other host",
    ]


def test_a_way_that_is_lost_is_left_once() -> None:
    said: list[str] = []
    found = routes(said, Way("shm"), Way("rdma", "no device"), Way("tcp"))
    first = found.channel
    found.lose(first, unavailable("memory is gone"))
    second = found.channel
    found.lose(first, unavailable("memory is gone"))
    assert found.channel is second is not first
    assert said[1:] == ["tcp: memory is gone; no device"]
    assert [channel.closed for channel in (first, second) if isinstance(channel, Channel)] == [
        True,
        False,
    ]
    with pytest.raises(TransportUnavailable, match="gone; no device; too"):
        found.lose(second, unavailable("too"))


def test_the_last_way_may_be_lost_again_and_again() -> None:
    found = routes([], Way("shm"), Way("tcp"))
    found.lose(found.channel, unavailable("memory is gone"))
    for number in range(3):
        with pytest.raises(TransportUnavailable) as raised:
            found.lose(found.channel, unavailable(f"read {number}"))
        assert raised.value.message == f"no way to read from it: memory is gone; read {number}"


def test_no_way_at_all() -> None:
    with pytest.raises(TransportUnavailable, match="other host"):
        routes([], Way("shm", "other host"))


def test_ways_that_are_opened_after_closing_are_closed() -> None:
    found = routes([], Way("shm"), Way("tcp"))
    found.close()
    found.lose(found.channel, unavailable("gone"))
    assert isinstance(found.channel, Channel)
    assert found.channel.closed


def schemes(settings: TransferSettings, *told: str) -> list[str]:
    found = Transports(settings).data_routes([TCP, "shm://stale"], told)
    return [f"{transport.scheme} {address}" for transport, address in found]


def test_best_first_and_only_what_is_allowed() -> None:
    assert schemes(TransferSettings(), SHM, "quantum://q") == [f"shm {SHM}", f"tcp {TCP}"]
    assert schemes(TransferSettings(transports=("tcp",)), SHM) == [f"tcp {TCP}"]
    assert schemes(TransferSettings(transports=("shm",)), SHM) == [f"shm {SHM}"]
    with pytest.raises(PeerUnreachable, match="none of its addresses"):
        schemes(TransferSettings(transports=("shm",)))


def test_what_is_not_encrypted_is_left_out_with_tls_unless_it_is_named(tls: TlsFiles) -> None:
    assert "rdma" in repr(Transports(TransferSettings()))
    assert repr(Transports(TransferSettings(**tls.settings()))) == "<Transports shm, tcp>"
    named = TransferSettings(transports=("rdma", "tcp"), **tls.settings())
    assert repr(Transports(named)) == "<Transports rdma, tcp>"


@pytest.fixture
def tls(tmp_path: Path) -> TlsFiles:
    return Authority(tmp_path, "ca").issue("worker", "127.0.0.1")


def test_settings_of_transports() -> None:
    assert TransferSettings(transports=["tcp", "shm"]).transports == (  # type: ignore[arg-type]
        "tcp",
        "shm",
    )
    assert "shm" in repr(Transports(TransferSettings()))


@pytest.mark.parametrize("value", ["tcp", (), [], ["tcp", "tcp"], ["quantum"], [1], None, {}, [[]]])
def test_settings_of_transports_that_are_refused(value: object) -> None:
    with pytest.raises(ConfigurationError, match="transports"):
        TransferSettings(transports=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", SCHEMES_BEST_FIRST)
def test_every_scheme_that_settings_may_name_has_a_transport_of_its_own(scheme: str) -> None:
    transports = Transports(TransferSettings(transports=(scheme,)))
    assert [one.scheme for one in transports._by_scheme.values()] == [scheme]
