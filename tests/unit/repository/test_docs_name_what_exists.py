"""Pages name files, folders, modules and headings that are there.

Decision records are left out of all but links: they say what was, and are not rewritten.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
RECORDS = sorted((ROOT / "docs" / "adr").glob("*.md"))
CODE = ("bench", "deployments", "serve_app", "tests", "transfer")
FOLDERS = (*CODE, "docs", "examples", "requirements")
NOT_OURS = {
    # What the page has its reader write.
    ("docs/first-change.md", "transfer/transports/efa"),
    # Of another project.
    ("docs/from-mooncake-demo.md", "toy_proxy_server.py"),
}

_BLOCK = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"`([\w.-]+(?:/[\w.-]+)*/?)`")
_FILE = re.compile(r"\.(?:md|py|sh|toml|yaml)$")
_DOTTED = re.compile(rf"`((?:{'|'.join(CODE)})\.\w+(?:\.\w+)+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def _named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _text(page: Path) -> str:
    return _BLOCK.sub("", page.read_text())


def _files() -> list[str]:
    """Every file and folder that a page may name, by its path from the root, each after a slash."""
    found = [f"/{entry.name}" for entry in ROOT.iterdir()]
    for folder in FOLDERS:
        found += [f"/{entry.relative_to(ROOT)}" for entry in (ROOT / folder).rglob("*")]
    return found


@pytest.fixture(scope="module")
def files() -> list[str]:
    return _files()


def _exists(name: str, files: list[str]) -> bool:
    """Whether it is a path from the root; if it begins otherwise, whether it is the end of one."""
    if "/" in name and name.split("/")[0] in FOLDERS:
        return (ROOT / name).exists()
    return any(path.endswith(f"/{name}") for path in files)


def _paths_in(page: Path) -> set[str]:
    """Names of files, and of folders from the root on."""
    names = {name.rstrip("/") for name in _NAME.findall(_text(page))}
    return {
        name
        for name in names
        if _FILE.search(name) or ("/" in name and name.split("/")[0] in FOLDERS)
    }


@pytest.mark.parametrize("page", PAGES, ids=_named)
def test_files_and_folders_that_a_page_names_are_there(page: Path, files: list[str]) -> None:
    missing = [
        name
        for name in sorted(_paths_in(page))
        if not _exists(name, files) and (_named(page), name) not in NOT_OURS
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=_named)
def test_modules_that_a_page_names_are_there(page: Path) -> None:
    missing = []
    for name in sorted(set(_DOTTED.findall(_text(page)))):
        path = ROOT / name.replace(".", "/")
        # The last part may be what a module holds.
        candidates = (path.with_suffix(".py"), path, path.parent.with_suffix(".py"))
        if not any(candidate.exists() for candidate in candidates):
            missing.append(name)
    assert not missing


def _anchors(page: Path) -> set[str]:
    """What headings can be linked by: small letters, hyphens for blanks, no other punctuation."""
    return {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in _HEADING.findall(_text(page))
    }


@pytest.mark.parametrize("page", [*PAGES, *RECORDS], ids=_named)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    broken = []
    for link in _LINK.findall(_text(page)):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert not broken


def test_what_is_not_ours_is_named_where_it_says() -> None:
    assert {(page, name) for page, name in NOT_OURS if name in _paths_in(ROOT / page)} == NOT_OURS
