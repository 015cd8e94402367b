"""Texts of others, made fit for a line of a log."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with a question mark for what ends a line, hides in it, or is no character."""
    return "".join(one if one.isprintable() else "?" for one in text)
