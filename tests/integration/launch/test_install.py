"""``make setup`` finds torch's CPU build, wherever it is; package indexes on loopback stand in."""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sysconfig
import threading
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

INSTALL = Path(__file__).resolve().parents[3] / "requirements" / "install.py"
TORCH, CUDA_TORCH, OTHER = "2.13.0+cpu", "2.13.0", "1.0"


@dataclass
class Index:
    """A package index, its requests counted."""

    folder: Path
    url: str = ""
    asked: list[str] = field(default_factory=list)

    def add(self, name: str, version: str) -> Path:
        """A package with one module that says where it comes from."""
        place = self.folder / name
        place.mkdir(parents=True, exist_ok=True)
        wheel = place / f"{name}-{version}-py3-none-any.whl"
        about = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{name}.py", f"origin = {self.folder.name!r}\n")
            archive.writestr(
                f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            )
            archive.writestr(
                f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{about}/RECORD", "")
        return wheel


class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args: object, index: Index) -> None:
        self.index = index
        super().__init__(*args, directory=str(index.folder))  # type: ignore[arg-type]

    def log_request(self, code: object = "-", size: object = "-") -> None:
        self.index.asked.append(self.path)

    def log_error(self, *args: object) -> None:
        pass


@pytest.fixture
def indexes(tmp_path: Path) -> Iterator[tuple[Index, Index]]:
    """The one that pip is set up for, with torch's usual build, and PyTorch's."""
    servers = []
    made = []
    for name in ("general", "pytorch"):
        (tmp_path / name).mkdir()
        index = Index(tmp_path / name)
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Handler, index=index)
        )
        index.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        made.append(index)
    made[0].add("torch", CUDA_TORCH)
    made[0].add("other", OTHER)
    made[1].add("other", OTHER)
    yield made[0], made[1]
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """Where the packages of an environment go that has nothing but pip."""
    folder = tmp_path / "environment"
    venv.create(folder)
    packages = folder / "lib" / "python3.11" / "site-packages"
    (packages / "pip").symlink_to(Path(sysconfig.get_path("purelib")) / "pip")
    return packages


def install(
    general: Index, torch_index: str, installed: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    environment = installed.parents[2]
    lock = environment / "some.lock"
    lock.write_text(f"# pinned\nother=={OTHER}\ntorch=={TORCH}\n")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    env |= {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": general.url,
        "PIP_RETRIES": "0",
        "PIP_NO_CACHE_DIR": "1",
    }
    return subprocess.run(
        [
            str(environment / "bin" / "python"),
            str(INSTALL),
            str(lock),
            "--torch-index",
            torch_index,
        ],
        capture_output=True,
        text=True,
        env=env | more,
    )


def origin(installed: Path, name: str) -> str:
    return (installed / f"{name}.py").read_text().partition("= ")[2].strip().strip("'")


def test_what_pip_finds_by_itself_is_taken(
    tmp_path: Path, indexes: tuple[Index, Index], installed: Path
) -> None:
    general, pytorch = indexes
    pytorch.add("torch", TORCH)
    local = Index(tmp_path / "local")
    wheels = local.add("torch", TORCH).parent
    done = install(general, pytorch.url, installed, PIP_FIND_LINKS=str(wheels))
    assert done.returncode == 0, done.stderr
    assert (origin(installed, "torch"), origin(installed, "other")) == ("local", "general")
    assert pytorch.asked == []


def test_torch_alone_comes_from_its_own_index(
    indexes: tuple[Index, Index], installed: Path
) -> None:
    general, pytorch = indexes
    pytorch.add("torch", TORCH)
    done = install(general, pytorch.url, installed)
    assert done.returncode == 0, done.stderr
    assert (origin(installed, "torch"), origin(installed, "other")) == ("pytorch", "general")
    said = done.stdout.splitlines()[0]
    assert said == f"pip's own settings have no torch {TORCH}: taking it from {pytorch.url}"
    assert "Downloading" in done.stdout  # one sees that it goes on
    assert not [path for path in pytorch.asked if path.startswith("/other")]


@pytest.mark.parametrize("there", ["another version", "nothing", "no server"])
def test_what_is_nowhere_is_one_line(
    indexes: tuple[Index, Index], installed: Path, there: str
) -> None:
    general, pytorch = indexes
    if there == "another version":
        pytorch.add("torch", "2.12.0+cpu")
    address = "http://127.0.0.1:1" if there == "no server" else pytorch.url
    done = install(general, address, installed)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"torch {TORCH} is found neither by pip's own settings nor at {address} ("
    )
    assert line.endswith("make setup TORCH_INDEX=https://...")
    assert not (installed / "other.py").exists()
