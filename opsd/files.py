"""Atomic writes (temporary name beside the target, fsync, rename), locks, and hashes of files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import logging
import operator
import os
import re
import resource
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from opsd.errors import ArtefactError, UsageError, disk_reason

logger = logging.getLogger(__name__)

# A name that no reader of results, checkpoints or merged folders takes for a finished one.
PARTIAL_MARK = ".partial-"
# This host in eight characters: a process id identifies a process on its own host alone.
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
# No write of this project takes as long, so another host's partial file of this age is abandoned.
_ABANDONED_SECONDS = 24 * 3600
# What an unchanged file keeps; smaller files than _CACHED_BYTES are hashed each time.
_STAMP = operator.attrgetter("st_size", "st_mtime_ns", "st_ctime_ns", "st_ino")
_CACHED_BYTES = 2**20
# A file that changed more recently may change again under the same time stamp: its hash is not cached.
_SETTLED_SECONDS = 2.0


def fsync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder`, and `folder` itself, to the disk."""
    for path in (*sorted(folder.rglob("*")), folder):
        fsync(path)


def partial_name(path: Path) -> Path:
    """Return a temporary sibling of `path`: same file system, hidden, never mistaken for a result."""
    return path.with_name(f".{path.name}{PARTIAL_MARK}{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def remove_partials(path: Path) -> list[Path]:
    """Delete what killed writers of `path` left beside it and return what was deleted.

    A partial of a process that runs on this host is kept, another host's until it is a day old.
    """
    removed = []
    for leftover in sorted(path.parent.glob(f".{glob.escape(path.name)}{PARTIAL_MARK}*")):
        host, _, owner = leftover.name.split(PARTIAL_MARK)[-1].partition("-")
        owner = owner.split("-")[0]
        if host == _HOST and owner.isdigit():
            in_use = int(owner) != os.getpid() and _alive(int(owner))
        else:
            in_use = time.time() - leftover.stat().st_mtime < _ABANDONED_SECONDS
        if in_use:
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
        removed.append(leftover)
    return removed


def remove_all_partials(folder: Path) -> list[Path]:
    """Call `remove_partials` for every target in `folder` and below; return what was deleted."""
    marked = sorted(folder.rglob(f".*{PARTIAL_MARK}*"))
    targets = dict.fromkeys(path.with_name(path.name[1:].split(PARTIAL_MARK)[0]) for path in marked)
    return [leftover for target in targets for leftover in remove_partials(target)]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True


def check_place(flag: str, path: str) -> None:
    """Raise UsageError, naming the flag, where no file or folder can be created at `path`."""
    place = Path(path).absolute()
    existing = next(folder for folder in (place, *place.parents) if folder.exists())
    if not existing.is_dir():
        raise UsageError(f"{flag} {path!r} cannot be created: {str(existing)!r} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{flag} {path!r} cannot be written: no permission in {str(existing)!r}")


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn what Python, safetensors and torch raise when `target` cannot be written into an ArtefactError.

    It says that the disk is full, a file grows over `ulimit -f`, or permission is missing.
    """
    from safetensors import SafetensorError  # late: launchers use this module before anything is installed

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number, text = getattr(error, "errno", None), str(error).lower()
        # torch only says, in several ways, that its archive could not be written.
        archive = any(part in text for part in ("pytorchstreamwriter", "inline_container", "iostream"))
        limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
        full = archive and shutil.disk_usage(target.parent).free < 2**20
        if "no space left" in text or "quota" in text or full:
            number = errno.ENOSPC
        elif "file too large" in text or (archive and limited):
            number = errno.EFBIG
        elif "permission denied" in text:
            number = errno.EACCES
        reason = disk_reason(number, target)
        if reason is None:
            raise
        raise ArtefactError(reason) from error


def lock_file(path: Path, *, busy: str) -> IO[bytes]:
    """Open `path` for appending under an exclusive lock, which ends with the process or the returned file.

    Raises UsageError(busy) when another process holds it, ArtefactError when the file system has no locks.
    """
    while True:
        file = open(path, "ab")  # noqa: SIM115 (the caller closes it)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UsageError(busy) from None
        except OSError as error:
            file.close()
            raise ArtefactError(
                f"{path} cannot be locked ({error.strerror}), so two processes could write there at once; "
                "choose a place on a file system that has locks"
            ) from error
        # Between open and lock the previous owner may have deleted the file: nobody else finds this one then.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


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
    fsync(path.parent)


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write `text` in UTF-8 as `atomic_write_bytes` does."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON. NaN and infinities raise ValueError: they are not JSON."""
    atomic_write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends without an error.

    An existing folder at `path`, or the one that a link there leads to, is replaced by two renames: a kill
    between them leaves no folder at `path`, and the next call writes it again and removes the rest. On an
    error the temporary folder is removed and `path` is unchanged.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path)
    temporary = partial_name(path)
    temporary.mkdir()
    try:
        yield temporary
        fsync_tree(temporary)
        retired = partial_name(path)
        if path.exists():
            os.replace(path, retired)
        os.replace(temporary, path)
        if retired.exists():
            shutil.rmtree(retired)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync(path.parent)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cached_sha256(path: Path) -> str:
    """Return `file_sha256`, from the user's cache while the file's path, size, times and inode are unchanged.

    The cache is the folder `pwopsd` below XDG_CACHE_HOME or ~/.cache, a file for each hash. Only
    `file_sha256` notices a bit that the disk itself flips, which changes no time stamp.
    """
    path = path.resolve()
    before = path.stat()
    if before.st_size < _CACHED_BYTES:
        return file_sha256(path)
    key = hashlib.sha256(f"{path} {_STAMP(before)}".encode()).hexdigest()
    store = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pwopsd" / key
    with contextlib.suppress(OSError):
        known = store.read_bytes()
        if re.fullmatch(rb"[0-9a-f]{64}", known):  # a damaged entry is written again
            return known.decode()
    digest = file_sha256(path)
    if _STAMP(path.stat()) == _STAMP(before) and time.time() - before.st_ctime > _SETTLED_SECONDS:
        try:
            atomic_write_text(store, digest)
        except OSError as error:
            logger.warning("the hash of %s is not cached (%s): the next run computes it again", path, error)
    return digest


def combined_sha256(hashes: Mapping[str, str]) -> str:
    """Return one SHA-256 (hex) over `name hash` of every file, sorted by name."""
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def file_list(folder: Path, *, but: str) -> dict[str, dict[str, Any]]:
    """Return every file below `folder` but those of one name: `{name: {"bytes": int, "sha256": str}}`."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != but
    }


def changed_file(
    folder: Path, files: Mapping[str, Mapping[str, Any]], sha256: Callable[[Path], str] | None
) -> str | None:
    """Return, in words, the first file of a `file_list` that is missing or changed; None without one.

    `sha256` hashes a file; None compares sizes alone.
    """
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if sha256 is not None and sha256(path) != entry["sha256"]:
            return f"the SHA-256 of {name} is not the one that was saved"
    return None
