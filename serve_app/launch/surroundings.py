"""What a configuration needs around it: model, etcd, ports, devices."""

from __future__ import annotations

import contextlib
import errno
import http.client
import socket
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from serve_app.api_keys import ApiKeys
from serve_app.config import Settings, SettingsError
from serve_app.config_file import load_document, load_settings
from serve_app.launch.demo_model import ModelError, resolve_model
from serve_app.launch.etcd_binary import find_etcd
from serve_app.launch.model_kind import config_folder, model_fault
from transfer.addressing import host_and_port, is_every_address
from transfer.connector.block_settings import read_transfer
from transfer.discovery import etcd_settings
from transfer.discovery.settings import Endpoint, parse_endpoints
from transfer.errors import ConfigurationError

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 8000

_CONNECT_TIMEOUT_S: Final = 2.0
_TLS_FILES: Final = ("ssl_certfile", "ssl_keyfile")
_OWN_ETCD: Final = frozenset({("127.0.0.1", 2379), ("localhost", 2379), ("[::1]", 2379)})


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    level: Literal["ok", "note", "error"]
    text: str


@dataclass(frozen=True, slots=True)
class HttpAddress:
    """Where the OpenAI endpoint listens, and where a client on this machine finds it.

    Attributes:
        tls: it has a certificate, and takes nothing in the clear.
    """

    host: str
    port: int
    prefix: str
    tls: bool

    @property
    def url(self) -> str:
        """Base address, without a slash at its end."""
        scheme = "https" if self.tls else "http"
        return f"{scheme}://{host_and_port(self.reachable_host, self.port)}{self.prefix}"

    @property
    def reachable_host(self) -> str:
        """``host``, or loopback where that stands for every address."""
        if self.host and not is_every_address(self.host):
            return self.host
        return "::1" if ":" in self.host else DEFAULT_HOST


def http_address(document: dict[str, Any], port: int | None = None) -> HttpAddress:
    """The address in a Serve config; ``port`` comes before the one written there.

    Raises:
        SettingsError: host, port, certificate or route_prefix is not what it should be, or a
            secret is there.
    """
    options = document.get("http_options") or {}
    if not isinstance(options, dict):
        raise SettingsError("http_options: is not a mapping")
    if options.get("ssl_keyfile_password"):
        raise SettingsError(
            "http_options.ssl_keyfile_password: a secret is not written out here; name a key file "
            "without a password that only its user can read"
        )
    files = [options.get(name) for name in _TLS_FILES]
    if any(files) and not all(isinstance(file, str) and file for file in files):
        raise SettingsError(
            "http_options: ssl_certfile and ssl_keyfile are paths and go together: set both, or "
            "neither"
        )
    host = options.get("host", DEFAULT_HOST)
    if not isinstance(host, str):
        raise SettingsError("http_options.host: is not a string")
    chosen = options.get("port", DEFAULT_PORT) if port is None else port
    if type(chosen) is not int or not 1 <= chosen <= 65535:
        raise SettingsError(f"http_options.port: {chosen!r} is not a port from 1 to 65535")
    prefix = document["applications"][0].get("route_prefix") or "/"
    if not isinstance(prefix, str) or not prefix.startswith("/"):
        raise SettingsError("applications.0.route_prefix: does not begin with /")
    return HttpAddress(host, chosen, prefix.rstrip("/"), tls=any(files))


def certificate_problem(document: dict[str, Any]) -> str | None:
    """Why the endpoint could not use the certificate that a Serve config names, or None."""
    options = document.get("http_options") or {}
    certificate, key = (options.get(name) for name in _TLS_FILES)
    if not certificate:
        return None
    try:
        # A password that is wrong keeps OpenSSL from asking for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        return (
            f"http_options: ssl_certfile {certificate!r} with ssl_keyfile {key!r} cannot be used: "
            f"{error}; they should be PEM files, the key without a password"
        )
    return None


def bind_problem(host: str, port: int) -> str | None:
    """Why nobody could listen there now, or None."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return f"port {port} on {host} is taken"
            return f"cannot listen on {host_and_port(host, port)}: {error.strerror or error}"
    return None


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody listens on, all different."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((DEFAULT_HOST, 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def etcd_endpoints(settings: Settings) -> tuple[Endpoint, ...]:
    """The etcd members that the settings name; none for other kinds of discovery."""
    if settings.discovery.get("kind") != "etcd":
        return ()
    return parse_endpoints(settings.discovery["endpoints"])


def is_reachable(endpoints: Sequence[Endpoint]) -> bool:
    """Whether an etcd answers at one of them; behind TLS, whether something accepts connections."""
    return any(_answers(endpoint) for endpoint in endpoints)


def may_start_etcd(endpoints: Sequence[Endpoint]) -> bool:
    """Whether the settings only name etcd's own default address on this machine.

    That is what a configuration says that does not care which etcd it gets.
    """
    return all((endpoint.host, endpoint.port) in _OWN_ETCD for endpoint in endpoints)


def _answers(endpoint: Endpoint) -> bool:
    host = endpoint.host.strip("[]")
    try:
        if endpoint.scheme == "https":
            with socket.create_connection((host, endpoint.port), timeout=_CONNECT_TIMEOUT_S):
                return True
        connection = http.client.HTTPConnection(host, endpoint.port, timeout=_CONNECT_TIMEOUT_S)
        with contextlib.closing(connection):
            connection.request("GET", "/version")
            answer = connection.getresponse().read(4096)
            # An etcd behind TLS tells a plain client so.
            return b"etcdserver" in answer or b"HTTPS server" in answer
    except (OSError, http.client.HTTPException):
        return False


def check_model(settings: Settings) -> Finding:
    """Whether the model is there, or expected from Hugging Face, and can be handed over."""
    try:
        source = resolve_model(settings.model.source)
        fault = model_fault(settings)
    except ModelError as error:
        return Finding("error", f"model: {error}")
    if fault is not None:
        return Finding("error", f"model: {fault}")
    if (Path(source) / "config.json").is_file():
        return Finding("ok", f"model: {source}")
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") != 1
    if Path(source).exists() or looks_like_path:
        return Finding("error", f"model: {source} is no model folder: it has no config.json")
    try:
        folder = config_folder(source)
    except ValueError as error:
        return Finding("error", f"model: {error}")
    if folder is not None:
        return Finding("ok", f"model: {source}, in the local Hugging Face cache")
    return Finding("note", f"model: {source} is not here, vLLM will ask Hugging Face for it")


def secret_problem(settings: Settings) -> str | None:
    """What is wrong with a secret that the settings refer to, as seen from here, or None."""
    try:
        ApiKeys(settings.router.api_keys).check()
    except ConfigurationError as error:
        return f"router.api_keys: {error.message}"
    try:
        if settings.discovery["kind"] == "etcd":
            etcd_settings(settings.discovery).credentials()
    except ConfigurationError as error:
        return f"discovery: {error.message}"
    return None


def check(path: Path, port: int | None = None) -> Iterator[Finding]:
    """Looks at a configuration and its surroundings, one thing at a time."""
    try:
        document = load_document(path)
        settings = load_settings(path)
        address = http_address(document, port)
    except SettingsError as error:
        for line in str(error).splitlines():
            yield Finding("error", f"config: {line}")
        return
    yield Finding("ok", f"config: {path} is valid")
    if problem := certificate_problem(document):
        yield Finding("error", problem)
    if problem := secret_problem(settings):
        yield Finding("error", problem)
    yield check_model(settings)
    yield _check_etcd(settings)
    yield _check_port(address)
    yield from _check_transfer(settings)
    yield from _check_gpus(settings)


def _check_etcd(settings: Settings) -> Finding:
    endpoints = etcd_endpoints(settings)
    named = ", ".join(str(endpoint) for endpoint in endpoints)
    if not endpoints:
        return Finding("ok", "etcd: not needed, discovery is static")
    if is_reachable(endpoints):
        return Finding("ok", f"etcd: {named} is reachable")
    if not may_start_etcd(endpoints):
        return Finding("error", f"etcd: nothing answers at {named}")
    try:
        binary = find_etcd()
    except FileNotFoundError as error:
        return Finding("error", f"etcd: nothing answers at {named}, and {error}")
    return Finding("note", f"etcd: nothing answers at {named}; `baton up` would start {binary}")


def _check_port(address: HttpAddress) -> Finding:
    problem = bind_problem(address.host, address.port)
    if problem is not None:
        return Finding("error", f"http: {problem}")
    return Finding("ok", f"http: {host_and_port(address.host, address.port)} is free")


def _check_transfer(settings: Settings) -> Iterator[Finding]:
    transfer, _ = read_transfer({"host": "auto", **settings.transfer})
    # `auto` is the address of whichever node a replica lands on: any address of this one will do.
    problem = bind_problem("" if transfer.host == "auto" else transfer.host, transfer.port)
    if problem is not None:
        yield Finding("error", f"transfer: {problem}")
    else:
        yield Finding("ok", f"transfer: tcp on {transfer.host}")


def _check_gpus(settings: Settings) -> Iterator[Finding]:
    needed = 0.0
    for side in (settings.prefill, settings.decode):
        replicas = side.autoscaling.min_replicas if side.autoscaling else side.replicas
        needed += side.resources.gpus_per_worker * side.tensor_parallel_size * replicas
    if not needed:
        return
    here = len([device for device in Path("/dev").glob("nvidia*") if device.name[6:].isdigit()])
    if here >= needed:
        yield Finding("ok", f"gpus: {needed:g} needed, {here} here")
    else:
        yield Finding(
            "note", f"gpus: {needed:g} needed, {here} here; other nodes must have the rest"
        )
