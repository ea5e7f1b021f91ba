"""Files and folders that appear whole or not at all: temporary name beside the target, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opsd.errors import NO_PERMISSION, NO_ROOM, ArtefactError

# A name that no reader of results, checkpoints or merged folders takes for a finished one.
PARTIAL_MARK = ".partial-"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_name(path: Path) -> Path:
    """A temporary sibling of `path`: same file system, hidden, never mistaken for a result."""
    return path.with_name(f".{path.name}{PARTIAL_MARK}{os.getpid()}-{uuid.uuid4().hex[:8]}")


def remove_partials(path: Path) -> list[Path]:
    """Delete what killed writers of `path` left beside it and return what was deleted.

    A partial of a process that still runs is left alone.
    """
    removed = []
    for leftover in sorted(path.parent.glob(f".{glob_escape(path.name)}{PARTIAL_MARK}*")):
        owner = leftover.name.split(PARTIAL_MARK)[-1].split("-")[0]
        if owner.isdigit() and int(owner) != os.getpid() and _alive(int(owner)):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
        removed.append(leftover)
    return removed


def remove_all_partials(folder: Path) -> list[Path]:
    """`remove_partials` for every target in `folder` and below; returns what was deleted."""
    marked = sorted(folder.rglob(f".*{PARTIAL_MARK}*"))
    targets = dict.fromkeys(path.with_name(path.name[1:].split(PARTIAL_MARK)[0]) for path in marked)
    return [leftover for target in targets for leftover in remove_partials(target)]


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and `folder` itself, to the disk."""
    for path in sorted(folder.rglob("*")):
        _fsync(path)
    _fsync(folder)


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn what three libraries say when `target` cannot be written into one clear line.

    Raises:
        ArtefactError: the disk is full, a file grows over `ulimit -f`, or permission is missing.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number, words = getattr(error, "errno", None), str(error).lower()
        # torch says no more than that its archive could not be written, in several ways.
        archive = any(part in words for part in ("pytorchstreamwriter", "inline_container", "iostream"))
        unsaid = archive and _nearly_full(target.parent)
        if number in NO_ROOM or "no space left" in words or "quota" in words or unsaid:
            raise ArtefactError(
                f"the disk of {target.parent} is full: {target.name} was not written; free some space and "
                "run the same command again"
            ) from error
        limited = archive and resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
        if number == errno.EFBIG or "file too large" in words or limited:
            raise ArtefactError(
                f"a file of {target} is larger than this shell allows; raise `ulimit -f` and run it again"
            ) from error
        if number in NO_PERMISSION or "permission denied" in words:
            raise ArtefactError(f"no permission to write {target}; choose another place") from error
        raise


def _nearly_full(folder: Path) -> bool:
    return shutil.disk_usage(folder).free < 2**20


def glob_escape(name: str) -> str:
    """`name` as a glob pattern that matches only itself."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def atomic_write_bytes(path: Path | str, data: bytes) -> None:
    """Write `data` to `path` so that a reader, or a kill at any moment, sees the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_name(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


def atomic_write_text(path: Path | str, text: str) -> None:
    """`atomic_write_bytes` of `text` in UTF-8."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path | str, value: Any) -> None:
    """`value` as indented JSON, written whole. NaN and infinities raise ValueError: they are not JSON."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error.

    An existing folder at `path` is replaced. On an error the temporary folder is removed and `path` is
    untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path)
    temporary = partial_name(path)
    temporary.mkdir()
    try:
        yield temporary
        fsync_tree(temporary)
        if path.exists():
            retired = partial_name(path)
            os.replace(path, retired)
            os.replace(temporary, path)
            shutil.rmtree(retired)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync(path.parent)
