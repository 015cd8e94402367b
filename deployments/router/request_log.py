"""What the router's log says of a request."""

from __future__ import annotations

import logging

from deployments.streams.generation import GenerationRequest

logger = logging.getLogger("ray.serve")  # Serve keeps this one's lines


def warn(request: GenerationRequest, text: str) -> None:
    """A warning with both names of a request: the client's, and that by which replicas know it."""
    own = request.body.request_id
    logger.warning("request %s (inside: %s): %s", request.name_in_logs, own, text)
