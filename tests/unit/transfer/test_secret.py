"""A secret is referred to, read where it is used, and shown by nothing that goes wrong."""

from __future__ import annotations

import os
import pickle
import traceback
from pathlib import Path

import pytest

from transfer.errors import ConfigurationError
from transfer.secret import SecretReference

VARIABLE = "BATON_TEST_SECRET"


def test_the_environment_is_read_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = SecretReference.parse("${BATON_TEST_SECRET}")
    for value in ("hush", "hush again"):
        monkeypatch.setenv(VARIABLE, value)
        assert reference.read() == value


def test_a_file_is_read_when_asked_without_its_last_line_end(tmp_path: Path) -> None:
    file = tmp_path / "password"
    reference = SecretReference.parse(f"file:{file}")
    for text, secret in (("hush", "hush"), ("hush\n", "hush"), (" a b \r\n", " a b ")):
        file.write_bytes(text.encode())
        assert reference.read() == secret


@pytest.mark.parametrize("text", ["${A}", "${_a9}", "file:/run/secrets/key"])
def test_a_reference_gives_its_text_back(text: str) -> None:
    reference = SecretReference.parse(text)
    assert str(reference) == text
    assert pickle.loads(pickle.dumps(reference)) == reference


@pytest.mark.parametrize(
    "text",
    ["hush", "", "$HUSH", "${HUSH", "${}", "${9HUSH}", "x${HUSH}", "${HUSH} ", "env:HUSH", "/hush"],
)
def test_what_is_no_reference_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        SecretReference.parse(text)
    assert caught.value.message == (
        "a secret is not written out here; write where it is: "
        "${NAME} for an environment variable, or file:/path"
    )


@pytest.mark.parametrize("text", ["file:", "file:key", "file:~/key", "file:/a\0b"])
def test_a_file_has_an_absolute_path(text: str) -> None:
    with pytest.raises(ConfigurationError, match="absolute path"):
        SecretReference.parse(text)


def test_what_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    file = tmp_path / "key"
    reference = SecretReference.parse(f"file:{file}")
    with pytest.raises(ConfigurationError, match=r"\$\{BATON_TEST_SECRET\}: there is no such"):
        SecretReference.parse("${BATON_TEST_SECRET}").read()
    with pytest.raises(ConfigurationError, match=f"{file} cannot be read: No such file"):
        reference.read()
    for contents, words in (
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"x" * 70000, "longer"),
        (b"hush\xff", "is not text in UTF-8"),
    ):
        file.write_bytes(contents)
        with pytest.raises(ConfigurationError, match=words) as caught:
            reference.read()
        assert "hush" not in "".join(traceback.format_exception(caught.value))


def test_an_environment_that_is_not_text_is_refused_where_it_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Python has such bytes as surrogates, which nothing that sends them can encode.
    monkeypatch.setenv(VARIABLE, os.fsdecode(b"hush\xff"))
    with pytest.raises(ConfigurationError, match=r"_SECRET\} is not text in UTF-8") as caught:
        SecretReference.parse("${BATON_TEST_SECRET}").read()
    assert "hush" not in "".join(traceback.format_exception(caught.value))
