"""Serve's config files: where the settings of an application are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from serve_app.config import Settings, SettingsError, parse_settings

IMPORT_PATH: Final = "serve_app.app:build_app"
"""By which an application in such a file is Baton."""


def load_document(path: Path | str) -> dict[str, Any]:
    """Reads a Serve config file.

    Raises:
        SettingsError: not there, not YAML, or not a Serve config with Baton in it.
    """
    file = Path(path)
    try:
        document = yaml.safe_load(file.read_text())
    except FileNotFoundError as error:
        raise SettingsError(f"{file}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{file}: is not YAML: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("applications"), list):
        raise SettingsError(f"{file}: a Serve config with a list `applications` is expected")
    if _application(document) is None:
        raise SettingsError(f"{file}: no application has import_path: {IMPORT_PATH}")
    return document


def load_settings(path: Path | str) -> Settings:
    """The settings in a Serve config file.

    Raises:
        SettingsError: as :func:`load_document` and :func:`parse_settings`.
    """
    application = _application(load_document(path))
    return parse_settings((application or {}).get("args"))


def _application(document: dict[str, Any]) -> dict[str, Any] | None:
    for application in document["applications"]:
        if isinstance(application, dict) and application.get("import_path") == IMPORT_PATH:
            return application
    return None
