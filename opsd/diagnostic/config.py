"""What fixes a run of the branch-viability diagnostic: the settings, their bounds, the command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opsd.errors import OneLineParser, UsageError
from opsd.options import (
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    PROPER_SHARE,
    Range,
    add_options,
    check_options,
    option,
    take,
)
from opsd.rollout.engine import Sampling, check_sampling


@dataclass(frozen=True, kw_only=True)
class BranchConfig:
    """One diagnostic. The sampling defaults are those of the rollouts in training."""

    model_name_or_path: str = option(help="folder or hub id of the base model")
    dataset: str = option(help="file, folder or hub id; columns problem, solution and, if any, answer")
    output_dir: str = option(help="folder of the results; an unfinished run is continued")
    adapter: str | None = option(None, "LoRA checkpoint: the student is base + adapter, the teacher the base")
    model_revision: str | None = option(None, "hub revision of the base model")
    num_problems: int | None = option(None, "the first so many problems; None = all", range=AT_LEAST_ONE)
    num_positions: int = option(
        8, "forks per spine, one in each of so many equal stretches", range=AT_LEAST_ONE
    )
    top_k: int = option(3, "teacher's likeliest next tokens forced at each fork", range=AT_LEAST_ONE)
    continuations: int = option(
        8, "student continuations per branch, and per fork without a forced token", range=AT_LEAST_ONE
    )
    rollout_temperature: float = option(1.1, "sampling of spines and continuations: temperature")
    rollout_top_p: float = option(0.95, "nucleus mass")
    rollout_top_k: int = option(20, "likeliest tokens kept; 0 = all")
    max_new_tokens: int = option(1024, "limit of a spine, and again of each continuation")
    score_temperature: float = option(
        1.1, "divides the logits before entropies, probabilities and KL are read", range=POSITIVE
    )
    viable_share: float = option(
        0.5, "viable = at least this share of the continuations recovers the answer", range=PROPER_SHARE
    )
    seed: int = option(0, "every spine and continuation has its own hashed seed", range=NOT_NEGATIVE)
    engine: str = option("vllm", "what samples; hf is transformers", choices=("hf", "vllm"))
    dtype: str = option("auto", "auto is the checkpoint's own", choices=("auto", "float32", "bfloat16"))
    hf_batch_size: int = option(
        64, "sequences at once in transformers, for sampling (hf) and scoring (both)", range=AT_LEAST_ONE
    )
    gpu_memory_utilization: float = option(
        0.6, "vllm's share of the GPU; leave room for a second copy that scores", range=PROPER_SHARE
    )
    tensor_parallel_size: int = option(1, "GPUs that share one copy of the model (vllm)", range=AT_LEAST_ONE)
    resamples: int = option(
        2000, "bootstrap resamples of the problems; a 95 % interval needs 20", range=Range(20)
    )
    grading_workers: int | None = option(
        None, "processes that grade; None = the cores, at most 8", range=AT_LEAST_ONE
    )
    suggest_schedule: bool = option(False, "fit (w_min, tau, s) to the measured curves")
    trust_remote_code: bool = option(False, "run code that comes with the model")

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
    check_options(BranchConfig, vars(config))
    check_sampling(config.sampling())
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
    """The flags of branch_viability.py: those of `BranchConfig`."""
    p = OneLineParser(
        prog="branch_viability.py",
        description="Which of the privileged teacher's next tokens can the student still finish correctly?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add_options(p, BranchConfig)
    return p


def parse_config(argv: Sequence[str] | None) -> BranchConfig:
    """The diagnostic that a command line asks for.

    Raises:
        UsageError: an unknown or malformed flag, or a value out of its range.
    """
    arguments = vars(parser().parse_args(argv))
    check_options(BranchConfig, arguments)
    config = take(BranchConfig, arguments)
    check_config(config)
    return config
