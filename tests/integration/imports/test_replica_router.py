"""The router's class as Serve loads it, in another process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from ray.serve.config import RequestRouterConfig

from deployments.replicas.replica_router import HintedRouter


def test_the_router_knows_hints_where_serve_loads_it(tmp_path: Path) -> None:
    """Serve sends the class by value: what it compares with must be what callers import."""
    config = RequestRouterConfig(request_router_class=HintedRouter)
    sent = tmp_path / "router"
    sent.write_bytes(config.get_serialized_request_router_cls() or b"")
    program = (
        "import sys\n"
        "from ray import cloudpickle\n"
        "router = cloudpickle.loads(open(sys.argv[1], 'rb').read())\n"
        "from deployments.route_hint import RouteHint\n"
        "assert router.choose_replicas.__globals__['RouteHint'] is RouteHint\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(sent)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
