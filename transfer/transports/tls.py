"""Mutual TLS for the TCP port: both ends show a certificate of one authority."""

from __future__ import annotations

import ssl
from pathlib import Path

from transfer.errors import ConfigurationError, Phase
from transfer.settings import TransferSettings


class TlsContexts:
    """What the two ends of a connection need, from the settings of the engine.

    Args:
        settings: with ``tls_ca``, ``tls_cert`` and ``tls_key``.

    Raises:
        ConfigurationError: a file is missing or is not what it should be.
    """

    def __init__(self, settings: TransferSettings) -> None:
        self._server_name = settings.tls_server_name
        self.server = _context(ssl.PROTOCOL_TLS_SERVER, settings)
        self.server.verify_mode = ssl.CERT_REQUIRED
        # Connections live long; nobody resumes a session.
        self.server.num_tickets = 0
        self.client = _context(ssl.PROTOCOL_TLS_CLIENT, settings)

    @classmethod
    def of(cls, settings: TransferSettings) -> TlsContexts | None:
        """None when the settings do not ask for TLS."""
        return cls(settings) if settings.tls_ca else None

    def name_of(self, host: str) -> str:
        """What the certificate of an owner at ``host`` must be for."""
        return self._server_name or host


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
