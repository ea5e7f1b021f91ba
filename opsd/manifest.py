"""What a run was: its manifest, the sentinel of a merged folder, and whether a merged folder is complete.

A run folder holds `manifest.json` (command, arguments, code, versions, data, seeds). `merge_lora.py` copies
it into the merged folder and, last of all, writes the sentinel `.ready_for_eval`, which lists every file with
its size and SHA-256. Launchers and the evaluation ask `check_merged` before they use a merged folder.

Nothing here imports torch, so that a check costs milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from opsd.errors import ArtefactError
from opsd.files import atomic_write_json
from opsd.provenance import dataset_fingerprint, file_sha256, git_state, plain, redacted, versions

__all__ = [
    "CELL_ARGUMENTS",
    "MANIFEST_NAME",
    "SENTINEL_NAME",
    "IncompleteMergeError",
    "check_merged",
    "dataset_fingerprint",
    "git_state",
    "read_manifest",
    "read_sentinel",
    "run_manifest",
    "versions",
    "write_manifest",
    "write_sentinel",
]

MANIFEST_NAME = "manifest.json"
SENTINEL_NAME = ".ready_for_eval"
FORMAT = 1

# The arguments that make two runs different experiments. Where, how fast and how loudly a run went is not
# among them. `check_merged` compares these and no others.
CELL_ARGUMENTS = (
    "method",
    "temperature",
    "jsd_token_clip",
    "position_w_min",
    "position_tau",
    "position_s",
    "position_global_reduction",
    "eopd_entropy_threshold",
    "eopd_top_k",
    "eopd_clip_epsilon",
    "reopold_lambda",
    "reopold_beta",
    "reopold_t_switch",
    "loss_scope",
    "rollout",
    "rollout_temperature",
    "rollout_top_p",
    "rollout_top_k",
    "max_completion_length",
    "max_length",
    "train_dataset",
    "model_revision",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "max_steps",
    "seed",
    "bf16",
)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_LARGEST_JSON_BYTES = 64 * 2**20


def run_manifest(
    *,
    run_name: str,
    method: str,
    base_model: str,
    base_revision: str | None,
    arguments: Mapping[str, Any],
    dataset: str,
    dataset_rows: int,
    dataset_sha256: str,
    world_size: int,
    per_device_batch: int,
    accumulation: int,
    seeds: Mapping[str, int],
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The manifest of a training run, ready for `write_manifest`.

    Args:
        base_model: what was given to from_pretrained (hub id or folder).
        base_revision: the hub commit that was loaded; None for a local folder.
        arguments: every argument of the run by name. Secrets (`…token`, `…api_key`) become null.
        dataset_rows: problems that take part, after over-long ones are left out.
        dataset_sha256: `dataset_fingerprint` of the rows as loaded.
        per_device_batch, accumulation: sequences per rank and micro-batch; micro-batches per optimizer step.
        command: the command line; default this process's.
    """
    return {
        "format": FORMAT,
        "run_name": run_name,
        "method": method,
        "base_model": str(base_model),
        "base_revision": base_revision,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": redacted([sys.executable, *sys.argv] if command is None else list(command)),
        "arguments": plain(arguments),
        "git": git_state(),
        "versions": versions(),
        "dataset": {"name": str(dataset), "rows": dataset_rows, "sha256": dataset_sha256},
        "world_size": world_size,
        "per_device_batch": per_device_batch,
        "accumulation": accumulation,
        "effective_batch": world_size * per_device_batch * accumulation,
        "seeds": dict(seeds),
    }


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "run_name": str,
    "method": str,
    "base_model": str,
    "arguments": dict,
    "versions": dict,
    "dataset": dict,
    "world_size": int,
    "effective_batch": int,
    "seeds": dict,
}


def write_manifest(folder: Path | str, manifest: Mapping[str, Any]) -> Path:
    """Write `folder/manifest.json` whole and return its path. ArtefactError for a malformed manifest."""
    path = Path(folder) / MANIFEST_NAME
    _validate_manifest(manifest, path)
    atomic_write_json(path, manifest)
    return path


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """The manifest of a run or merged folder. Raises ArtefactError when it is missing, torn or malformed."""
    path = Path(folder) / MANIFEST_NAME
    manifest = read_json_object(path, what="manifest")
    _validate_manifest(manifest, path)
    return manifest


def _validate_manifest(manifest: Mapping[str, Any], path: Path) -> None:
    for name, kind in _FIELDS.items():
        if name not in manifest:
            raise ArtefactError(f"{path} has no {name!r}: it is not a run manifest of this project")
        if not isinstance(manifest[name], kind) or isinstance(manifest[name], bool):
            raise ArtefactError(f"{path}: {name!r} is {manifest[name]!r}, which is not a {kind}")


def read_json_object(path: Path, *, what: str) -> dict[str, Any]:
    """A JSON object from a file that may be missing, torn, huge or no JSON: an ArtefactError each."""
    try:
        size = path.stat().st_size
        if size > _LARGEST_JSON_BYTES:
            raise ArtefactError(f"{path} has {size} bytes: too large for a {what}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError(f"no {what} at {path}") from error
    except OSError as error:
        raise ArtefactError(f"the {what} {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"the {what} {path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArtefactError(f"the {what} {path} holds a {type(value).__name__}, not an object")
    return value


def file_list(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file below `folder` but the sentinel, sorted: `{name: {"bytes": int, "sha256": str}}`."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SENTINEL_NAME
    }


def weights_identity(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One SHA-256 (hex) of what decides a model's output: weights, configuration, tokenizer, no notes."""
    notes = (MANIFEST_NAME, "README.md")
    lines = [f"{name} {entry['sha256']}" for name, entry in sorted(files.items()) if name not in notes]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_sentinel(
    folder: Path | str,
    *,
    base_model: str,
    adapter: str,
    adapter_step: int | None,
    files: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Write `.ready_for_eval`, the last file of a merged folder, and return what it holds.

    Args:
        files: `file_list` of the folder.
    """
    sentinel = {
        "format": FORMAT,
        "base_model": str(base_model),
        "adapter": str(adapter),
        "adapter_step": adapter_step,
        "merged": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "identity": weights_identity(files),
        "files": {name: dict(entry) for name, entry in files.items()},
    }
    atomic_write_json(Path(folder) / SENTINEL_NAME, sentinel)
    return sentinel


def read_sentinel(folder: Path | str) -> dict[str, Any]:
    """The sentinel of a merged folder. Raises ArtefactError when it is missing, torn or malformed."""
    path = Path(folder) / SENTINEL_NAME
    sentinel = read_json_object(path, what="sentinel")
    files = sentinel.get("files")
    if not isinstance(sentinel.get("base_model"), str) or not isinstance(sentinel.get("identity"), str):
        raise ArtefactError(f"{path} is not a sentinel of this project; run merge_lora.py again")
    if not isinstance(files, dict) or not files:
        raise ArtefactError(f"{path} lists no files; run merge_lora.py again")
    for name, entry in files.items():
        parts = Path(name).parts
        if os.path.isabs(name) or ".." in parts or not isinstance(entry, dict):
            raise ArtefactError(f"{path} lists {name!r}, which is no file of a merged folder")
        if not isinstance(entry.get("bytes"), int) or not isinstance(entry.get("sha256"), str):
            raise ArtefactError(f"{path} gives neither size nor SHA-256 of {name!r}")
    return sentinel


class IncompleteMergeError(ArtefactError):
    """A merged folder that is missing or not whole. Merging again mends it."""


def check_merged(
    path: Path | str,
    *,
    expected_run_name: str | None = None,
    expected_method: str | None = None,
    expected_base_model: str | None = None,
    expected_step: int | None = None,
    expected_arguments: Mapping[str, Any] | None = None,
    hashes: bool = False,
) -> dict[str, Any]:
    """Make sure that a merged folder is whole and, where asked, that it is the expected run's.

    Args:
        path: `outputs/<run_name>_merged`.
        expected_run_name, expected_method, expected_base_model: compared with the manifest.
        expected_step: optimizer steps of the adapter that was merged.
        expected_arguments: training arguments by name; those in `CELL_ARGUMENTS` are compared.
        hashes: also recompute every file's SHA-256 (reads the whole folder). Otherwise sizes are compared.

    Returns:
        The sentinel, with the manifest under "manifest". Its "identity" names the weights.

    Raises:
        IncompleteMergeError (an ArtefactError): a file, or the sentinel, is missing, cut or empty.
        ArtefactError: the folder is whole but another run's.
    """
    folder = Path(path)
    sentinel, manifest = _check_whole(folder, hashes=hashes)
    expected = {
        "run_name": (manifest["run_name"], expected_run_name),
        "method": (manifest["method"], expected_method),
        "base model": (manifest["base_model"], expected_base_model),
        "adapter step": (sentinel.get("adapter_step"), expected_step),
    }
    for name in CELL_ARGUMENTS:
        if expected_arguments and name in expected_arguments and name in manifest["arguments"]:
            expected[name] = (manifest["arguments"][name], expected_arguments[name])
    wrong = [
        f"{name} is {found!r}, expected {wanted!r}"
        for name, (found, wanted) in expected.items()
        if wanted is not None and not _same_value(found, wanted)
    ]
    if wrong:
        raise ArtefactError(
            f"{folder} is another run's: {'; '.join(wrong)}. Move it away, or give this run its own RUN_NAME"
        )
    return {**sentinel, "manifest": manifest}


def _check_whole(folder: Path, *, hashes: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    remedy = "run merge_lora.py again"
    if not folder.is_dir():
        raise IncompleteMergeError(f"no merged model at {folder}; {remedy}")
    try:
        sentinel = read_sentinel(folder)
        manifest = read_manifest(folder)
    except ArtefactError as error:
        raise IncompleteMergeError(f"{folder} is not complete: {error}; {remedy}") from error
    for name, entry in sentinel["files"].items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size is None:
            raise IncompleteMergeError(f"{folder} is not complete: {name} is missing; {remedy}")
        if size != entry["bytes"]:
            raise IncompleteMergeError(
                f"{folder} is not complete: {name} has {size} bytes, not {entry['bytes']}; {remedy}"
            )
        if hashes and file_sha256(file) != entry["sha256"]:
            raise IncompleteMergeError(f"{folder} is damaged: the SHA-256 of {name} differs; {remedy}")
    names = sentinel["files"]
    if not any(name.endswith(".safetensors") for name in names):
        raise IncompleteMergeError(f"{folder} holds no weights; {remedy}")
    if not any(name in names for name in TOKENIZER_FILES):
        raise IncompleteMergeError(f"{folder} holds no tokenizer; {remedy}")
    return sentinel, manifest


def _same_value(found: Any, wanted: Any) -> bool:
    """Equality that takes a command line's words for what they mean: "1" is 1.0, "True" is true."""
    if found == wanted or str(found).lower() == str(wanted).lower():
        return True
    try:
        return float(found) == float(wanted)
    except (TypeError, ValueError):
        return same_source(str(found), str(wanted))


def same_source(recorded: str, given: str) -> bool:
    """Whether two names of a model or data set may mean the same thing.

    Equal names do, two spellings of one existing path do, and so do a hub id and its copy in the local cache.
    Of two absolute paths of which one is gone (a checkout that has moved), the last parts decide.
    """
    if recorded == given:
        return True
    if os.path.exists(recorded) and os.path.exists(given):
        return os.path.samefile(recorded, given)
    for hub_id, path in ((recorded, given), (given, recorded)):
        if hub_id.count("/") == 1 and f"models--{hub_id.replace('/', '--')}" in Path(path).parts:
            return True
    both = os.path.isabs(recorded) and os.path.isabs(given)
    return both and Path(recorded).parts[-2:] == Path(given).parts[-2:]
