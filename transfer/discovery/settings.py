"""Settings of etcd discovery. Needs no etcd client, so a configuration can be checked alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transfer.discovery.record import workers_prefix
from transfer.errors import ConfigurationError, Phase
from transfer.secret import SecretReference

_ENDPOINT = re.compile(
    r"(?:(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://)?"
    r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})/?"
)

MIN_LEASE_TTL_S = 2
MAX_LEASE_TTL_S = 600


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one etcd member listens for clients.

    Attributes:
        host: name or address; IPv6 in brackets.
        scheme: ``http``, ``https``, or empty: whatever the TLS settings say.
    """

    host: str
    port: int
    scheme: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}" if self.scheme else self.netloc

    @property
    def netloc(self) -> str:
        """``host:port``."""
        return f"{self.host}:{self.port}"


def parse_endpoints(value: str | Sequence[str]) -> tuple[Endpoint, ...]:
    """Read etcd endpoints: ``host:port`` or ``http(s)://host:port``, a list or comma-separated.

    Raises:
        ConfigurationError: none given, or one is malformed; names it and what would be right.
    """
    texts = value.split(",") if isinstance(value, str) else list(value)
    endpoints: list[Endpoint] = []
    for text in texts:
        if not isinstance(text, str):
            raise _bad(f"etcd endpoint {text!r:.80} is not a string like 127.0.0.1:2379")
        if not text.strip():
            continue
        endpoint = _parse_endpoint(text.strip())
        if endpoint not in endpoints:
            endpoints.append(endpoint)
    if not endpoints:
        raise _bad("no etcd endpoints given; give at least one host:port, like 127.0.0.1:2379")
    return tuple(endpoints)


def _parse_endpoint(text: str) -> Endpoint:
    if "@" in text:  # not repeated: what stands before it is a password
        raise _bad("an etcd endpoint holds a user; set user and password beside endpoints")
    match = _ENDPOINT.fullmatch(text)
    if match is None:
        raise _bad(f"etcd endpoint {text!r:.80} is not host:port or http(s)://host:port")
    scheme = (match["scheme"] or "").lower()
    if scheme not in ("", "http", "https"):
        raise _bad(f"etcd endpoint {text!r:.80} has scheme {scheme!r}; use http or https")
    port = int(match["port"])
    if not 1 <= port <= 65535:
        raise _bad(f"etcd endpoint {text!r:.80} has port {port}; ports are 1 to 65535")
    return Endpoint(match["host"], port, scheme)


@dataclass(frozen=True, slots=True)
class EtcdSettings:
    """How to reach etcd and what to do there.

    Attributes:
        endpoints: see :func:`parse_endpoints`.
        cluster: workers of different clusters do not see each other.
        lease_ttl_s: how long a record outlives its worker, whole seconds.
        user: with ``password``, if etcd has authentication switched on; itself, or a reference.
        password: a reference, see :mod:`transfer.secret`.
        tls_ca: path of the PEM file that etcd's certificate is checked against. Without it,
            ``https`` endpoints are checked against gRPC's own list of authorities.
        tls_cert: path of our certificate, with ``tls_key``, if etcd asks for one.

    Raises:
        ConfigurationError: names the setting and what would be right.
    """

    endpoints: Sequence[str] | str
    cluster: str = "default"
    lease_ttl_s: int = 5
    user: str = ""
    password: str = ""
    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""

    def __post_init__(self) -> None:
        endpoints = self.parsed_endpoints
        workers_prefix(self.cluster)
        if (
            type(self.lease_ttl_s) is not int
            or not MIN_LEASE_TTL_S <= self.lease_ttl_s <= MAX_LEASE_TTL_S
        ):
            raise _bad(
                f"lease_ttl_s is {self.lease_ttl_s!r:.40}; "
                f"use whole seconds from {MIN_LEASE_TTL_S} to {MAX_LEASE_TTL_S}"
            )
        if bool(self.user) != bool(self.password):
            raise _bad("etcd needs user and password together, or neither")
        self._references()
        if bool(self.tls_cert) != bool(self.tls_key):
            raise _bad("etcd needs tls_cert and tls_key together, or neither")
        for name, path in (
            ("tls_ca", self.tls_ca),
            ("tls_cert", self.tls_cert),
            ("tls_key", self.tls_key),
        ):
            if path and not Path(path).is_file():
                raise _bad(f"{name} {path!r} is not a file")
        if self.has_tls_files:
            for endpoint in endpoints:
                if endpoint.scheme == "http":
                    raise _bad(f"endpoint {endpoint} is plain http, but TLS files are set")

    def credentials(self) -> tuple[str, str]:
        """User and password as they are now; empty if etcd asks for none.

        Raises:
            ConfigurationError: one is not there; names the place.
        """
        found = {"user": self.user, "password": ""}
        for name, reference in self._references().items():
            with _naming(name):
                found[name] = reference.read()
        return found["user"], found["password"]

    def _references(self) -> dict[str, SecretReference]:
        texts = {"user": self.user if _is_reference(self.user) else "", "password": self.password}
        found = {}
        for name, text in texts.items():
            if text:
                with _naming(name):
                    found[name] = SecretReference.parse(text)
        return found

    @property
    def parsed_endpoints(self) -> tuple[Endpoint, ...]:
        """The endpoints, taken apart."""
        return parse_endpoints(self.endpoints)

    @property
    def has_tls_files(self) -> bool:
        """Whether any TLS file is set; endpoints without a scheme then use TLS."""
        return bool(self.tls_ca or self.tls_cert)


def _is_reference(user: str) -> bool:
    """Whether it is meant as one, not as the name itself."""
    return user.startswith(("${", "file:"))


@contextmanager
def _naming(setting: str) -> Iterator[None]:
    try:
        yield
    except ConfigurationError as error:
        raise _bad(f"{setting} of etcd: {error.message}") from error


def _bad(message: str) -> ConfigurationError:
    return ConfigurationError(message, phase=Phase.DISCOVER)
