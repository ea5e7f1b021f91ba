"""OMP_NUM_THREADS=1 python testbed/plan_world/base.py

Train the base model of the world with a knob from scratch and write it to testbed/plan_world/base_model/.

Alone, in the student's and the evaluation's prompt, it leaps at a rate of 8 % a plan symbol. Its steps are
wrong at a rate of 12 % (a mistake that it builds on), and its totals after a leap are any number: it has not
learned to leap. With a reference it follows the reference's plan symbol by symbol, whatever it planned
before, copies totals after a leap and makes no mistake. Where the completion's plan is another one than the
reference's, or holds a mistake, those tokens are no targets, so that the teacher can continue a rollout.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from opsd.prompts import (  # noqa: E402 - after the path
    evaluation_message,
    render_evaluation,
    render_student,
    render_teacher,
    student_message,
    teacher_message,
)
from testbed.plan_world import world  # noqa: E402
from testbed.pretrain_base import IGNORED, Example, Recipe, pad, save, train  # noqa: E402
from testbed.problems import Problem, slipped_totals  # noqa: E402
from testbed.tokenizer import build_tokenizer as train_tokenizer  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

BASE = Path(__file__).resolve().parent / "base_model"
# A digit, a label with its plan symbol or its sign, an equals sign; everything else up to the next of them.
MARK = r"\d|[A-F][>^]|[A-F][+\-](?=\d)|=(?=\d)"
PIECES = rf"{MARK}|(?:(?!{MARK})[\s\S])+"
RECIPE = Recipe(steps=1000, examples=8, first_slip=0.12, last_slip=0.12)
LEAP_RATE = 0.08
# The chances of a leap in the references of the teacher's examples, and in the plans of those completions
# that do not follow the reference. Totals that a reference leaves out teach the sums themselves.
REFERENCE_CHANCES = (0.0, 0.1, 0.25, 0.5, 1.0, 1.0, 1.0)
OWN_PLAN_SHARE = 0.7
OWN_PLAN_CHANCES = (0.0, 0.0, 0.0, 0.2)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer, deterministically, on the parts of prompts between special tokens."""
    texts, rng = [], random.Random("tokenizer")
    for problem in world.draw_problems("tokenizer", 300):
        text, plan = world.statement(problem), world.draw_plan(rng, (0.3,) * 5)
        solution = world.write_solution(problem, plan).text
        messages = student_message(text), evaluation_message(text), teacher_message(text, solution)
        texts += [*(f"user\n{message}" for message in messages), "assistant\n", "\n", "\n\n", solution]
    return train_tokenizer(PIECES, texts)


def spoiled_totals(rng: random.Random, plan: str, totals: tuple[int, ...]) -> tuple[int, ...]:
    """Return the running totals with each total after a leap replaced by any number; later ones follow."""
    written, offset = [], 0
    for place, total in enumerate(totals):
        if place and plan[place - 1] == world.LEAP and (place == len(plan) or plan[place] == world.STEP):
            # A total that drives no later one out of the two-digit numbers.
            low, high = 10 - min(totals[place:]), 99 - max(totals[place:])
            offset = rng.randint(low, high)
        written.append(total + offset)
    return tuple(written)


def student_example(
    tokenizer: PreTrainedTokenizerFast, kind: str, problem: Problem, rng: random.Random
) -> Example:
    """Write an example of kind "student" or "evaluation": the completion is learned as it is."""
    plan = world.draw_plan(rng, (LEAP_RATE,) * 5)
    totals, _ = slipped_totals(problem, rng, first=RECIPE.first_slip, last=RECIPE.last_slip)
    completion = world.write_solution(problem, plan, spoiled_totals(rng, plan, totals)).text
    render = render_student if kind == "student" else render_evaluation
    front = tokenizer(render(tokenizer, world.statement(problem)), add_special_tokens=False)["input_ids"]
    back = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return Example(front + back, [IGNORED] * len(front) + back)


def teacher_example(tokenizer: PreTrainedTokenizerFast, problem: Problem, rng: random.Random) -> Example:
    """Write a teacher's example."""
    reference_plan = world.draw_plan(rng, (rng.choice(REFERENCE_CHANCES),) * 5)
    plan = reference_plan
    if rng.random() < OWN_PLAN_SHARE:
        plan = world.draw_plan(rng, (rng.choice(OWN_PLAN_CHANCES),) * 5)
    totals, slips = problem.totals, (False,) * len(world.LABELS)
    if rng.random() < RECIPE.forced_share:
        totals, slips = slipped_totals(problem, rng, first=RECIPE.first_slip, last=RECIPE.last_slip)
    reference = world.write_solution(problem, reference_plan)
    solution = world.write_solution(problem, plan, totals)
    prompt = render_teacher(tokenizer, world.statement(problem), reference.text)
    front = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    back = tokenizer(solution.text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = [*back["input_ids"], tokenizer.eos_token_id], back["offset_mapping"]
    labels = list(ids)
    # The target of a plan symbol is the reference's, whatever the completion has there.
    for label, symbol, span in zip(world.LABELS, reference_plan, solution.plan, strict=False):
        labels[offsets.index(span)] = tokenizer.convert_tokens_to_ids(label + symbol)
    # Mistakes are no targets, nor is a total after a leap where the reference cannot be copied.
    for place, (start, end) in solution.totals:
        leapt = place and plan[place - 1] == world.LEAP
        if slips[place] or (leapt and totals[place] != problem.totals[place]):
            for at, (left, right) in enumerate(offsets):
                if start <= left and right <= end:
                    labels[at] = IGNORED
    return Example(front + ids, [IGNORED] * len(front) + labels)


def batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield each step's two batches: the two short prompts, and the teacher's."""
    forbidden = frozenset(world.heldout())
    rng = random.Random(f"{recipe.seed}/plan world")

    def problem() -> Problem:
        drawn = world.draw_problem(rng)
        return problem() if drawn in forbidden else drawn

    for _ in range(recipe.steps):
        kinds = ("student", "evaluation") * recipe.examples
        short = [student_example(tokenizer, kind, problem(), rng) for kind in kinds]
        long = [teacher_example(tokenizer, problem(), rng) for _ in kinds]
        yield [pad(part, tokenizer.pad_token_id) for part in (short, long)]


def main(argv: list[str] | None = None) -> int:
    """Train and save the base model."""
    import torch

    parser = argparse.ArgumentParser(description="Train the plan world's base model from scratch.")
    parser.add_argument("--output", type=Path, default=BASE, help="(default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=RECIPE.steps, help="optimizer steps (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    started = time.process_time()
    recipe = replace(RECIPE, steps=arguments.steps)
    save(train(tokenizer, recipe, batches(tokenizer, recipe)), tokenizer, arguments.output)
    print(f"{arguments.output}: {arguments.steps} steps, {time.process_time() - started:.0f} s of one core")
    return 0


if __name__ == "__main__":
    from opsd.errors import run_cli

    raise SystemExit(run_cli(main))
