"""The settings of the branch-viability diagnostic, their ranges, and its command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opsd.errors import UsageError
from opsd.files import check_place
from opsd.options import (
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    PROPER_SHARE,
    Range,
    check_options,
    option,
    option_parser,
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
    num_positions: int = option(8, "forks per spine, one in each equal stretch", range=AT_LEAST_ONE)
    top_k: int = option(3, "teacher's likeliest next tokens forced at each fork", range=AT_LEAST_ONE)
    continuations: int = option(8, "of each branch, and of each fork's control", range=AT_LEAST_ONE)
    rollout_temperature: float = option(1.1, "sampling of spines and continuations: temperature")
    rollout_top_p: float = option(0.95, "nucleus mass")
    rollout_top_k: int = option(20, "likeliest tokens kept; 0 = all")
    max_new_tokens: int = option(1024, "limit of a spine, and again of each continuation")
    score_temperature: float = option(1.1, "of entropies, probabilities and KL", range=POSITIVE)
    viable_share: float = option(0.5, "share of right continuations of a viable branch", range=PROPER_SHARE)
    seed: int = option(0, "every spine and continuation has its own hashed seed", range=NOT_NEGATIVE)
    engine: str = option("vllm", "what samples; hf is transformers", choices=("hf", "vllm"))
    dtype: str = option("auto", "auto is the checkpoint's own", choices=("auto", "float32", "bfloat16"))
    hf_batch_size: int = option(64, "sequences in transformers, which always scores", range=AT_LEAST_ONE)
    # A second copy of the model scores.
    gpu_memory_utilization: float = option(0.6, "vllm's share of the GPU's memory", range=PROPER_SHARE)
    tensor_parallel_size: int = option(1, "GPUs that share one copy of the model (vllm)", range=AT_LEAST_ONE)
    # A 95 % interval needs 20.
    resamples: int = option(2000, "bootstrap resamples of the problems", range=Range(20))
    grading_workers: int | None = option(None, "processes; None = cores, at most 8", range=AT_LEAST_ONE)
    suggest_schedule: bool = option(False, "fit (w_min, tau, s) to the measured curves")
    trust_remote_code: bool = option(False, "run code that comes with the model")

    def sampling(self) -> Sampling:
        """Return how spines and continuations are drawn."""
        filters = {name: getattr(self, f"rollout_{name}") for name in ("temperature", "top_p", "top_k")}
        return Sampling(**filters, max_new_tokens=self.max_new_tokens)


def parse_config(argv: Sequence[str] | None) -> BranchConfig:
    """Return the diagnostic that a command line asks for, checked before anything is loaded.

    Raises:
        UsageError: an unknown or malformed flag, a value out of its range, or no folder to write to.
    """
    question = "Which of the privileged teacher's next tokens can the student still finish correctly?"
    parser = option_parser(BranchConfig, prog="branch_viability.py", description=question)
    arguments = vars(parser.parse_args(argv))
    check_options(BranchConfig, arguments)
    config = take(BranchConfig, arguments)
    check_sampling(config.sampling())
    if config.engine == "hf" and config.tensor_parallel_size > 1:
        raise UsageError("--tensor_parallel_size needs --engine vllm")
    check_place("--output_dir", config.output_dir)
    return config
