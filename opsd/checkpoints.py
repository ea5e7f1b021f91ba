"""The checkpoints of a run: which are complete, whose they are, which to resume from, which base they fit.

A checkpoint counts only with its `.complete` marker, which is written last: its step, the identity of its run
(opsd/run_identity.py), and size and SHA-256 of every file. A kill while saving leaves a folder without one.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsd.errors import ArtefactError
from opsd.files import atomic_write_json, changed_file, file_list, file_sha256, fsync_tree
from opsd.run_identity import (
    MANIFEST_NAME,
    differences,
    identity,
    read_json_object,
    read_manifest,
)

logger = logging.getLogger(__name__)

MARKER = ".complete"
NAME = re.compile(r"checkpoint-(\d+)")
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
STATE_NAME = "trainer_state.json"
# What a resumed run cannot do without.
REQUIRED = (CONFIG_NAME, WEIGHTS_NAME, "optimizer.pt", "scheduler.pt", STATE_NAME)


def mark_complete(checkpoint: Path) -> None:
    """Write the marker of a checkpoint that every rank has finished writing, with the identity of its run.

    Raises ArtefactError when a required file, or the run's manifest beside the checkpoint, is missing.
    """
    missing = [name for name in REQUIRED if not (checkpoint / name).is_file()]
    if missing:
        raise ArtefactError(f"{checkpoint} lacks {', '.join(missing)} right after saving; is the disk full?")
    fsync_tree(checkpoint)
    marker = {
        "step": int(checkpoint.name.removeprefix("checkpoint-")),
        "run": identity(read_manifest(checkpoint.parent)),
        "files": file_list(checkpoint, but=MARKER),
    }
    atomic_write_json(checkpoint / MARKER, marker)


def incompleteness(
    checkpoint: Path, *, hashes: bool = False, only: Collection[str] | None = None
) -> str | None:
    """Return why `checkpoint` is not complete, in words; None when it is.

    `hashes` compares each file's SHA-256 too, not its size alone; `only` names the files to check, in a
    folder of any name but another step's.
    """
    if not (checkpoint / MARKER).is_file():
        return f"it has no {MARKER} marker: saving it was interrupted"
    try:
        marker = read_json_object(checkpoint / MARKER, what="marker", fields={"step": int, "files": dict})
    except ArtefactError:
        return f"its {MARKER} marker is damaged"
    files, saved_as = marker["files"], f"checkpoint-{marker['step']}"
    if not files.keys() >= set(REQUIRED):
        return f"its {MARKER} marker is damaged or an earlier version's"
    if checkpoint.name != saved_as and (only is None or NAME.fullmatch(checkpoint.name)):
        return f"it was saved as {saved_as}"
    checked = files if only is None else {name: files[name] for name in only}
    return changed_file(checkpoint, checked, file_sha256 if hashes else None)


def check_run(checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ArtefactError, with every difference, for a complete checkpoint of another run."""
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
    """Return a run's newest complete checkpoint, by hashes; None without one. Log the ones left out."""
    for _, path in reversed(checkpoints(run_folder)):
        reason = incompleteness(path, hashes=True)
        if reason is None:
            return path
        logger.warning("%s is left out: %s", path, reason)
    return None


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint; of a link, the link alone."""
    checkpoint.unlink() if checkpoint.is_symlink() else shutil.rmtree(checkpoint)


def remove_incomplete(run_folder: Path) -> list[Path]:
    """Delete the checkpoints without a marker, rename the damaged ones (once complete), log and return both.

    The files of a damaged one, or of an earlier version's, stay in `damaged-checkpoint-N-<time>`.
    """
    removed = [path for _, path in checkpoints(run_folder) if incompleteness(path, hashes=True) is not None]
    for path in removed:
        if (path / MARKER).is_file():
            renamed = path.rename(path.with_name(f"damaged-{path.name}-{time.time_ns()}"))
            logger.warning("%s is damaged; it is now %s", path, renamed.name)
        else:
            _remove(path)
            logger.warning("%s was incomplete when a run was killed; deleted", path)
    return removed


def rotate(run_folder: Path, limit: int | None, *, keep: int | None = None) -> list[Path]:
    """Delete the oldest complete checkpoints until `limit` are left (None or below 1: all), and return them.

    The checkpoint of step `keep`, which will be merged, is never deleted and does not count; an incomplete
    one does not count, so that it never displaces the one to resume from.
    """
    complete = [p for step, p in checkpoints(run_folder) if step != keep and incompleteness(p) is None]
    surplus = complete[: max(len(complete) - limit, 0)] if limit is not None and limit > 0 else []
    for path in surplus:
        # Without its marker a folder that a kill leaves half deleted does not pass for a checkpoint.
        (path / MARKER).unlink()
        _remove(path)
    return surplus


def resolve_resume(run_folder: Path, asked: str | None) -> Path | None:
    """Return the checkpoint that `--resume_from_checkpoint` means: "auto" the newest complete one, if any.

    Raises:
        ArtefactError: the folder is not a complete checkpoint; or checkpoints exist and `asked` is None.
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


@dataclass(frozen=True)
class Adapter:
    """A complete LoRA checkpoint."""

    path: Path
    base_model: str  # the base that it was trained on, as recorded; "" where none was
    step: int | None  # optimizer steps behind it; None for an adapter that no Trainer saved
    manifest: dict[str, Any] | None  # its run's; None for a third-party adapter


def read_adapter(path: Path | str) -> Adapter:
    """Return the LoRA checkpoint in a folder; `models.load_adapter` checks that its matrices fit a base.

    Raises:
        ArtefactError: the folder, or a part of it, is missing, damaged or of another kind; or it is this
            project's checkpoint and incomplete, another run's, or without its run's manifest.
    """
    folder = Path(path)
    if not folder.is_dir():
        names = ", ".join(found.name for _, found in checkpoints(folder.parent))
        raise ArtefactError(
            f"no checkpoint at {folder}; {f'{folder.parent} holds {names}' if names else 'train first'}"
        )
    if not (folder / WEIGHTS_NAME).is_file():
        raise ArtefactError(f"{folder} has no {WEIGHTS_NAME} (pickled weights are not loaded); take another")
    places = (folder, Path(os.path.abspath(folder)).parent, folder.resolve().parent)
    place = next((place for place in places if (place / MANIFEST_NAME).is_file()), None)
    manifest = step = None
    if place is not None:
        manifest = read_manifest(place)
        reason = incompleteness(folder, hashes=True, only=(CONFIG_NAME, WEIGHTS_NAME, STATE_NAME))
        if reason is not None:
            raise ArtefactError(
                f"the checkpoint {folder} is not complete or damaged: {reason}; take another one, or resume "
                "the training, which saves it again"
            )
        check_run(folder, manifest)
    elif (folder / MARKER).is_file():
        raise ArtefactError(
            f"{folder} has no {MANIFEST_NAME} beside it to say which run it is; put that run's there"
        )
    config = read_json_object(folder / CONFIG_NAME, what="adapter configuration")
    if config.get("peft_type") != "LORA":
        raise ArtefactError(f"{folder / CONFIG_NAME}: peft_type is {config.get('peft_type')!r}, not LORA")
    if (folder / STATE_NAME).is_file():
        step = read_json_object(folder / STATE_NAME, what="trainer state").get("global_step")
    return Adapter(folder, str(config.get("base_model_name_or_path") or ""), step, manifest)
