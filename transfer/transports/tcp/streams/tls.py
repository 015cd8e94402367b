"""Mutual TLS for the TCP port: both ends show a certificate of one authority."""

from __future__ import annotations

import logging
import os
import ssl
import threading
from pathlib import Path
from typing import NamedTuple

from transfer.errors import ConfigurationError, Phase
from transfer.settings import TransferSettings

logger = logging.getLogger(__name__)


class _Ends(NamedTuple):
    server: ssl.SSLContext
    client: ssl.SSLContext


class TlsContexts:
    """What the two ends of a new connection need, from the files that the settings name.

    Files that change are read again for the next connection; while they do not fit together, as
    between the writing of a certificate and that of its key, those before stay in use, and each
    connection tries anew: what is in the way need not be a matter of the files. Thread-safe.

    Args:
        settings: with ``tls_ca``, ``tls_cert`` and ``tls_key``.

    Raises:
        ConfigurationError: a file is missing or is not what it should be.
    """

    def __init__(self, settings: TransferSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._stamps = _stamps(settings)
        self._ends = _ends(settings)
        self._fault = ""

    @property
    def server(self) -> ssl.SSLContext:
        """Of who accepts a connection."""
        return self._current().server

    @property
    def client(self) -> ssl.SSLContext:
        """Of who makes one."""
        return self._current().client

    @classmethod
    def of(cls, settings: TransferSettings) -> TlsContexts | None:
        """None when the settings do not ask for TLS."""
        return cls(settings) if settings.tls_ca else None

    def name_of(self, host: str) -> str:
        """What the certificate of an owner at ``host`` must be for."""
        return self._settings.tls_server_name or host

    def _current(self) -> _Ends:
        with self._lock:
            # Taken before the files are read: a change meanwhile is one for the next time.
            stamps = _stamps(self._settings)
            if stamps != self._stamps:
                self._read(stamps)
            return self._ends

    def _read(self, stamps: list[tuple[int, ...]]) -> None:
        try:
            self._ends = _ends(self._settings)
        except ConfigurationError as error:
            if error.message != self._fault:
                logger.warning("the TLS files as they were stay in use: %s", error.message)
            self._fault = error.message
            return
        logger.info("the TLS files have changed: new connections use the new ones")
        self._stamps, self._fault = stamps, ""


def _stamps(settings: TransferSettings) -> list[tuple[int, ...]]:
    """What changes when a file does, or what a link to it leads to."""
    return [_stamp(path) for path in (settings.tls_ca, settings.tls_cert, settings.tls_key)]


def _stamp(path: str) -> tuple[int, ...]:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _ends(settings: TransferSettings) -> _Ends:
    server = _context(ssl.PROTOCOL_TLS_SERVER, settings)
    server.verify_mode = ssl.CERT_REQUIRED
    # Connections live long; nobody resumes a session.
    server.num_tickets = 0
    return _Ends(server, _context(ssl.PROTOCOL_TLS_CLIENT, settings))


def _context(protocol: int, settings: TransferSettings) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cafile=settings.tls_ca)
    except (OSError, ValueError) as error:
        raise _unusable("tls_ca", settings.tls_ca, error) from error
    for name, path in (("tls_cert", settings.tls_cert), ("tls_key", settings.tls_key)):
        try:
            Path(path).read_bytes()
        except (OSError, ValueError) as error:
            raise _unusable(name, path, error) from error
    try:
        # A password that is wrong keeps OpenSSL from asking for one on the terminal.
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password="")
    except (OSError, ValueError) as error:
        raise _unusable("tls_cert and tls_key", settings.tls_cert, error) from error
    return context


def _unusable(name: str, path: str, error: Exception) -> ConfigurationError:
    return ConfigurationError(
        f"{name} {path!r:.300} cannot be used: {error}; it should be a PEM file, a key without a "
        "password",
        phase=Phase.REGISTER,
    )
