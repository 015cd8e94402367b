"""Where the two ends of a connection run when they share a host.

Bytes that go over a socket of one host are copied twice, into the kernel and out of it. When the
two threads run on the same processor and no more is under way than its cache holds, the second
copy hardly goes to memory. So the owner's thread moves to the processor that its reader's request
came from, which Linux keeps for every socket (``SO_INCOMING_CPU``, socket(7)), and its send buffer
is small. Between hosts neither is done.
"""

from __future__ import annotations

import os

from transfer.transports.tcp_stream import TcpStream


class ProcessorFollower:
    """Keeps the calling thread where a stream's bytes come from, if both ends share a host.

    Only on processors that the thread was allowed when this was made. Use it on one thread.
    """

    def __init__(self, stream: TcpStream) -> None:
        self._stream = stream
        self._allowed = os.sched_getaffinity(0) if stream.same_host else set()
        self._at = -1

    def __repr__(self) -> str:
        return f"<ProcessorFollower at {self._at} of {sorted(self._allowed)}>"

    def follow(self) -> None:
        """Move if the last bytes came from another allowed processor."""
        if len(self._allowed) < 2:
            return
        processor = self._stream.incoming_processor()
        if processor != self._at and processor in self._allowed:
            os.sched_setaffinity(0, {processor})
            self._at = processor
