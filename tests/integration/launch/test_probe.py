"""What `baton up` asks to find out whether a service is up, with TLS and without."""

from __future__ import annotations

import contextlib
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from serve_app.launch.probe import ask
from serve_app.launch.surroundings import certificate_problem, http_address
from tests.support.servers.certificates import Authority


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/a/health" else 404)
        self.end_headers()
        self.wfile.write(b"fine\n")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def endpoint(options: dict[str, str]) -> Iterator[str]:
    """Serves with these ``http_options``; gives the address that `baton up` asks."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        if options:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(options["ssl_certfile"], options["ssl_keyfile"])
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        document = {"applications": [{"route_prefix": "/a"}], "http_options": options}
        yield http_address(document, server.server_port).url
        server.shutdown()
        thread.join()


@pytest.fixture(params=["plain", "tls"])
def options(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """With TLS, a certificate of an authority that nobody here trusts, and for another name."""
    if request.param == "plain":
        return {}
    files = Authority(tmp_path, "ca").issue("endpoint", "chat.example.com")
    return {"ssl_certfile": files.tls_cert, "ssl_keyfile": files.tls_key}


def test_an_endpoint_that_is_up_says_so(options: dict[str, str]) -> None:
    assert certificate_problem({"http_options": options}) is None
    with endpoint(options) as url:
        assert ask(f"{url}/health") == (200, "fine")
        assert ask(f"{url}/other")[0] == 404
    assert ask(f"{url}/health") == (0, "")


def test_who_speaks_only_one_of_the_two_gives_no_answer(options: dict[str, str]) -> None:
    with endpoint(options) as url:
        scheme, _, rest = url.partition("://")
        other = "http" if scheme == "https" else "https"
        assert ask(f"{other}://{rest}/health") == (0, "")
