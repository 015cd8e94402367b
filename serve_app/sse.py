"""Server-sent events as OpenAI streams them."""

from __future__ import annotations

from collections.abc import AsyncIterator

DONE = "data: [DONE]\n\n"


async def as_events(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """Passes framed events on; ends with ``[DONE]`` exactly once."""
    done = False
    async for text in chunks:
        if text:
            done = text.endswith(DONE)
            yield text
    if not done:
        yield DONE
