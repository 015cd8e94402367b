"""``baton proxy`` from its command line: which servers, and how they are found."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from aiohttp import web

from deployments.role import Role
from serve_app.origins import require_origin
from serve_app.proxy.endpoint import HEAD_TIMEOUT_S, STOP_TIMEOUT_S, Proxy, ProxyOptions
from transfer.addressing import host_and_port, is_http_url
from transfer.discovery import make_discovery
from transfer.errors import ConfigurationError, Phase
from transfer.mooncake.file import PATH_VARIABLE, mooncake_from
from transfer.settings import TransferSettings

KEY_VARIABLE = "OPENAI_API_KEY"
_READY_TIMEOUT_S = 10.0

logger = logging.getLogger(__name__)


def run(options: argparse.Namespace) -> None:
    """Serves until SIGINT or SIGTERM.

    Raises:
        ConfigurationError: an option is wrong, or it is not said how to find a side's servers.
        TransferError: etcd does not answer.
        OSError: the port cannot be listened on.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    servers: dict[Role, tuple[str, ...]] = {
        "prefill": server_urls("prefill", options.prefill),
        "decode": server_urls("decode", options.decode),
    }
    for origin in options.allowed_origin:
        try:
            require_origin(origin)
        except ValueError as error:
            raise _bad(f"--allowed-origin {error}") from error
    config = discovery_config(options.etcd, options.cluster, os.environ)
    transfer = notice_settings(
        options.tls_ca, options.tls_cert, options.tls_key, options.tls_server_name
    )
    if transfer.tls_ca and config is None:
        raise _bad("--tls-ca is for telling owners of blocks, whom only etcd knows: name --etcd")
    for role, urls in servers.items():
        if not urls and config is None:
            raise _bad(
                f"--{role} is missing, and so is etcd: name {role} servers, or --etcd, or an etcd "
                f"in the file that {PATH_VARIABLE} names"
            )
        logger.info("%s servers: %s", role, ", ".join(urls) or "those that etcd knows")
    with ExitStack() as stack:
        discovery = None
        if config is not None:
            discovery = stack.enter_context(make_discovery(config))
            discovery.ready(_READY_TIMEOUT_S)
        proxy = Proxy(
            ProxyOptions(
                servers,
                discovery,
                os.environ.get(KEY_VARIABLE, ""),
                allowed_origins=tuple(options.allowed_origin),
                transfer=transfer,
            )
        )
        web.run_app(
            proxy.application(),
            host=options.host,
            port=options.port,
            # Calls to servers end with the request that they are made for.
            handler_cancellation=True,
            # To aiohttp a connection is idle until a head has come whole.
            keepalive_timeout=HEAD_TIMEOUT_S,
            shutdown_timeout=STOP_TIMEOUT_S,
            access_log=None,
            print=lambda _: logger.info(
                "listening at http://%s", host_and_port(options.host, options.port)
            ),
        )


def server_urls(role: Role, given: Sequence[str]) -> tuple[str, ...]:
    """The servers of one side; ``host:port`` stands for ``http://host:port``.

    Raises:
        ConfigurationError: one is no URL.
    """
    urls = []
    for text in given:
        url = (text if "://" in text else f"http://{text}").rstrip("/")
        if not is_http_url(url):
            raise _bad(f"--{role} {text!r:.80} is not a URL like http://192.168.0.137:8100")
        urls.append(url)
    return tuple(dict.fromkeys(urls))


def discovery_config(
    etcd: str | None, cluster: str, environment: Mapping[str, str]
) -> dict[str, Any] | None:
    """Where workers tell of themselves; None if nothing says so.

    Raises:
        ConfigurationError: the environment names a ``mooncake.json`` that is wrong.
    """
    if etcd:
        return {"kind": "etcd", "endpoints": etcd.split(","), "cluster": cluster}
    config = mooncake_from(environment)
    found = None if config is None else config.discovery_by_etcd
    return None if found is None else {**found, "cluster": cluster}


def notice_settings(ca: str, certificate: str, key: str, server_name: str) -> TransferSettings:
    """How owners are told of tickets that nobody will read: over TCP, with TLS if they have it.

    Args:
        ca, certificate, key, server_name: as the workers' own ``tls_ca`` and so on; may be empty.

    Raises:
        ConfigurationError: they do not go together.
    """
    return TransferSettings(
        transports=("tcp",),
        tls_ca=ca,
        tls_cert=certificate,
        tls_key=key,
        tls_server_name=server_name,
    )


def _bad(message: str) -> ConfigurationError:
    return ConfigurationError(message, phase=Phase.REGISTER)
