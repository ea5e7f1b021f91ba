"""Measure the cost of padding at the length spread of real data, and the backbone calls of its limit.

    python bench/bench_padding.py

No model runs. Problems of 60 to 240 tokens, reference solutions and completions log-normal (their central
99 % spans the given range, completions cut at --completion_tokens). Micro-batches are drawn as training draws
them and split into grids by opsd/batch.py, per role. "padded / valid" is over all tokens of the simulated
run, "worst" the largest of one micro-batch, "calls" the mean number of backbone calls per micro-batch. The
limit "none" is one grid per micro-batch, padded to its longest; "maximum" pads completions to their maximum
on top, as a dense step does.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def padded(lengths: list[int], limit: float) -> tuple[int, int]:
    """Return (padded tokens, grids) of one micro-batch of one role."""
    from opsd.batch import length_groups

    groups = length_groups(lengths, limit)
    return sum(len(group) * max(lengths[i] for i in group) for group in groups), len(groups)


def measure(batches: list[list[int]], limit: float) -> tuple[float, float, float]:
    """Return (padded / valid over all, the worst micro-batch's, mean calls per micro-batch)."""
    found = [padded(lengths, limit) for lengths in batches]
    valid = [sum(lengths) for lengths in batches]
    total = sum(tokens for tokens, _ in found) / sum(valid)
    worst = max(tokens / own for (tokens, _), own in zip(found, valid, strict=True))
    return total, worst, sum(grids for _, grids in found) / len(found)


def main(argv: list[str] | None = None) -> int:
    from bench.step_worlds import spread

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sequences", type=int, default=4800, help="150 steps of 32")
    parser.add_argument("--solution_tokens", type=int, nargs=2, default=[200, 8000])
    parser.add_argument("--completion_tokens", type=int, default=1024, help="the maximum")
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[2, 4, 8, 16], help="sequences of a micro-batch"
    )
    parser.add_argument("--limits", type=float, nargs="+", default=[1.05, 1.15, 1.3, 1.6, math.inf])
    args = parser.parse_args(argv)
    generator = random.Random(1)
    problems = [generator.randint(60, 240) for _ in range(args.sequences)]
    solutions = spread(args.sequences, *args.solution_tokens, seed=2)
    completions = [
        min(n, args.completion_tokens) for n in spread(args.sequences, *args.solution_tokens, seed=3)
    ]
    # What the backbone sees: the last completion token predicts nothing that is scored.
    student = [p + c - 1 for p, c in zip(problems, completions, strict=True)]
    teacher = [length + s for length, s in zip(student, solutions, strict=True)]
    heads = ["micro-batch", "limit"]
    heads += [
        f"{role} {figure}"
        for role in ("student", "teacher")
        for figure in ("padded / valid", "worst", "calls")
    ]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for size in args.batches:
        spans = [slice(start, start + size) for start in range(0, args.sequences - size + 1, size)]
        for limit in args.limits:
            cells = [f"{size}", "none" if math.isinf(limit) else f"{limit}"]
            for lengths in (student, teacher):
                total, worst, calls = measure([lengths[span] for span in spans], limit)
                cells += [f"{total:.3f}", f"{worst:.2f}", f"{calls:.2f}"]
            print(f"| {' | '.join(cells)} |")
        cells = [f"{size}", "maximum"]
        for prefix in (problems, [p + s for p, s in zip(problems, solutions, strict=True)]):
            grids = [len(prefix[span]) * (max(prefix[span]) + args.completion_tokens) for span in spans]
            valid = [
                sum(p + c for p, c in zip(prefix[span], completions[span], strict=True)) for span in spans
            ]
            worst = max(grid / own for grid, own in zip(grids, valid, strict=True))
            cells += [f"{sum(grids) / sum(valid):.3f}", f"{worst:.2f}", "1.00"]
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
