"""The launcher leaves no process behind, and says in one line what went wrong."""

from __future__ import annotations

import contextlib
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import yaml

from tests.support.servers.certificates import Authority

STAND_IN = Path(__file__).with_name("launcher_stand_in.py")
REPOSITORY = Path(__file__).resolve().parents[3]


def start(folder: Path, scenario: str) -> subprocess.Popen[str]:
    # Every stand-in has the folder in its command line: that is how the test finds them all,
    # without trusting the code under test to know its own descendants.
    return subprocess.Popen(
        [sys.executable, str(STAND_IN), str(folder), scenario],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )


def processes_naming(folder: Path) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if str(folder).encode() in (entry / "cmdline").read_bytes():
                    found.add(int(entry.name))
    return found


def wait_until_none(folder: Path, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while left := processes_naming(folder):
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)


def read_until(stream: IO[str] | None, word: str, timeout_s: float = 20.0) -> str:
    assert stream is not None
    deadline = time.monotonic() + timeout_s
    text = ""
    while word not in text:
        assert select.select([stream], [], [], deadline - time.monotonic())[0], text
        line = stream.readline()
        assert line, f"the stream ended: {text}"
        text += line
    return text


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A stand-in launcher whose services are all up: two daemons and one in the foreground."""
    with start(tmp_path, "ok") as process:
        read_until(process.stdout, "ready")
        assert len(processes_naming(tmp_path)) == 5  # launcher, keeper and the three
        yield process
        for pid in processes_naming(tmp_path):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_everything(
    launcher: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
) -> None:
    launcher.send_signal(number)
    assert launcher.wait(10) == 130
    assert processes_naming(tmp_path) == set()


def test_sigkill_of_the_launcher_ends_everything(
    launcher: subprocess.Popen[str], tmp_path: Path
) -> None:
    launcher.kill()
    wait_until_none(tmp_path)


def test_sigkill_of_the_keeper_ends_everything(
    launcher: subprocess.Popen[str], tmp_path: Path
) -> None:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
    os.kill(int(children), signal.SIGKILL)
    assert launcher.wait(10) == 128 + signal.SIGKILL
    assert processes_naming(tmp_path) == set()


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("never", "error: never is not ready after 0 s: still waiting for Godot"),
        ("failing", "error: failing ended with code 7: no such device"),
        ("missing", "error: cannot start missing: [Errno 2] No such file or directory"),
    ],
)
def test_a_service_that_does_not_come_up_is_named(
    tmp_path: Path, scenario: str, message: str
) -> None:
    with start(tmp_path, scenario) as process:
        output, _ = process.communicate(timeout=30)
        assert process.returncode == 1
        assert message in output
    assert processes_naming(tmp_path) == set()


# --- what the command line says ------------------------------------------------------------------


def baton(
    *arguments: str,
    cache: Path | None,
    homeless: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Runs a command, perhaps as a user whom the system does not know, without a home."""
    gone = ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "BATON_CACHE") if homeless else ()
    env = {name: value for name, value in os.environ.items() if name not in gone}
    return subprocess.run(
        [*(homeless_user() if homeless else ()), sys.executable, "-m", "serve_app.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
        env=env if cache is None else {**env, "BATON_CACHE": str(cache)},
    )


def homeless_user() -> list[str]:
    """Before a command: a user of a number only, who may read what root may."""
    known = {user.pw_uid for user in pwd.getpwall()}
    number = next(number for number in range(65000, 60000, -1) if number not in known)
    may_read = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    command = ["setpriv", f"--reuid={number}", f"--regid={number}", "--clear-groups", *may_read]
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv")
    if subprocess.run([*command, sys.executable, "-c", ""], check=False).returncode != 0:
        pytest.skip("root may not give the right to read files here")
    return command


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def write_config(
    folder: Path, model: Path, *, http: dict[str, str] | None = None, **changes: Any
) -> Path:
    args: dict[str, Any] = {
        "model": {"id": "tiny", "source": str(model)},
        "discovery": {"kind": "etcd", "endpoints": ["127.0.0.1:2379"]},
    }
    document = {
        "http_options": {"host": "127.0.0.1", "port": closed_port(), **(http or {})},
        "applications": [
            {
                "name": "baton",
                "route_prefix": "/",
                "import_path": "serve_app.app:build_app",
                "args": {**args, **changes},
            }
        ],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.mark.parametrize("command", ["up", "check"])
def test_a_missing_config_is_one_line(tmp_path: Path, command: str) -> None:
    done = baton(command, str(tmp_path / "none.yaml"), cache=tmp_path)
    assert done.returncode == 1
    assert "there is no such file" in done.stdout + done.stderr
    assert len((done.stdout + done.stderr).splitlines()) == 1


@pytest.mark.parametrize("command", ["up", "check"])
def test_a_bad_setting_is_named_with_its_path(
    tmp_path: Path, tiny_model: Path, command: str
) -> None:
    config = write_config(tmp_path, tiny_model, prefill={"replicas": 0})
    done = baton(command, str(config), cache=tmp_path)
    assert done.returncode == 1
    assert "prefill.replicas" in done.stdout + done.stderr


@pytest.mark.parametrize("command", ["up", "check"])
def test_a_taken_port_is_named(tmp_path: Path, tiny_model: Path, command: str) -> None:
    config = write_config(tmp_path, tiny_model)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = baton(command, str(config), "--port", str(port), cache=tmp_path)
    assert done.returncode == 1
    assert f"port {port} on 127.0.0.1 is taken" in done.stdout + done.stderr


@pytest.mark.parametrize("command", ["up", "check"])
def test_a_certificate_that_cannot_be_used_is_named(
    tmp_path: Path, tiny_model: Path, command: str
) -> None:
    files = Authority(tmp_path, "ca").issue("locked", "127.0.0.1", password=b"secret")
    http = {"ssl_certfile": files.tls_cert, "ssl_keyfile": files.tls_key}
    config = write_config(tmp_path, tiny_model, http=http)
    done = baton(command, str(config), cache=tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert f"ssl_certfile '{files.tls_cert}' with ssl_keyfile '{files.tls_key}' cannot be" in said
    assert "the key without a password" in said


@pytest.mark.parametrize("command", ["up", "check"])
def test_a_missing_model_is_named(tmp_path: Path, command: str) -> None:
    config = write_config(tmp_path, tmp_path / "no-model")
    done = baton(command, str(config), cache=tmp_path)
    assert done.returncode == 1
    assert f"{tmp_path / 'no-model'} is no model folder" in done.stdout + done.stderr


@pytest.mark.parametrize("command", ["up", "check"])
def test_an_etcd_named_on_purpose_must_answer(
    tmp_path: Path, tiny_model: Path, command: str
) -> None:
    endpoint = f"127.0.0.1:{closed_port()}"
    discovery = {"kind": "etcd", "endpoints": [endpoint]}
    config = write_config(tmp_path, tiny_model, discovery=discovery)
    done = baton(command, str(config), cache=tmp_path)
    assert done.returncode == 1
    assert f"nothing answers at {endpoint}" in done.stdout + done.stderr


def test_check_of_a_good_config_succeeds(tmp_path: Path, tiny_model: Path) -> None:
    config = write_config(tmp_path, tiny_model)
    done = baton("check", str(config), cache=tmp_path)
    assert done.returncode == 0, done.stdout
    assert f"ok    model: {tiny_model}" in done.stdout


def test_the_demo_model_is_asked_for_when_it_is_missing(tmp_path: Path) -> None:
    config = write_config(tmp_path, Path("baton-demo"))
    done = baton("check", str(config), cache=tmp_path)
    assert done.returncode == 1
    assert "run `baton model`" in done.stdout


@pytest.mark.parametrize("command", ["up", "check"])
def test_a_user_without_a_home_is_told_in_one_line(tmp_path: Path, command: str) -> None:
    config = write_config(tmp_path, Path("baton-demo"))
    done = baton(command, str(config), cache=None, homeless=True)
    said = (done.stdout + done.stderr).splitlines()
    wrong = [line for line in said if not line.startswith(("ok ", "note "))]
    assert done.returncode == 1
    assert [line.partition(": ")[2] for line in wrong] == [
        "there is no home folder to keep the demo model in: set HOME, or BATON_CACHE to a folder"
    ]


def test_a_user_without_a_home_can_have_another_folder(tmp_path: Path, tiny_model: Path) -> None:
    demo, tiny = tmp_path / "demo", tmp_path / "tiny"
    for folder, model in ((demo, Path("baton-demo")), (tiny, tiny_model)):
        folder.mkdir()
        write_config(folder, model)
    asked = baton("check", str(demo / "config.yaml"), cache=tmp_path, homeless=True)
    assert f"the demo model is not in {tmp_path}" in asked.stdout
    done = baton("check", str(tiny / "config.yaml"), cache=tmp_path, homeless=True)
    assert done.returncode == 0, done.stdout + done.stderr
