"""Is one method better than another on these results, and if that is not resolved, what would resolve it?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opsd.errors import ArtefactError
from opsd.evaluation.results import regime_differences
from opsd.report.intervals import components, detectable, resolving_factors
from opsd.report.summary import MODEL_FIELDS, Cell, Row, Table, method_stem, row_title

METHOD_LINE = (
    "Differences are paired by problem. The 95 % intervals add the variances over problems, samples and, "
    "with several training seeds, training seeds (components of the crossed layout, Satterthwaite's degrees "
    "of freedom, each method with its own variance over training seeds). Each holds for its own comparison "
    "alone: of 20 without a difference, one is expected to seem resolved. Detectable: the true difference "
    "that the same design would resolve in 80 % of its repetitions."
)
HEADER = ["benchmark", "difference, points", "95 % interval", "verdict", "detectable"]
HEADER += ["would resolve this difference", "variance that samples do not remove"]


@dataclass(frozen=True)
class Comparison:
    """The difference first − second on one benchmark or the mean of several, in points of Avg@n.

    Attributes:
        shares: share of the squared standard error by source; `samples` is NaN with one sample a problem.
        samples_needed: samples a problem and training seed; math.inf where no number is enough, NaN where
            unknown.
        problems_factor: how many times the problems; math.inf where no number is enough.
        unknown_training: methods whose variance over training seeds is not in the interval.
    """

    first: str
    second: str
    benchmark: str
    difference: float
    standard_error: float
    degrees_of_freedom: float
    interval: tuple[float, float]
    detectable: float
    problems: int
    shares: dict[str, float]
    samples_needed: float
    problems_factor: float
    unknown_training: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """Which method is better, in words."""
        low, high = self.interval
        better = self.first if low > 0 else self.second if high < 0 else None
        return f"{better} is better" if better else "not resolved"

    @property
    def remedy(self) -> str:
        """What would resolve the observed difference, in words."""
        if self.verdict != "not resolved" or not self.difference:
            return "—"
        samples = "" if math.isnan(self.samples_needed) else "no number of samples"
        if math.isfinite(self.samples_needed):
            samples = f"{self.samples_needed:,.0f} samples a problem"
        problems = "no number of problems"
        if math.isfinite(self.problems_factor):
            problems = f"{math.ceil(self.problems_factor * self.problems):,} problems"
        if not math.isfinite(self.samples_needed) and not math.isfinite(self.problems_factor):
            return "more training seeds"
        return " or ".join(filter(None, (samples, problems)))

    @property
    def cells(self) -> list[str]:
        """The texts of this comparison under HEADER."""
        low, high = self.interval
        kept = 1 - self.shares["samples"]
        return [
            self.benchmark,
            f"{self.difference:+.2f}",
            f"[{low:+.2f}, {high:+.2f}]",
            self.verdict,
            f"{self.detectable:.2f}",
            self.remedy,
            "—" if math.isnan(kept) else f"{100 * kept:.0f} %",
        ]


def compare(one: Row, other: Row, columns: Sequence[str], benchmark: str) -> Comparison | None:
    """Return the paired difference of two rows over `columns`; None where one lacks a cell.

    Raises:
        ArtefactError: the cells are of different problems or samplings, or hold fewer than two problems, or
            share no training seed over the columns.
    """
    if any(name not in row.cells for row in (one, other) for name in columns):
        return None
    for name in columns:
        _check_pair(one.cells[name], other.cells[name])
    (first, first_samples), (second, second_samples) = _shares(one, columns), _shares(other, columns)
    found = components(first, second, (first_samples, second_samples))
    more_samples, more_problems = resolving_factors(found)
    half = 100 * float(found.half_width)
    difference, variance = 100 * float(found.difference), float(found.variance)
    parts = {"samples": float(found.samples), "training seeds": float(found.training)}
    parts["problems"] = variance - sum(parts.values())
    trained = ((one, found.seed_counts[0]), (other, found.seed_counts[1]))
    needed = math.inf if more_samples is None else more_samples * max(first_samples, second_samples)
    return Comparison(
        first=row_title(one),
        second=row_title(other),
        benchmark=benchmark,
        difference=difference,
        standard_error=100 * math.sqrt(variance),
        degrees_of_freedom=float(found.df),
        interval=(difference - half, difference + half),
        detectable=100 * detectable(found),
        problems=sum(array.shape[-1] for array in first),
        shares={name: part / variance if variance else 0.0 for name, part in parts.items()},
        samples_needed=math.nan
        if math.isnan(found.samples)
        else math.ceil(needed)
        if more_samples
        else needed,
        problems_factor=math.inf if more_problems is None else more_problems,
        unknown_training=tuple(
            row_title(row) for row, seeds in trained if seeds == 1 and method_stem(row.method) != "base"
        ),
    )


def _check_pair(one: Cell, other: Cell) -> None:
    ours, theirs = one.runs[0], other.runs[0]
    different = regime_differences(ours.facts, theirs.facts, ignore=("seed", *MODEL_FIELDS))
    if not different and ours.problem_texts != theirs.problem_texts:
        different = ["the texts of their problems"]
    if different:
        raise ArtefactError(f"{ours.path} and {theirs.path} are not compared: {'; '.join(different)}")
    if len(ours.samples.correct) < 2:
        raise ArtefactError(f"{ours.path} holds one problem; a comparison needs at least two")


def _shares(row: Row, columns: Sequence[str]) -> tuple[list[np.ndarray], float]:
    """Return a [training seeds, P] share of right samples for each column, and samples a problem and seed."""
    groups = [
        {group[0].training_seed: group for group in row.cells[name].by_training_seed} for name in columns
    ]
    common = [seed for seed in groups[0] if all(seed in group for group in groups)]
    if not common:
        names = ", ".join(columns)
        raise ArtefactError(f"{row_title(row)} has no training seed with results on all of {names}")
    arrays = [
        np.array([np.mean([run.samples.correct.mean(1) for run in group[seed]], axis=0) for seed in common])
        for group in groups
    ]
    counts = [
        len(group[seed]) * group[seed][0].samples.correct.shape[1] for group in groups for seed in common
    ]
    return arrays, float(np.mean(counts))


def comparisons(table: Table, pairs: Sequence[tuple[Row, Row]]) -> list[Comparison]:
    """Return the comparison of each pair on each benchmark and their mean; see `compare` for its errors."""
    found = [compare(*pair, columns, title) for pair in pairs for title, columns in table.figures]
    return [comparison for comparison in found if comparison]


def notes(found: Sequence[Comparison]) -> list[str]:
    """Return what a reader must know of these comparisons, a paragraph each."""
    single = sorted({title for comparison in found for title in comparison.unknown_training})
    conditional = (
        f"{', '.join(single)}: one training seed, so the intervals are about these checkpoints; another "
        "training run of the same method would differ by an unknown amount."
    )
    return [METHOD_LINE, *([conditional] if single else [])]
