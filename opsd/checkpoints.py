"""Which checkpoint of a run is complete, which run it belongs to, and which one to resume from.

A checkpoint counts only with its `.complete` marker, which is written last: its step, the identity of its run
(opsd/run_identity.py), and size and SHA-256 of every file. A kill while saving leaves a folder without one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from opsd.errors import ArtefactError
from opsd.files import atomic_write_json, fsync_tree, remove_folder
from opsd.provenance import file_sha256
from opsd.run_identity import differences, file_list, identity, read_json_object, read_manifest

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
    """Write the marker of a checkpoint that every rank has finished writing, with the identity of its run.

    Raises:
        ArtefactError: a required file, or the run's manifest beside the checkpoint, is missing.
    """
    missing = [name for name in REQUIRED if not (checkpoint / name).is_file()]
    if missing:
        raise ArtefactError(f"{checkpoint} lacks {', '.join(missing)} right after saving; is the disk full?")
    fsync_tree(checkpoint)
    marker = {
        "step": int(NAME.fullmatch(checkpoint.name)[1]),
        "run": identity(read_manifest(checkpoint.parent)),
        "files": {name: entry for name, entry in file_list(checkpoint).items() if name != MARKER},
    }
    atomic_write_json(checkpoint / MARKER, marker)


def incompleteness(
    checkpoint: Path, *, hashes: bool = False, only: Collection[str] | None = None
) -> str | None:
    """Return why `checkpoint` is not complete, in words; None when it is.

    Args:
        hashes: compare each file's SHA-256 too, not its size alone.
        only: the files to look at, whatever the folder's name; default all.
    """
    if not (checkpoint / MARKER).is_file():
        return f"it has no {MARKER} marker: saving it was interrupted"
    try:
        marker = read_json_object(checkpoint / MARKER, what="marker")
        step, files = marker["step"], {name: dict(entry) for name, entry in marker["files"].items()}
    except (ArtefactError, KeyError, TypeError, ValueError, AttributeError):
        return f"its {MARKER} marker is damaged or an earlier version's"
    if not files.keys() >= set(REQUIRED):
        return f"its {MARKER} marker is damaged or an earlier version's"
    if only is None and checkpoint.name != f"checkpoint-{step}":
        return f"it was saved as checkpoint-{step}"
    for name in files if only is None else only:
        path, entry = checkpoint / name, files.get(name, {})
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.get("bytes"):
            return f"{name} has {path.stat().st_size} bytes instead of {entry.get('bytes')}"
        if hashes and file_sha256(path) != entry.get("sha256"):
            return f"the SHA-256 of {name} is not the one that was saved"
    return None


def check_run(checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a complete checkpoint of another run.

    Raises:
        ArtefactError: its marker names another identity than the manifest; every difference is named.
    """
    recorded = read_json_object(checkpoint / MARKER, what="marker").get("run")
    differing = differences(recorded if isinstance(recorded, dict) else {}, identity(manifest))
    if differing:
        raise ArtefactError(
            f"{checkpoint} is a checkpoint of another run ({'; '.join(differing)}); move it out of this "
            "run's folder, or give another --output_dir"
        )


def checkpoints(run_folder: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of every checkpoint, complete or not, oldest first; a folder may be a link."""
    found = [(NAME.fullmatch(path.name), path) for path in run_folder.glob("checkpoint-*")]
    kept = [(int(match[1]), path) for match, path in found if match]
    return sorted((step, path) for step, path in kept if path.is_dir() or path.is_symlink())


def newest_complete(run_folder: Path) -> Path | None:
    """Return a run's newest complete checkpoint, its files hashed; None without one. Log what is left out."""
    for _, path in reversed(checkpoints(run_folder)):
        reason = incompleteness(path, hashes=True)
        if reason is None:
            return path
        logger.warning("%s is left out: %s", path, reason)
    return None


def remove_incomplete(run_folder: Path) -> list[Path]:
    """Delete the checkpoints that are half-written or damaged and return them; of a link, the link alone."""
    removed = [path for _, path in checkpoints(run_folder) if incompleteness(path, hashes=True) is not None]
    for path in removed:
        remove_folder(path)
    return removed


def rotate(run_folder: Path, limit: int | None, *, keep: int | None = None) -> list[Path]:
    """Delete the oldest checkpoints until `limit` complete ones are left, and return what was deleted.

    Only complete checkpoints count, so that a half-written one never displaces the one to resume from.

    Args:
        limit: None or a number below 1 keeps all.
        keep: the step that will be merged: its checkpoint is never deleted and does not count.
    """
    complete = [p for step, p in checkpoints(run_folder) if step != keep and incompleteness(p) is None]
    surplus = complete[: max(len(complete) - limit, 0)] if limit is not None and limit > 0 else []
    for path in surplus:
        # Without its marker a folder that a kill leaves half deleted does not pass for a checkpoint.
        (path / MARKER).unlink()
        remove_folder(path)
    return surplus


def resolve_resume(run_folder: Path, asked: str | None) -> Path | None:
    """Return the checkpoint that `--resume_from_checkpoint` means.

    Args:
        asked: None starts afresh, "auto" or "True" takes the newest complete one (None without one), anything
            else is a folder.

    Raises:
        ArtefactError: the folder is not a complete checkpoint; or checkpoints exist and nothing was asked.
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
    reason = incompleteness(folder, hashes=True) if folder.is_dir() else "it does not exist"
    if reason is not None:
        raise ArtefactError(
            f"--resume_from_checkpoint {asked}: {reason}; give auto for the newest complete one"
        )
    return folder
