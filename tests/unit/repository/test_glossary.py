"""docs/glossary.md has one entry for each word, in order, and names in the code keep to it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()
FOLDERS = ("transfer", "deployments", "serve_app")

ONLY_IN = {
    "lane": "transfer/transports/rdma/",
    "passage": "deployments/router/",
    "piece": "transfer/connector/kv/pairing.py",
    "rail": "transfer/transports/rdma/",
    "slot": "transfer/connector/",
    "stretch": "transfer/connector/",
}
"""Words that mean one thing, and where it is. Names elsewhere take another word."""

NO_CLASS = {
    "Caller": "ReplicaClient for what the router calls, ReaderProcess for who connects",
    "Fence": "DeviceEvent; a fence is a ticket's number",
    "Outcome": "OfferOutcome or ReadOutcome",
    "Side": "Role",
}
"""Names that had two meanings, and what to call things instead."""

_ENTRY = re.compile(r"\n\n\*\*(.+?)\*\*")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_CLASS = re.compile(r"`([A-Z][a-z]+(?:[A-Z][A-Za-z]+)+)`")


def _sources() -> Iterator[tuple[str, ast.Module]]:
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield str(file.relative_to(ROOT)), ast.parse(file.read_text())


def _names_in(tree: ast.Module) -> set[str]:
    """Names that are given here; those that are only used may be another program's."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                names.add(name)
            case ast.AsyncFunctionDef(name=name) | ast.arg(arg=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                names.add(name)
    return {name for name in names if not name.startswith("__")}


@pytest.fixture(scope="module")
def names() -> dict[str, set[str]]:
    return {file: _names_in(tree) for file, tree in _sources()}


def _words(name: str) -> set[str]:
    """Singular and in small letters."""
    return {word.lower().removesuffix("s") for word in _WORD.findall(name)}


def test_entries_are_in_order_and_none_is_there_twice() -> None:
    # Hyphens and underscores count as blanks, as in any dictionary.
    words = [re.sub(r"[-_]", " ", word.lower()) for word in _ENTRY.findall(GLOSSARY)]
    assert words == sorted(set(words))


@pytest.mark.parametrize("word", ONLY_IN)
def test_a_word_of_one_place_is_in_no_name_elsewhere(word: str, names: dict[str, set[str]]) -> None:
    found = {
        file: [name for name in given if word.removesuffix("s") in _words(name)]
        for file, given in names.items()
        if not file.startswith(ONLY_IN[word])
    }
    assert not {file: given for file, given in found.items() if given}


@pytest.mark.parametrize("word", ONLY_IN)
def test_a_word_of_one_place_is_explained_and_used_there(
    word: str, names: dict[str, set[str]]
) -> None:
    assert re.search(rf"^(?:\*\*.*)?\*\*{word}\*\*", GLOSSARY, re.MULTILINE)
    given = [names[file] for file in names if file.startswith(ONLY_IN[word])]
    assert any(word in _words(name) for some in given for name in some)


def test_no_class_has_a_name_of_two_meanings(names: dict[str, set[str]]) -> None:
    assert not {
        file: given & NO_CLASS.keys() for file, given in names.items() if given & NO_CLASS.keys()
    }


def test_classes_that_the_glossary_names_are_there() -> None:
    classes = {
        node.name
        for _, tree in _sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    assert set(_CLASS.findall(GLOSSARY)) <= classes
