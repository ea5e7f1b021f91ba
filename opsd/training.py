"""Prepare and run a training: data, tokenizer, model, adapter, engine, records, Trainer."""

from __future__ import annotations

import logging
import os
import pickle
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from transformers import ProgressCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from opsd.arguments import MethodArguments, ModelArguments, RolloutArguments
from opsd.checkpoints import check_run, remove_incomplete, resolve_resume
from opsd.data import Problems, check_positions, encode_problems
from opsd.errors import ArtefactError, UsageError
from opsd.files import atomic_write_json, atomic_write_text, lock_file, remove_all_partials
from opsd.head import attach_hidden_forward, check_head, head_of
from opsd.models import load_causal_lm, load_config, load_tokenizer, model_folder
from opsd.rollout.vllm_setup import local_model, require_vllm
from opsd.run_identity import (
    MANIFEST_NAME,
    differences,
    identity,
    model_sha256,
    read_manifest,
    run_arguments,
    run_manifest,
)
from opsd.step_metrics import ConciseProgress, MetricsFile, TensorBoardFolder
from opsd.tables import load_table

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from opsd.rollout.engine import Engine
    from opsd.trainer import OPSDTrainer

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"


def train(
    training: TrainingArguments, method: MethodArguments, rollout: RolloutArguments, options: ModelArguments
) -> int:
    """Run the training under a lock of its main process on the run folder; return the exit code.

    Raises:
        UsageError, ArtefactError: before any model is loaded where that is possible.
    """
    _check_devices(training)
    _check_engine(rollout, training.world_size)
    folder = Path(str(training.output_dir))
    if training.process_index > 0:
        return _train(training, method, rollout, options)
    busy = f"another process is training in --output_dir {folder}; wait for it, or choose another folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_file(folder / LOCK_NAME, busy=busy)
    except OSError as error:
        raise ArtefactError(f"--output_dir {folder} cannot be written: {error.strerror}") from error
    with lock:
        try:
            return _train(training, method, rollout, options)
        finally:
            (folder / LOCK_NAME).unlink(missing_ok=True)


def _train(
    training: TrainingArguments, method: MethodArguments, rollout: RolloutArguments, options: ModelArguments
) -> int:
    from opsd.trainer import OPSDTrainer  # late, since it imports what an error in the data does not need

    output_dir = Path(str(training.output_dir))
    resume = resolve_resume(output_dir, training.resume_from_checkpoint)
    load = {"revision": options.model_revision, "trust_remote_code": options.trust_remote_code}
    config = load_config(options.model_name_or_path, **load)
    tokenizer = load_tokenizer(options.model_name_or_path, **load)
    problems = _load_problems(training, rollout, options, tokenizer)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    check_positions(problems, max_completion_length=rollout.max_completion_length, positions=positions)
    manifest = _manifest(training, method, rollout, options, config, problems)
    _check_same_run(output_dir, manifest, resume)
    if resume is not None and int(resume.name.removeprefix("checkpoint-")) >= training.max_steps:
        logger.info("%s is already the last step of %d; nothing to train", resume, training.max_steps)
        return 0
    if training.process_index == 0:
        remove_incomplete(output_dir)
        remove_all_partials(output_dir)
        manifest = manifest if resume is None else _resumed(output_dir, manifest, resume)
        atomic_write_json(output_dir / MANIFEST_NAME, manifest)
        _identify_wandb_run(training, output_dir)
    logger.info("resuming from %s", resume) if resume is not None else logger.info("starting afresh")
    model = _load_model(training, options).to(training.device)
    base = cast("PreTrainedModel", model.get_base_model())
    head = head_of(base)
    attach_hidden_forward(base)
    check_head(base, head)
    engine = _build_engine(model, tokenizer, problems, rollout, options, training)
    trainer = OPSDTrainer(
        method=method,
        engine=engine,
        head=head,
        rollout=rollout,
        options=options,
        model=model,
        args=training,
        processing_class=tokenizer,
        train_dataset=problems,
        callbacks=[MetricsFile(output_dir)],
    )
    progress = ConciseProgress()
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(progress)
    if trainer.pop_callback(TensorBoardCallback) is not None:
        trainer.add_callback(TensorBoardFolder(output_dir))
    try:
        _run(trainer, resume)
    finally:
        progress.close()
        engine.close()
    return 0


def _run(trainer: OPSDTrainer, resume: Path | None) -> None:
    try:
        trainer.train(resume_from_checkpoint=resume and str(resume))
    except pickle.UnpicklingError as error:
        raise ArtefactError(
            f"{resume} holds more than tensors and numbers in its optimizer, scheduler or random state, "
            "which is not loaded; resume from a checkpoint of your own"
        ) from error
    except torch.OutOfMemoryError as error:
        raise ArtefactError(
            f"out of memory ({str(error).splitlines()[0]}); set --per_device_train_batch_size "
            f"{max(trainer.args.per_device_train_batch_size // 2, 1)} and double "
            "--gradient_accumulation_steps, or lower --max_completion_length or "
            "--vllm_gpu_memory_utilization"
        ) from error


def _check_devices(training: TrainingArguments) -> None:
    # The Trainer would spread one process over all visible GPUs (DataParallel) and multiply the batch.
    if training.n_gpu > 1:
        raise UsageError(
            f"one process sees {training.n_gpu} GPUs; start it with accelerate launch --num_processes "
            f"{training.n_gpu}, or set CUDA_VISIBLE_DEVICES to one of them"
        )


def _check_engine(rollout: RolloutArguments, world_size: int) -> None:
    if rollout.rollout != "vllm":
        if rollout.rollout_weights == "adapter":
            raise UsageError(
                "--rollout_weights adapter is for --rollout vllm; transformers never merges the adapter, so "
                "leave the flag out"
            )
        return
    require_vllm()
    if world_size % (size := rollout.vllm_tensor_parallel_size):
        raise UsageError(
            f"--vllm_tensor_parallel_size {size} does not divide the {world_size} processes; choose a divisor"
        )


def _load_problems(
    training: TrainingArguments,
    rollout: RolloutArguments,
    options: ModelArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> Problems:
    import datasets

    if training.disable_tqdm:
        datasets.disable_progress_bars()
    # The first rank of each machine encodes; the others find its file.
    with training.main_process_first(desc="loading the dataset"):
        rows = load_table(options.train_dataset, revision=options.dataset_revision)
        limit = options.max_length - rollout.max_completion_length
        problems = encode_problems(rows, tokenizer, source=options.train_dataset, max_prompt_length=limit)
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    needed = batch * accumulation * training.world_size
    if len(problems) < needed:
        raise UsageError(
            f"one optimizer step takes {needed} problems ({training.world_size} processes × "
            f"--per_device_train_batch_size {batch} × --gradient_accumulation_steps {accumulation}), the "
            f"dataset has {len(problems)}; add rows or lower one of the three"
        )
    return problems


def _manifest(training, method, rollout, options, config, problems: Problems) -> dict:
    revision = getattr(config, "_commit_hash", None)
    # The main process hashes the model; the others find the hash in the user's cache.
    with training.main_process_first(desc="hashing the base model"):
        base_weights = model_sha256(model_folder(options.model_name_or_path, revision))
    return run_manifest(
        run_arguments(training, method, rollout, options),
        base_revision=revision,
        base_weights=base_weights,
        dataset_rows=len(problems),
        dataset_sha256=problems.sha256,
        world_size=training.world_size,
    )


def _check_same_run(output_dir: Path, manifest: dict, resume: Path | None) -> None:
    """Check that folder, checkpoint and command line of a resumed run have one identity.

    Raises:
        UsageError: the command line differs from the run in `output_dir`; every difference is named.
        ArtefactError: the checkpoint is another run's, or the folder's manifest is gone.
    """
    if resume is None:
        return
    has_manifest = (output_dir / MANIFEST_NAME).exists()
    differing = differences(identity(read_manifest(output_dir)), identity(manifest)) if has_manifest else ()
    if differing:
        raise UsageError(
            f"{output_dir} was trained with other settings ({'; '.join(differing)}); restore them, or "
            "give another --output_dir"
        )
    check_run(resume, manifest)
    if not has_manifest:
        raise ArtefactError(
            f"{output_dir} has no {MANIFEST_NAME}, so nothing says how the run of {resume} began; put the "
            "file back, or give another --output_dir and no --resume_from_checkpoint"
        )


def _resumed(output_dir: Path, manifest: dict, resume: Path) -> dict:
    """Return the run's first manifest with the present arguments and one more entry under `resumed`."""
    before = read_manifest(output_dir)
    start = {name: manifest[name] for name in ("created", "command", "git", "versions")}
    resumed = [*before.get("resumed", ()), {"checkpoint": resume.name} | start]
    return before | {"arguments": manifest["arguments"], "resumed": resumed}


def _identify_wandb_run(training: TrainingArguments, output_dir: Path) -> None:
    """Let a resumed run continue its own W&B run instead of opening a second one."""
    if "wandb" not in (training.report_to or ()) or "WANDB_RUN_ID" in os.environ:
        return
    path = output_dir / "wandb_run_id"
    if not path.exists():
        atomic_write_text(path, uuid.uuid4().hex[:12])
    os.environ["WANDB_RUN_ID"] = path.read_text(encoding="utf-8").strip()
    os.environ.setdefault("WANDB_RESUME", "allow")


def _load_model(training: TrainingArguments, options: ModelArguments) -> PeftModel:
    """Load the base and add a new adapter, whose parameters PEFT keeps in float32 on a bfloat16 base too."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    use_bf16 = training.bf16 if options.dtype == "auto" else options.dtype == "bfloat16"
    model = load_causal_lm(
        options.model_name_or_path,
        dtype=torch.bfloat16 if use_bf16 else torch.float32,
        revision=options.model_revision,
        trust_remote_code=options.trust_remote_code,
        attn_implementation=options.attn_implementation,
    )
    set_seed(training.seed)  # so the adapter's initial values do not depend on earlier draws
    targets = list(options.lora_target_modules)
    lora = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,  # pyright: ignore[reportArgumentType]  # PEFT takes any number
        lora_dropout=options.lora_dropout,
        # In a list, PEFT's keyword all-linear would be the name of a module.
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
        revision=options.model_revision,
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise UsageError(f"--lora_target_modules {' '.join(options.lora_target_modules)}: {error}") from error


def _build_engine(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Problems,
    rollout: RolloutArguments,
    options: ModelArguments,
    training: TrainingArguments,
) -> Engine:
    if rollout.rollout == "hf":
        from opsd.rollout.hf import HFEngine

        return HFEngine(model, tokenizer, batch_size=rollout.hf_rollout_batch_size)
    from opsd.rollout.vllm import VLLMEngine
    from opsd.rollout.vllm_push import check_pushable

    adapter = rollout.rollout_weights == "adapter"
    check_pushable(model, merged=not adapter)
    return VLLMEngine(
        local_model(options.model_name_or_path, options.model_revision),
        tensor_parallel_size=rollout.vllm_tensor_parallel_size,
        gpu_memory_utilization=rollout.vllm_gpu_memory_utilization,
        max_model_len=problems.longest_student_prompt + rollout.max_completion_length,
        max_num_seqs=rollout.vllm_max_num_seqs,
        seed=training.seed,
        enforce_eager=rollout.vllm_enforce_eager,
        enable_sleep_mode=rollout.vllm_enable_sleep_mode,
        dtype=str(model.get_base_model().dtype).removeprefix("torch."),
        trust_remote_code=options.trust_remote_code,
        pushed_rank=options.lora_r if adapter else None,
    )
