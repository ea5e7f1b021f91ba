"""Which run a folder belongs to: its manifest, the sentinel of a merged folder, what "the same run" means.

A run folder holds `manifest.json` (command, arguments, code, versions, data, base weights, seeds). Its
`identity` is what a resumed run, a checkpoint and a merged folder must share with it. `merge_lora.py` copies
the manifest into the merged folder and, last of all, writes the sentinel `.ready_for_eval`, which lists every
file with its size and SHA-256. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from opsd.errors import ArtefactError
from opsd.files import atomic_write_json
from opsd.provenance import (
    cached_sha256,
    combined_sha256,
    file_sha256,
    git_state,
    plain,
    redacted,
    versions,
    weights_sha256,
)

MANIFEST_NAME = "manifest.json"
SENTINEL_NAME = ".ready_for_eval"
FORMAT = 1

# What may change in the same run, by program: where it runs, how fast, how loudly, what it keeps, and names
# whose content is compared. Every other argument, a new one too, is part of the run's identity.
MAY_CHANGE: dict[str, frozenset[str]] = {
    "training": frozenset({
        "output_dir", "run_name", "resume_from_checkpoint", "use_cpu", "do_train", "trust_remote_code",
        "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "log_level",
        "log_level_replica", "disable_tqdm", "report_to", "project", "trackio_space_id",
        "trackio_bucket_id", "trackio_static_space_id", "log_completions_steps", "rollout_audit_steps",
        "debug", "skip_memory_metrics", "skip_nonfinite", "save_strategy", "save_steps",
        "save_total_limit", "save_on_each_node", "merge_step", "push_to_hub", "hub_token",
        "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
        "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
        "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "ddp_timeout",
        "ddp_backend", "torch_empty_cache_steps", "local_rank", "vllm_gpu_memory_utilization",
        "vllm_enable_sleep_mode", "vllm_max_num_seqs", "vllm_enforce_eager",
    }),
    "evaluation": frozenset({
        "output", "adapter", "revision", "dataset_path", "num_samples", "max_model_len", "engine",
        "tensor_parallel_size", "data_parallel_size", "gpu_memory_utilization", "hf_batch_size",
        "grading_workers", "time_limit", "trust_remote_code",
    }),
    "diagnostic": frozenset({
        "model_name_or_path", "adapter", "model_revision", "dataset", "output_dir", "engine", "dtype",
        "hf_batch_size", "gpu_memory_utilization", "tensor_parallel_size", "resamples", "viable_share",
        "grading_workers", "suggest_schedule", "trust_remote_code",
    }),
}  # fmt: skip
# Arguments whose content the manifest holds as a hash: the content decides, not the name.
BY_CONTENT = frozenset({"model_name_or_path", "train_dataset"})

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
    base_weights: str | None = None,
    world_size: int,
    per_device_batch: int,
    accumulation: int,
    seeds: Mapping[str, int],
    command: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return the manifest of a training run, ready for `write_manifest`.

    Args:
        base_model: what was given to from_pretrained (hub id or folder).
        base_revision: the hub commit that was loaded; None for a local folder.
        arguments: every argument of the run by name. Secrets (`…token`, `…api_key`) become null.
        dataset_rows: problems that take part, after over-long ones are left out.
        dataset_sha256: `dataset_fingerprint` of the rows as loaded.
        base_weights: `weights_sha256` of the base model.
        per_device_batch, accumulation: sequences per rank and micro-batch; micro-batches per optimizer step.
        command: the command line; default this process's.
    """
    return {
        "format": FORMAT,
        "run_name": run_name,
        "method": method,
        "base_model": str(base_model),
        "base_revision": base_revision,
        "base_weights": base_weights,
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


def run_arguments(*groups: Any) -> dict[str, Any]:
    """Return every argument of a training run by name, as JSON values.

    Args:
        groups: what `opsd.arguments.parse_arguments` returns, the Trainer's arguments first.
    """
    trainer, *others = groups
    values = trainer.to_dict()
    for group in others:
        values |= vars(group)
    return plain(values)


def identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes a run this run and no other: arguments that may not change, data, weights, ranks."""
    left_out = MAY_CHANGE["training"] | BY_CONTENT
    arguments = {name: value for name, value in manifest["arguments"].items() if name not in left_out}
    dataset = manifest["dataset"]
    return arguments | {
        "the base model's weights": manifest.get("base_weights"),
        "the dataset's content": dataset.get("sha256"),
        "the dataset's problems": dataset.get("rows"),
        "world_size": manifest["world_size"],
    }


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], words: str = "{}: {!r} before, {!r} now"
) -> list[str]:
    """Return a line for each entry of `now` that is not in `before` or means another value there."""
    return [
        words.format(name, before.get(name), value)
        for name, value in sorted(now.items())
        if not same_value(before.get(name), value)
    ]


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
    """Read a run's manifest. Raises ArtefactError when it is missing, torn or malformed."""
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
    """Read a JSON object. Raises ArtefactError for a file that is missing, torn, too large or no JSON."""
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
    """Return every file below `folder` but the sentinel: `{name: {"bytes": int, "sha256": str}}`."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SENTINEL_NAME
    }


def model_identity(files: Mapping[str, str]) -> str:
    """Return one SHA-256 (hex) of what decides a model's output: weights, configuration, tokenizer, no notes.

    Args:
        files: SHA-256 of each file of the model by name.
    """
    notes = (MANIFEST_NAME, "README.md")
    return combined_sha256({name: digest for name, digest in files.items() if name not in notes})


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
        "identity": model_identity({name: entry["sha256"] for name, entry in files.items()}),
        "files": {name: dict(entry) for name, entry in files.items()},
    }
    atomic_write_json(Path(folder) / SENTINEL_NAME, sentinel)
    return sentinel


def read_sentinel(folder: Path | str) -> dict[str, Any]:
    """Read the sentinel of a merged folder. Raises ArtefactError when it is missing, torn or malformed."""
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
    """A merged folder that is missing or not complete. Merging again fixes it."""


def check_merged(
    path: Path | str,
    *,
    expected_run_name: str | None = None,
    expected_base_model: str | None = None,
    expected_step: int | None = None,
    expected_arguments: Mapping[str, Any] | None = None,
    hashes: bool = False,
) -> dict[str, Any]:
    """Make sure that a merged folder is complete and, where asked, that it is the expected run's.

    Args:
        path: `outputs/<run_name>_merged`.
        expected_run_name: compared with the manifest.
        expected_base_model: a folder's weights are compared by hash, a hub id by name.
        expected_step: optimizer steps of the adapter that was merged.
        expected_arguments: all arguments of the expected run (`run_arguments`).
        hashes: compare every file's SHA-256 too, not its size alone (weights: `cached_sha256`).

    Returns:
        The sentinel, with the manifest under "manifest". Its "identity" names the weights.

    Raises:
        IncompleteMergeError (an ArtefactError): a file, or the sentinel, is missing, cut or empty.
        ArtefactError: the folder is complete but another run's.
    """
    folder = Path(path)
    sentinel, manifest = _check_complete(folder, hashes=hashes)
    expected = dict(expected_arguments or {})
    for name in MAY_CHANGE["training"] | {"model_name_or_path"}:
        expected.pop(name, None)
    if expected_run_name is not None:
        expected["run_name"] = expected_run_name
    if expected_step is not None:
        expected["adapter step"] = expected_step
    found = manifest["arguments"] | {
        "run_name": manifest["run_name"],
        "adapter step": sentinel.get("adapter_step"),
    }
    wrong = differences(found, expected, "{} is {!r}, expected {!r}")
    if expected_base_model is not None:
        wrong += base_differences(manifest, expected_base_model)
    if wrong:
        raise ArtefactError(
            f"{folder} is another run's: {'; '.join(wrong)}. Move it away, or give this run its own RUN_NAME"
        )
    return {**sentinel, "manifest": manifest}


def base_differences(manifest: Mapping[str, Any], base: str, folder: Path | None = None) -> list[str]:
    """Return, as at most one line, how the base model `base` differs from a manifest's.

    Args:
        folder: the files of `base`; default `base` itself where it is a folder. Their hash decides where both
            sides have one, else the name.
    """
    if folder is None and Path(base).is_dir():
        folder = Path(base)
    recorded = manifest.get("base_weights")
    if recorded is not None and folder is not None:
        given = weights_sha256(folder)
        if given != recorded:
            return [f"the base model's weights have the SHA-256 {recorded[:12]}…, {base!r} has {given[:12]}…"]
    elif not same_source(manifest["base_model"], base):
        return [f"base model is {manifest['base_model']!r}, expected {base!r}"]
    return []


def _check_complete(folder: Path, *, hashes: bool) -> tuple[dict[str, Any], dict[str, Any]]:
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
        if hashes and cached_sha256(file) != entry["sha256"]:
            raise IncompleteMergeError(f"{folder} is damaged: the SHA-256 of {name} differs; {remedy}")
    names = sentinel["files"]
    if not any(name.endswith(".safetensors") for name in names):
        raise IncompleteMergeError(f"{folder} holds no weights; {remedy}")
    if not any(name in names for name in TOKENIZER_FILES):
        raise IncompleteMergeError(f"{folder} holds no tokenizer; {remedy}")
    return sentinel, manifest


def same_value(found: Any, wanted: Any) -> bool:
    """Return whether two values mean the same: 1 and "1.0", True and "true", a list entry by entry."""
    if isinstance(found, list) and isinstance(wanted, list):
        pairs = zip(found, wanted, strict=False)
        return len(found) == len(wanted) and all(same_value(one, other) for one, other in pairs)
    if found == wanted or str(found).lower() == str(wanted).lower():
        return True
    try:
        return float(found) == float(wanted)
    except (TypeError, ValueError):
        return isinstance(found, str) and isinstance(wanted, str) and same_source(found, wanted)


def same_source(recorded: str, given: str) -> bool:
    """Return whether two names of a model or data set may mean the same thing.

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
