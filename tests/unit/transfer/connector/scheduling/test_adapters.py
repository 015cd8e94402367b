"""Adapters are told apart by what is in them, whatever they are called and wherever they lie."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.config.lora import LoRAConfig
from vllm.lora.request import LoRARequest

from tests.support.models.tiny_adapter import make_tiny_adapter
from transfer.connector.scheduling import adapters
from transfer.connector.scheduling.adapters import AdapterFingerprints


def fingerprint(folder: Path, config: LoRAConfig | None = None, **request: Any) -> str | None:
    """What an engine that sees the adapter for the first time calls it."""
    return AdapterFingerprints(config or LoRAConfig())(loaded(folder, **request))


def loaded(folder: Path, name: str = "pirate", number: int = 1, **request: Any) -> LoRARequest:
    return LoRARequest(name, number, str(folder), **request)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path) -> None:
    """Changes one byte in the middle."""
    path = folder / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.fixture
def pirate(tmp_path: Path) -> Path:
    return make_tiny_adapter(tmp_path / "pirate", seed=1)


def test_name_and_place_do_not_matter(pirate: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(pirate, tmp_path / "copy")
    edit_config(copy, base_model_name_or_path="/elsewhere")

    assert fingerprint(pirate) == fingerprint(copy, name="buccaneer", number=7)
    assert len(fingerprint(pirate) or "") == 32


@pytest.mark.parametrize(
    "change",
    [
        edit_weights,
        lambda folder: edit_config(folder, lora_alpha=32),
        lambda folder: edit_config(folder, use_rslora=True),
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
    ],
    ids=["weights", "scale", "rank-stabilized", "format"],
)
def test_other_content_is_another_adapter(
    pirate: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    other = shutil.copytree(pirate, tmp_path / "other")
    change(other)

    assert None is not fingerprint(pirate) != fingerprint(other) is not None


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(lora_dtype="float16"),
        LoRAConfig(target_modules=["q_proj"]),
        LoRAConfig(enable_tower_connector_lora=True),
        LoRAConfig(enable_moe_shared_loras=True),
        LoRAConfig(enable_mixed_moe_lora_format=True),
    ],
)
def test_loaded_otherwise_it_is_another_adapter(pirate: Path, config: LoRAConfig) -> None:
    assert fingerprint(pirate) != fingerprint(pirate, config)


def test_every_setting_of_adapters_is_known_to_change_kv_or_not() -> None:
    # What a new setting does to KV has to be looked up before it is put into one of the two.
    change_kv = {
        *("lora_dtype", "target_modules", "enable_tower_connector_lora"),
        *("enable_mixed_moe_lora_format", "enable_moe_shared_loras"),
    }
    speed_and_room = {
        *("max_lora_rank", "max_loras", "max_cpu_loras", "fully_sharded_loras"),
        "specialize_active_lora",
        "default_mm_loras",  # The request brings the adapter that was chosen.
    }

    assert set(LoRAConfig.__dataclass_fields__) == change_kv | speed_and_room
    assert set(LoRARequest.__struct_fields__) == {
        *("lora_path", "tensorizer_config_dict", "load_inplace", "is_3d_lora_weight"),
        *("lora_name", "lora_int_id", "base_model_name"),
    }


def test_it_is_read_once(pirate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    add = adapters._add

    def add_and_note(digest: Any, path: Path) -> None:
        read.append(path)
        add(digest, path)

    monkeypatch.setattr(adapters, "_add", add_and_note)
    fingerprints = AdapterFingerprints(LoRAConfig())

    assert fingerprints(loaded(pirate)) == fingerprints(loaded(pirate)) == fingerprint(pirate)
    assert len(read) == 4


def test_what_was_loaded_before_its_files_changed_is_not_known(
    pirate: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fingerprints = AdapterFingerprints(LoRAConfig())
    before = fingerprints(loaded(pirate))
    time.sleep(0.02)
    edit_weights(pirate)

    assert before is not None
    assert fingerprints(loaded(pirate)) is fingerprints(loaded(pirate)) is None
    assert caplog.text.count("changed since it was loaded") == 1
    # Nor can it be when it is loaded anew: before the change, or after it?
    assert fingerprints(loaded(pirate, number=2)) is None


def overwrite(folder: Path) -> None:
    shutil.copy(folder.parent / "rival" / "adapter_model.safetensors", folder)


def overwrite_and_keep_its_time(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    before = path.stat()
    overwrite(folder)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def move_another_there(folder: Path) -> None:
    folder.rename(folder.parent / "away")
    (folder.parent / "rival").rename(folder)


# ``served`` leads to the folder by way of a link in the middle of a path and a second one.
CHAIN = (("served", "..data/adapter"), ("..data", "now"), ("now", "versions"))


@pytest.mark.parametrize(
    "change", [overwrite, overwrite_and_keep_its_time, move_another_there, edit_weights]
)
def test_what_changed_before_the_first_prompt_may_have_been_loaded_before(
    pirate: Path, change: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    make_tiny_adapter(pirate.parent / "rival", seed=2)
    fingerprints = AdapterFingerprints(LoRAConfig())
    time.sleep(0.02)  # File systems take their time from the last tick of the kernel's clock.
    change(pirate)

    assert fingerprints(loaded(pirate)) is fingerprints(loaded(pirate)) is None
    assert caplog.text.count("changed after this engine started") == 1
    assert fingerprint(pirate) is not None  # an engine that starts now


@pytest.mark.parametrize("relinked", [None, "served", "..data", "now"])
def test_a_link_that_leads_elsewhere_is_a_change(pirate: Path, relinked: str | None) -> None:
    folder = pirate.parent
    (folder / "versions").mkdir()
    pirate.rename(folder / "versions" / "adapter")
    for link, target in CHAIN:
        (folder / link).symlink_to(target)
    fingerprints = AdapterFingerprints(LoRAConfig())
    time.sleep(0.02)
    for link, target in CHAIN:
        if link == relinked:
            (folder / link).unlink()
            (folder / link).symlink_to(target)

    named = fingerprints(loaded(folder / "served"))
    assert named == (None if relinked else fingerprint(folder / "versions" / "adapter"))


def test_what_changes_while_it_is_read_is_not_known(
    pirate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = adapters._add

    def add_late(digest: Any, path: Path) -> None:
        time.sleep(0.02)
        edit_weights(pirate)
        add(digest, path)

    fingerprints = AdapterFingerprints(LoRAConfig())
    monkeypatch.setattr(adapters, "_add", add_late)
    assert fingerprints(loaded(pirate)) is None


def test_same_size_and_time_do_not_hide_another_file(pirate: Path) -> None:
    fingerprints = AdapterFingerprints(LoRAConfig())
    fingerprints(loaded(pirate))
    path = pirate / "adapter_model.safetensors"
    status, new = path.stat(), pirate / "new"
    shutil.copy(path, new)
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.rename(path)

    assert fingerprints(loaded(pirate)) is None


def test_loaded_in_place_it_is_read_again(pirate: Path) -> None:
    fingerprints = AdapterFingerprints(LoRAConfig())
    before = fingerprints(loaded(pirate))
    edit_weights(pirate)
    after = fingerprints(loaded(pirate, load_inplace=True))

    assert None is not after != before
    assert fingerprints(loaded(pirate, load_inplace=True)) == after == fingerprint(pirate)


@pytest.mark.parametrize(
    "broken",
    [
        lambda folder: shutil.rmtree(folder),
        lambda folder: (folder / "adapter_config.json").unlink(),
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        lambda folder: (folder / "adapter_config.json").write_text("[]"),
        lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff"),
    ],
)
def test_what_cannot_be_read_has_none_and_a_line_in_the_log(
    pirate: Path, broken: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    broken(pirate)
    fingerprints = AdapterFingerprints(LoRAConfig())

    assert fingerprints(loaded(pirate)) is fingerprints(loaded(pirate)) is None
    assert caplog.text.count("prompts with adapter pirate are not handed over") == 1


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("look", ["is_dir", "is_file", "stat"])
def test_a_folder_that_cannot_be_looked_at_now_can_be_later(
    pirate: Path,
    look: str,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # As on a network's file system that stumbles; pathlib passes these errors on.
    def fail(path: Path, **_: Any) -> Any:
        raise OSError(number, os.strerror(number), str(path))

    fingerprints = AdapterFingerprints(LoRAConfig())
    with monkeypatch.context() as patch:
        patch.setattr(Path, look, fail)
        assert fingerprints(loaded(pirate)) is fingerprints(loaded(pirate)) is None
    assert caplog.text.count("prompts with adapter pirate are not handed over") == 1
    assert os.strerror(number) in caplog.text
    first = fingerprints(loaded(pirate))
    assert first == fingerprint(pirate) is not None

    with monkeypatch.context() as patch:
        patch.setattr(Path, look, fail)
        assert fingerprints(loaded(pirate)) is None
    assert fingerprints(loaded(pirate)) == first


def test_what_changed_and_changed_back_is_not_known(pirate: Path) -> None:
    # The engine may have dropped it and loaded the other one in between.
    fingerprints = AdapterFingerprints(LoRAConfig())
    fingerprints(loaded(pirate))
    path, away = pirate / "adapter_config.json", pirate / "away"
    path.rename(away)
    shutil.copy(away, path)
    assert fingerprints(loaded(pirate)) is None
    away.rename(path)
    assert fingerprints(loaded(pirate)) is None


@pytest.mark.parametrize(
    "path", ["someone/no-such-adapter", "no such adapter", "a\0b", "~nobody/x"]
)
def test_a_repository_that_is_not_here_has_none(path: str) -> None:
    assert AdapterFingerprints(LoRAConfig())(LoRARequest("pirate", 1, path)) is None


def test_what_is_streamed_in_from_elsewhere_has_none(pirate: Path) -> None:
    assert fingerprint(pirate, tensorizer_config_dict={"tensorizer_dir": "s3://x"}) is None


def test_only_so_many_are_remembered(pirate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "MAX_ADAPTERS", 2)
    fingerprints = AdapterFingerprints(LoRAConfig())
    for number in range(1, 6):
        fingerprints(loaded(pirate, number=number))

    assert [key[0] for key in fingerprints._known] == [4, 5]
