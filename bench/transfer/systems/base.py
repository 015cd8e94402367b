"""What a system has to be to take part: two ends, each in a process of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from bench.transfer.cases import Case
from bench.transfer.memory import Pool, Scatter


class OwnerEnd(ABC):
    """The process whose memory is read. Everything but ``open`` comes from one thread; whatever
    serves readers runs on threads of its own."""

    scattered = True
    """False for systems that move one run of memory only."""

    @abstractmethod
    def open(self, pool: Pool, scratch: str) -> dict[str, Any]:
        """Register the pool and listen; gives what the reader must know, in JSON's types.

        Args:
            scratch: an empty folder that both ends see.
        """

    def offer(self, where: Scatter, reads: int) -> dict[str, Any]:
        """Allow the blocks to be read so often; gives what the reader must show. Not timed."""
        return {}

    @abstractmethod
    def close(self) -> None: ...


class ReaderEnd(ABC):
    """The process that reads. All calls come from one thread."""

    scattered = True

    @abstractmethod
    def open(self, pool: Pool, scratch: str, owner: dict[str, Any]) -> None:
        """Register the pool and connect.

        Args:
            owner: what the owner's ``open`` gave, and its pool's address as ``base``; empty for a
                system of one process.
        """

    @abstractmethod
    def load(self, case: Case, where: Scatter) -> None:
        """Prepare descriptors in the form that the system takes. Not timed."""

    def ready(self, offer: dict[str, Any]) -> None:
        """Take what the owner's ``offer`` gave. Not timed."""
        return

    def disconnect(self) -> None:
        """Let the next read be the first over its connection. Not timed.

        Raises:
            NotImplementedError: not this system.
        """
        raise NotImplementedError

    @abstractmethod
    def read(self) -> None:
        """One read of all blocks, complete when it returns. This is what is timed.

        Raises:
            Exception: any; its text goes to the report.
        """

    def drop(self) -> None:
        """Give memory other than the pool back."""
        return

    @abstractmethod
    def close(self) -> None: ...
