"""python testbed/problems.py

Write the small world's problems to testbed/data/{train,heldout,heldout_hard}.jsonl, byte for byte the same
each time. `--check` compares instead of writing.

A problem is a chain of additions and subtractions, "Compute 36+35-41+36+21.", whose every running total
lies in 15..99; its reference solution writes each running total down and ends in `\\boxed{}`. The same
module writes the texts with mistakes (a forgotten carry, units off by one; later totals build on it) from
which the base model learns to be right only part of the time.

Everything here is a pure function of its arguments and the generator passed in. `random.Random` gives the
same stream for the same seed on every platform.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

SMALLEST_TOTAL, LARGEST_TOTAL = 15, 99
SMALLEST_TERM, LARGEST_TERM = 11, 59
# Totals after a mistake stay two-digit numbers, so that its text looks like any other.
SMALLEST_SLIPPED, LARGEST_SLIPPED = 10, 99

DATA = Path(__file__).resolve().parent / "data"


@dataclass(frozen=True)
class Split:
    """One data file: its name, number of problems, and how many operations each has, uniformly drawn."""

    name: str
    rows: int
    fewest: int
    most: int


# 150 optimizer steps of 32 problems see each training problem once. The held-out sets come first in
# `all_splits`, so that their problems do not change when the training set grows.
TRAIN = Split("train", 4800, 4, 7)
HELDOUT = Split("heldout", 256, 4, 7)
HELDOUT_HARD = Split("heldout_hard", 256, 8, 9)
SEED = 20260521

# How a running total is introduced: (before, after) the equation, at the first, at a middle and at the last
# operation. A writer keeps to one register for the complete solution or changes it from step to step.
FIRST = ("First, ", "We start with ", "To begin, ", "Start: ")
MIDDLE = ("Then, ", "Next, ", "After that, ", "Now ", "So ", "And ")
LAST = ("Finally, ", "At last, ", "Then, ", "Next, ")
ENDINGS = (
    "So the answer is \\boxed{{{}}}.",
    "The answer is \\boxed{{{}}}.",
    "Therefore the result is \\boxed{{{}}}.",
    "This gives \\boxed{{{}}}.",
)


@dataclass(frozen=True)
class Problem:
    """A chain `start ± term ± term …`; `terms` are signed."""

    start: int
    terms: tuple[int, ...]

    @property
    def totals(self) -> tuple[int, ...]:
        """Return the running total after each operation."""
        totals, total = [], self.start
        for term in self.terms:
            total += term
            totals.append(total)
        return tuple(totals)

    @property
    def answer(self) -> int:
        """Return the last running total."""
        return self.totals[-1]

    @property
    def text(self) -> str:
        """Return the problem's text in the prompts."""
        return f"Compute {self.start}{''.join(f'{term:+d}' for term in self.terms)}."


@dataclass(frozen=True)
class Solution:
    """A written solution.

    Attributes:
        text: what a reader sees.
        total_spans: (start, end) character offsets of each running total behind its "=".
    """

    text: str
    total_spans: tuple[tuple[int, int], ...]


def draw_problem(rng: random.Random, operations: int) -> Problem:
    """Draw a problem of `operations` operations, totals in 15..99, both signs about equally likely."""
    start = total = rng.randint(SMALLEST_TOTAL, LARGEST_TOTAL - SMALLEST_TERM)
    terms: list[int] = []
    while len(terms) < operations:
        highest_up = min(LARGEST_TERM, LARGEST_TOTAL - total)
        highest_down = min(LARGEST_TERM, total - SMALLEST_TOTAL)
        signs = [sign for sign, highest in ((1, highest_up), (-1, highest_down)) if highest >= SMALLEST_TERM]
        sign = signs[rng.randrange(len(signs))]
        term = sign * rng.randint(SMALLEST_TERM, highest_up if sign > 0 else highest_down)
        terms.append(term)
        total += term
    return Problem(start, tuple(terms))


def carries(total: int, term: int) -> bool:
    """Whether `total + term` carries into the tens or borrows from them."""
    units = total % 10 + (term % 10 if term > 0 else -(-term % 10))
    return not 0 <= units <= 9


def slip_amounts(total: int, term: int) -> tuple[int, ...]:
    """Return the possible errors of a mistake in `total + term`.

    A carry or borrow is forgotten (the tens are off by one); without one, the units are off by one, staying
    within their decade, so that a mistake changes exactly one digit.
    """
    if carries(total, term):
        return (-10,) if term > 0 else (10,)
    units = (total + term) % 10
    return tuple(amount for amount in (-1, 1) if 0 <= units + amount <= 9)


def slip_rate(position: int, operations: int, first: float, last: float) -> float:
    """Return the chance of a mistake at operation `position` (from 0), linear from `first` to `last`."""
    return first if operations == 1 else first + (last - first) * position / (operations - 1)


def slipped_totals(
    problem: Problem, rng: random.Random, *, first: float, last: float
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Return running totals with mistakes; later totals build on them.

    Args:
        first: chance of a mistake at the first operation.
        last: chance of a mistake at the last operation; linear in between.

    Returns:
        The totals as written, and for each whether its operation is a mistake. No mistake drives this or a
        later total out of 10..99.
    """
    written: list[int] = []
    slips: list[bool] = []
    total, offset = problem.start, 0
    for position, term in enumerate(problem.terms):
        later = problem.totals[position:]
        amounts = [
            amount
            for amount in slip_amounts(total, term)
            if min(later) + offset + amount >= SMALLEST_SLIPPED
            and max(later) + offset + amount <= LARGEST_SLIPPED
        ]
        # Drawn whether or not a mistake is possible: the stream then does not depend on the outcome.
        chance, choice = rng.random(), rng.random()
        slips.append(bool(amounts) and chance < slip_rate(position, len(problem.terms), first, last))
        total += term
        if slips[-1]:
            amount = amounts[int(choice * len(amounts))]
            offset += amount
            total += amount
        written.append(total)
    return tuple(written), tuple(slips)


def write_solution(problem: Problem, rng: random.Random, totals: Sequence[int] | None = None) -> Solution:
    """Write the solution in words with varying connectives.

    Args:
        problem: what is solved.
        rng: chooses the connectives.
        totals: the running totals to write, one per operation; the true ones when left out.
    """
    totals = problem.totals if totals is None else totals
    steady = MIDDLE[rng.randrange(len(MIDDLE))] if rng.random() < 0.5 else None
    text, spans, before = "", [], problem.start
    for position, (term, total) in enumerate(zip(problem.terms, totals, strict=True)):
        choices = FIRST if position == 0 else LAST if position == len(totals) - 1 else MIDDLE
        connective = choices[rng.randrange(len(choices))]
        if steady is not None and 0 < position < len(totals) - 1:
            connective = steady
        text += f"{connective}{before}{term:+d}="
        spans.append((len(text), len(text) + len(str(total))))
        text += f"{total}. "
        before = total
    text += ENDINGS[rng.randrange(len(ENDINGS))].format(before)
    return Solution(text, tuple(spans))


def draw_split(split: Split, rng: random.Random, taken: Collection[Problem]) -> list[Problem]:
    """Draw distinct problems of one split, none of them in `taken`."""
    seen, problems = set(taken), []
    while len(problems) < split.rows:
        problem = draw_problem(rng, rng.randint(split.fewest, split.most))
        if problem not in seen:
            seen.add(problem)
            problems.append(problem)
    return problems


def all_splits(seed: int = SEED) -> dict[str, list[Problem]]:
    """Return the problems of the three files by split name; no problem is in two of them or twice in one."""
    splits: dict[str, list[Problem]] = {}
    for split in (HELDOUT, HELDOUT_HARD, TRAIN):
        taken = {problem for problems in splits.values() for problem in problems}
        splits[split.name] = draw_split(split, random.Random(f"{seed}/{split.name}"), taken)
    return splits


def jsonl(name: str, problems: Sequence[Problem], seed: int = SEED) -> str:
    """Return the text of one data file: problem, answer and solution as strings, a row per line."""
    rng = random.Random(f"{seed}/{name}/solutions")
    rows = (
        {
            "problem": problem.text,
            "answer": str(problem.answer),
            "solution": write_solution(problem, rng).text,
        }
        for problem in problems
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Write, or with `--check` compare, the three data files."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from opsd.errors import ArtefactError
    from opsd.files import atomic_write_text

    parser = argparse.ArgumentParser(
        description="Write the small world's problems, the same bytes each time."
    )
    parser.add_argument(
        "--output", type=Path, default=DATA, help="folder for the files (default: %(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="compare with the files there, write nothing")
    arguments = parser.parse_args(argv)
    for name, problems in all_splits().items():
        path, text = arguments.output / f"{name}.jsonl", jsonl(name, problems)
        if not arguments.check:
            atomic_write_text(path, text)
        elif not path.is_file() or path.read_bytes() != text.encode("utf-8"):
            raise ArtefactError(f"{path} is not what the generator writes; run python testbed/problems.py")
        print(f"{path}: {len(problems)} problems")
    return 0


def _run() -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from opsd.errors import run_cli

    return run_cli(main)


if __name__ == "__main__":
    raise SystemExit(_run())
