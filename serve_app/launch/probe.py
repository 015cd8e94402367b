"""Asks an endpoint of this machine whether it is up."""

from __future__ import annotations

import http.client
import ssl
from typing import Final
from urllib.parse import urlsplit

_TIMEOUT_S: Final = 2.0
_LONGEST_BODY: Final = 4096


def ask(url: str) -> tuple[int, str]:
    """Status and body of a GET; 0 and nothing if there was no answer within 2 s.

    Certificates are not checked: nothing is told, and they need not be for the address that is
    asked here.

    Args:
        url: ``http://`` or ``https://``, with a port.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    connection = (
        http.client.HTTPSConnection(host, parts.port, timeout=_TIMEOUT_S, context=_unverified())
        if parts.scheme == "https"
        else http.client.HTTPConnection(host, parts.port, timeout=_TIMEOUT_S)
    )
    try:
        connection.request("GET", parts.path)
        response = connection.getresponse()
        return response.status, response.read(_LONGEST_BODY).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException):
        return 0, ""
    finally:
        connection.close()


def _unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
