"""Server-sent events as OpenAI streams them."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from deployments.streams.event_stream import EventStream
from deployments.streams.framing import DONE, error_event
from serve_app.edge.error_body import error_body

logger = logging.getLogger("ray.serve")  # Serve keeps this one's lines


async def as_events(stream: EventStream) -> AsyncGenerator[str, None]:
    """Passes framed events on, with one last event, also when the stream breaks; closes it."""
    done = False
    async with aclosing(stream):
        try:
            async for text in stream:
                if text:
                    done = text.endswith(DONE)
                    yield text
        except Exception as error:  # the status is sent: what is left is to say so in the stream
            logger.error("unexpected error in mid-stream", exc_info=error)
            body = error_body(500, "an unexpected error occurred; the server's log has it")
            yield error_event(body)
            done = False
    if not done:
        yield DONE
