"""What fixes a run of the branch-viability diagnostic: the settings, their bounds, the command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from opsd.errors import OneLineParser, UsageError, refuse_below_one, refuse_no_share, refuse_unknown
from opsd.rollout import Sampling, check_sampling

ENGINES = ("hf", "vllm")
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class BranchConfig:
    """One diagnostic. The sampling defaults are those of the rollouts in training.

    Attributes:
        model_name_or_path: folder or hub id of the base model.
        dataset: table with the columns problem, solution and perhaps answer.
        output_dir: where journal, branches, plots and report go.
        adapter: LoRA folder; the student is base + adapter then, the teacher the base.
        num_problems: the first so many problems; None takes all.
        num_positions: forks per spine, one drawn in each of so many equal stretches.
        top_k: how many of the teacher's likeliest next tokens are forced at each fork.
        continuations: student continuations of each branch, and of each fork's unforced control.
        score_temperature: divides both sides' logits before entropies, probabilities and KL are read.
        viable_share: a branch is viable if at least this share of its continuations recovers the answer.
        max_new_tokens: limit of the spine, and again of every continuation.
        gpu_memory_utilization: vLLM's share of the GPU; a second copy of the model scores spines beside it.
    """

    model_name_or_path: str
    dataset: str
    output_dir: str
    adapter: str | None = None
    model_revision: str | None = None
    num_problems: int | None = None
    num_positions: int = 8
    top_k: int = 3
    continuations: int = 8
    rollout_temperature: float = 1.1
    rollout_top_p: float = 0.95
    rollout_top_k: int = 20
    max_new_tokens: int = 1024
    score_temperature: float = 1.1
    viable_share: float = 0.5
    seed: int = 0
    engine: str = "vllm"
    dtype: str = "auto"
    hf_batch_size: int = 64
    gpu_memory_utilization: float = 0.6
    tensor_parallel_size: int = 1
    resamples: int = 2000
    grading_workers: int | None = None
    suggest_schedule: bool = False
    trust_remote_code: bool = False

    def sampling(self) -> Sampling:
        """How spines and continuations are drawn."""
        return Sampling(
            temperature=self.rollout_temperature,
            top_p=self.rollout_top_p,
            top_k=self.rollout_top_k,
            max_new_tokens=self.max_new_tokens,
        )

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self)

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.output_dir)


def check_config(config: BranchConfig) -> None:
    """Refuse settings that no model could make right, before anything is loaded.

    Raises:
        UsageError: names the flag, its value and what would do.
    """
    check_sampling(config.sampling())
    refuse_below_one(
        config, "num_problems", "num_positions", "top_k", "continuations", "hf_batch_size",
        "tensor_parallel_size", "grading_workers",
    )  # fmt: skip
    if config.seed < 0:
        raise UsageError(f"--seed is {config.seed}, but must be at least 0")
    if config.resamples < 20:
        raise UsageError(f"--resamples is {config.resamples}, but a 95 % interval needs at least 20")
    if not config.score_temperature > 0:
        raise UsageError(f"--score_temperature is {config.score_temperature}, but must be more than 0")
    refuse_no_share(config, "viable_share", "gpu_memory_utilization")
    refuse_unknown(config, engine=ENGINES, dtype=DTYPES)
    if config.engine == "hf" and config.tensor_parallel_size > 1:
        raise UsageError("--tensor_parallel_size needs --engine vllm")
    _check_folder(config.folder)


def _check_folder(folder: Path) -> None:
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise UsageError(f"--output_dir {str(folder)!r} cannot be made: {str(existing)!r} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(
            f"--output_dir {str(folder)!r} cannot be written: no permission in {str(existing)!r}"
        )


def parser() -> argparse.ArgumentParser:
    """The flags of branch_viability.py. Defaults are those of `BranchConfig`."""
    default = {field.name: field.default for field in fields(BranchConfig)}
    p = OneLineParser(
        prog="branch_viability.py",
        description="Which of the privileged teacher's next tokens can the student still finish correctly?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )

    def flag(name: str, kind: Any, text: str) -> None:
        p.add_argument(f"--{name}", type=kind, default=default[name], help=text)

    p.add_argument("--model_name_or_path", required=True, help="folder or hub id of the base model")
    p.add_argument(
        "--dataset",
        required=True,
        help="file, folder or hub id; columns problem, solution and, if any, answer",
    )
    p.add_argument(
        "--output_dir", required=True, help="folder of the results; an unfinished run is continued"
    )
    flag("adapter", str, "LoRA checkpoint: the student is base + adapter, the teacher the base")
    flag("model_revision", str, "hub revision of the base model")
    flag("num_problems", int, "the first so many problems; None = all")
    flag("num_positions", int, "forks per spine, one in each of so many equal stretches")
    flag("top_k", int, "teacher's likeliest next tokens forced at each fork")
    flag("continuations", int, "student continuations per branch, and per fork without a forced token")
    flag("rollout_temperature", float, "sampling of spines and continuations: temperature")
    flag("rollout_top_p", float, "nucleus mass")
    flag("rollout_top_k", int, "likeliest tokens kept; 0 = all")
    flag("max_new_tokens", int, "limit of a spine, and again of each continuation")
    flag("score_temperature", float, "divides the logits before entropies, probabilities and KL are read")
    flag("viable_share", float, "viable = at least this share of the continuations recovers the answer")
    flag("seed", int, "every spine and continuation has its own hashed seed")
    flag("engine", str, "what samples: vllm or hf (transformers)")
    flag("dtype", str, "auto (the checkpoint's own), float32 or bfloat16")
    flag("hf_batch_size", int, "sequences at once in transformers, for sampling (hf) and scoring (both)")
    flag("gpu_memory_utilization", float, "vllm's share of the GPU; leave room for a second copy that scores")
    flag("tensor_parallel_size", int, "GPUs that share one copy of the model (vllm)")
    flag("resamples", int, "bootstrap resamples of the problems")
    flag("grading_workers", int, "processes that grade; None = the cores, at most 8")
    p.add_argument(
        "--suggest_schedule", action="store_true", help="fit (w_min, tau, s) to the measured curves"
    )
    p.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    return p


def parse_config(argv: Sequence[str] | None) -> BranchConfig:
    """The diagnostic that a command line asks for.

    Raises:
        UsageError: an unknown or malformed flag, or a value out of its range.
    """
    config = BranchConfig(**vars(parser().parse_args(argv)))
    check_config(config)
    return config
