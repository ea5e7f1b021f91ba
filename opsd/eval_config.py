"""What fixes an evaluation run: the settings, their bounds, and the command line that sets them."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from opsd.errors import OneLineParser, UsageError, refuse_below_one, refuse_no_share, refuse_unknown
from opsd.grading import DEFAULT_TIME_LIMIT_S
from opsd.result_names import PAPER_MAX_NEW_TOKENS
from opsd.rollout import Sampling, check_sampling

ENGINES = ("vllm", "hf")
# The paper's model length; a model built for fewer positions sets the limit itself.
MAX_MODEL_LEN = 40960


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """One evaluation run. The defaults are the paper's (12 samples, temperature 1.0, top_p 0.95, 38k tokens).

    Attributes:
        base_model: folder or hub id of the model, a merged one included.
        dataset: a benchmark's name; any name goes with `dataset_path`.
        output: the JSON to write. The journal stands beside it while the run lasts.
        adapter: folder of a LoRA checkpoint to evaluate on top of `base_model`.
        max_model_len: tokens of prompt + completion that the engine must hold; None takes 40960 or what the
            model was built for, whichever is less.
        val_n: samples a problem.
        num_samples: only the benchmark's first so many problems; None takes all.
        hf_batch_size: completions at once in the transformers engine.
        time_limit: seconds for one parse or comparison in grading.
    """

    base_model: str
    dataset: str
    output: str
    adapter: str | None = None
    revision: str | None = None
    dataset_path: str | None = None
    enable_thinking: bool = True
    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    max_new_tokens: int = PAPER_MAX_NEW_TOKENS
    max_model_len: int | None = None
    val_n: int = 12
    num_samples: int | None = None
    seed: int = 0
    engine: str = "vllm"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    hf_batch_size: int = 32
    grading_workers: int | None = None
    time_limit: float = DEFAULT_TIME_LIMIT_S
    trust_remote_code: bool = False

    def sampling(self) -> Sampling:
        """The sampling parameters as the engines take them."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            max_new_tokens=self.max_new_tokens,
        )

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self)

    @property
    def journal_path(self) -> Path:
        """Where the samples of an unfinished run stand."""
        return Path(f"{self.output}.journal.jsonl")


def check_config(config: EvalConfig) -> None:
    """Refuse settings that no model could make right, before anything is loaded.

    Raises:
        UsageError: names the flag, its value and what would do.
    """
    check_sampling(config.sampling())
    refuse_below_one(
        config,
        "val_n",
        "num_samples",
        "max_model_len",
        "tensor_parallel_size",
        "hf_batch_size",
        "grading_workers",
    )
    if config.seed < 0:
        raise UsageError(f"--seed is {config.seed}, but must be at least 0")
    refuse_no_share(config, "gpu_memory_utilization")
    if not 0 < config.time_limit < math.inf:
        raise UsageError(f"--time_limit is {config.time_limit}, but must be a number of seconds above 0")
    refuse_unknown(config, engine=ENGINES)
    if config.engine == "hf" and config.tensor_parallel_size > 1:
        raise UsageError(
            f"--tensor_parallel_size is {config.tensor_parallel_size}, but --engine hf uses one GPU; use "
            "--engine vllm, or evaluate other cells on the other GPUs"
        )
    _check_output(config)


def _check_output(config: EvalConfig) -> None:
    output = Path(config.output)
    if output.suffix != ".json":
        raise UsageError(f"--output is {config.output!r}, but must end in .json")
    if output.is_dir():
        raise UsageError(f"--output {config.output!r} is a folder; name a file in it")
    existing = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not existing.is_dir() and existing != output.absolute():
        raise UsageError(f"--output {config.output!r} cannot be made: {str(existing)!r} is a file")
    if existing.is_dir() and not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"--output {config.output!r} cannot be written: no permission in {str(existing)!r}")


def _top_k(text: str) -> int:
    value = int(text)
    return 0 if value == -1 else value  # vLLM writes "off" as -1, and so do the authors' commands


def parser() -> argparse.ArgumentParser:
    """The flags of evaluate_math.py. Defaults are those of `EvalConfig`."""
    default = {field.name: field.default for field in fields(EvalConfig)}
    p = OneLineParser(
        prog="evaluate_math.py",
        description="Sample a benchmark from a model, grade it, write the result JSON.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )

    def flag(name: str, kind: Any, text: str, **more: Any) -> None:
        p.add_argument(f"--{name}", type=kind, default=default[name], help=text, **more)

    model = "folder or hub id of the model"
    p.add_argument("--base_model", required=True, help=f"{model} (may be a merged folder)")
    p.add_argument(
        "--dataset", required=True, help="benchmark: math500, aime24, aime25, hmmt25, small, small_hard"
    )
    p.add_argument("--output", required=True, help="the result JSON; an unfinished run is continued")
    flag("adapter", str, "folder of a LoRA checkpoint to evaluate on top of the base model")
    flag("revision", str, "hub revision of the base model")
    flag("dataset_path", str, "local file or folder with the benchmark's rows (problem, answer)")
    flag("temperature", float, "divides the logits; 0 = greedy")
    flag("top_p", float, "nucleus mass")
    flag("top_k", _top_k, "likeliest tokens that stay; 0 or -1 = off")
    flag("min_p", float, "smallest probability relative to the likeliest token's; 0 = off")
    flag("presence_penalty", float, "subtracted from the logit of tokens already generated")
    flag("max_new_tokens", int, "a sample that reaches it is truncated")
    flag(
        "max_model_len",
        int,
        f"prompt + completion, tokens; None = {MAX_MODEL_LEN} or the model's own, the lesser",
    )
    flag("val_n", int, "samples a problem")
    flag("num_samples", int, "only the benchmark's first so many problems")
    flag("seed", int, "every (seed, problem, sample) has its own hashed seed")
    flag("engine", str, "what samples: vllm or hf (transformers)")
    flag("tensor_parallel_size", int, "GPUs that share one copy of the model (vllm)")
    flag("gpu_memory_utilization", float, "share of each GPU's memory for vllm")
    flag("hf_batch_size", int, "completions at once with --engine hf")
    flag("grading_workers", int, "processes that grade; None = the cores, at most 8")
    flag("time_limit", float, "seconds for one parse or comparison in grading")
    thinking = p.add_mutually_exclusive_group()
    thinking.add_argument(
        "--enable_thinking",
        action="store_true",
        default=default["enable_thinking"],
        help="the chat template's thinking flag on, the default",
    )
    thinking.add_argument(
        "--no_thinking",
        dest="enable_thinking",
        action="store_false",
        help="the chat template's thinking flag off",
    )
    p.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    p.add_argument(
        "--replace",
        action="store_true",
        help="set a result of another run that stands at OUTPUT aside under a new name (default: refuse)",
    )
    return p


def parse_config(argv: Sequence[str] | None) -> tuple[EvalConfig, bool]:
    """The configuration that a command line asks for, and whether another run's result may be set aside.

    Raises:
        UsageError: an unknown or malformed flag, or a value out of its range.
    """
    arguments = vars(parser().parse_args(argv))
    replace = arguments.pop("replace")
    config = EvalConfig(**arguments)
    check_config(config)
    return config, replace
