"""Every flag of ea_opsd_train.py: the method's, the rollout's, the data's and the Trainer's own."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from opsd.errors import OneLineParser, UsageError
from opsd.objectives import METHODS, Hyperparameters
from opsd.options import (
    AT_LEAST_ONE,
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    PROPER_SHARE,
    SEED,
    Range,
    add_options,
    check_options,
    check_range,
    option,
    take,
)

DEFAULT_DATASET = "siyanzhao/Openthoughts_math_30k_opsd"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class MethodArguments(Hyperparameters):
    """The objective: its name, its numbers and what it is normalised over."""

    method: str = option(help="objective", choices=tuple(METHODS))
    loss_scope: str = option("micro_batch", "the loss's normaliser", choices=("micro_batch", "global"))


@dataclass
class RolloutArguments:
    """How completions are sampled while training; the defaults are the paper's."""

    rollout: str = option("vllm", "sampler; hf is transformers' generate", choices=("hf", "vllm"))
    rollout_weights: str = option(
        "merged", "vllm: base + adapter as one matrix, or the adapter itself", choices=("merged", "adapter")
    )
    rollout_temperature: float = option(1.1, "sampling temperature", range=POSITIVE)
    rollout_top_p: float = option(0.95, "nucleus mass", range=PROPER_SHARE)
    rollout_top_k: int = option(20, "likeliest tokens kept; 0 = all", range=NOT_NEGATIVE)
    max_completion_length: int = option(1024, "most new tokens of a rollout", range=AT_LEAST_ONE)
    hf_rollout_batch_size: int = option(32, "hf: prompts per generate call", range=AT_LEAST_ONE)
    vllm_gpu_memory_utilization: float = option(0.4, "vllm: share of each GPU", range=PROPER_SHARE)
    vllm_tensor_parallel_size: int = option(1, "vllm: ranks that share an engine", range=AT_LEAST_ONE)
    vllm_enable_sleep_mode: bool = option(False, "vllm: free its memory between rollouts")
    vllm_max_num_seqs: int = option(64, "vllm: completions in flight", range=AT_LEAST_ONE)
    vllm_enforce_eager: bool = option(False, "vllm: no CUDA graphs")
    rollout_audit_steps: int = option(
        10, "steps between audits of the sampler; 0 = never", range=NOT_NEGATIVE
    )
    log_completions_steps: int = option(10, "steps between written texts; 0 = never", range=NOT_NEGATIVE)


@dataclass
class ModelArguments:
    """The base model, its adapter and the data."""

    model_name_or_path: str = option(help="hub id or folder of the base model")
    model_revision: str | None = option(None, "hub branch, tag or commit")
    trust_remote_code: bool = option(False, "run code that the model ships")
    dtype: str = option("auto", "of the base; auto: as --bf16", choices=("auto", "float32", "bfloat16"))
    attn_implementation: str = option("sdpa", "transformers' name of the attention code")
    lora_r: int = option(64, "rank", range=AT_LEAST_ONE)
    lora_alpha: float = option(128, "scale is alpha / r", range=POSITIVE)
    lora_dropout: float = option(0.0, "dropout on the adapter's input", range=BELOW_ONE)
    lora_target_modules: list[str] = option(factory=lambda: [*LORA_TARGETS], help="linear layers to adapt")  # noqa: RUF009
    train_dataset: str = option(
        factory=lambda: os.environ.get("PWOPSD_TRAIN_DATASET") or DEFAULT_DATASET,
        help="hub id, folder, parquet, JSONL or CSV with the columns problem and solution",
    )
    dataset_revision: str | None = option(None, "hub branch, tag or commit")
    max_length: int = option(20000, "tokens of prompt + completion; longer ones are skipped", range=Range(2))
    max_padding_ratio: float = option(1.15, "most padded / valid tokens of a forward pass", range=Range(1))
    skip_nonfinite: int = option(0, "steps with a NaN or infinite loss to leave out", range=NOT_NEGATIVE)
    merge_step: int = option(100, "step of the checkpoint that is always kept", range=AT_LEAST_ONE)


GROUPS = (MethodArguments, RolloutArguments, ModelArguments)
# Where the paper's run differs from transformers' defaults, or where a default must not drift.
TRAINER_DEFAULTS = {
    "learning_rate": 5e-6,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "optim": "adamw_torch_fused",
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "weight_decay": 0.0,
    "max_grad_norm": 0.1,
    "max_steps": 150,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "bf16": True,
    "gradient_checkpointing": True,
    "seed": 42,
    "save_strategy": "steps",
    "save_steps": 25,
    "logging_steps": 1,
    "report_to": "none",
}
TRAINER_RANGES = {
    name: allowed
    for names, allowed in (
        ("per_device_train_batch_size gradient_accumulation_steps max_steps save_total_limit", AT_LEAST_ONE),
        ("learning_rate adam_epsilon save_steps logging_steps ddp_timeout", POSITIVE),
        ("weight_decay max_grad_norm warmup_steps dataloader_num_workers", NOT_NEGATIVE),
        ("adam_beta1 adam_beta2", BELOW_ONE),
        ("seed data_seed", SEED),
    )
    for name in names.split()
}
# Fields that must stay off, and why.
UNSUPPORTED = {
    "deepspeed": "the adapter run fits DistributedDataParallel",
    "fsdp": "the base weights must stay complete and unchanged on every rank",
    "torch_compile": "generation and the two passes compile into different graphs each step",
    "push_to_hub": "a run writes into --output_dir alone; upload the merged folder with `hf upload`",
    "full_determinism": "use --seed; rollouts have hashed seeds of their own",
    "auto_find_batch_size": "the effective batch is part of the experiment",
    "save_only_model": "a run without the optimizer's state cannot be resumed exactly",
    "ignore_data_skip": "a resumed run must see the problems that the interrupted one had left",
    "load_best_model_at_end": "there is no evaluation loop here; see launchers/run_eval.sh",
    "fp16": "its loss scaling works by infinite gradients, which stop a run here; use --bf16",
    "use_liger_kernel": "the objectives have a chunked head of their own (opsd/token_stats.py)",
    "label_smoothing_factor": "no label enters the objectives",
    "neftune_noise_alpha": "the student would not be the network that sampled",
    "eval_on_start": "there is no evaluation loop here; see launchers/run_eval.sh",
}
# Fields with several values: those that are supported, the default first, and why no other is.
SUPPORTED = {
    "eval_strategy": (("no",), UNSUPPORTED["eval_on_start"]),
    "include_num_input_tokens_seen": (("no", "False"), "rollout/completion_tokens counts what is sampled"),
    "train_sampling_strategy": (("random", "sequential"), "--max_padding_ratio keeps padding down"),
}


def parse_arguments(argv: Sequence[str]):
    """Parse a command line into (TrainingArguments, MethodArguments, RolloutArguments, ModelArguments).

    Raises:
        UsageError: an unknown flag, a value that does not parse, or one outside its range.
        SystemExit: for --help.
    """
    if not {"-h", "--help"} & set(argv):
        # A mistake in a flag of this project is reported before transformers is imported.
        early = OneLineParser(prog="ea_opsd_train.py", add_help=False, allow_abbrev=False)
        add_options(early, *GROUPS)
        _check_ours(vars(early.parse_known_args(list(argv))[0]))
    from transformers import HfArgumentParser, TrainingArguments

    class TrainingParser(OneLineParser, HfArgumentParser):
        """transformers' flags from TrainingArguments; a mistake is one line."""

    parser = TrainingParser(cast("Any", TrainingArguments), prog="ea_opsd_train.py", allow_abbrev=False)
    add_options(parser, *GROUPS)
    parser.set_defaults(**TRAINER_DEFAULTS)
    values = vars(parser.parse_args(list(argv)))
    method, rollout, model = (take(group, values) for group in GROUPS)
    _check_trainer(values)
    return _training_arguments(values), method, rollout, model


def _check_ours(values: dict) -> None:
    for group in GROUPS:
        check_options(group, values)
    if values["max_completion_length"] >= values["max_length"]:
        raise UsageError(
            f"--max_completion_length {values['max_completion_length']} leaves no room for a prompt in "
            f"--max_length {values['max_length']}; lower the one or raise the other"
        )


def _check_trainer(values: dict) -> None:
    for name, allowed in TRAINER_RANGES.items():
        check_range(name, values.get(name), allowed)
    if not values.get("output_dir"):
        raise UsageError("--output_dir is missing: give a folder, e.g. outputs/my_run")
    for name, reason in UNSUPPORTED.items():
        if values.get(name):
            raise UsageError(f"--{name} is not supported: {reason}")
    for name, (supported, reason) in SUPPORTED.items():
        value = values.get(name, supported[0])
        value = str(getattr(value, "value", value))
        if value not in supported:
            raise UsageError(f"--{name} {value} is not supported: {reason}")


def _training_arguments(values: dict):
    from transformers import TrainingArguments
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    values = {name: value for name, value in values.items() if value is not argparse.SUPPRESS} | {
        "remove_unused_columns": False,
        "dataloader_drop_last": True,
        "logging_nan_inf_filter": False,  # a non-finite step stops the run and is not averaged away
        "ddp_find_unused_parameters": False,
        # A micro-batch takes several forward passes before its backward; buffers must not change in between.
        "ddp_broadcast_buffers": False,
        "average_tokens_across_devices": False,
    }
    if values.get("gradient_checkpointing"):
        values["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if not values.get("run_name"):
        values["run_name"] = os.path.basename(os.path.normpath(values["output_dir"]))
    try:
        arguments = TrainingArguments(**values)
    except (ValueError, ImportError) as error:
        raise UsageError(f"the Trainer refuses its flags: {error}") from error
    try:
        for callback in get_reporting_integration_callbacks(arguments.report_to):
            callback()
    except (ValueError, ImportError, RuntimeError) as error:
        raise UsageError(f"--report_to {' '.join(arguments.report_to or ())}: {error}") from error
    return arguments
