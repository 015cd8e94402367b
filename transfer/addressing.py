"""Addresses of transports: ``scheme://host:port``."""

from __future__ import annotations

import functools
import re
import socket
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from transfer.errors import Phase, ProtocolError

SCHEMES_BEST_FIRST = ("shm", "rdma", "tcp")
"""Every scheme that a worker may advertise, the best one first."""

MAX_ADDRESS_CHARS = 300

_IPV4_IN_IPV6 = b"\0" * 10 + b"\xff\xff"

_HTTP_URL = re.compile(
    r"https?://(?:\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?(?:/[A-Za-z0-9._~/-]*)?"
)


@dataclass(frozen=True, slots=True)
class Address:
    """One parsed address; ``str()`` gives the text back."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.scheme}://{host_and_port(self.host, self.port)}"


# One address is connected to again and again, and IDNA is slow.
@functools.lru_cache(maxsize=256)
def parse_address(text: str) -> Address:
    """Parse ``scheme://host:port``; an IPv6 host stands in brackets.

    Raises:
        ProtocolError: for anything else, as addresses come from other processes.
    """
    scheme = _scheme(text)
    host, colon, port_text = text[len(scheme) + 3 :].rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise _malformed(text)
    if not colon or not is_host(host):
        raise _malformed(text)
    if not (port_text.isascii() and port_text.isdigit() and 1 <= len(port_text) <= 5):
        raise _malformed(text)
    port = int(port_text)
    if not 0 < port < 65536:
        raise _malformed(text)
    return Address(scheme, host, port)


def is_host(text: str) -> bool:
    """Whether ``text`` can be a host name or an IP address: one that can be looked up."""
    if not text.isascii() or not text.isprintable() or set(text) & set("/@[] "):
        return False
    try:
        return bool(text.encode("idna"))
    except UnicodeError:  # an empty label, or one of more than 63 characters
        return False


def is_every_address(host: str) -> bool:
    """Whether ``host`` is what one listens on to be reached at every address of a machine.

    In all spellings (``0.0.0.0``, ``0``, ``::``, ``::ffff:0.0.0.0``). It leads nobody there.
    """
    for parse in (socket.inet_aton, _inet6):  # as resolvers read it: `0` is one, too
        try:
            packed = parse(host)
        except (OSError, ValueError):  # a name, or no text that could be one
            continue
        return not packed.removeprefix(_IPV4_IN_IPV6).strip(b"\0")
    return False


def host_and_port(host: str, port: int | str) -> str:
    """``host:port``, as it stands in a URL: an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_http_url(text: str) -> bool:
    """Whether ``text`` is ``http://`` or ``https://`` with a host, and may be asked as it is."""
    return len(text) <= MAX_ADDRESS_CHARS and _HTTP_URL.fullmatch(text) is not None


def usable_addresses(addresses: Iterable[str], schemes: Collection[str]) -> list[str]:
    """Those of ``addresses`` whose scheme is in ``schemes``, the best scheme first.

    Addresses of other schemes are left out unparsed: a newer peer may advertise what this
    version does not know.
    """
    ranked = [
        (SCHEMES_BEST_FIRST.index(scheme), address)
        for address in addresses
        if (scheme := address[:MAX_ADDRESS_CHARS].partition("://")[0]) in schemes
        and scheme in SCHEMES_BEST_FIRST
    ]
    return [address for _, address in sorted(ranked, key=lambda pair: pair[0])]


def _scheme(text: str) -> str:
    if len(text) > MAX_ADDRESS_CHARS:
        raise ProtocolError(
            f"address of {len(text)} characters, at most {MAX_ADDRESS_CHARS} are read",
            phase=Phase.CONNECT,
        )
    scheme, separator, _ = text.partition("://")
    if not separator or scheme not in SCHEMES_BEST_FIRST:
        raise _malformed(text)
    return scheme


def _malformed(text: str) -> ProtocolError:
    known = ", ".join(SCHEMES_BEST_FIRST)
    return ProtocolError(
        f"address {text[:MAX_ADDRESS_CHARS]!r} is not scheme://host:port with a scheme of {known}",
        phase=Phase.CONNECT,
    )


def _inet6(host: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
