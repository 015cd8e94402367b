"""Fault points: free when off, one thread of one process held when armed."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path

import pytest

from transfer import faults


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(faults, "_folder", tmp_path)
    return tmp_path


def _held(folder: Path, point: str) -> Path:
    path = folder / f"{point}@{os.getpid()}"
    deadline = time.monotonic() + 5
    while not path.exists():
        assert time.monotonic() < deadline, f"nobody reached {point}"
        time.sleep(0.002)
    return path


def test_off_without_the_variable() -> None:
    assert faults.VARIABLE not in os.environ
    assert faults._folder is None
    faults.reach("reader.reading")
    asyncio.run(faults.reach_async("reader.reading"))


def test_an_unarmed_point_holds_nobody(folder: Path) -> None:
    (folder / "another.point").touch()
    faults.reach("reader.reading")
    assert [path.name for path in folder.iterdir()] == ["another.point"]


def test_one_thread_is_held_until_it_is_let_go(folder: Path) -> None:
    (folder / "reader.reading").touch()
    threads = [
        threading.Thread(target=faults.reach, args=("reader.reading", "engine-1")) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    held = _held(folder, "reader.reading")
    assert held.read_text() == "engine-1"
    deadline = time.monotonic() + 5
    while sum(thread.is_alive() for thread in threads) > 1:
        assert time.monotonic() < deadline, "a second thread was held"
        time.sleep(0.002)
    held.unlink()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert not list(folder.iterdir())


def test_a_point_may_wait_for_somebody(folder: Path) -> None:
    (folder / "prefill.computing").write_text("killer")
    faults.reach("prefill.computing")
    faults.reach("prefill.computing", "somebody")
    thread = threading.Thread(target=faults.reach, args=("prefill.computing", "killer"))
    thread.start()
    _held(folder, "prefill.computing").unlink()
    thread.join(5)
    assert not thread.is_alive()


def test_coroutines_beside_a_held_one_go_on(folder: Path) -> None:
    (folder / "router.ticket").touch()

    async def others_go_on() -> None:
        first = asyncio.create_task(faults.reach_async("router.ticket"))
        await asyncio.sleep(0.02)
        await faults.reach_async("router.ticket")
        assert not first.done()
        _held(folder, "router.ticket").unlink()
        await asyncio.wait_for(first, 5)

    asyncio.run(others_go_on())


def test_nobody_is_held_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "LONGEST_HOLD_S", 0.02)
    (folder / "reader.reading").touch()
    faults.reach("reader.reading")
    assert (folder / f"reader.reading@{os.getpid()}").exists()
