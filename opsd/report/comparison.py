"""Is one method better than another on these results, and if that is not resolved, what would resolve it?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from opsd.errors import ArtefactError, UsageError
from opsd.evaluation.results import regime_differences
from opsd.report.intervals import components, detectable, resolving_factors
from opsd.report.summary import BENCHMARK_TITLES, MODEL_FIELDS, Row, Table, method_stem, row_title

METHOD_NOTE = (
    "Differences are paired by problem and, where both methods have the same three or more training seeds, "
    "by seed. The 95 % intervals add the variances over problems, samples and, with several, training seeds "
    "(components of the crossed layout, Satterthwaite's degrees of freedom). Each holds for its own "
    "comparison alone: of 20 without a difference, one is expected to seem resolved. Detectable: the true "
    "difference that the same design would resolve in 80 % of its repetitions."
)
HEADER = ["comparison", "benchmark", "difference, points", "95 % interval", "verdict", "detectable"]
HEADER += ["would resolve this difference", "variance that samples do not remove"]
UNRESOLVED, DASH = "not resolved", "—"


@dataclass(frozen=True)
class Comparison:
    """The difference first - second on one benchmark or the mean of several, in points of Avg@n.

    Attributes:
        detectable: true difference that this design resolves with a probability of 80 %.
        variance_shares: of the squared standard error, by source; None where one sample a problem leaves it
            unknown.
        samples_needed, problems_needed: samples a problem and training seed, or problems, that would resolve
            this difference with a probability of 80 %; None where no number is enough, or it is unknown.
        single_seed: methods whose variance over training seeds is unknown and not in the 95 % interval.
    """

    first: str
    second: str
    benchmark: str
    difference: float
    standard_error: float
    degrees_of_freedom: float
    interval: tuple[float, float]
    detectable: float
    variance_shares: dict[str, float] | None
    samples_needed: int | None
    problems_needed: int | None
    single_seed: list[str]

    @property
    def verdict(self) -> str:
        """Which method is better, in words."""
        low, high = self.interval
        return f"{self.first if low > 0 else self.second} is better" if low > 0 or high < 0 else UNRESOLVED

    @property
    def line(self) -> list[str]:
        """The texts under HEADER."""
        low, high = self.interval
        wanted = [(self.samples_needed, "samples a problem"), (self.problems_needed, "problems")]
        enough = [f"{number:,} {what}" for number, what in wanted if number is not None]
        needed = " or ".join(enough) or "more training seeds"
        kept = (
            DASH if self.variance_shares is None else f"{100 * (1 - self.variance_shares['samples']):.0f} %"
        )
        return [
            f"{self.first} against {self.second}",
            BENCHMARK_TITLES.get(self.benchmark, self.benchmark),
            f"{self.difference:+.2f}",
            f"[{low:+.2f}, {high:+.2f}]",
            self.verdict,
            f"{self.detectable:.2f}",
            needed if self.verdict == UNRESOLVED and self.difference else DASH,
            kept,
        ]


def find_pairs(table: Table, compared: Sequence[str], reference: str | None) -> list[tuple[Row, Row]]:
    """Return the two rows `compared`, then every other row against `reference`, as far as they are there.

    A row is named by its method, or by its title, which UsageError asks for where a method has several rows.
    """
    rows = [row for row in table.rows if row.cells]

    def find(name: str) -> list[Row]:
        found = [row for row in rows if row_title(row) == name] or [row for row in rows if row.method == name]
        if len(found) > 1:
            titles = ", ".join(repr(row_title(row)) for row in found)
            raise UsageError(f"{name!r} fits several rows of {table.model}; give one of {titles}")
        return found

    pairs = [pair for pair in [tuple(row for name in compared for row in find(name))] if len(pair) == 2]
    for other in find(reference) if reference else []:
        pairs += [(row, other) for row in rows if row is not other]
    return list(dict.fromkeys(pairs))


def comparisons(
    table: Table, pairs: Sequence[tuple[Row, Row]], on_skip: Callable[[str], None]
) -> list[Comparison]:
    """Return each pair's difference on each benchmark that both have, and on their mean.

    A pair of cells with other problems or another sampling, with one problem, or without a common training
    seed is left out, with a message to `on_skip`.
    """
    found = []
    for (one, other), (title, columns) in ((pair, figure) for pair in pairs for figure in table.figures):
        if all(name in row.cells for row in (one, other) for name in columns):
            try:
                found.append(_compare(one, other, columns, title))
            except ArtefactError as error:
                on_skip(f"{error}; the comparison is left out")
    return found


def _compare(one: Row, other: Row, columns: Sequence[str], benchmark: str) -> Comparison:
    for name in columns:
        ours, theirs = one.cells[name].runs[0], other.cells[name].runs[0]
        different = regime_differences(ours.facts, theirs.facts, ignore=("seed", *MODEL_FIELDS))
        if different or ours.samples.problems != theirs.samples.problems:
            reason = "; ".join(different) or "their problems differ"
            raise ArtefactError(f"{ours.path} and {theirs.path} are not compared, {reason}")
        if len(ours.samples.problems) < 2:
            raise ArtefactError(f"{ours.path} holds one problem, but a comparison needs at least two")
    first, first_seeds, first_samples = _shares(one, columns)
    second, second_seeds, second_samples = _shares(other, columns)
    counts = (first_samples, second_samples)
    found = components(first, second, counts, same_seeds=first_seeds == second_seeds)
    difference, variance, half = (
        100 * float(found.difference),
        float(found.variance),
        100 * float(found.half_width),
    )
    samples, training, reach = float(found.samples), float(found.training), detectable(found)
    parts = {"problems": variance - samples - training, "samples": samples, "training seeds": training}
    shares = {name: part / (variance or 1) for name, part in parts.items()}
    more_samples, more_problems = resolving_factors(found, reach)
    trained = [row for row in (one, other) if method_stem(row.method) != "base"]
    return Comparison(
        first=row_title(one),
        second=row_title(other),
        benchmark=benchmark,
        difference=difference,
        standard_error=100 * math.sqrt(variance),
        degrees_of_freedom=float(found.df),
        interval=(difference - half, difference + half),
        detectable=100 * reach,
        variance_shares=None if math.isnan(samples) else shares,
        samples_needed=more_samples and math.ceil(more_samples * max(counts)),
        problems_needed=more_problems and math.ceil(more_problems * sum(array.shape[-1] for array in first)),
        single_seed=[row_title(row) for row in trained if len(row.training_seeds) < 2],
    )


def _shares(row: Row, columns: Sequence[str]) -> tuple[list[np.ndarray], list[int | None], float]:
    """Return the share of right samples [training seeds, P] of each column, the seeds, samples a problem."""
    cells = [{group[0].training_seed: group for group in row.cells[n].by_training_seed} for n in columns]
    seeds = [seed for seed in cells[0] if all(seed in cell for cell in cells)]
    if not seeds:
        raise ArtefactError(f"{row_title(row)} has no training seed that is in all of {', '.join(columns)}")
    means = [
        [np.mean([run.shares["average"] for run in cell[seed]], axis=0) for seed in seeds] for cell in cells
    ]
    counts = [sum(run.samples.correct.shape[1] for run in cell[seed]) for cell in cells for seed in seeds]
    return [np.array(mean) for mean in means], seeds, float(np.mean(counts))


def comparison_notes(found: Sequence[Comparison]) -> list[str]:
    """Return what a reader must know of these comparisons, a paragraph each."""
    single = sorted({title for comparison in found for title in comparison.single_seed})
    about = (
        "one training seed, so the intervals are about these checkpoints; another training run of the same"
    )
    conditional = f"{', '.join(single)}: {about} method would differ by an unknown amount."
    return [METHOD_NOTE, conditional] if single else [METHOD_NOTE]
