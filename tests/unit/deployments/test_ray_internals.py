"""That Ray's private modules are those of the Ray that is installed."""

from __future__ import annotations

from importlib.metadata import version

from deployments.ray_internals import FITS_RAY


def test_the_private_modules_are_of_the_ray_that_is_here() -> None:
    release = ".".join(version("ray").split(".")[:2])
    assert release == FITS_RAY, "go through deployments/ray_internals with the new release"
