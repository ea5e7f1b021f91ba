"""python bench/bench_intervals.py [--worlds N] [--only TEXT]

Measures the 95 % intervals of `opsd/report/intervals.py` in simulated worlds whose effect is known: coverage,
verdicts where there is no difference, and the power at the difference that is said to be detectable.

A world has problems with a Beta-distributed chance of success (60 % of the variance of a sample lies between
problems), two methods that differ in each problem, a training run for each seed that differs again, and
binomial counts of 12 samples. With one training seed the interval is about the two checkpoints, so the
coverage is of their difference; the last column shows how often it holds the methods' own.

Exit code 1 where a coverage leaves 93 to 97 %, "A is better" is wrong in more than 5 %, or the predicted
power is off by more than 3 points, each by more than two standard errors of the simulation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from opsd.report.intervals import Components, components, detectable, simulated_analyses
from opsd.report.markdown import markdown_table

SAMPLES = 12
# Beta parameters of a problem's chance of success: two thirds of the samples right, or 95 % as in MATH-500.
HARD, EASY = (0.44, 0.22), (1.9, 0.1)
# A method's chance in a problem is Beta around the problem's, a training run's around the method's; larger
# is closer. Of a sample's variance 1/21 and 1/41 of what is left.
METHOD_CLOSENESS, SEED_CLOSENESS = 20.0, 40.0
CHUNK = 250
ONE_STUDY = 100


def doubt(beta: tuple[float, float]) -> float:
    """Return the mean of p (1 - p) over the chances p of all training runs and problems."""
    a, b = beta
    variance = a * b / ((a + b) * (a + b + 1))
    return variance / (1 + 1 / METHOD_CLOSENESS) / (1 + 1 / SEED_CLOSENESS)


@dataclass(frozen=True)
class World:
    """Benchmarks as (problems, Beta parameters), training seeds, and their deviation on a hard benchmark.

    With `shared`, the same seed moves both methods, twice as far, as a shared order of the data does.
    """

    name: str
    benchmarks: tuple[tuple[int, tuple[float, float]], ...]
    seeds: int
    hard_points: float
    shared: bool = False

    @property
    def scale(self) -> float:
        """What a shift of one point on a hard benchmark makes in the mean of this world's."""
        return float(np.mean([doubt(beta) for _, beta in self.benchmarks])) / doubt(HARD)

    def draw(self, random: np.random.Generator, effect: float) -> tuple[list, list, np.ndarray]:
        """Return CHUNK worlds: counts/12 of both methods, and what their checkpoints truly differ by."""
        shifts = random.normal(0, self.hard_points / 100, (2, CHUNK, self.seeds, 1))
        shifts += self.shared * random.normal(0, 2 * self.hard_points / 100, (1, CHUNK, self.seeds, 1))
        methods: tuple[list, list] = ([], [])
        for problems, (a, b) in self.benchmarks:
            chance = _inside(random.beta(a, b, (CHUNK, 1, problems)))
            for method, shift, gain in zip(methods, shifts, (effect, 0.0), strict=True):
                own = _around(random, chance, METHOD_CLOSENESS)
                run = _around(random, np.repeat(own, self.seeds, axis=1), SEED_CLOSENESS)
                # A seed's shift acts where success is in doubt; its mean over problems is known. So is the
                # effect, which is the same in every problem.
                moved = np.clip(run + shift * run * (1 - run) / doubt(HARD), 0, 1)
                method.append(random.binomial(SAMPLES, gain + (1 - effect) * moved) / SAMPLES)
        luck = self.scale * (shifts[0] - shifts[1]).mean((-2, -1))
        return *methods, effect + (1 - effect) * luck


def _inside(chance: np.ndarray) -> np.ndarray:
    return np.clip(chance, 1e-6, 1 - 1e-6)


def _around(random: np.random.Generator, mean: np.ndarray, closeness: float) -> np.ndarray:
    return _inside(random.beta(closeness * mean, closeness * (1 - mean)))


class Figures(NamedTuple):
    """What one world shows, in percent; `reach` and `single_reach` in points."""

    coverage: float
    of_methods: float
    false_first: float
    false_any: float
    reach: float
    single_reach: tuple[float, float]
    power: float
    predicted: float


def simulate(world: World, worlds: int, effect: float, seed: int) -> tuple[Components, np.ndarray]:
    """Return the components of `worlds` simulated studies, and their checkpoints' true differences."""
    random = np.random.default_rng(seed)
    parts, truths = [], []
    for _ in range(-(-worlds // CHUNK)):
        first, second, truth = world.draw(random, effect)
        parts.append(components(first, second, (SAMPLES, SAMPLES), same_seeds=world.shared))
        truths.append(truth)
    arrays = [np.concatenate(values, axis=-1) for values in zip(*(part[:-1] for part in parts), strict=True)]
    return Components(*arrays, parts[0].seed_counts), np.concatenate(truths)


def measure(world: World, worlds: int) -> Figures:
    """Simulate without a difference, and with the one that is detectable in the mean world."""

    def error(found: Components, truth: np.ndarray, effect: float) -> np.ndarray:
        return found.difference - (truth if world.seeds == 1 else effect)

    def mean_of(found: Components, chosen: slice) -> Components:
        values = [np.asarray(value)[..., chosen].mean(-1) for value in found[:-1]]
        return Components(*values, found.seed_counts)

    found, truth = simulate(world, worlds, 0.0, 1)
    off = error(found, truth, 0.0)
    reach = detectable(mean_of(found, slice(None)))
    singles = [100 * detectable(mean_of(found, slice(one, one + 1))) for one in range(min(ONE_STUDY, worlds))]
    moved, moved_truth = simulate(world, worlds, reach, 2)
    noise, half_widths = simulated_analyses(mean_of(moved, slice(None)))
    resolved = reach + error(moved, moved_truth, reach) > moved.half_width
    return Figures(
        coverage=_percent(np.abs(off) <= found.half_width),
        of_methods=_percent(np.abs(found.difference) <= found.half_width),
        false_first=_percent(off > found.half_width),
        false_any=_percent(np.abs(off) > found.half_width),
        reach=100 * reach,
        single_reach=tuple(np.percentile(singles, [10, 90])),
        power=_percent(resolved),
        predicted=_percent(reach + noise > half_widths),
    )


def _percent(hits: np.ndarray) -> float:
    return 100 * float(np.mean(hits))


def all_worlds() -> list[World]:
    """Return the worlds of the table in docs/evaluation.md."""
    sets = {
        "30 problems": ((30, HARD),),
        "500 problems": ((500, HARD),),
        "500 problems, 95 % right": ((500, EASY),),
        "mean of 4 (500, 30, 30, 30)": ((500, EASY), (30, HARD), (30, HARD), (30, HARD)),
    }
    seeds = [(1, 0.5, False), (2, 0.0, False), (2, 0.5, False), (2, 1.0, False), (3, 0.0, False)]
    seeds += [(3, 0.5, False), (3, 1.0, False), (3, 0.0, True), (3, 0.5, True), (3, 1.0, True)]
    return [World(name, rows, *some) for name, rows in sets.items() for some in seeds]


def wrong(figures: Figures, worlds: int) -> list[str]:
    """Return which bounds a world breaks by more than two standard errors of the simulation."""
    error, power_error = (200 * np.sqrt(p * (1 - p) / worlds) for p in (0.05, 0.8))
    broken = []
    if not 93 - error <= figures.coverage <= 97 + error:
        broken.append("coverage")
    if figures.false_first > 5 + error:
        broken.append("false verdicts")
    if abs(figures.power - figures.predicted) > 3 + power_error:
        broken.append("power")
    return broken


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worlds", type=int, default=4000)
    parser.add_argument("--only", default="", help="worlds whose name holds this text")
    args = parser.parse_args(argv)
    header = ["world", "training seeds", "their deviation", "coverage", "false: A is better", "false: either"]
    header += [
        "power",
        "predicted",
        "detectable",
        "by one study",
        "holds the methods' difference",
        "broken",
    ]
    lines, failed = [], False
    for world in all_worlds():
        if args.only not in world.name:
            continue
        figures = measure(world, args.worlds)
        broken = wrong(figures, args.worlds)
        failed |= bool(broken)
        rates = [figures.coverage, figures.false_first, figures.false_any, figures.power, figures.predicted]
        spread = "{:.1f} to {:.1f}".format(*figures.single_reach)
        deviation = "" if world.seeds == 1 else f"{world.scale * world.hard_points:.2f}"
        seeds = f"{world.seeds}, paired" if world.shared else world.seeds
        line = [world.name, seeds, deviation, *(f"{rate:.1f}" for rate in rates)]
        line += [f"{figures.reach:.1f}", spread, f"{figures.of_methods:.1f}", ", ".join(broken)]
        lines.append(line)
        print(*line, sep=" | ", file=sys.stderr, flush=True)
    print(markdown_table(header, lines), end="")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
