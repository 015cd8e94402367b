from __future__ import annotations

import io

import pytest

from serve_app.config import SettingsError
from serve_app.launch.launcher import gist
from serve_app.launch.services import Progress
from serve_app.launch.surroundings import http_address, may_start_etcd
from transfer.discovery.settings import parse_endpoints


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_gist_of_a_traceback_is_its_exception() -> None:
    message = (
        "A replica failed to start. Error:\nTraceback (most recent call last):\n"
        '  File "a.py", line 1, in f\nray.exceptions.RayTaskError: outer\n'
        "pkg.ModelError: 1 fault\n  max_model_len is too large\n"
    )
    assert gist(message) == "pkg.ModelError: 1 fault max_model_len is too large"


@pytest.mark.parametrize(
    ("message", "expected"),
    [("first\nlast line\n", "last line"), ("", "Serve does not say why")],
)
def test_the_gist_without_an_exception_is_the_last_line(message: str, expected: str) -> None:
    assert gist(message) == expected


def test_progress_in_a_log_says_each_thing_once() -> None:
    out = io.StringIO()
    progress = Progress(out)
    for what in ("etcd", "etcd", "Ray", "Ray", "Ray"):
        progress.waiting(what)
    progress.say("ready")
    lines = [line.split("  ")[-1] for line in out.getvalue().splitlines()]
    assert lines == ["waiting for etcd", "waiting for Ray", "ready"]


def test_progress_on_a_terminal_rewrites_its_line() -> None:
    out = Terminal()
    progress = Progress(out)
    progress.waiting("a long thing")
    progress.waiting("Ray")
    progress.say("ready")
    assert out.getvalue().count("\n") == 1
    assert out.getvalue().split("\r")[-1] == "ready\n"


def test_the_http_address_comes_from_the_config_and_the_command_line() -> None:
    document = {"applications": [{}], "http_options": {"host": "0.0.0.0", "port": 9}}
    assert http_address(document).url == "http://127.0.0.1:9"
    assert http_address(document, 7).url == "http://127.0.0.1:7"
    assert (
        http_address({"applications": [{"route_prefix": "/a/"}]}).url == "http://127.0.0.1:8000/a"
    )


def test_an_endpoint_with_a_certificate_is_asked_by_tls() -> None:
    options = {"ssl_certfile": "cert.pem", "ssl_keyfile": "key.pem", "host": "::", "port": 9}
    address = http_address({"applications": [{"route_prefix": "/a"}], "http_options": options})
    assert address.url == "https://[::1]:9/a"


@pytest.mark.parametrize(
    "options",
    [
        {"ssl_certfile": "cert.pem"},
        {"ssl_keyfile": "key.pem"},
        {"ssl_certfile": "cert.pem", "ssl_keyfile": ""},
        {"ssl_certfile": ["cert.pem"], "ssl_keyfile": "key.pem"},
    ],
)
def test_a_certificate_without_its_key_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=r"^http_options: ssl_certfile and ssl_keyfile are"):
        http_address({"applications": [{}], "http_options": options})


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("::1", "http://[::1]:8000"),
        ("fd00::7", "http://[fd00::7]:8000"),
        ("::", "http://[::1]:8000"),
        ("0", "http://127.0.0.1:8000"),
        ("", "http://127.0.0.1:8000"),
        ("node-1", "http://node-1:8000"),
    ],
)
def test_the_address_that_is_printed_can_be_asked(host: str, url: str) -> None:
    address = http_address({"applications": [{}], "http_options": {"host": host}})

    assert address.url == url


@pytest.mark.parametrize("options", [{"port": "8000"}, {"port": 0}, {"host": 1}, []])
def test_a_wrong_http_address_is_refused(options: object) -> None:
    with pytest.raises(SettingsError, match=r"^http_options"):
        http_address({"applications": [{}], "http_options": options or [1]})


def test_a_password_that_is_written_out_is_refused_and_not_repeated() -> None:
    options = {"ssl_keyfile": "key.pem", "ssl_keyfile_password": "word-of-mouth"}
    with pytest.raises(SettingsError, match=r"^http_options.ssl_keyfile_password: ") as caught:
        http_address({"applications": [{}], "http_options": options})
    assert "word-of-mouth" not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoints", "expected"),
    [
        (["127.0.0.1:2379"], True),
        (["http://localhost:2379"], True),
        (["127.0.0.1:2380"], False),
        (["127.0.0.1:2379", "10.0.0.1:2379"], False),
    ],
)
def test_only_the_default_etcd_may_be_ours(endpoints: list[str], expected: bool) -> None:
    assert may_start_etcd(parse_endpoints(endpoints)) is expected
