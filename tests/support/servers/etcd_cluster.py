"""Three etcd members on loopback, to be killed and paused one by one or together."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from tests.support.servers.etcd_server import EtcdServer

_MEMBERS = 3


class EtcdCluster:
    """An etcd of three members with their own data; a context manager. As :class:`EtcdServer`."""

    def __init__(self) -> None:
        self.members = [EtcdServer() for _ in range(_MEMBERS)]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for member in self.members:
            member.stop()

    @property
    def endpoints(self) -> list[str]:
        """``host:port`` of every member, for clients."""
        return [member.endpoint for member in self.members]

    def start(self) -> None:
        """Start every member on the data it has; returns when they answer."""
        for number in range(_MEMBERS):
            self.launch(number)
        for member in self.members:
            member.wait()

    def launch(self, number: int) -> None:
        """Start one member on the data it has; does not wait."""
        peers = ",".join(f"m{index}={member.peer_url}" for index, member in enumerate(self.members))
        self.members[number].launch("--name", f"m{number}", "--initial-cluster", peers)

    def kill(self) -> None:
        """SIGKILL all of them; the data stays."""
        for member in self.members:
            member.kill()

    def pause(self) -> None:
        """SIGSTOP all of them: connections stay open, nothing answers."""
        for member in self.members:
            member.pause()

    def resume(self) -> None:
        """SIGCONT."""
        for member in self.members:
            member.resume()
