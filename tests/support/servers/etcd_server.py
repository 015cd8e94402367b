"""A real etcd for a test: own ports, own data, gone with the test."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import pyetcd

from serve_app.launch.etcd_binary import find_etcd
from tests.support.processes.lifeline import start_tied

START_TIMEOUT_S = 15.0


class EtcdServer:
    """One etcd member on loopback; a context manager.

    Raises:
        RuntimeError: it did not come up; carries the end of its log.
    """

    def __init__(self, *extra_arguments: str) -> None:
        self._extra_arguments = extra_arguments
        self._folder = Path(tempfile.mkdtemp(prefix="baton-etcd-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._ports = _free_ports(2)

    def __repr__(self) -> str:
        return f"<EtcdServer {self.endpoint}>"

    def __enter__(self) -> Self:
        for attempt in range(3):
            try:
                self.start()
            except RuntimeError:
                # Somebody else may have taken a port in between; what it left is of no use.
                if attempt == 2:
                    self.stop()
                    raise
                self.kill()
                self._ports = _free_ports(2)
                shutil.rmtree(self._folder / "data", ignore_errors=True)
            else:
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """``host:port`` for clients."""
        return f"127.0.0.1:{self._ports[0]}"

    @property
    def peer_url(self) -> str:
        """Where other members reach it."""
        return f"http://127.0.0.1:{self._ports[1]}"

    def start(self) -> None:
        """Start on the same data and ports as before; returns when it answers."""
        self.launch()
        self.wait()

    def launch(self, *extra_arguments: str) -> None:
        """Start without waiting; what the arguments say comes before what others said."""
        client, peer = (f"http://127.0.0.1:{port}" for port in self._ports)
        command = [
            *(str(find_etcd()), "--name", "test", "--data-dir", str(self._folder / "data")),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"test={peer}", "--unsafe-no-fsync", "--log-level", "warn"),
            *self._extra_arguments,
            *extra_arguments,
        ]
        with open(self._folder / "log", "ab") as output:
            self._process = start_tied(command, output)

    def wait(self) -> None:
        """Return when it answers, as a member of a majority."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if (
                self._process is None
                or self._process.poll() is not None
                or time.monotonic() > deadline_s
            ):
                log = (self._folder / "log").read_text(errors="replace")[-2000:]
                self.kill()
                raise RuntimeError(f"etcd did not start:\n{log}")
            time.sleep(0.05)

    def enable_users(self, password: str) -> None:
        """From now on, etcd answers users only: baton, below ``/baton/``; guest, nowhere; root.

        Args:
            password: of all three.
        """
        rpc = pyetcd.etcdrpc
        with pyetcd.client(host="127.0.0.1", port=self._ports[0], timeout=5) as client:
            auth = client.authstub
            for user in ("root", "baton", "guest"):
                auth.UserAdd(rpc.AuthUserAddRequest(name=user, password=password))
            for role in ("root", "workers"):
                auth.RoleAdd(rpc.AuthRoleAddRequest(name=role))
            permission = {"permType": 2, "key": b"/baton/", "range_end": b"/baton0"}
            auth.RoleGrantPermission(
                rpc.AuthRoleGrantPermissionRequest(name="workers", perm=permission)
            )
            auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user="root", role="root"))
            auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user="baton", role="workers"))
            auth.AuthEnable(rpc.AuthEnableRequest())

    def stop(self) -> None:
        """End it and delete its data. Idempotent."""
        if self._process is not None and self._process.poll() is None:
            self.resume()
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL; the data stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Kill it and start it on the same data and ports."""
        self.kill()
        self.start()

    def wipe(self) -> None:
        """Kill it and start it on the same ports with nothing in it."""
        self.kill()
        shutil.rmtree(self._folder / "data")
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None:
            raise RuntimeError("etcd is not running")
        self._process.send_signal(number)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._ports[0], timeout=1)
        try:
            connection.request("GET", "/health")
            return b"true" in connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()
