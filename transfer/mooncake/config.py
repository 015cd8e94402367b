"""``mooncake.json`` of the first public vLLM + Mooncake demo, told as Baton's own settings. Pure.

The demo has one file for both nodes: ``local_url`` (also ``prefill_url``) is where the prefill node
is reached, ``remote_url`` (also ``decode_url``) where the decode node is. Files in which each node
names itself first are understood as well, see :func:`own_end`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from transfer.addressing import Address, is_every_address, parse_address
from transfer.discovery.settings import parse_endpoints
from transfer.discovery.static import ANY_ENGINE
from transfer.errors import ConfigurationError, Phase, ProtocolError

P2P_HANDSHAKE = "P2PHANDSHAKE"
ROLE_VARIABLE = "VLLM_DISTRIBUTED_KV_ROLE"
SAME_URL_OFFSET = 100
"""The demo moves decode's port by this much when both URLs are the same."""
MAX_STATIC_RANKS = 16
"""Ranks of the other engine that are listed for static discovery."""

_KNOWN = (
    *("local_url", "remote_url", "prefill_url", "decode_url"),
    *("metadata_server", "metadata_backend", "protocol", "device_name"),
)
_RIGHT_SERVER = (
    f"host:port of etcd, an etcd URL, several of them with commas between, or {P2P_HANDSHAKE}"
)

End = Literal["local", "remote"]


@dataclass(frozen=True, slots=True)
class MooncakeConfig:
    """One file, checked.

    Attributes:
        source: its path, for messages.
        local: where the prefill node listens.
        remote: where the decode node listens.
        endpoints: etcd members, none for ``P2PHANDSHAKE``.
        protocol: ``tcp`` or ``rdma``.
        device_name: RDMA devices with commas between; empty for ``tcp``.
    """

    source: str
    local: Address
    remote: Address
    endpoints: tuple[str, ...]
    protocol: str
    device_name: str

    @property
    def discovery_by_etcd(self) -> dict[str, Any] | None:
        """For :func:`transfer.discovery.make_discovery`; None for ``P2PHANDSHAKE``."""
        if not self.endpoints:
            return None
        return {"kind": "etcd", "endpoints": list(self.endpoints)}


@dataclass(frozen=True, slots=True)
class MooncakeSettings:
    """What a file means for one worker.

    Attributes:
        discovery: for :func:`transfer.discovery.make_discovery`.
        transfer: fields of :class:`~transfer.settings.TransferSettings`.
    """

    discovery: dict[str, Any]
    transfer: dict[str, Any]


def parse_mooncake(document: Any, source: str) -> MooncakeConfig:
    """Checks what a file holds.

    Args:
        document: the parsed JSON.
        source: the file's path, for messages.

    Raises:
        ConfigurationError: one line for each fault, naming file and field.
    """
    if not isinstance(document, Mapping):
        raise _bad(f"{source}: is not a JSON object with the fields {', '.join(_KNOWN)}")
    fields = _Fields(document, source)
    fields.refuse_unknown()
    local, remote = fields.url("local_url", "prefill_url"), fields.url("remote_url", "decode_url")
    endpoints = fields.endpoints()
    protocol = fields.text("protocol") or "tcp"
    if protocol not in ("tcp", "rdma"):
        fields.fault("protocol", f"is {protocol!r:.40}, must be tcp or rdma")
    devices = [name.strip() for name in fields.text("device_name").split(",")]
    device_name = ",".join(name for name in devices if name)
    if protocol == "rdma" and not device_name and "device_name" not in fields.wrong:
        fields.fault(
            "device_name",
            "is missing; protocol rdma needs a device, or several with commas between, like mlx5_0",
        )
    if fields.faults or local is None or remote is None:
        raise _bad("\n".join(fields.faults))
    if local == remote:
        remote = replace(remote, port=remote.port + SAME_URL_OFFSET)
    return MooncakeConfig(
        source, local, remote, endpoints, protocol, device_name if protocol == "rdma" else ""
    )


def own_end(config: MooncakeConfig, role: str, is_own: Callable[[str], bool]) -> End | None:
    """Which of the two URLs is this worker's, or None if that cannot be told.

    The one whose host is an address of this machine. Where that does not tell, because both are or
    neither is, the role does: as in the demo, producers are at ``local_url``.

    Args:
        role: ``producer``, ``consumer``, or something else.
        is_own: whether a host is an address of this machine.
    """
    local, remote = is_own(config.local.host), is_own(config.remote.host)
    if local != remote:
        return "local" if local else "remote"
    by_role: dict[str, End] = {"producer": "local", "consumer": "remote"}
    return by_role.get(role)


def worker_settings(config: MooncakeConfig, end: End | None, rank: int) -> MooncakeSettings:
    """Settings of one worker of a vLLM server: it listens at its own URL's port plus its rank.

    Args:
        end: see :func:`own_end`.
        rank: tensor-parallel rank of the worker.

    Raises:
        ConfigurationError: ``end`` is None, and it matters.
    """
    transfer = _transports(config)
    discovery = config.discovery_by_etcd
    if end is None:
        if discovery is None or config.local.host != config.remote.host:
            raise _bad(
                f"{config.source}: cannot tell which of {_plain(config.local)} and "
                f"{_plain(config.remote)} is this server; set {ROLE_VARIABLE} to producer or "
                "consumer, or kv_role to kv_producer or kv_consumer"
            )
        # Both servers on one host: any port will do, etcd tells it.
        return MooncakeSettings(discovery, {**transfer, "host": config.local.host, "port": 0})
    own, other = (config.local, config.remote) if end == "local" else (config.remote, config.local)
    return MooncakeSettings(
        discovery or _static(other),
        {**transfer, "host": own.host, "port": own.port + rank},
    )


def cluster_settings(config: MooncakeConfig) -> MooncakeSettings:
    """Settings of all workers under an orchestrator that decides where they run.

    The URLs are not used: workers listen where they are placed, and etcd tells where that is.

    Raises:
        ConfigurationError: ``metadata_server`` is ``P2PHANDSHAKE``.
    """
    discovery = config.discovery_by_etcd
    if discovery is None:
        raise _bad(
            f"{config.source}: metadata_server: is {P2P_HANDSHAKE}, which needs workers that stay "
            "at fixed addresses; replicas of Ray Serve do not, so name an etcd"
        )
    return MooncakeSettings(discovery, _transports(config))


def _transports(config: MooncakeConfig) -> dict[str, Any]:
    transfer: dict[str, Any] = {"transports": [config.protocol]}
    if config.device_name:
        transfer["rdma_device"] = config.device_name
    return transfer


def _static(other: Address) -> dict[str, Any]:
    """The other engine, whatever its id is: the handshake tells it."""
    ports = range(other.port, min(other.port + MAX_STATIC_RANKS, 65536))
    return {
        "kind": "static",
        "peers": [
            {
                "engine_id": ANY_ENGINE,
                "rank": rank,
                "role": "any",
                "addresses": [str(replace(other, port=port))],
            }
            for rank, port in enumerate(ports)
        ],
    }


class _Fields:
    """The fields of one file, and what is wrong with them."""

    def __init__(self, document: Mapping[str, Any], source: str) -> None:
        self._document = document
        self._source = source
        self.faults: list[str] = []
        self.wrong: set[str] = set()

    def fault(self, field: str, message: str) -> None:
        """Notes that ``field`` is wrong."""
        self.faults.append(f"{self._source}: {field}: {message}")
        self.wrong.add(field)

    def refuse_unknown(self) -> None:
        for field in self._document:
            if field not in _KNOWN:
                self.fault(field, f"is unknown; known are {', '.join(_KNOWN)}")

    def text(self, field: str) -> str:
        """The field's text; empty if it is not there or wrong."""
        value = self._document.get(field)
        if value is None or isinstance(value, str):
            return (value or "").strip()
        self.fault(field, f"is {value!r:.40}, must be text")
        return ""

    def url(self, name: str, also: str) -> Address | None:
        """``host:port`` of one node, under either name."""
        given = [field for field in (name, also) if field in self._document]
        if not given:
            self.fault(name, f"is missing (it may also be called {also})")
            return None
        field = given[0]
        if len(given) > 1:
            self.fault(also, f"means the same as {name}; give one of them")
        text = self.text(field)
        if field in self.wrong:
            return None
        try:
            address = parse_address(f"tcp://{text}")
        except ProtocolError:
            self.fault(field, f"is {text!r:.60}, must be host:port, like 192.168.0.137:13003")
            return None
        if is_every_address(address.host):
            self.fault(field, f"is {text}, which is no address that the other node could reach")
            return None
        return address

    def endpoints(self) -> tuple[str, ...]:
        """The etcd members; none for ``P2PHANDSHAKE``, or if something is wrong."""
        field = "metadata_server"
        text = self.text(field)
        if text == P2P_HANDSHAKE or field in self.wrong:
            return ()
        backend = self.text("metadata_backend")
        if backend not in ("", "etcd"):
            self.fault("metadata_backend", f"is {backend!r:.40}; only etcd can be used")
            return ()
        if not text:
            self.fault(field, f"is missing; it must be {_RIGHT_SERVER}")
            return ()
        members = [item.strip().removeprefix("etcd://").rstrip("/") for item in text.split(",")]
        try:
            return tuple(str(endpoint) for endpoint in parse_endpoints(members))
        except ConfigurationError as error:
            self.fault(field, f"{error.message}; it must be {_RIGHT_SERVER}")
            return ()


def _plain(address: Address) -> str:
    return str(address).removeprefix("tcp://")


def _bad(message: str) -> ConfigurationError:
    return ConfigurationError(message, phase=Phase.REGISTER)
