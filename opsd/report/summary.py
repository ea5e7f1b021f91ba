"""From result files to the cells of the paper's table: runs, seed statistics, bootstrap intervals.

A cell is one model, method and benchmark; its runs differ in the evaluation seed and, for a study, in the
training seed (`_t<N>` at the end of the run's name) and in nothing else. A table holds one sampling regime.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opsd.errors import ArtefactError
from opsd.evaluation.benchmarks import BENCHMARKS, PAPER_BENCHMARKS
from opsd.evaluation.names import parse_name
from opsd.evaluation.results import load_result, regime_differences

REPOSITORY = Path(__file__).resolve().parents[2]
METHODS = ("opsd", "eopd", "reopold", "pwopsd")
METRICS = ("average", "pass", "majority")
BOOTSTRAP_DRAWS = 2000
# What distinguishes the benchmarks of one row.
OF_THE_BENCHMARK = ("dataset", "dataset_fingerprint", "num_problems")
OF_THE_MODEL = ("base_model", "model_identity")
METHOD_TITLES = {"base": "Base", "opsd": "OPSD", "eopd": "EOPD", "reopold": "REOPOLD", "pwopsd": "PW-OPSD"}
BENCHMARK_TITLES = {
    "math500": "MATH-500",
    "aime24": "AIME 2024",
    "aime25": "AIME 2025",
    "hmmt25": "HMMT 2025",
    "small": "small",
    "small_hard": "small, hard",
}
_HUB_NAMES = {row.hub_id: row.name for row in BENCHMARKS.values() if row.hub_id}


def model_tags() -> list[str]:
    """The model tags that the launchers know, longest first."""
    tags = [path.stem for path in (REPOSITORY / "launchers" / "models").glob("*.sh")]
    return sorted(tags, key=lambda tag: (-len(tag), tag))


@dataclass(frozen=True)
class Run:
    """One result file.

    Attributes:
        name: the `<method_name>` of the file's name.
        training_seed: from `_t<N>` in the run's name, None without.
        first: the number behind `_first`, None in the name of a whole benchmark's result.
        facts: all top-level keys but `results`, `dataset` by this project's name.
        shares: by metric, one value in [0, 1] for each problem; no entry where the file lacks the metric.
    """

    path: Path
    name: str
    model: str
    method: str
    training_seed: int | None
    first: int | None
    dataset: str
    seed: int | None
    facts: dict[str, Any]
    shares: dict[str, np.ndarray]

    def percent(self, metric: str) -> float:
        return 100 * float(self.shares[metric].mean())


def split_name(method_name: str) -> tuple[str, str, int | None]:
    """(model tag, method, training seed) of a run's name; with an unknown tag the whole name is the model."""
    for tag in model_tags():
        match = re.fullmatch(rf"{re.escape(tag)}(?:_(?P<method>.+?))??(?:_t(?P<seed>\d+))?", method_name)
        if match:
            return tag, match["method"] or "base", int(match["seed"]) if match["seed"] else None
    return method_name, "base", None


def load_run(path: Path) -> Run:
    """Read one result file down to what the table needs.

    Raises:
        ArtefactError: it is damaged or foreign, or its name has not the form of a result's.
    """
    result = load_result(path)
    dataset = _HUB_NAMES.get(result["dataset"], result["dataset"])
    parsed = parse_name(path, dataset)
    if parsed is None:
        raise ArtefactError(f"{path} is not named <method_name>[_<dataset>]_<length>[_seed<N>].json")
    name, first = parsed
    records = result.pop("results")
    correct = [[generation["correct"] for generation in record["generations"]] for record in records]
    shares = {
        "average": np.array([sum(row) / len(row) for row in correct]),
        "pass": np.array([float(any(row)) for row in correct]),
    }
    votes = [record.get("majority_vote_correct") for record in records]
    if all(isinstance(vote, bool) for vote in votes):
        shares["majority"] = np.array([float(vote) for vote in votes])
    model, method, training_seed = split_name(name)
    facts = result | {"dataset": dataset}
    return Run(path, name, model, method, training_seed, first, dataset, result.get("seed"), facts, shares)


@dataclass(frozen=True)
class Statistic:
    """Percent: mean, sample standard deviation (n-1; None with one run), number of values behind it, and the
    95 % bootstrap interval over problems."""

    mean: float
    deviation: float | None
    count: int
    interval: tuple[float, float]


class Cell:
    """The runs of one model, method and benchmark, checked to be repetitions of one another."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = sorted(runs, key=lambda run: (run.training_seed or 0, run.seed or 0))
        for group in self.by_training_seed:
            _refuse_different(group, ignore=("seed",))
        _refuse_different(self.runs, ignore=("seed", *OF_THE_MODEL))
        keys = [(run.training_seed, run.seed) for run in self.runs]
        for key in keys:
            if keys.count(key) > 1:
                twice = ", ".join(str(run.path) for run in self.runs if (run.training_seed, run.seed) == key)
                raise ArtefactError(f"the same run stands in the table twice (seed {key[1]}): {twice}")

    @property
    def by_training_seed(self) -> list[list[Run]]:
        seeds = list(dict.fromkeys(run.training_seed for run in self.runs))
        return [[run for run in self.runs if run.training_seed == seed] for seed in seeds]

    def values(self, metric: str) -> list[float]:
        """Percent of each evaluation seed, or of each training seed (the mean of its runs) where there are
        several."""
        groups = self.by_training_seed
        if len(groups) == 1:
            groups = [[run] for run in self.runs]
        return [float(np.mean([run.percent(metric) for run in group])) for group in groups]

    def statistic(self, metric: str) -> Statistic | None:
        """Over `values`; None where a file lacks the metric."""
        if any(metric not in run.shares for run in self.runs):
            return None
        values = self.values(metric)
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        draws = self.bootstrap(metric)
        low, high = np.percentile(draws, [2.5, 97.5])
        return Statistic(float(np.mean(values)), deviation, len(values), (float(low), float(high)))

    def bootstrap(self, metric: str) -> np.ndarray:
        """Means in percent over BOOTSTRAP_DRAWS resamples of the problems, each with all of its samples."""
        per_problem = np.mean([run.shares[metric] for run in self.runs], axis=0)
        draw = np.random.default_rng(0).integers(0, len(per_problem), (BOOTSTRAP_DRAWS, len(per_problem)))
        return 100 * per_problem[draw].mean(axis=1)


def _refuse_different(runs: Sequence[Run], *, ignore: Sequence[str]) -> None:
    """Raise ArtefactError when two runs that would be averaged have different regimes."""
    for run in runs[1:]:
        # A seed that is absent is compared like any other, so it is left out by name.
        differences = regime_differences(runs[0].facts, run.facts, ignore=ignore)
        if differences:
            raise ArtefactError(
                f"{runs[0].path} and {run.path} are not averaged, their regimes differ: "
                f"{'; '.join(differences)}"
            )


class Row:
    """One model and method: a cell for each benchmark that has one.

    Runs with a training seed in their name and runs without one are different rows: which seed the latter had
    is not known here, and it may be one of the former. So are runs of a benchmark's `first` problems.
    """

    def __init__(self, model: str, method: str, runs: Sequence[Run], *, first: int | None = None) -> None:
        self.model, self.method, self.first = model, method, first
        datasets = dict.fromkeys(run.dataset for run in runs)
        self.cells = {name: Cell([run for run in runs if run.dataset == name]) for name in datasets}

    @property
    def training_seeds(self) -> list[int]:
        """In rising order; empty for a row of runs that name none."""
        found = {run.training_seed for cell in self.cells.values() for run in cell.runs}
        return sorted(seed for seed in found if seed is not None)

    def average(self, metric: str, columns: Sequence[str]) -> Statistic | None:
        """The equal-weight mean over `columns`; None unless every one of them is there."""
        if not all(name in self.cells for name in columns):
            return None
        statistics = [self.cells[name].statistic(metric) for name in columns]
        if any(statistic is None for statistic in statistics):
            return None
        # Benchmarks are independent samples of problems: their draws must not move together.
        draws = [
            np.random.default_rng(index + 1).permutation(self.cells[name].bootstrap(metric))
            for index, name in enumerate(columns)
        ]
        low, high = np.percentile(np.mean(draws, axis=0), [2.5, 97.5])
        mean = float(np.mean([statistic.mean for statistic in statistics]))
        return Statistic(mean, None, len(columns), (float(low), float(high)))


@dataclass(frozen=True)
class Table:
    """The rows of one model, and the benchmarks that are its columns.

    Attributes:
        averaged: the columns whose equal-weight mean closes each row; empty for a single column.
    """

    model: str
    columns: tuple[str, ...]
    averaged: tuple[str, ...]
    rows: list[Row]
    val_n: int

    @property
    def runs(self) -> list[Run]:
        return [run for row in self.rows for cell in row.cells.values() for run in cell.runs]


def build_tables(runs: Sequence[Run], on_skip: Callable[[str], None]) -> list[Table]:
    """Return one table for each model and sampling regime.

    One that holds a benchmark of the paper has a column for each of its four and, for a model that the
    launchers know, a row for each method, even without a result. Any other holds what there is. A cell whose
    runs are no repetitions of one another (other weights, other problems, one run twice) is left out, with a
    message to `on_skip`.
    """
    groups: list[list[Run]] = []
    ignored = ("seed", *OF_THE_BENCHMARK, *OF_THE_MODEL)
    models = list(dict.fromkeys(run.model for run in runs))
    for run in sorted(runs, key=lambda run: models.index(run.model)):
        for group in groups:
            different = (regime_differences(other.facts, run.facts, ignore=ignored) for other in group)
            if group[0].model == run.model and not any(different):
                group.append(run)
                break
        else:
            groups.append([run])
    sound = [_repetitions(group, on_skip) for group in groups]
    return [_table(group[0].model, group) for group in sound if group]


def _repetitions(runs: Sequence[Run], on_skip: Callable[[str], None]) -> list[Run]:
    """Return the runs of the cells that `Cell` accepts; its complaint about any other goes to `on_skip`."""
    cells: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        key = (run.method, run.training_seed is None, run.first, run.dataset)
        cells.setdefault(key, []).append(run)
    sound = []
    for cell in cells.values():
        try:
            sound += Cell(cell).runs
        except ArtefactError as error:
            on_skip(f"{error}; the cell is left out")
    return sound


def _table(model: str, runs: list[Run]) -> Table:
    datasets = sorted({run.dataset for run in runs}, key=_benchmark_order)
    of_the_paper = bool(set(datasets) & set(PAPER_BENCHMARKS))
    averaged = PAPER_BENCHMARKS if of_the_paper else tuple(datasets)
    columns = (*averaged, *(name for name in datasets if name not in averaged))
    rows: dict[tuple[str, bool, int | None], list[Run]] = {}
    for run in runs:
        rows.setdefault((run.method, run.training_seed is not None, run.first), []).append(run)
    if of_the_paper and model in model_tags():
        # A method whose runs all name their training seed needs no empty row beside it.
        there = {method for method, *_ in rows}
        rows |= {(method, False, None): [] for method in METHODS if method not in there}
    order = sorted(rows, key=lambda key: (*_method_order(key[0]), key[1], key[2] or 0))
    return Table(
        model,
        columns,
        averaged if len(averaged) > 1 else (),
        [Row(model, key[0], rows[key], first=key[2]) for key in order],
        int(runs[0].facts["val_n"]),
    )


def _benchmark_order(name: str) -> tuple[int, str]:
    order = list(BENCHMARKS)
    return (order.index(name) if name in order else len(order), name)


def _method_order(method: str) -> tuple[int, str]:
    """The base first, then the paper's methods, each followed by its variants (`pwopsd_flat`)."""
    order = ("base", *METHODS)
    stem = method_stem(method)
    return (order.index(stem) if stem in order else len(order), method)


def method_stem(method: str) -> str:
    """`pwopsd` of `pwopsd_flat`: the method that a variant's name begins with, the whole name without one."""
    stem = method.split("_")[0]
    return stem if stem in ("base", *METHODS) else method


def row_title(row: Row) -> str:
    """`PW-OPSD`, its variant and training seeds behind it: `PW-OPSD (flat, 3 training seeds)`."""
    stem = method_stem(row.method)
    notes = [row.method.removeprefix(stem).strip("_").replace("_", " ")] if row.method != stem else []
    notes += [f"first {row.first} problems"] if row.first else []
    seeds = row.training_seeds
    if seeds:
        notes.append(f"{len(seeds)} training seeds" if len(seeds) > 1 else f"training seed {seeds[0]}")
    title = METHOD_TITLES.get(stem, stem)
    return f"{title} ({', '.join(notes)})" if notes else title


def benchmark_title(name: str) -> str:
    """A benchmark's name as a heading."""
    return BENCHMARK_TITLES.get(name, name)


def collect(paths: Sequence[Path], on_skip: Callable[[str], None]) -> list[Run]:
    """Load every path; a damaged or foreign file goes to `on_skip` as a message."""
    runs = []
    for path in paths:
        try:
            runs.append(load_run(path))
        except ArtefactError as error:
            on_skip(str(error))
    return runs


def paper_row(numbers: Mapping[str, Any], model: str) -> list[tuple[str, list[list[float]], float]]:
    """(title, [mean, deviation] for each of the paper's benchmarks, mean of four) of the paper's rows."""
    return [(row["title"], row["cells"], row["mean"]) for row in numbers["rows"] if row["model"] == model]
