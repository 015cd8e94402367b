"""Server-sent events as OpenAI streams them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

DONE = "data: [DONE]\n\n"


async def as_events(chunks: AsyncIterator[Any]) -> AsyncIterator[str]:
    """Frames what a decode replica streams; ends with ``[DONE]`` exactly once.

    Args:
        chunks: texts that are framed already, or lists of them.
    """
    done = False
    async for chunk in chunks:
        text = chunk if isinstance(chunk, str) else "".join(chunk)
        if text:
            done = text.endswith(DONE)
            yield text
    if not done:
        yield DONE
