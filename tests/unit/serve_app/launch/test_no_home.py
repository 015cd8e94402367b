"""Users without a home folder, as in containers that run under any number, are told what to set."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from serve_app import cli
from serve_app.launch import cluster_node


@pytest.fixture(autouse=True)
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "BATON_CACHE", "XDG_CACHE_HOME", "BATON_STATE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_the_demo_model_has_no_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["model"]) == 1

    said = capsys.readouterr().err
    assert said.startswith("baton: there is no home folder to keep the demo model in: set HOME")
    assert "BATON_CACHE" in said


def test_a_node_has_no_place_for_its_state(capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster_node.main(["stop"]) == 1

    said = capsys.readouterr().err
    assert said.startswith("there is no home folder to keep state in: set HOME, or BATON_STATE")


def test_folders_that_are_named_are_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BATON_STATE", str(tmp_path))

    assert cluster_node.main(["stop"]) == 0
