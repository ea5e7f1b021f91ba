"""From result files to the cells of the paper's table: runs, seed statistics, bootstrap intervals.

A cell is one model, method and benchmark; its runs differ in the evaluation seed and, for a study, in the
training seed (`_t<N>` at the end of the run's name) and in nothing else. A table holds one sampling regime.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from opsd import REPO_ROOT
from opsd.errors import ArtefactError
from opsd.evaluation.benchmarks import BENCHMARKS, PAPER_BENCHMARKS
from opsd.evaluation.names import marks, parse_name
from opsd.evaluation.results import load_result, regime_differences
from opsd.objectives import METHODS
from opsd.report.samples import Samples, read_samples

METRICS = ("average", "pass", "majority")
BOOTSTRAP_DRAWS = 2000
# The fields in which the benchmarks of one row, and the models of one table, differ.
BENCHMARK_FIELDS = ("dataset", "dataset_fingerprint", "num_problems")
MODEL_FIELDS = ("base_model", "model_identity")
METHOD_TITLES = {"base": "Base", "opsd": "OPSD", "eopd": "EOPD", "reopold": "REOPOLD", "pwopsd": "PW-OPSD"}
BENCHMARK_TITLES = dict(
    zip(PAPER_BENCHMARKS, ("MATH-500", "AIME 2024", "AIME 2025", "HMMT 2025"), strict=True),
    aime26="AIME 2026",
    hmmt_feb26="HMMT 2026",
    small_hard="small, hard",
)
_HUB_NAMES = {row.hub_id: name for name, row in BENCHMARKS.items() if row.hub_id}


def model_tags() -> list[str]:
    """Return the model tags that the launchers know, longest first."""
    tags = [path.stem for path in (REPO_ROOT / "launchers" / "models").glob("*.sh")]
    return sorted(tags, key=lambda tag: (-len(tag), tag))


@dataclass(frozen=True)
class Run:
    """One result file."""

    path: Path
    name: str  # the `<method_name>` of the file's name
    model: str
    method: str
    training_seed: int | None  # from `_t<N>` at the end of `name`
    first: int | None  # from `_first<K>`; None for the result of a complete benchmark
    dataset: str
    seed: int | None
    facts: dict[str, Any]  # all top-level keys but `results`, `dataset` by this project's name
    shares: dict[str, np.ndarray]  # by metric, in [0, 1] for each problem; without one that the file lacks
    samples: Samples


def split_name(method_name: str) -> tuple[str, str, int | None]:
    """Return (model tag, method, training seed) of a run's name; an unknown model has no method."""
    for tag in model_tags():
        match = re.fullmatch(rf"{re.escape(tag)}(?:_(?P<method>.+?))??(?:_t(?P<seed>\d+))?", method_name)
        if match:
            return tag, match["method"] or "base", int(match["seed"]) if match["seed"] else None
    return method_name, "base", None


def load_run(path: Path) -> Run:
    """Read one result file, or raise ArtefactError if it is damaged or has another's form or name."""
    result = load_result(path)
    dataset = _HUB_NAMES.get(result["dataset"], result["dataset"])
    parsed = parse_name(path, dataset)
    if parsed is None:
        raise ArtefactError(f"{path} is not named <method_name>[_<dataset>]_<length>[_seed<N>].json")
    name, first = parsed
    records = result.pop("results")
    samples = read_samples(records)
    shares = {"average": samples.correct.mean(1), "pass": samples.correct.any(1).astype(float)}
    votes = [record.get("majority_vote_correct") for record in records]
    if all(isinstance(vote, bool) for vote in votes):
        shares["majority"] = np.array(votes, dtype=float)
    model, method, training_seed = split_name(name)
    # What was not evaluated as the paper does is a row of its own, whatever the file's name.
    method = "_".join([method, *marks(result)])
    facts = result | {"dataset": dataset}
    seed = result.get("seed")
    return Run(path, name, model, method, training_seed, first, dataset, seed, facts, shares, samples)


@dataclass(frozen=True)
class Statistic:
    """The figures of a cell or of the mean of several, in percent."""

    mean: float
    deviation: float | None  # sample standard deviation over `count` values, None for one
    count: int
    interval: tuple[float, float]  # 95 %, bootstrap over problems


class Cell:
    """The runs of one model, method and benchmark, sorted by seed."""

    def __init__(self, runs: Sequence[Run]) -> None:
        """Raise ArtefactError where the runs are no repetitions of one another, or one is there twice."""
        self.runs = sorted(runs, key=lambda run: (run.training_seed or 0, run.seed or 0))
        for one, other in combinations(self.runs, 2):
            same_model = one.training_seed == other.training_seed
            # A seed that is absent is compared like any other, so it is left out by name.
            ignored = ("seed",) if same_model else ("seed", *MODEL_FIELDS)
            if differences := regime_differences(one.facts, other.facts, ignore=ignored):
                reason = f"their regimes differ: {'; '.join(differences)}"
                raise ArtefactError(f"{one.path} and {other.path} are not averaged, {reason}")
            if same_model and one.seed == other.seed:
                raise ArtefactError(f"{one.path} and {other.path} are the same run twice (seed {one.seed})")

    @property
    def by_training_seed(self) -> list[list[Run]]:
        seeds = dict.fromkeys(run.training_seed for run in self.runs)
        return [[run for run in self.runs if run.training_seed == seed] for seed in seeds]

    def values(self, metric: str) -> list[float]:
        """Return the percentage of each evaluation seed, or of each training seed where there are several."""
        groups = self.by_training_seed
        if len(groups) == 1:
            groups = [[run] for run in self.runs]
        return [float(np.mean([100 * run.shares[metric].mean() for run in group])) for group in groups]

    def statistic(self, metric: str) -> Statistic | None:
        """Return the figures of `values`; None where a file lacks the metric."""
        if any(metric not in run.shares for run in self.runs):
            return None
        values = self.values(metric)
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return Statistic(float(np.mean(values)), deviation, len(values), _interval(self.bootstrap(metric)))

    def bootstrap(self, metric: str) -> np.ndarray:
        """Return the means (percent) of BOOTSTRAP_DRAWS resamples of the problems, each with all samples."""
        per_problem = np.mean([run.shares[metric] for run in self.runs], axis=0)
        draw = np.random.default_rng(0).integers(0, len(per_problem), (BOOTSTRAP_DRAWS, len(per_problem)))
        return 100 * per_problem[draw].mean(axis=1)


def _interval(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


@dataclass(eq=False)
class Row:
    """One method of a model: a cell for each benchmark that has one.

    Runs without a training seed in their name are a row of their own, since that seed is unknown and may be
    another run's. So are runs of a benchmark's `first` problems.
    """

    method: str
    first: int | None
    cells: dict[str, Cell]

    @property
    def training_seeds(self) -> list[int]:
        """The training seeds in rising order; empty for a row of runs whose names have none."""
        found = {run.training_seed for cell in self.cells.values() for run in cell.runs}
        return sorted(seed for seed in found if seed is not None)

    def statistic(self, metric: str, columns: Sequence[str]) -> Statistic | None:
        """Return the cell of one column, or the equal-weight mean of several; None unless all are there."""
        cells = [self.cells[name] for name in columns if name in self.cells]
        statistics = [statistic for cell in cells if (statistic := cell.statistic(metric))]
        if len(statistics) < len(columns) or len(columns) == 1:
            return statistics[0] if len(statistics) == len(columns) else None
        # Benchmarks are independent samples of problems: their draws must not move together.
        draws = (cell.bootstrap(metric) for cell in cells)
        drawn = [np.random.default_rng(k).permutation(draw) for k, draw in enumerate(draws, 1)]
        mean = float(np.mean([statistic.mean for statistic in statistics]))
        return Statistic(mean, None, len(columns), _interval(np.mean(drawn, axis=0)))


@dataclass(frozen=True)
class Table:
    """The rows of one model, and the benchmarks that are its columns."""

    model: str
    columns: tuple[str, ...]
    averaged: tuple[str, ...]  # the columns of each row's equal-weight mean; empty for a single column
    rows: list[Row]
    val_n: int

    @property
    def runs(self) -> list[Run]:
        return [run for row in self.rows for cell in row.cells.values() for run in cell.runs]

    @property
    def figures(self) -> list[tuple[str, tuple[str, ...]]]:
        """The name and the columns of each figure of a row: its cells and, last, their mean."""
        mean = [(f"mean of {len(self.averaged)}", self.averaged)] if self.averaged else []
        return [(name, (name,)) for name in self.columns] + mean


def build_tables(runs: Sequence[Run], on_skip: Callable[[str], None]) -> list[Table]:
    """Return one table for each model and sampling regime.

    One that holds a benchmark of the paper has a column for each of its four and, for a model that the
    launchers know, a row for each method, even without a result. A cell whose runs `Cell` refuses is left
    out, with a message to `on_skip`.
    """
    groups: list[list[Run]] = []
    ignored = ("seed", *BENCHMARK_FIELDS, *MODEL_FIELDS)
    for run in sorted(runs, key=lambda run: run.model):
        for group in (group for group in groups if group[0].model == run.model):
            if not any(regime_differences(other.facts, run.facts, ignore=ignored) for other in group):
                group.append(run)
                break
        else:
            groups.append([run])
    return [table for group in groups if (table := _table(group, on_skip)).runs]


def _table(runs: Sequence[Run], on_skip: Callable[[str], None]) -> Table:
    model = runs[0].model
    repetitions: dict[tuple[str, bool, int | None, str], list[Run]] = {}
    for run in runs:
        key = (run.method, run.training_seed is not None, run.first, run.dataset)
        repetitions.setdefault(key, []).append(run)
    rows: dict[tuple[str, bool, int | None], Row] = {}
    for (method, seeded, first, dataset), some in repetitions.items():
        try:
            cell = Cell(some)
        except ArtefactError as error:
            on_skip(f"{error}; the cell is left out")
        else:
            rows.setdefault((method, seeded, first), Row(method, first, {})).cells[dataset] = cell
    datasets = {name for row in rows.values() for name in row.cells}
    columns = (*(name for name in BENCHMARKS if name in datasets), *sorted(datasets.difference(BENCHMARKS)))
    averaged = columns
    if datasets & set(PAPER_BENCHMARKS):
        averaged = PAPER_BENCHMARKS
        # A method whose runs all have a training seed in their names needs no empty row beside it.
        there = {row.method for row in rows.values()}
        empty = [method for method in METHODS if method not in there] if model in model_tags() else []
        rows |= {(method, False, None): Row(method, None, {}) for method in empty}
    columns = (*averaged, *(name for name in columns if name not in averaged))
    # The base first, then the paper's methods, each followed by its variants.
    stems = [*METHOD_TITLES, None]
    keys = sorted(rows, key=lambda key: (stems.index(method_stem(key[0])), key[0], key[1], key[2] or 0))
    averaged = averaged if len(averaged) > 1 else ()
    return Table(model, columns, averaged, [rows[key] for key in keys], runs[0].facts["val_n"])


def method_stem(method: str) -> str | None:
    """Return `pwopsd` for `pwopsd_flat`, the method that a variant's name begins with; None without one."""
    return next((stem for stem in METHOD_TITLES if stem == method.split("_")[0]), None)


def row_title(row: Row) -> str:
    """Return `PW-OPSD`, or with variant and training seeds `PW-OPSD (flat, 3 training seeds)`."""
    stem, _, variant = row.method.partition("_") if method_stem(row.method) else (row.method, "", "")
    notes = [variant.replace("_", " ")] if variant else []
    notes += [f"first {row.first} problems"] if row.first else []
    if seeds := row.training_seeds:
        notes.append(f"{len(seeds)} training seeds" if len(seeds) > 1 else f"training seed {seeds[0]}")
    title = METHOD_TITLES.get(stem, stem)
    return f"{title} ({', '.join(notes)})" if notes else title


def paper_rows(numbers: Mapping[str, Any], model: str) -> list[tuple[str, str, dict[tuple[str, ...], list]]]:
    """Return (method, title, {columns: [mean, deviation] or [mean]}) of the paper's rows, in percent."""
    columns = [*((name,) for name in numbers["benchmarks"]), PAPER_BENCHMARKS]
    return [
        (row["method"], row["title"], dict(zip(columns, [*row["cells"], [row["mean"]]], strict=True)))
        for row in numbers["rows"]
        if row["model"] == model
    ]
