"""``serve run CONFIG``, and a file that says how far it is.

The launcher runs ``python -m serve_app.launch.serve_driver CONFIG STATUS_FILE`` against a running
Ray. The command is Serve's own; a thread beside it asks Serve for the state of the application and
writes it down, until the application runs or cannot be deployed.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

_POLL_S: Final = 0.5


def write_status(path: Path, status: dict[str, Any]) -> None:
    """Replaces the status file in one step."""
    new = path.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_text(json.dumps(status))
    new.replace(path)


def read_status(path: Path) -> dict[str, Any]:
    """What was last written; empty if nothing was."""
    try:
        status: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return status


def _watch(path: Path) -> None:
    import ray
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    while True:
        time.sleep(_POLL_S)
        applications = serve.status().applications if ray.is_initialized() else {}
        missing, problems, failures = [], [], []
        for name, application in applications.items():
            deployments = application.deployments
            # A deployment's message is empty while all is well, else the last failed try.
            messages = [value.message for value in deployments.values() if value.message]
            if application.status == ApplicationStatus.DEPLOY_FAILED:
                failures += messages or [application.message]
            elif application.status != ApplicationStatus.RUNNING:
                missing += [key for key, value in deployments.items() if value.status != "HEALTHY"]
                missing += [] if deployments else [f"{name} to be built"]
                problems += messages
        if applications:
            status = {"missing": missing, "problems": problems, "failures": failures}
            write_status(path, status)
            if failures or not missing:
                return


def main() -> None:
    """The command line of this module."""
    from ray.serve.scripts import cli

    config, status_file = sys.argv[1:]
    threading.Thread(
        target=_watch, args=(Path(status_file),), name="baton-status", daemon=True
    ).start()
    cli(["run", config], prog_name="serve")


if __name__ == "__main__":
    main()
