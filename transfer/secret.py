"""Secrets by reference: a setting says where a secret is, never what it is.

Settings travel: into arguments of processes, Ray's controller, its logs and its dashboard. A
reference may be seen there; the secret is read by the process that uses it, when it uses it.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from transfer.errors import ConfigurationError, Phase

HOW_TO_WRITE = "${NAME} for an environment variable, or file:/path"

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_FILE = "file:"
_MAX_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class SecretReference:
    """Where a secret is; ``str()`` gives the text back.

    Attributes:
        variable: name of the environment variable, or empty.
        file: absolute path of the file, or None.
    """

    variable: str
    file: Path | None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``${NAME}`` or ``file:/path``.

        Raises:
            ConfigurationError: it is neither. The message does not repeat it: it may be a secret.
        """
        if match := _VARIABLE.fullmatch(text):
            return cls(match[1], None)
        if text.startswith(_FILE):
            file = Path(text.removeprefix(_FILE))
            if not file.is_absolute() or "\0" in text:
                raise _bad("a file is named by its absolute path, as in file:/run/secrets/key")
            return cls("", file)
        raise _bad(f"a secret is not written out here; write where it is: {HOW_TO_WRITE}")

    def __str__(self) -> str:
        return f"${{{self.variable}}}" if self.file is None else f"{_FILE}{self.file}"

    def read(self) -> str:
        """The secret as it is now, without the line end that editors put behind it.

        Raises:
            ConfigurationError: it is not there, or empty; names the place.
        """
        text = self._environment() if self.file is None else self._contents(self.file)
        secret = text.rstrip("\r\n")
        if not secret:
            raise _bad(f"{self} is empty")
        return secret

    def _environment(self) -> str:
        text = os.environ.get(self.variable)
        if text is None:
            raise _bad(f"{self}: there is no such environment variable")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise self._not_utf8() from None
        return text

    def _contents(self, file: Path) -> str:
        try:
            with file.open("rb") as opened:
                data = opened.read(_MAX_BYTES + 1)
        except OSError as error:
            raise _bad(f"{self} cannot be read: {error.strerror}") from error
        if len(data) > _MAX_BYTES:
            raise _bad(f"{self} is longer than {_MAX_BYTES} bytes")
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self._not_utf8() from None

    def _not_utf8(self) -> ConfigurationError:
        """Raised ``from None``: the text of what Python raises shows the secret."""
        return _bad(f"{self} is not text in UTF-8")


def _bad(message: str) -> ConfigurationError:
    return ConfigurationError(message, phase=Phase.REGISTER)
