"""What is used of Ray's private modules, which may change with any release of Ray.

Nothing else of Baton imports ``ray.llm._internal`` or ``ray.serve._private`` (ruff checks): with
another Ray, look here first. A module for each kind of process, so that none imports what only
others need.
"""

from __future__ import annotations

from typing import Final

FITS_RAY: Final = "2.60"
"""The release whose private modules these are."""
