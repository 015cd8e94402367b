"""Which LoRA adapter a prompt is computed with, told by its weights: names say nothing of them."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import stat
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

if TYPE_CHECKING:
    from vllm.config.lora import LoRAConfig
    from vllm.lora.request import LoRARequest

logger = logging.getLogger(__name__)

MAX_ADAPTERS: Final = 1024
"""How many are remembered; those that were used least recently are read again."""

_CONFIG = "adapter_config.json"
_WEIGHTS: Final = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
"""In the order in which vLLM looks for them."""
_READ_BYTES: Final = 1 << 20
_MAX_LINKS: Final = 40
"""Of one path, as in Linux."""
_TOO_NEW: Final = (
    "its files, or the way to them, changed after this engine started, which may have loaded it "
    "before that; start the engine anew"
)

_Files = tuple[tuple[str, int, int, int], ...]
"""Path, inode, size and time of change, in Unix nanoseconds, of the files of an adapter."""


@dataclass(slots=True)
class _Adapter:
    files: _Files = ()
    fingerprint: str | None = None
    changed: bool = False
    warned_of: str = ""


class AdapterFingerprints:
    """Fingerprints of the adapters of one engine. Not thread-safe; reads files.

    An adapter is read whole when it is first asked for, some 0.1 s for 100 MB, and looked at again
    whenever it is asked for. What an engine has loaded cannot be told any more when its files
    change, unless vLLM was asked to load it in place. When it loaded them, nobody says: files that
    changed after this was made may be others than those that it computes with.

    Made before the engine loads its first adapter. The clock of the file system must agree with
    this host's.

    Args:
        config: how the engine loads adapters; None: not at all.
    """

    def __init__(self, config: LoRAConfig | None) -> None:
        self._made_ns = time.time_ns()
        self._loading = _loading(config)
        self._known: OrderedDict[tuple[int, str, str], _Adapter] = OrderedDict()

    def __call__(self, request: LoRARequest) -> str | None:
        """32 hex digits, equal for equal weights that are loaded alike, wherever they lie.

        None if that cannot be told; the log says why, once for each adapter and reason.
        """
        known = self._adapter_of(request)
        try:
            files = _files(request)
            stale = known.changed or known.files != files
            if stale and (request.load_inplace or known.fingerprint is None):
                known.files, known.fingerprint, known.changed = files, None, False
                if request.load_inplace or _last_change_ns(files) <= self._made_ns:
                    known.fingerprint = self._read(files, is_3d=request.is_3d_lora_weight)
                    files = _files(request)  # as they are after they were read
                else:
                    _not_handed_over(request, known, _TOO_NEW)
        except (OSError, ValueError) as error:
            _not_handed_over(request, known, f"it cannot be read: {error}")
            return None
        if known.files != files:
            known.changed = True
            _not_handed_over(request, known, "its files have changed since it was loaded")
        return None if known.changed else known.fingerprint

    def _adapter_of(self, request: LoRARequest) -> _Adapter:
        key = (request.lora_int_id, request.lora_name, request.lora_path)
        known = self._known.setdefault(key, _Adapter())
        self._known.move_to_end(key)
        if len(self._known) > MAX_ADAPTERS:
            self._known.popitem(last=False)
        return known

    def _read(self, files: _Files, *, is_3d: bool) -> str:
        digest = hashlib.blake2b(self._loading, digest_size=16, person=b"baton-adapter-1")
        digest.update(bytes([is_3d]))
        for path, *_ in files:
            _add(digest, Path(path))
        return digest.hexdigest()


def _loading(config: LoRAConfig | None) -> bytes:
    """What else decides what an adapter does to a model."""
    if config is None:
        return b""
    factors = {
        "dtype": str(config.lora_dtype),
        "target_modules": sorted(config.target_modules or ()),
        "tower_connector": config.enable_tower_connector_lora,
        "mixed_moe_format": config.enable_mixed_moe_lora_format,
        "moe_shared": config.enable_moe_shared_loras,
    }
    return json.dumps(factors, sort_keys=True).encode()


def _files(request: LoRARequest) -> _Files:
    """The adapter's files as they are now.

    Raises:
        OSError: it is not there as files, or they cannot be looked at.
    """
    if request.tensorizer_config_dict:
        raise FileNotFoundError("it is streamed in from elsewhere, not from files")
    folder = _folder(request.lora_path)
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{folder} has none of {', '.join(_WEIGHTS)}")
    found = []
    for path in (folder / _CONFIG, weights):
        status = path.stat()
        found.append((str(path), status.st_ino, status.st_size, status.st_ctime_ns))
    return tuple(found)


def _folder(path: str) -> Path:
    folder = Path(os.path.expanduser(path))
    if folder.is_dir():
        return folder
    try:
        # vLLM takes it for a repository then, and has fetched it.
        return Path(snapshot_download(path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        # Their words speak of a network that was never to be asked.
        raise FileNotFoundError(f"{path} is neither a folder nor a repository here") from None


def _last_change_ns(files: _Files) -> int:
    """Unix time of the last change to the files, their folders and the links that lead there."""
    newest = 0
    for name, *_ in files:
        path = Path(name).absolute()
        newest = max(newest, path.stat().st_ctime_ns, path.parent.stat().st_ctime_ns)
        newest = max(newest, _last_relinked_ns(path, _MAX_LINKS))
    return newest


def _last_relinked_ns(path: Path, links_left: int) -> int:
    newest = 0
    for part in (path, *path.parents):
        status = part.lstat()
        if not stat.S_ISLNK(status.st_mode):
            continue
        if not links_left:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = part.parent / part.readlink()
        newest = max(newest, status.st_ctime_ns, _last_relinked_ns(target, links_left - 1))
    return newest


def _add(digest: Any, path: Path) -> None:
    if path.name == _CONFIG:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError(f"{path} is not a JSON object")
        # The base model has a fingerprint of its own, and may lie elsewhere.
        config.pop("base_model_name_or_path", None)
        digest.update(json.dumps(config, sort_keys=True).encode())
        return
    digest.update(path.suffix.encode())
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)


def _not_handed_over(request: LoRARequest, known: _Adapter, why: str) -> None:
    if known.warned_of != why:
        logger.warning("prompts with adapter %s are not handed over: %s", request.lora_name, why)
    known.warned_of = why
