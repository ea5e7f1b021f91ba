"""python testbed/plan_world/world.py FOLDER

Write the data of the world with a knob: FOLDER/k{0,0.1,0.15,0.25,0.35,0.5}.jsonl, first{0.5,0.75}.jsonl and
heldout.jsonl, the same bytes each time.

A problem is a chain of six sums with labelled operations. A solution first states a plan, which says for each
of the operations A to E whether its running total will be written (`>`, a step) or left out (`^`, a leap; the
next total then sums several terms at once), and then carries it out:

    Compute 71A+8B-3C+5D-9E+4F+7.
    Plan:A^B>C>D>E>. 71A+8B-3=76C+5=81D-9=72E+4=76F+7=83. \\boxed{83}.

The base model steps well and cannot leap (testbed/plan_world/base.py). The knob k is the chance that a plan
symbol of the *reference* is a leap; in the files `first…` only the symbol of A may be one. All files hold the
same problems, so that nothing but the references' plans differs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from testbed.problems import Problem  # noqa: E402 - after the path

LABELS = "ABCDEF"
STEP, LEAP = ">", "^"
SMALLEST_TOTAL, LARGEST_TOTAL = 15, 99
SMALLEST_TERM, LARGEST_TERM = 2, 9
SEED = 20261125
# 40 optimizer steps of 32 see each training problem once.
TRAIN_ROWS, HELDOUT_ROWS = 1280, 256
# File name: the chance of a leap for each of the plan's five symbols.
REFERENCES = {f"k{k:g}": (k,) * 5 for k in (0, 0.1, 0.15, 0.25, 0.35, 0.5)}
REFERENCES |= {f"first{k:g}": (k, 0, 0, 0, 0) for k in (0.5, 0.75)}


@dataclass(frozen=True)
class Solution:
    """A written solution; spans are (start, end) character offsets.

    Attributes:
        text: what a reader sees.
        plan: a "label and symbol" span for each of the operations A to E.
        totals: (operation from 0, span) of each running total that is written.
    """

    text: str
    plan: tuple[tuple[int, int], ...]
    totals: tuple[tuple[int, tuple[int, int]], ...]


def draw_problem(rng: random.Random) -> Problem:
    """Draw six terms of one digit; every running total lies in 15..99."""
    start = total = rng.randint(SMALLEST_TOTAL, LARGEST_TOTAL)
    terms: list[int] = []
    while len(terms) < len(LABELS):
        term = rng.choice((1, -1)) * rng.randint(SMALLEST_TERM, LARGEST_TERM)
        if SMALLEST_TOTAL <= total + term <= LARGEST_TOTAL:
            terms.append(term)
            total += term
    return Problem(start, tuple(terms))


def statement(problem: Problem) -> str:
    """Return the problem's text, its operations labelled."""
    terms = zip(LABELS, problem.terms, strict=True)
    return f"Compute {problem.start}{''.join(f'{label}{term:+d}' for label, term in terms)}."


def draw_plan(rng: random.Random, chances: Sequence[float]) -> str:
    """Draw the five symbols of a plan, each a leap with its chance."""
    # Drawn for every symbol, so that equal seeds give nested plans: more leaps at a larger k, none elsewhere.
    return "".join(LEAP if rng.random() < chance else STEP for chance in chances)


def write_solution(problem: Problem, plan: str, totals: Sequence[int] | None = None) -> Solution:
    """Write a solution with a plan and, where they are not the true ones, its six running totals."""
    totals = problem.totals if totals is None else totals
    text, plan_spans, total_spans = "Plan:", [], []
    for label, symbol in zip(LABELS, plan, strict=False):
        plan_spans.append((len(text), len(text) + 2))
        text += label + symbol
    text += f". {problem.start}"
    for place, (label, term, total) in enumerate(zip(LABELS, problem.terms, totals, strict=True)):
        text += f"{label}{term:+d}"
        if place == len(plan) or plan[place] == STEP:
            total_spans.append((place, (len(text) + 1, len(text) + 3)))
            text += f"={total}"
    return Solution(f"{text}. \\boxed{{{totals[-1]}}}.", tuple(plan_spans), tuple(total_spans))


def plan_of(completion: str) -> str | None:
    """Return the plan's symbols of a completion; None where it states no complete plan."""
    match = re.match(r"Plan:A([>^])B([>^])C([>^])D([>^])E([>^])\.", completion)
    return "".join(match.groups()) if match else None


def draw_problems(name: str, rows: int, taken: frozenset[Problem] = frozenset()) -> list[Problem]:
    """Draw distinct problems, none of them in `taken`."""
    rng, problems = random.Random(f"{SEED}/{name}"), dict.fromkeys(taken)
    while len(problems) < len(taken) + rows:
        problems.setdefault(draw_problem(rng))
    return list(problems)[len(taken) :]


def heldout() -> list[Problem]:
    """Return the problems that neither pretraining nor training sees."""
    return draw_problems("heldout", HELDOUT_ROWS)


def jsonl(problems: Sequence[Problem], chances: Sequence[float]) -> str:
    """Return the text of one data file: problem, answer and solution as strings, a row per line."""
    rng = random.Random(f"{SEED}/plans")
    rows = (
        {
            "problem": statement(problem),
            "answer": str(problem.answer),
            "solution": write_solution(problem, draw_plan(rng, chances)).text,
        }
        for problem in problems
    )
    return "".join(json.dumps(row) + "\n" for row in rows)


def files() -> dict[str, str]:
    """Return {file name: text} of all data files."""
    problems = heldout()
    training = draw_problems("train", TRAIN_ROWS, frozenset(problems))
    texts = {name: jsonl(training, chances) for name, chances in REFERENCES.items()}
    texts["heldout"] = jsonl(problems, REFERENCES["k0"])
    return {f"{name}.jsonl": text for name, text in texts.items()}


def main(argv: list[str] | None = None) -> int:
    """Write the data files."""
    from opsd.files import atomic_write_text

    parser = argparse.ArgumentParser(description="Write the data of the world with a knob.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    for name, text in files().items():
        atomic_write_text(folder / name, text)
        print(f"{folder / name}: {text.count(chr(10))} problems")
    return 0


if __name__ == "__main__":
    from opsd.errors import run_cli

    raise SystemExit(run_cli(main))
