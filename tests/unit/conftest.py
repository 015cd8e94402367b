"""Hypothesis in unit tests: few examples, because there are many tests, and no deadline.

A deadline fails tests when other processes keep the machine's cores busy, which says nothing about
the code. ``--hypothesis-profile=thorough`` searches longer.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("unit", max_examples=50, deadline=None)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile("unit")
