"""The settings of an evaluation, their bounds, and the command line that sets them.

    python -m opsd.evaluation.config METHOD_NAME DATASET SEED [flags of evaluate_math.py ...]

checks the flags and prints the name of the result without `.json`, for the launchers; SEED may be empty.
Needs no package beside Python.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opsd.errors import UsageError, run_cli
from opsd.evaluation.benchmarks import BENCHMARKS, benchmark_row
from opsd.evaluation.grading import DEFAULT_TIME_LIMIT_S
from opsd.evaluation.names import PAPER_MAX_NEW_TOKENS, marks, result_path
from opsd.files import check_place
from opsd.options import (
    AT_LEAST_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    PROPER_SHARE,
    check_options,
    option,
    option_parser,
    take,
)
from opsd.rollout.engine import Sampling, check_sampling

# The paper's model length in tokens.
MAX_MODEL_LEN = 40960


def _top_k(text: str) -> int:
    value = int(text)
    return 0 if value == -1 else value  # vLLM writes "off" as -1, and so do the authors' commands


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """One evaluation. The defaults are the paper's (12 samples, temperature 1.0, top_p 0.95, 38k tokens).

    Sampling parameters have their ranges in `opsd.rollout.engine.Sampling`.
    """

    base_model: str = option(help="folder (a merged one included) or hub id of the model")
    dataset: str = option(help=f"benchmark: {', '.join(BENCHMARKS)}")
    output: str = option(help="result JSON to write; an unfinished run is resumed from the journal beside it")
    adapter: str | None = option(None, "folder of a LoRA checkpoint to evaluate on top of the base model")
    revision: str | None = option(None, "hub revision of the base model")
    dataset_path: str | None = option(
        None, "local file or folder with the benchmark's rows (problem, answer)"
    )
    dtype: str = option(
        "auto", "of the weights; auto = as they are stored", choices=("auto", "float32", "bfloat16")
    )
    prompt: str = option(
        "evaluation",
        "student and teacher are those of training; the teacher's needs rows with a `solution`",
        choices=("evaluation", "student", "teacher"),
    )
    enable_thinking: bool = option(True, "the chat template's thinking flag", off="no_thinking")
    temperature: float = option(1.0, "divides the logits; 0 = greedy")
    top_p: float = option(0.95, "nucleus mass")
    top_k: int = option(0, "likeliest tokens that stay; 0 or -1 = off", kind=_top_k)
    min_p: float = option(0.0, "smallest probability relative to the likeliest token's; 0 = off")
    presence_penalty: float = option(0.0, "subtracted from the logit of tokens already generated")
    max_new_tokens: int = option(PAPER_MAX_NEW_TOKENS, "a sample that reaches it is truncated")
    max_model_len: int | None = option(
        None,
        f"prompt + completion, tokens; None = {MAX_MODEL_LEN} or the model's own, whichever is less",
        range=AT_LEAST_ONE,
    )
    val_n: int = option(12, "samples a problem", range=AT_LEAST_ONE)
    num_samples: int | None = option(
        None, "only the benchmark's first so many problems; None = all", range=AT_LEAST_ONE
    )
    seed: int = option(0, "every (seed, problem, sample) has its own hashed seed", range=NOT_NEGATIVE)
    engine: str = option("vllm", "what samples; hf is transformers", choices=("vllm", "hf"))
    tensor_parallel_size: int = option(1, "GPUs that share one copy of the model (vllm)", range=AT_LEAST_ONE)
    gpu_memory_utilization: float = option(0.9, "share of each GPU's memory for vllm", range=PROPER_SHARE)
    hf_batch_size: int = option(32, "completions at once with --engine hf", range=AT_LEAST_ONE)
    grading_workers: int | None = option(
        None, "processes that grade; None = the cores, at most 8", range=AT_LEAST_ONE
    )
    time_limit: float = option(
        DEFAULT_TIME_LIMIT_S, "seconds for one parse or comparison in grading", range=POSITIVE
    )
    trust_remote_code: bool = option(False, "run code that comes with the model")

    def sampling(self) -> Sampling:
        """Return the sampling parameters as the engines take them."""
        return take(Sampling, dict(vars(self)))

    @property
    def journal_path(self) -> Path:
        """The file that keeps the samples of an unfinished run."""
        return Path(f"{self.output}.journal.jsonl")


def check_config(config: EvalConfig) -> None:
    """Raise UsageError for a value out of its range or a benchmark that is unknown."""
    check_options(EvalConfig, vars(config))
    check_sampling(config.sampling())
    if config.engine == "hf" and config.tensor_parallel_size > 1:
        raise UsageError(
            f"--tensor_parallel_size is {config.tensor_parallel_size}, but --engine hf uses one GPU; use "
            "--engine vllm, or evaluate other cells on the other GPUs"
        )
    if config.prompt == "teacher" and not config.enable_thinking:
        raise UsageError("--no_thinking is given, but the teacher thinks in training; leave it out")
    benchmark_row(config.dataset, config.dataset_path)


def check_output(config: EvalConfig) -> None:
    """Raise UsageError where the result cannot be written."""
    output = Path(config.output)
    reason = ""
    if output.suffix != ".json":
        reason = "does not end in .json"
    elif output.is_dir():
        reason = "is a folder; give the name of a file in it"
    if reason:
        raise UsageError(f"--output {config.output!r} {reason}")
    if not output.exists():
        check_place("--output", config.output)


def parse_config(argv: Sequence[str] | None) -> tuple[EvalConfig, bool]:
    """Return a command line's configuration, and whether --replace was given. Raises UsageError."""
    description = "Sample a benchmark from a model, grade it, write the result JSON."
    parser = option_parser(EvalConfig, prog="evaluate_math.py", description=description)
    replace = "rename the result of another run at OUTPUT instead of refusing to start"
    parser.add_argument("--replace", action="store_true", help=replace)
    values = vars(parser.parse_args(argv))
    check_options(EvalConfig, values)
    return take(EvalConfig, values), values["replace"]


def main() -> None:
    """Print the name that a launcher's arguments give."""
    method_name, dataset, seed, *flags = sys.argv[1:]
    flags += ["--dataset", dataset, "--base_model", "m", "--output", "r", *(["--seed", seed] if seed else [])]
    config, _ = parse_config(flags)
    check_config(config)
    part = {"max_new_tokens": config.max_new_tokens, "num_samples": config.num_samples}
    seed_of_name = config.seed if seed else None
    print(result_path(method_name, dataset, seed_of_name, marked=marks(vars(config)), **part).stem)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
