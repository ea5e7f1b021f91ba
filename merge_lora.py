"""Merge a LoRA checkpoint into its base model, or check a merged folder:

    python merge_lora.py --base_model Qwen/Qwen3-4B --adapter outputs/RUN/checkpoint-100 --output outputs/RUN_merged
        [--dtype auto|float32|bfloat16] [--rounding nearest|stochastic] [--seed 0]
    python merge_lora.py --check outputs/RUN_merged [--base_model B] [--run_name RUN] [--step 100] [--hashes]
        [--dtype D] [--rounding R] [--seed S] [-- FLAGS]

A bfloat16 weight keeps eight bits: an update below half its spacing is lost. The merge prints and records how much
of the update is left; float32 keeps all of it.

The merged folder holds the weights (safetensors), the base's tokenizer, chat template and generation settings,
the run's manifest.json and a model card. It is written under a temporary name and renamed; the sentinel
`.ready_for_eval` is written last. `--check` ends with 0 for a complete folder, 1 for a missing or incomplete
one, 2 for one that this project did not write and 3 for another run's. FLAGS is the complete command line of
the expected training: a flag that it does not give means its default.
"""  # noqa: E501 - the command that runs it, unbroken

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsd.checkpoints import Adapter, read_adapter
from opsd.errors import ArtefactError, OneLineParser, UsageError, run_cli
from opsd.files import PARTIAL_MARK, atomic_directory, atomic_write_json, disk_errors
from opsd.model_card import model_card
from opsd.models import (
    COPIED_FILES,
    copy_model_files,
    load_adapter,
    load_causal_lm,
    load_config,
    load_tokenizer,
    model_folder,
)
from opsd.options import SEED, add_options, option, take
from opsd.run_identity import (
    MANIFEST_NAME,
    SENTINEL_NAME,
    IncompleteMergeError,
    base_differences,
    check_merged,
    dataset_fingerprint,
    differences,
    read_manifest,
    read_sentinel,
    run_arguments,
    versions,
    write_sentinel,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("merge_lora")

OWN_FILES = (
    *COPIED_FILES, "config.json", "model.safetensors.index.json", MANIFEST_NAME, SENTINEL_NAME, "README.md",
)  # fmt: skip
# Room beside the weights: tokenizer, manifest, and the file system's own blocks.
SPARE_BYTES = 64 * 2**20
# Below it a merge warns: of the update's projection.
LEAST_KEPT = 0.5
DTYPES = ("auto", "float32", "bfloat16")


def merge(
    base: str,
    adapter: Path | str,
    out: Path | str,
    *,
    dtype: str = "auto",
    rounding: str = "nearest",
    seed: int = 0,
    revision: str | None = None,
    accept_base_name: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write base + adapter to the folder `out` and return its sentinel. Takes the memory of one base model.

    Warns where less than half of the update is left (`opsd.merging.UpdateKept`).

    Args:
        base: hub id or folder of the base model.
        adapter: folder of a LoRA checkpoint.
        out: a link to a folder stays a link; the folder that it leads to is written.
        dtype: of the merged weights: float32, bfloat16 or auto, the base's own.
        rounding: nearest, or stochastic (bfloat16 alone, with `seed`), which keeps the update on average.
        revision: hub commit of the base; default the one that the run's manifest names.
        accept_base_name: take `base` although a third-party adapter was trained on a model of another name.

    Raises:
        UsageError: `out` holds files that are no merged model's, the adapter is no plain LoRA, or stochastic
            rounding of float32.
        ArtefactError: base or checkpoint is missing, incomplete or not the other's; the merged weights are
            not finite; no room or no permission.
    """
    out = Path(out)
    checkpoint = read_adapter(adapter)
    refuse_other_folder(out, keep=(Path(base), checkpoint.path))
    if revision is None and checkpoint.manifest is not None:
        revision = checkpoint.manifest.get("base_revision")
    folder = model_folder(base, revision)
    load_config(str(folder), trust_remote_code=trust_remote_code)
    load_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    hollow = load_causal_lm(str(folder), dtype="auto", device_map="meta", trust_remote_code=trust_remote_code)
    own = str(hollow.dtype).removeprefix("torch.")
    record = _merge_record(own if dtype == "auto" else dtype, own, rounding, seed)
    width = {"float32": 4}.get(record["dtype"], 2)
    needed = sum(weight.numel() for weight in hollow.parameters()) * width + SPARE_BYTES
    load_adapter(hollow, checkpoint.path)
    _check_base(checkpoint, base, folder, accept_name=accept_base_name)
    with disk_errors(out):
        _check_room(out, needed)
        with atomic_directory(out) as temporary:
            model, kept = _merged_model(folder, checkpoint, record, trust_remote_code=trust_remote_code)
            record |= kept
            _show_kept(record)
            log.info("writing %s", out)
            model.save_pretrained(temporary, max_shard_size="5GB")
            del model
            copy_model_files(folder, temporary)
            manifest = checkpoint.manifest or _third_party_manifest(checkpoint, base, out)
            atomic_write_json(temporary / MANIFEST_NAME, manifest)
            card = model_card(manifest, adapter_step=checkpoint.step, merge=record)
            (temporary / "README.md").write_text(card, encoding="utf-8")
        return write_sentinel(
            out, base_model=base, adapter=str(checkpoint.path), adapter_step=checkpoint.step, merge=record
        )


def refuse_other_folder(out: Path, *, keep: Sequence[Path] = ()) -> None:
    """Refuse an `out` that a merge must not replace: anything but an empty folder or an earlier merge.

    Raises:
        UsageError: `out` is a file or a link to itself, contains one of `keep`, or is a folder that this
            project did not write.
    """
    real = Path(os.path.realpath(out))
    for path in keep:
        if path.exists() and path.resolve().is_relative_to(real):
            raise UsageError(f"--output {out} would replace {path}, which is merged; choose another folder")
    if real.is_symlink() or (real.exists() and not real.is_dir()):
        raise UsageError(f"--output {out} is no folder; choose one that does not exist")
    entries = sorted(real.iterdir()) if real.is_dir() else []
    for entry in entries:
        # A merge that was killed while it wrote its sentinel leaves the sentinel's temporary file.
        partial = entry.name.startswith(f".{SENTINEL_NAME}{PARTIAL_MARK}")
        if entry.is_dir() or not (entry.name in OWN_FILES or entry.suffix == ".safetensors" or partial):
            raise UsageError(f"--output {out} holds {entry.name}, which is no merged model's; choose another")
    # Any model has files of these names, but only a merged folder has a manifest or a sentinel.
    for read in (read_manifest, read_sentinel):
        with contextlib.suppress(ArtefactError):
            read(real)
            return
    if entries:
        raise UsageError(
            f"--output {out} holds a model without a {MANIFEST_NAME} or {SENTINEL_NAME} of this project; "
            "choose another folder, or move that one away"
        )


def _check_base(adapter: Adapter, base: str, folder: Path, *, accept_name: bool) -> None:
    """Refuse a base model that is not the one the adapter was trained on.

    The hash of the files in `folder` decides where the run's manifest has one, else the name, unless
    `accept_name` takes a renamed copy.
    """
    recorded = adapter.manifest or {"base_model": adapter.base_model}
    if not recorded["base_model"] or (accept_name and not recorded.get("base_weights")):
        return
    if wrong := base_differences(recorded, base, folder):
        raise ArtefactError(
            f"{adapter.path} was trained on another base model: {wrong[0]}; pass that one, or "
            "--accept_base_name for a renamed copy, if no SHA-256 says that it is another"
        )


def _check_room(out: Path, needed: int) -> None:
    parent = Path(os.path.realpath(out)).parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ArtefactError(
            f"{parent} has {free / 2**30:.2f} GiB free; the merged model needs {needed / 2**30:.2f} GiB; "
            "free some or choose another --output"
        )


def _merge_record(dtype: str, base_dtype: str, rounding: str, seed: int) -> dict[str, Any]:
    """Return how the weights are merged, for the sentinel and the model card."""
    if rounding == "stochastic" and dtype != "bfloat16":
        raise UsageError(
            f"--rounding stochastic is for bfloat16, but the merged weights are {dtype}; add --dtype bfloat16"
        )
    return {
        "dtype": dtype,
        "base_dtype": base_dtype,
        "rounding": rounding,
        "seed": seed if rounding == "stochastic" else None,
    }


def _merged_model(
    folder: Path, checkpoint: Adapter, record: Mapping[str, Any], *, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the base with W + scale · B A instead of every adapted W, and how much of the update is left.

    The second has `shares` of `opsd.merging.UpdateKept` over all matrices, and of each under "matrices".
    """
    import torch

    from opsd.merging import UpdateKept, adapted_layers, merged_matrix, update_kept

    log.info("loading %s", folder)
    base = load_causal_lm(str(folder), dtype=record["dtype"], trust_remote_code=trust_remote_code)
    model = load_adapter(base, checkpoint.path)
    seed, each = record["seed"], {}
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for name, layer in list(adapted_layers(model)):
        merged = merged_matrix(layer, model.active_adapters[0], generator=generator)
        each[name] = update_kept(layer, model.active_adapters[0], merged)
        layer.get_base_layer().weight.data = merged
    merged = model.unload()
    for name, weight in merged.named_parameters():
        if not torch.isfinite(weight).all():
            raise ArtefactError(
                f"{folder} with {checkpoint.path} gives values that are not finite in {name}; merge an "
                "earlier checkpoint, or download the base model again"
            )

    def shares(kept: UpdateKept) -> dict[str, Any]:
        return {key: value if math.isfinite(value) else None for key, value in kept.shares().items()}

    total = shares(sum(each.values(), UpdateKept()))
    return merged, total | {"matrices": {name: shares(kept) for name, kept in each.items()}}


def _show_kept(record: Mapping[str, Any]) -> None:
    """Log how much of the update is left, and warn below one half with the remedies."""
    shares = {name: one["kept"] for name, one in record["matrices"].items() if one["kept"] is not None}
    if not shares:
        log.warning("WARNING: the adapter is zero: the merged model is the base")
        return
    least = min(shares, key=shares.__getitem__)
    log.info(
        "kept of the update in %s: %.4f (projection; least in %s: %.4f); %.1f %% of the entries changed, "
        "relative error %.3f",
        *(record["dtype"], record["kept"], least, shares[least]),
        *(100 * record["changed"], record["relative_error"]),
    )
    if record["kept"] < LEAST_KEPT:
        log.warning(
            "WARNING: %s keeps %.2f of the update, so this is not the model that was trained; merge with "
            "--dtype float32 or --rounding stochastic, evaluate the adapter itself (ADAPTER=1 of "
            "launchers/run_eval.sh), or train with --rollout_weights adapter",
            *(record["dtype"], record["kept"]),
        )


def _third_party_manifest(checkpoint: Adapter, base: str, out: Path) -> dict[str, Any]:
    """Return what is known of an adapter that another project trained."""
    return {
        "run_name": out.name.removesuffix("_merged"),
        "method": "unknown",
        "base_model": base,
        "base_revision": None,
        "arguments": {},
        "versions": versions(),
        "dataset": {},
        "world_size": 0,
        "effective_batch": 0,
        "seeds": {},
        "note": f"no manifest came with {checkpoint.path.name}; versions are the merge's",
    }


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """The flags of merge_lora.py."""

    base_model: str | None = option(None, "hub id or folder of the base model")
    adapter: str | None = option(None, "folder of the LoRA checkpoint")
    output: str | None = option(None, "folder to write; an earlier merge there is replaced")
    accept_base_name: bool = option(False, "for third-party adapters: the base is a renamed copy")
    trust_remote_code: bool = option(False, "run code that the model ships")
    dtype: str | None = option(None, "of the merged weights; auto (default): the base's", choices=DTYPES)
    rounding: str | None = option(
        None, "stochastic (to bfloat16) keeps small updates on average", choices=("nearest", "stochastic")
    )
    seed: int = option(0, "of --rounding stochastic", range=SEED)
    check: str | None = option(None, "check this merged folder instead of merging")
    run_name: str | None = option(None, "with --check: the run that it must be")
    step: int | None = option(None, "with --check: the adapter's step that it must hold")
    hashes: bool = option(False, "with --check: compare SHA-256, not sizes alone")


def _expected_arguments(words: Sequence[str], folder: str) -> dict[str, Any] | None:
    """Return every argument of the training that a command line asks for; None for an empty one."""
    if not words:
        return None
    from opsd.arguments import parse_arguments

    # The Trainer needs a GPU for bfloat16, a check does not; these flags are not compared.
    given = ["--model_name_or_path", folder, "--output_dir", folder, *words, "--use_cpu", "True"]
    return run_arguments(*parse_arguments(given))


def _data_sha256(arguments: Mapping[str, Any]) -> str | None:
    """Return the fingerprint of a training's local data; None for a hub id: its name and revision decide."""
    source = arguments["train_dataset"]
    if not Path(source).exists():
        return None
    from opsd.tables import load_table

    return dataset_fingerprint(load_table(source))


def _check(folder: str, options: MergeOptions, training_flags: Sequence[str]) -> int:
    arguments = _expected_arguments(training_flags, folder)
    try:
        merged = check_merged(
            folder,
            expected_run_name=options.run_name,
            expected_base_model=options.base_model,
            expected_step=options.step,
            expected_arguments=arguments,
            expected_data=_data_sha256(arguments) if arguments else None,
            hashes=options.hashes,
        )
    except IncompleteMergeError as error:
        refuse_other_folder(Path(folder))  # before the training, not only before the merge
        print(error, file=sys.stderr)
        return 1
    _check_record(merged.get("merge") or {}, folder, options)
    print(f"{folder} is complete: step {merged['adapter_step']} of {merged['manifest']['run_name']}")
    return 0


def _check_record(record: Mapping[str, Any], folder: str, options: MergeOptions) -> None:
    """Refuse a folder that was merged into another dtype or with another rounding than a check asks for."""
    dtype = record.get("base_dtype") if options.dtype == "auto" else options.dtype
    asked = {"dtype": dtype, "rounding": options.rounding}
    asked["seed"] = options.seed if options.rounding == "stochastic" else None
    asked = {name: value for name, value in asked.items() if value is not None}
    if wrong := differences({"rounding": "nearest"} | record, asked, "{} is {!r}, expected {!r}"):
        raise ArtefactError(
            f"{folder} was merged otherwise: {'; '.join(wrong)}; move it away, or merge into another folder"
        )


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    cut = words.index("--") if "--" in words else len(words)
    parser = OneLineParser(
        prog="merge_lora.py", description="Merge a LoRA checkpoint into its base model.", allow_abbrev=False
    )
    add_options(parser, MergeOptions)
    options: MergeOptions = take(MergeOptions, vars(parser.parse_args(words[:cut])))
    if options.check:
        return _check(options.check, options, words[cut + 1 :])
    missing = [name for name in ("base_model", "adapter", "output") if not getattr(options, name)]
    if missing or options.base_model is None or options.adapter is None or options.output is None:
        raise UsageError(f"{', '.join('--' + name for name in missing)} missing; or use --check DIR")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    merge(
        options.base_model,
        options.adapter,
        options.output,
        dtype=options.dtype or "auto",
        rounding=options.rounding or "nearest",
        seed=options.seed,
        accept_base_name=options.accept_base_name,
        trust_remote_code=options.trust_remote_code,
    )
    print(options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
