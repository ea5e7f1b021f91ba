"""OMP_NUM_THREADS=1 python testbed/plan_world/measure_base.py

Measure the plan world's base model: how often it leaps and is right alone, how often the teacher is, and how
often the two are right behind a given plan. Temperature 1.0, top_p 1, a seed for each sample.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from testbed.plan_world import world  # noqa: E402 - after the path
from testbed.plan_world.study import BASE, behaviour  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from testbed.problems import Problem

STEPS_ONLY = world.STEP * 5
ONE_LEAP = world.STEP * 2 + world.LEAP + world.STEP * 2
# Title: (chance of a leap in the teacher's reference or None for the student, the completion's plan or None).
CASES: dict[str, tuple[float | None, str | None]] = {
    "student": (None, None),
    "student, forced into all steps": (None, STEPS_ONLY),
    "student, forced into one leap": (None, ONE_LEAP),
    "teacher, k = 0": (0.0, None),
    "teacher, k = 0.25": (0.25, None),
    "teacher, k = 0.25, forced into all steps": (0.25, STEPS_ONLY),
    "teacher, k = 1, forced into all steps": (1.0, STEPS_ONLY),
}


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, chance: float | None, plan: str | None, seed: int
) -> list[int]:
    """Return the prompt's token ids, and those of the plan that the completion is forced into."""
    from opsd.prompts import encode_student, encode_teacher

    text = world.statement(problem)
    if chance is None:
        ids = encode_student(tokenizer, text)
    else:
        reference = world.draw_plan(random.Random(seed), (chance,) * 5)
        ids = encode_teacher(tokenizer, text, world.write_solution(problem, reference).text)
    if plan is None:
        return ids
    forced = world.write_solution(problem, plan)
    front = forced.text[: forced.plan[-1][1]]
    return [*ids, *tokenizer(front, add_special_tokens=False)["input_ids"]]


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    case: tuple[float | None, str | None],
    *,
    top_p: float = 1.0,
) -> dict[str, float]:
    """Return `study.behaviour` of one completion of each problem."""
    from opsd.evaluation.grading import extract_boxed
    from opsd.rollout.engine import Request, Sampling
    from opsd.rollout.hf import HFEngine

    requests = [
        Request(prompt_ids(tokenizer, problem, *case, seed=index), index)
        for index, problem in enumerate(problems)
    ]
    engine = HFEngine(model, tokenizer, batch_size=128)
    sampling = Sampling(temperature=1.0, top_p=top_p, max_new_tokens=64)
    texts = [tokenizer.decode(done.token_ids) for done in engine.generate(requests, sampling)]
    if case[1] is not None:
        forced = [world.write_solution(problem, case[1]) for problem in problems]
        texts = [s.text[: s.plan[-1][1]] + text for s, text in zip(forced, texts, strict=True)]
    answers = [str(problem.answer) for problem in problems]
    return behaviour((text, extract_boxed(text) == a) for text, a in zip(texts, answers, strict=True))


def main(argv: list[str] | None = None) -> int:
    """Print one line for each case."""
    import torch

    from opsd.models import load_causal_lm, load_tokenizer

    parser = argparse.ArgumentParser(description="Measure the plan world's base model.")
    parser.add_argument("--model", type=Path, default=BASE, help="(default: %(default)s)")
    parser.add_argument("--problems", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus mass (default: %(default)s)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = load_causal_lm(str(arguments.model), dtype="auto")
    tokenizer = load_tokenizer(str(arguments.model))
    problems = world.heldout()[: arguments.problems]
    for title, case in CASES.items():
        found = measure(model, tokenizer, problems, case, top_p=arguments.top_p)
        print(f"{title:42}" + "  ".join(f"{name} {value:5.1f}" for name, value in found.items()), flush=True)
    return 0


if __name__ == "__main__":
    from opsd.errors import run_cli

    raise SystemExit(run_cli(main))
