"""OMP_NUM_THREADS=1 python testbed/measure_base.py

Measure how often the small world's base model is right, by prompt: the student's, the evaluation's, and the
privileged teacher's, which holds the reference solution. Sampled at temperature 1.0 and top_p 0.95 with a
seed per sample, so that the same model gives the same figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
PROMPTS = ("student", "evaluation", "teacher")
SETS = ("heldout", "heldout_hard")
MAX_NEW_TOKENS = 128


def read_rows(name: str) -> list[dict[str, str]]:
    """Return the rows of one data file: problem, answer, solution."""
    text = (HERE / "data" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, row: Mapping[str, str]) -> list[int]:
    """Return the token ids of one row's student, evaluation or teacher prompt."""
    from opsd.prompts import encode_evaluation, encode_student, encode_teacher

    if prompt == "teacher":
        return encode_teacher(tokenizer, row["problem"], row["solution"])
    return (encode_student if prompt == "student" else encode_evaluation)(tokenizer, row["problem"])


def measure(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, str]],
    *,
    prompt: str,
    samples: int,
    seed: int,
    batch_size: int = 64,
) -> dict[str, float]:
    """Return the shares of right and of truncated completions, and their mean length in tokens.

    A completion is right when the content of its last `\\boxed{}` is the answer, digit for digit.
    """
    from opsd.evaluation.grading import extract_boxed
    from opsd.rollout.engine import Request, Sampling
    from opsd.rollout.hf import HFEngine
    from opsd.seeds import hashed_seed

    requests = [
        Request(encode(tokenizer, prompt, row), hashed_seed("measure_base", seed, index, sample))
        for index, row in enumerate(rows)
        for sample in range(samples)
    ]
    engine = HFEngine(model, tokenizer, batch_size=batch_size)
    sampling = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=MAX_NEW_TOKENS)
    completions = engine.generate(requests, sampling)
    texts = [tokenizer.decode(completion.token_ids, skip_special_tokens=True) for completion in completions]
    right = [extract_boxed(text) == rows[index // samples]["answer"] for index, text in enumerate(texts)]
    return {
        "right": sum(right) / len(right),
        "truncated": sum(completion.truncated for completion in completions) / len(completions),
        "tokens": sum(len(completion.token_ids) for completion in completions) / len(completions),
    }


def main(argv: list[str] | None = None) -> int:
    """Print one line per data file and prompt."""
    parser = argparse.ArgumentParser(description="Measure the base model's accuracy under each prompt.")
    parser.add_argument("--model", type=Path, default=HERE / "base_model", help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, default=4, help="per problem (default: %(default)s)")
    parser.add_argument("--problems", type=int, default=256, help="per data file (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    arguments = parser.parse_args(argv)

    from opsd.errors import ArtefactError, UsageError

    for name in ("samples", "problems"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} is {getattr(arguments, name)}, but must be at least 1")
    if not (arguments.model / "config.json").is_file():
        raise ArtefactError(
            f"{arguments.model} holds no model; train it with python testbed/pretrain_base.py"
        )

    import torch

    from opsd.models import load_causal_lm, load_tokenizer

    torch.set_num_threads(1)
    model = load_causal_lm(str(arguments.model), dtype="auto")
    tokenizer = load_tokenizer(str(arguments.model))
    print(f"{'problems':14}{'prompt':12}{'right':>8}{'truncated':>11}{'tokens':>8}")
    for name in SETS:
        rows = read_rows(name)[: arguments.problems]
        for prompt in PROMPTS:
            result = measure(
                model, tokenizer, rows, prompt=prompt, samples=arguments.samples, seed=arguments.seed
            )
            print(
                f"{name:14}{prompt:12}{result['right']:8.1%}{result['truncated']:11.1%}"
                f"{result['tokens']:8.1f}",
                flush=True,
            )
    return 0


def _run() -> int:
    sys.path.insert(0, str(HERE.parent))
    from opsd.errors import run_cli

    return run_cli(main)


if __name__ == "__main__":
    raise SystemExit(_run())
