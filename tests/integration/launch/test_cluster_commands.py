"""The commands of cluster.yaml on loopback, in the order and the environment of ``ray up``.

Every machine of the cluster is a loopback address and a state folder here. SSH, rsync and the
installation are left out: the checkout's own environment takes the place of an installed one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, with_envs

CHECKOUT = Path(__file__).resolve().parents[3]
VENV = Path(sys.executable).parent.parent
NODE_TYPE = "local.cluster.node"
HEAD, PREFILL, DECODE = "127.0.0.10", "127.0.0.11", "127.0.0.21"
COMMAND_TIMEOUT_S = 90
GONE_TIMEOUT_S = 15.0

_NODES = """
import json, sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(json.dumps({node["NodeManagerAddress"]: node["Resources"] for node in ray.nodes()
                  if node["Alive"]}))
"""

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Process:
    """One process; its start, in clock ticks since boot, tells it from a later one."""

    pid: int
    started: int
    command: str


@dataclass
class Cluster:
    """One cluster.yaml, with everything it touches in one folder and on free ports."""

    root: Path
    ports: dict[str, int]
    config: dict[str, Any]
    started: list[str] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What all machines have in common; nothing of Ray's or Baton's leaks in from outside."""
        outer = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "BATON_"))
        }
        return {
            **outer,
            "HOME": str(self.root / "home"),
            "RAY_TMPDIR": str(self.root),
            "RAY_AUTH_MODE": "disabled",
            "BATON_SKIP_MODEL": "1",
            "BATON_GCS_PORT": str(self.ports["gcs"]),
            "BATON_ETCD_PORT": str(self.ports["etcd"]),
            "BATON_ETCD_PEER_PORT": str(self.ports["etcd_peer"]),
            "BATON_DASHBOARD_PORT": str(self.ports["dashboard"]),
            "BATON_RAY_CLIENT_PORT": str(self.ports["client"]),
            # The kernel picks the others: all machines share this one's ports.
            "BATON_RAY_PORTS": "--dashboard-agent-listen-port=0 --object-store-memory=80000000",
        }

    def state(self, address: str) -> Path:
        """The state folder of one machine."""
        return self.root / address

    def run(self, address: str, commands: Sequence[str], extra: Mapping[str, str]) -> None:
        """Runs commands one by one, as Ray's updater does, and gives up at the first that fails."""
        for command in with_envs(list(commands), dict(extra)):
            done = subprocess.run(
                ["bash", "-c", command],
                env={**self.environment, "BATON_STATE": str(self.state(address))},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=COMMAND_TIMEOUT_S,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

    def start_head(self) -> None:
        """Set-up and start of the head."""
        self.started.append(HEAD)
        self.run(HEAD, self.config["head_setup_commands"], {})
        self.run(
            HEAD,
            self.config["head_start_ray_commands"],
            {
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": HEAD,
                "RAY_NODE_TYPE_NAME": NODE_TYPE,
            },
        )

    def start_worker(self, address: str) -> None:
        """Set-up and start of one worker."""
        self.started.append(address)
        self.run(address, self.config["worker_setup_commands"], {"RAY_HEAD_IP": HEAD})
        self.run(
            address,
            self.config["worker_start_ray_commands"],
            {
                "RAY_HEAD_IP": HEAD,
                "RAY_CLOUD_INSTANCE_ID": address,
                "RAY_NODE_TYPE_NAME": NODE_TYPE,
                "RAY_CLOUD_INSTANCE_TYPE_NAME": NODE_TYPE,
            },
        )

    def stop(self, address: str) -> None:
        """The first start command, which is also the way to stop by hand."""
        kind = "head" if address == HEAD else "worker"
        self.run(address, self.config[f"{kind}_start_ray_commands"][:1], {})

    def nodes(self) -> dict[str, dict[str, float]]:
        """Living nodes and their resources, as a driver sees them."""
        done = subprocess.run(
            [sys.executable, "-c", _NODES, f"{HEAD}:{self.ports['gcs']}"],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
        )
        assert done.returncode == 0, done.stderr
        nodes: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
        return nodes

    def supervisor(self, address: str) -> int:
        """Process id of what holds a machine together."""
        return int(json.loads((self.state(address) / "node.json").read_text())["pid"])

    def processes(self, address: str) -> set[Process]:
        """A machine's supervisor and everything that descends from it."""
        return _family(self.supervisor(address))


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    # Not tmp_path: Ray's sockets need short paths.
    root = Path(tempfile.mkdtemp(prefix="bc-", dir="/tmp"))
    names = ("gcs", "etcd", "etcd_peer", "dashboard", "client")
    made = Cluster(root, dict(zip(names, _free_ports(len(names)), strict=True)), _config())
    _install(root / "home", made.config)
    try:
        yield made
    finally:
        for address in reversed(made.started):
            made.stop(address)
        shutil.rmtree(root)


def test_a_cluster_starts_with_its_roles_and_stops_whole(cluster: Cluster) -> None:
    cluster.start_head()
    cluster.start_worker(PREFILL)
    cluster.start_worker(DECODE)

    nodes = cluster.nodes()
    assert set(nodes) == {HEAD, PREFILL, DECODE}
    roles = {
        address: {name for name in resources if name.startswith("baton_")}
        for address, resources in nodes.items()
    }
    assert roles == {HEAD: set(), PREFILL: {"baton_prefill"}, DECODE: {"baton_decode"}}
    assert _etcd_is_healthy(HEAD, cluster.ports["etcd"])
    assert _etcd_is_healthy("127.0.0.1", cluster.ports["etcd"])

    head, prefill, decode = (cluster.processes(a) for a in (HEAD, PREFILL, DECODE))
    assert {"etcd", "gcs_server", "raylet"} <= {process.command for process in head}
    assert "raylet" in {process.command for process in prefill}
    # Ray's exporter of metrics would use a proxy even to its own machine.
    for process in head | prefill:
        if process.command == "raylet":
            assert "127.0.0.1" in psutil.Process(process.pid).environ()["no_proxy"].split(",")
    assert not {"etcd", "gcs_server"} & {process.command for process in prefill | decode}

    cluster.stop(PREFILL)
    _assert_gone(prefill)
    assert {"raylet"} <= {process.command for process in _living(decode)}
    assert {"etcd", "gcs_server", "raylet"} <= {process.command for process in _living(head)}
    cluster.stop(DECODE)
    cluster.stop(HEAD)
    _assert_gone(decode | head)
    cluster.stop(HEAD)  # nothing left to stop: no error


def test_no_way_of_ending_leaves_a_process_behind(cluster: Cluster) -> None:
    cluster.start_head()
    processes = cluster.processes(HEAD)
    os.kill(cluster.supervisor(HEAD), signal.SIGKILL)
    _assert_gone(processes)

    # `ray down` ends Ray's own processes on the head, and knows nothing of etcd.
    cluster.start_head()
    processes = cluster.processes(HEAD)
    (raylet,) = [process.pid for process in processes if process.command == "raylet"]
    os.kill(raylet, signal.SIGTERM)
    _assert_gone(processes)


def test_a_machine_without_a_role_says_so(cluster: Cluster) -> None:
    start = cluster.config["worker_start_ray_commands"]
    (command,) = with_envs(start[1:], {"RAY_CLOUD_INSTANCE_ID": "127.0.0.99"})
    done = subprocess.run(
        ["bash", "-c", command],
        env={**cluster.environment, "BATON_STATE": str(cluster.root / "none")},
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
    )
    assert done.returncode == 1
    assert "no role for '127.0.0.99'" in done.stderr
    assert not (cluster.root / "none").exists()


def test_a_taken_port_is_one_clear_failure(cluster: Cluster) -> None:
    taken = socket.create_server((HEAD, cluster.ports["etcd"]))
    with taken, pytest.raises(AssertionError) as caught:
        cluster.start_head()
    assert "address already in use" in str(caught.value)
    assert not (cluster.state(HEAD) / "node.json").exists()


def _config() -> dict[str, Any]:
    """cluster.yaml with loopback addresses written in, as its user writes in theirs."""
    text = (CHECKOUT / "cluster.yaml").read_text().replace("10.0.0.", "127.0.0.")
    config: dict[str, Any] = prepare_config(yaml.safe_load(text))
    return config


def _install(home: Path, config: dict[str, Any]) -> None:
    """Puts the checkout and its environment where cluster.yaml's file mounts and set-up would."""
    folder = home / "baton"
    folder.mkdir(parents=True)
    for name in ("Makefile", "serve_app", "deployments", "transfer"):
        (folder / name).symlink_to(CHECKOUT / name)
    (folder / ".venv").symlink_to(VENV)
    # Older than the environment, so that `make setup` finds nothing to do.
    (folder / "requirements").mkdir()
    for name in ("requirements/cpu.lock", "requirements/install.py", "pyproject.toml"):
        (folder / name).touch()
        os.utime(folder / name, (0, 0))
    # The head's autoscaler gets a cluster without workers: this test stands in for its SSH.
    provider = {**config["provider"], "worker_ips": []}
    node_types = {NODE_TYPE: {**config["available_node_types"][NODE_TYPE]}}
    node_types[NODE_TYPE].update(min_workers=0, max_workers=0)
    alone = {"provider": provider, "available_node_types": node_types, "max_workers": 0}
    bootstrap = {**config, **alone, "file_mounts": {}, "no_restart": False}
    (home / "ray_bootstrap_config.yaml").write_text(json.dumps(bootstrap))


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("0.0.0.0", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _etcd_is_healthy(host: str, port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{host}:{port}/health", timeout=5) as answer:
        return b"true" in answer.read()


def _process(pid: int) -> tuple[Process, int] | None:
    """A process and its parent's id; None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    head, _, tail = stat.rpartition(")")
    state, parent, *others = tail.split()
    if state == "Z":
        return None
    return Process(pid, int(others[17]), head.partition("(")[2]), int(parent)


def _family(root: int) -> set[Process]:
    seen = [
        found
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and (found := _process(int(entry.name))) is not None
    ]
    family = {process for process, _ in seen if process.pid == root}
    while True:
        pids = {process.pid for process in family}
        more = {process for process, parent in seen if parent in pids} - family
        if not more:
            return family
        family |= more


def _living(processes: Iterable[Process]) -> set[Process]:
    """Those that still run. A name may have changed: Ray's workers change theirs."""
    return {
        process
        for process in processes
        if (now := _process(process.pid)) is not None and now[0].started == process.started
    }


def _assert_gone(processes: Iterable[Process]) -> None:
    deadline = time.monotonic() + GONE_TIMEOUT_S
    while left := _living(processes):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
