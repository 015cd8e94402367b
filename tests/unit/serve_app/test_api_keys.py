"""Keys of clients: where they are, which can match, and that a changed file is taken up."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from serve_app.api_keys import ApiKeys
from transfer.errors import ConfigurationError

OLD, NEW, OTHER = "old-key-0", "new-key-1", "other-key"


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def accepted(keys: ApiKeys) -> list[str]:
    return [key for key in (OLD, NEW, OTHER) if keys.match(key.encode()) is not None]


def replace(file: Path, text: str) -> None:
    """As programs that change secrets do it."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.replace(file)


def test_keys_come_from_all_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{OLD}\r\n\n{NEW}\n")
    monkeypatch.setenv("API_KEY_TEST", OTHER)
    keys = ApiKeys([f"file:{file}", "${API_KEY_TEST}"])
    keys.check()
    assert accepted(keys) == [OLD, NEW, OTHER]
    assert keys.match(OTHER.encode()) == OTHER.encode()
    assert keys.match(b"") is None


def test_none_are_false() -> None:
    assert not ApiKeys([])
    assert ApiKeys(["${SOME}"])


def test_what_travels_is_the_reference(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(OLD)
    sent = pickle.dumps(ApiKeys([f"file:{file}"]))
    assert OLD.encode() not in sent
    assert accepted(pickle.loads(sent)) == [OLD]


def followed(folder: Path) -> tuple[Clock, Path, ApiKeys]:
    """Keys of a file that has the old one and was read."""
    clock, file = Clock(), folder / "keys"
    file.write_text(OLD)
    keys = ApiKeys([f"file:{file}"], clock)
    assert accepted(keys) == [OLD]
    return clock, file, keys


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    clock, file, keys = followed(tmp_path)
    replace(file, f"{OLD}\n{NEW}")
    clock.now_s = 0.5
    assert accepted(keys) == [OLD]
    clock.now_s = 1.0
    assert accepted(keys) == [OLD, NEW]
    replace(file, NEW)
    clock.now_s = 2.0
    assert accepted(keys) == [NEW]


def rewrite(file: Path, text: str) -> None:
    """In place, with another time of change."""
    before = file.stat().st_ctime_ns
    file.write_text(text)
    while file.stat().st_ctime_ns == before:  # the kernel's clock has ticks
        os.utime(file)


@pytest.mark.parametrize("write", [replace, rewrite])
def test_a_file_of_the_same_size_and_time_is_read_again(
    tmp_path: Path, write: Callable[[Path, str], None]
) -> None:
    clock, file, keys = followed(tmp_path)
    before = file.stat()
    write(file, NEW)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    clock.now_s = 1.0
    assert accepted(keys) == [NEW]


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: replace(file, "short")])
def test_a_file_that_cannot_be_used_leaves_its_keys(
    tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    clock, file, keys = followed(tmp_path)
    assert callable(damage)
    damage(file)
    for second in (1.0, 2.0, 3.0):
        clock.now_s = second
        assert accepted(keys) == [OLD]
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"file:{file}" in line
    assert line.endswith("; its keys stay as they were")
    assert "short" not in line
    replace(file, NEW)
    clock.now_s = 4.0
    assert accepted(keys) == [NEW]


def test_a_file_is_read_once_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a chmod, or when files may be opened again: its time and size are the same."""
    clock, file, keys = followed(tmp_path)
    replace(file, NEW)

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as unreadable:
        unreadable.setattr(Path, "open", refused)
        for second in (1.0, 2.0, 3.0):
            clock.now_s = second
            assert accepted(keys) == [OLD]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "cannot be read: Permission denied; its keys stay" in line
    clock.now_s = 4.0
    assert accepted(keys) == [NEW]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "keys is empty"),
        ("\n \n", "keys is empty"),
        (" first-key", "blanks around it"),
        ("first-key ", "blanks around it"),
        ("first-key\n\tsecond-key\n", "key 2 of file:.* has blanks around it"),
        ("first key", "blanks or characters outside ASCII"),
        ("schlüssel", "blanks or characters outside ASCII"),
        ("first-\x07key", "blanks or characters outside ASCII"),
        ("first", "less than 8 characters"),
    ],
)
def test_a_key_that_can_never_match_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=words) as caught:
        ApiKeys([f"file:{file}"]).check()
    assert not text.strip() or text.strip() not in str(caught.value)


def test_a_placeholder_that_stands_for_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"\$\{NO_SUCH_KEY\}: there is no such"):
        ApiKeys(["${NO_SUCH_KEY}"]).check()
