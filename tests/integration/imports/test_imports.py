"""What is imported where nobody needs it: each in a process that has imported nothing yet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        ("transfer.discovery, transfer.discovery.etcd", "pyetcd grpc torch ray vllm"),
        ("transfer.connector", "torch ray vllm"),
        ("serve_app.config", "torch ray vllm"),
        ("serve_app.launch.surroundings", "torch ray vllm"),
        ("serve_app.proxy.command", "torch ray vllm"),
        ("serve_app.vllm_serve", "torch ray vllm"),
    ],
)
def test_a_package_is_imported_without(modules: str, without: str) -> None:
    code = f"import sys, {modules}; print([m for m in {without.split()} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
