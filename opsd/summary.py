"""From result files to the cells of the paper's table: runs, seed statistics, bootstrap intervals.

A cell is one model, method and benchmark; its runs differ in the evaluation seed and, for a study, in the
training seed (`_t<N>` at the end of the run's name) and in nothing else. What differs otherwise is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opsd.benchmarks import BENCHMARKS, PAPER_BENCHMARKS
from opsd.errors import ArtefactError
from opsd.results import LENGTH_TAG, load_result, method_name_of, regime_differences, regime_of

REPOSITORY = Path(__file__).resolve().parent.parent
METHODS = ("opsd", "eopd", "reopold", "pwopsd")
METRICS = ("average", "pass", "majority")
BOOTSTRAP_DRAWS = 2000
# What distinguishes the benchmarks of one row.
OF_THE_BENCHMARK = ("dataset", "dataset_fingerprint", "num_problems")
OF_THE_MODEL = ("base_model", "model_identity")
_HUB_NAMES = {row.hub_id: row.name for row in BENCHMARKS.values() if row.hub_id}


def model_tags() -> list[str]:
    """The model tags that the launchers know, longest first."""
    tags = [path.stem for path in (REPOSITORY / "launchers" / "models").glob("*.sh")]
    return sorted(tags, key=lambda tag: (-len(tag), tag))


@dataclass(frozen=True)
class Run:
    """One result file.

    Attributes:
        shares: by metric, one value in [0, 1] for each problem; no entry where the file lacks the metric.
        training_seed: from `_t<N>` in the run's name, None without.
    """

    path: Path
    model: str
    method: str
    training_seed: int | None
    dataset: str
    seed: int | None
    regime: dict[str, Any]
    shares: dict[str, np.ndarray]

    @property
    def method_name(self) -> str:
        return self.path.name.split(f"_{LENGTH_TAG}")[0].removesuffix(f"_{self.dataset}")

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
    method_name = method_name_of(path, dataset)
    if method_name is None:
        raise ArtefactError(f"{path} is not named <method_name>[_<dataset>]_{LENGTH_TAG}[_seed<N>].json")
    records = result["results"]
    if not records or not all(record["generations"] for record in records):
        raise ArtefactError(f"{path} holds no problem, or a problem without samples")
    correct = [[generation["correct"] for generation in record["generations"]] for record in records]
    shares = {
        "average": np.array([sum(row) / len(row) for row in correct]),
        "pass": np.array([float(any(row)) for row in correct]),
    }
    votes = [record.get("majority_vote_correct") for record in records]
    if all(isinstance(vote, bool) for vote in votes):
        shares["majority"] = np.array([float(vote) for vote in votes])
    seed = result.get("seed")
    model, method, training_seed = split_name(method_name)
    regime = regime_of(result) | {"dataset": dataset}
    return Run(path, model, method, training_seed, dataset, seed, regime, shares)


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
        _refuse_different(self.runs, ignore=("seed",))
        keys = [(run.training_seed, run.seed) for run in self.runs]
        for key in keys:
            if keys.count(key) > 1:
                twice = ", ".join(str(run.path) for run in self.runs if (run.training_seed, run.seed) == key)
                raise ArtefactError(f"the same run stands in the table twice (seed {key[1]}): {twice}")

    @property
    def by_training_seed(self) -> list[list[Run]]:
        seeds = list(dict.fromkeys(run.training_seed for run in self.runs))
        return [[run for run in self.runs if run.training_seed == seed] for seed in seeds]

    def statistic(self, metric: str) -> Statistic | None:
        """Over the evaluation seeds; with several training seeds, over these, each the mean of its runs."""
        if any(metric not in run.shares for run in self.runs):
            return None
        groups = self.by_training_seed
        if len(groups) > 1:
            values = [float(np.mean([run.percent(metric) for run in group])) for group in groups]
        else:
            values = [run.percent(metric) for run in self.runs]
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
    """Raises ArtefactError when two runs that would be averaged have different regimes."""
    for run in runs[1:]:
        ignored = [*ignore, *(OF_THE_MODEL if run.training_seed != runs[0].training_seed else ())]
        # A seed that is absent is compared like any other, so it is left out by name.
        differences = regime_differences(runs[0].regime, run.regime, ignore=ignored)
        if differences:
            raise ArtefactError(
                f"{runs[0].path} and {run.path} are not averaged, their regimes differ: "
                f"{'; '.join(differences)}; give a PATTERN that leaves one of them out"
            )


class Row:
    """One model and method: a cell for each benchmark that has one."""

    def __init__(self, model: str, method: str, runs: Sequence[Run]) -> None:
        self.model, self.method = model, method
        datasets = dict.fromkeys(run.dataset for run in runs)
        self.cells = {name: Cell([run for run in runs if run.dataset == name]) for name in datasets}

    def average(self, metric: str, columns: Sequence[str]) -> Statistic | None:
        """The equal-weight mean over `columns`; None unless every one of them is there.

        Raises:
            ArtefactError: the benchmarks were sampled in different regimes.
        """
        if not all(name in self.cells for name in columns):
            return None
        runs = [run for name in columns for run in self.cells[name].runs]
        _refuse_different(runs, ignore=("seed", *OF_THE_BENCHMARK))
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
    """The rows of one model, and the benchmarks that are its columns."""

    model: str
    columns: tuple[str, ...]
    averaged: tuple[str, ...]
    rows: list[Row]
    val_n: int


def build_tables(runs: Sequence[Run]) -> list[Table]:
    """One table for each model, in which the paper's methods have a row each even without a result."""
    tables = []
    for model in dict.fromkeys(run.model for run in runs):
        ours = [run for run in runs if run.model == model]
        datasets = dict.fromkeys(run.dataset for run in ours)
        averaged = PAPER_BENCHMARKS if set(datasets) & set(PAPER_BENCHMARKS) else ("small", "small_hard")
        if not set(datasets) & set(averaged):
            averaged = tuple(datasets)
        columns = (*averaged, *(name for name in datasets if name not in averaged))
        found = dict.fromkeys(run.method for run in ours)
        known = METHODS if model in model_tags() else ()
        base = ("base",) if "base" in found else ()
        methods = tuple(dict.fromkeys((*base, *known, *found)))
        rows = [Row(model, method, [run for run in ours if run.method == method]) for method in methods]
        tables.append(Table(model, columns, averaged, rows, int(ours[0].regime["val_n"])))
    return tables


def missing_commands(table: Table, seeds: Sequence[int]) -> list[str]:
    """The commands that would fill what is missing in `table` for the evaluation seeds `seeds`."""
    parallel = 1 if table.model == "small" else 4
    commands = []
    for row in table.rows:
        training_seeds = dict.fromkeys(run.training_seed for cell in row.cells.values() for run in cell.runs)
        for training_seed in training_seeds or (None,):
            for dataset in table.columns:
                runs = row.cells[dataset].runs if dataset in row.cells else []
                present = {run.seed for run in runs if run.training_seed == training_seed}
                suffix = "" if training_seed is None else f"_t{training_seed}"
                name = _run_name(table.model, row.method) + suffix
                commands += [
                    f"bash launchers/run_eval.sh {name} {dataset} {parallel} {seed}"
                    for seed in seeds
                    if seed not in present
                ]
    return commands


def _run_name(model: str, method: str) -> str:
    # The bare tag of a paper model is its base model; the small world's is `small_base`.
    if method == "base":
        return model if model != "small" else "small_base"
    return f"{model}_{method}"


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
