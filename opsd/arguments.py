"""Every flag of ea_opsd_train.py: the Trainer's own, with the paper's defaults, and the method's, rollout's
and data's.

Bounds are checked where a value enters, before any model is loaded; the error names flag, value and range.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from opsd.errors import UsageError

METHOD_NAMES = ("opsd", "eopd", "reopold", "pwopsd")
DEFAULT_DATASET = "siyanzhao/Openthoughts_math_30k_opsd"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# flag -> (lowest, highest, lowest itself is allowed, highest itself is allowed)
BOUNDS: dict[str, tuple[float, float, bool, bool]] = {
    "temperature": (0.0, math.inf, False, False),
    "jsd_token_clip": (0.0, math.inf, True, False),
    "position_w_min": (0.0, 1.0, True, True),
    "position_tau": (-math.inf, math.inf, False, False),
    "position_s": (0.0, math.inf, False, False),
    "eopd_entropy_threshold": (0.0, math.inf, True, False),
    "eopd_top_k": (1, math.inf, True, False),
    "eopd_clip_epsilon": (0.0, 1.0, True, False),
    "reopold_lambda": (0.0, 1.0, False, False),
    "reopold_beta": (0.0, 1.0, True, True),
    "reopold_t_switch": (0, math.inf, True, False),
    "rollout_temperature": (0.0, math.inf, False, False),
    "rollout_top_p": (0.0, 1.0, False, True),
    "rollout_top_k": (0, math.inf, True, False),
    "max_completion_length": (1, math.inf, True, False),
    "max_length": (2, math.inf, True, False),
    "max_padding_ratio": (1.0, math.inf, True, False),
    "hf_rollout_batch_size": (1, math.inf, True, False),
    "rollout_audit_steps": (0, math.inf, True, False),
    "log_completions_steps": (0, math.inf, True, False),
    "skip_nonfinite": (0, math.inf, True, False),
    "vllm_gpu_memory_utilization": (0.0, 1.0, False, True),
    "vllm_tensor_parallel_size": (1, math.inf, True, False),
    "vllm_max_num_seqs": (1, math.inf, True, False),
    "lora_r": (1, math.inf, True, False),
    "lora_alpha": (0.0, math.inf, False, False),
    "lora_dropout": (0.0, 1.0, True, False),
    "per_device_train_batch_size": (1, math.inf, True, False),
    "gradient_accumulation_steps": (1, math.inf, True, False),
    "learning_rate": (0.0, math.inf, False, False),
    "weight_decay": (0.0, math.inf, True, False),
    "adam_beta1": (0.0, 1.0, True, False),
    "adam_beta2": (0.0, 1.0, True, False),
    "adam_epsilon": (0.0, math.inf, False, False),
    "max_grad_norm": (0.0, math.inf, True, False),
    "max_steps": (1, math.inf, True, False),
    "warmup_steps": (0, math.inf, True, False),
    "save_steps": (0.0, math.inf, False, False),
    "logging_steps": (0.0, math.inf, False, False),
    "save_total_limit": (1, math.inf, True, False),
    "dataloader_num_workers": (0, math.inf, True, False),
    "ddp_timeout": (0, math.inf, False, False),
    "seed": (0, 2**32 - 1, True, True),
    "data_seed": (0, 2**32 - 1, True, True),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "method": METHOD_NAMES,
    "rollout": ("hf", "vllm"),
    "loss_scope": ("micro_batch", "global"),
    "dtype": ("auto", "float32", "bfloat16"),
}


def check_bounds(values: dict[str, object]) -> None:
    """Raise UsageError for the first value outside `BOUNDS` or `CHOICES`; NaN is outside every range."""
    for name, allowed in CHOICES.items():
        if name in values and values[name] not in allowed:
            raise UsageError(f"--{name} {values[name]!r}: choose one of {', '.join(allowed)}")
    for name, (low, high, low_allowed, high_allowed) in BOUNDS.items():
        value = values.get(name)
        if value is None:
            continue
        above = value >= low if low_allowed else value > low
        below = value <= high if high_allowed else value < high
        if not (above and below):
            interval = f"{'[' if low_allowed else '('}{low}, {high}{']' if high_allowed else ')'}"
            raise UsageError(f"--{name} {value}: must lie in {interval}")


def early_method_check(argv: Sequence[str]) -> None:
    """Refuse a missing or unknown --method before the heavy imports. Raises UsageError with the four
    names."""
    if any(argument in ("-h", "--help") for argument in argv):
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", nargs="?")
    method = parser.parse_known_args(list(argv))[0].method
    if method is None:
        raise UsageError(f"--method is missing: choose one of {', '.join(METHOD_NAMES)}")
    check_bounds({"method": method})


@dataclass
class MethodArguments:
    """The objective's numbers (opsd/objectives.py); the defaults are the paper's."""

    method: str = field(default="", metadata={"help": f"one of {', '.join(METHOD_NAMES)}"})
    temperature: float = field(default=1.1, metadata={"help": "T of both distributions in the objective"})
    jsd_token_clip: float = field(
        default=0.05, metadata={"help": "cap on each vocabulary entry of the forward KL; 0 = none"}
    )
    position_w_min: float = field(default=0.25, metadata={"help": "pwopsd: smallest position weight"})
    position_tau: float = field(default=0.30, metadata={"help": "pwopsd: relative position of half weight"})
    position_s: float = field(default=0.10, metadata={"help": "pwopsd: width of the schedule"})
    position_global_reduction: bool = field(
        default=False, metadata={"help": "pwopsd: mean over all tokens, not per sequence first"}
    )
    eopd_entropy_threshold: float = field(default=0.8, metadata={"help": "eopd: teacher entropy gate, nats"})
    eopd_top_k: int = field(default=16, metadata={"help": "eopd: teacher's support in the gated forward KL"})
    eopd_clip_epsilon: float = field(default=0.2, metadata={"help": "eopd: PPO clip"})
    reopold_lambda: float = field(default=0.1, metadata={"help": "reopold: reward floor is log λ / (1 − λ)"})
    reopold_beta: float = field(default=0.2, metadata={"help": "reopold: share of tokens kept when refining"})
    reopold_t_switch: int = field(
        default=50, metadata={"help": "reopold: optimizer step where refining begins"}
    )
    loss_scope: str = field(
        default="micro_batch",
        metadata={"help": "micro_batch (the paper) or global: normalise over the whole optimizer step"},
    )


@dataclass
class RolloutArguments:
    """How completions are sampled while training; the defaults are the paper's."""

    rollout: str = field(default="vllm", metadata={"help": "vllm, or hf: transformers' generate"})
    rollout_temperature: float = field(default=1.1, metadata={"help": "sampling temperature"})
    rollout_top_p: float = field(default=0.95, metadata={"help": "nucleus mass"})
    rollout_top_k: int = field(default=20, metadata={"help": "likeliest tokens kept; 0 = all"})
    max_completion_length: int = field(default=1024, metadata={"help": "most new tokens of a rollout"})
    hf_rollout_batch_size: int = field(default=32, metadata={"help": "hf: prompts per generate call"})
    vllm_gpu_memory_utilization: float = field(default=0.4, metadata={"help": "vllm: share of each GPU"})
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "vllm: ranks that share an engine"})
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "vllm: free its memory between rollouts"}
    )
    vllm_max_num_seqs: int = field(default=64, metadata={"help": "vllm: completions in flight"})
    vllm_enforce_eager: bool = field(default=False, metadata={"help": "vllm: no CUDA graphs"})
    rollout_audit_steps: int = field(
        default=10,
        metadata={"help": "compare the sampler with the trainer's own logits every so many steps; 0 = never"},
    )
    log_completions_steps: int = field(
        default=10, metadata={"help": "write this step's completions every so many steps; 0 = never"}
    )


@dataclass
class ModelArguments:
    """The base model, its adapter and the data."""

    model_name_or_path: str = field(default="", metadata={"help": "hub id or folder of the base model"})
    model_revision: str | None = field(default=None, metadata={"help": "hub branch, tag or commit"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that the model ships"})
    dtype: str = field(default="auto", metadata={"help": "of the base: auto = bfloat16 with --bf16"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "as in from_pretrained"})
    lora_r: int = field(default=64, metadata={"help": "rank"})
    lora_alpha: float = field(default=128, metadata={"help": "scale is alpha / r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: list(LORA_TARGETS), metadata={"help": "linear layers to adapt"}
    )
    train_dataset: str = field(
        default_factory=lambda: os.environ.get("PWOPSD_TRAIN_DATASET") or DEFAULT_DATASET,
        metadata={"help": "hub id, folder, parquet, JSONL or CSV with the columns problem and solution"},
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "hub branch, tag or commit"})
    max_length: int = field(
        default=20000,
        metadata={"help": "tokens of prompt + completion; longer prompts' problems are skipped"},
    )
    max_padding_ratio: float = field(
        default=1.15, metadata={"help": "most padded / valid tokens of a forward pass over several sequences"}
    )
    skip_nonfinite: int = field(
        default=0, metadata={"help": "how many steps with a NaN or infinite loss or gradient to leave out"}
    )


def _trainer_defaults() -> dict[str, object]:
    """Where the paper's run differs from transformers' defaults, or where a default must not drift."""
    return {
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


def parse_arguments(argv: Sequence[str]):
    """(TrainingArguments, MethodArguments, RolloutArguments, ModelArguments) from the command line.

    Raises:
        UsageError: an unknown flag, a value that does not parse, or one outside its range.
        SystemExit: for --help.
    """
    early_method_check(argv)
    from transformers import HfArgumentParser, TrainingArguments

    class OneLineParser(HfArgumentParser):
        def error(self, message: str):
            raise UsageError(f"{message}; --help lists every flag")

    groups = (MethodArguments, RolloutArguments, ModelArguments)
    parser = OneLineParser([_without_construction(TrainingArguments), *groups], allow_abbrev=False)
    parser.set_defaults(**_trainer_defaults())
    namespace = vars(parser.parse_args(list(argv)))
    check_bounds(namespace)
    method, rollout, model = (
        group(**{f.name: namespace.pop(f.name) for f in dataclasses.fields(group)}) for group in groups
    )
    _check_together(namespace, rollout, model)
    trainer = _training_arguments({k: v for k, v in namespace.items() if v is not argparse.SUPPRESS})
    return trainer, method, rollout, model


def _without_construction(cls):
    # HfArgumentParser reads fields only; the instance is built after the bounds have been checked.
    return cls


def _check_together(trainer: dict, rollout: RolloutArguments, model: ModelArguments) -> None:
    if not model.model_name_or_path:
        raise UsageError("--model_name_or_path is missing: give a hub id or the folder of a base model")
    if not trainer.get("output_dir"):
        raise UsageError("--output_dir is missing: give a folder, e.g. outputs/my_run")
    if rollout.max_completion_length >= model.max_length:
        raise UsageError(
            f"--max_completion_length {rollout.max_completion_length} leaves no room for a prompt in "
            f"--max_length {model.max_length}; lower the one or raise the other"
        )
    for name, reason in (
        ("deepspeed", "the adapter run fits DistributedDataParallel"),
        ("fsdp", "the base weights must stay whole and untouched on every rank"),
        ("torch_compile", "generation and the two passes compile into different graphs each step"),
        ("push_to_hub", "a run writes into --output_dir alone; upload the merged folder with `hf upload`"),
        ("full_determinism", "use --seed; rollouts have hashed seeds of their own"),
        ("auto_find_batch_size", "the effective batch is part of the experiment"),
        ("save_only_model", "a run without the optimizer's state cannot be resumed exactly"),
        ("ignore_data_skip", "a resumed run must see the problems that the interrupted one had left"),
        ("load_best_model_at_end", "there is no evaluation loop here; see launchers/run_eval.sh"),
        ("fp16", "its loss scaling works by infinite gradients, which stop a run here; use --bf16"),
        ("use_liger_kernel", "the objectives have a chunked head of their own (opsd/token_stats.py)"),
        ("label_smoothing_factor", "no label enters the objectives"),
        ("neftune_noise_alpha", "the student would not be the network that sampled"),
        ("eval_on_start", "there is no evaluation loop here; see launchers/run_eval.sh"),
    ):
        if trainer.get(name):
            raise UsageError(f"--{name} is not supported: {reason}")
    for name, supported, reason in (
        ("eval_strategy", ("no",), "there is no evaluation loop here; see launchers/run_eval.sh"),
        (
            "include_num_input_tokens_seen",
            ("no", "False"),
            "rollout/completion_tokens counts what is sampled",
        ),
        ("train_sampling_strategy", ("random", "sequential"), "--max_padding_ratio keeps padding down"),
    ):
        value = trainer.get(name, supported[0])
        value = str(getattr(value, "value", value))
        if value not in supported:
            raise UsageError(f"--{name} {value} is not supported: {reason}")


def _training_arguments(values: dict):
    from transformers import TrainingArguments
    from transformers.integrations import get_reporting_integration_callbacks

    values["remove_unused_columns"] = False
    values["dataloader_drop_last"] = True
    values["logging_nan_inf_filter"] = False  # a non-finite step stops the run; it is not averaged away
    values["ddp_find_unused_parameters"] = False
    # A micro-batch takes several forward passes before its backward; buffers must not be rewritten between.
    values["ddp_broadcast_buffers"] = False
    values["average_tokens_across_devices"] = False
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
        raise UsageError(f"--report_to {' '.join(arguments.report_to)}: {error}") from error
    return arguments


def hyperparameters(method: MethodArguments):
    """The objective's `Hyperparameters` out of the method's flags."""
    from opsd.objectives import Hyperparameters

    names = {f.name for f in dataclasses.fields(Hyperparameters)}
    return Hyperparameters(**{k: v for k, v in vars(method).items() if k in names})


def command_line() -> list[str]:
    """This process's arguments, without the program's name."""
    return sys.argv[1:]
