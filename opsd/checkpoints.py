"""Which checkpoint of a run is whole, and which one to resume from.

A checkpoint counts only with its `.complete` marker, which is written last and lists every file with its
size. A kill while saving leaves a folder without one.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

from opsd.errors import ArtefactError
from opsd.files import atomic_write_json, fsync_tree

logger = logging.getLogger(__name__)

MARKER = ".complete"
NAME = re.compile(r"checkpoint-(\d+)")
# What a resumed run cannot do without.
REQUIRED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "trainer_state.json",
)


def mark_complete(checkpoint: Path) -> None:
    """Write the marker of a checkpoint that every rank has finished writing.

    Raises:
        ArtefactError: a required file is missing.
    """
    missing = [name for name in REQUIRED if not (checkpoint / name).is_file()]
    if missing:
        raise ArtefactError(f"{checkpoint} lacks {', '.join(missing)} right after saving; is the disk full?")
    fsync_tree(checkpoint)
    sizes = {
        str(p.relative_to(checkpoint)): p.stat().st_size
        for p in sorted(checkpoint.rglob("*"))
        if p.is_file() and p.name != MARKER
    }
    atomic_write_json(checkpoint / MARKER, {"files": sizes})


def incompleteness(checkpoint: Path) -> str | None:
    """Why `checkpoint` is not whole, in words; None when it is."""
    try:
        sizes = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {MARKER} marker: saving it was interrupted"
    except (ValueError, KeyError, TypeError):
        return f"its {MARKER} marker is damaged"
    if not isinstance(sizes, dict) or not sizes.keys() >= set(REQUIRED):
        return f"its {MARKER} marker is damaged"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def checkpoints(run_folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, whole or not, oldest first."""
    found = [(NAME.fullmatch(p.name), p) for p in run_folder.glob("checkpoint-*") if p.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def newest_complete(run_folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, None without one. Each newer one that is not whole is named in
    the log."""
    for _, path in reversed(checkpoints(run_folder)):
        reason = incompleteness(path)
        if reason is None:
            return path
        logger.warning("%s is left out: %s", path, reason)
    return None


def remove_incomplete(run_folder: Path) -> list[Path]:
    """Delete the checkpoints that a kill left half-written and return them. Whole ones are never touched."""
    removed = [path for _, path in checkpoints(run_folder) if incompleteness(path) is not None]
    for path in removed:
        shutil.rmtree(path)
    return removed


def rotate(run_folder: Path, limit: int | None) -> list[Path]:
    """Delete the oldest checkpoints until `limit` whole ones are left, and return what was deleted.

    Only whole checkpoints count, so that a half-written one never displaces the one to resume from. None or a
    number below 1 keeps all.
    """
    whole = [path for _, path in checkpoints(run_folder) if incompleteness(path) is None]
    surplus = whole[: max(len(whole) - limit, 0)] if limit is not None and limit > 0 else []
    for path in surplus:
        # Without its marker a folder that a kill leaves half deleted does not pass for a checkpoint.
        (path / MARKER).unlink()
        shutil.rmtree(path)
    return surplus


def resolve_resume(run_folder: Path, asked: str | None) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means.

    Args:
        asked: None starts afresh, "auto" or "True" takes the newest whole one (None without one), anything
            else is a folder.

    Raises:
        ArtefactError: the folder is not a whole checkpoint; or checkpoints exist and nothing was asked.
    """
    if asked is None or asked.lower() == "false":
        existing = newest_complete(run_folder)
        if existing is not None:
            raise ArtefactError(
                f"{run_folder} already holds {existing.name}; add --resume_from_checkpoint auto, or give "
                "another --output_dir"
            )
        return None
    if asked.lower() in ("auto", "true"):
        return newest_complete(run_folder)
    folder = Path(asked)
    reason = incompleteness(folder) if folder.is_dir() else "it does not exist"
    if reason is not None:
        raise ArtefactError(f"--resume_from_checkpoint {asked}: {reason}; give auto for the newest whole one")
    return folder
