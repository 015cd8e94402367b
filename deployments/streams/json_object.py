"""JSON that another program wrote."""

from __future__ import annotations

import json
from typing import Any

from deployments.errors import AnswerUnreadable


def json_object(text: str | bytes) -> dict[str, Any]:
    """The object that an answer is.

    Raises:
        AnswerUnreadable: it is none.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AnswerUnreadable(f"an answer is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise AnswerUnreadable("an answer is not a JSON object")
    return content
