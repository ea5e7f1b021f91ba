"""Turn sampled branches into figures: a row per branch, AUROC of every predictor, curves along the spine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from opsd.diagnostic.config import BranchConfig
from opsd.diagnostic.schedule import ScheduleFit, fit_schedule
from opsd.diagnostic.spines import relative_position
from opsd.diagnostic.statistics import (
    Estimate,
    clustered_auroc,
    clustered_mean,
    relative_label,
    resample_weights,
)
from opsd.errors import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from opsd.diagnostic.sampling import Branches
    from opsd.diagnostic.spines import BranchProblem

CURVE_BINS = 10


@dataclass(frozen=True)
class Predictor:
    """A column of the table, and which end of it is expected, before seeing any data, to be viable."""

    column: str
    label: str
    higher_is_viable: bool


PREDICTORS = (
    Predictor("relative_position", "position, relative", True),
    Predictor("position", "position, absolute", True),
    Predictor("teacher_entropy", "teacher entropy", False),
    Predictor("student_entropy", "student entropy", False),
    Predictor("teacher_probability", "teacher probability of the token", True),
    Predictor("rank", "rank among the teacher's tokens", False),
    Predictor("student_probability", "student probability of the token", True),
    Predictor("margin", "teacher margin (top 1 − top 2)", True),
    Predictor("kl", "KL(teacher ‖ student)", False),
)


SUBSETS = {
    "all branches": lambda t: t["rank"] >= 1,
    "the teacher's first choice only": lambda t: t["rank"] == 1,
    "tokens that the spine does not hold there": lambda t: ~t["is_spine_token"],
    "spines that end right": lambda t: t["spine_correct"],
    "spines that end wrong": lambda t: ~t["spine_correct"],
}


@dataclass(frozen=True)
class Row:
    """One predictor: AUROC of absolute and relative viability, concordance with the difference itself."""

    predictor: Predictor
    absolute: Estimate
    relative: Estimate
    graded: Estimate


@dataclass(frozen=True)
class Subset:
    """The figures of one subset of the branches."""

    name: str
    branches: int
    problems: int
    viable: float
    ties: float
    rows: list[Row]


@dataclass(frozen=True)
class CurvePoint:
    """Success of branches, of the unforced control and their difference in one bin of relative position."""

    low: float
    high: float
    branches: int
    success: Estimate
    control: Estimate
    difference: Estimate


@dataclass(frozen=True)
class Analysis:
    """All that the report and the picture show."""

    subsets: list[Subset]
    curve: list[CurvePoint]
    by_rank: list[tuple[int, int, float, Estimate, Estimate]]
    spine_success: float
    truncated: float
    schedules: dict[str, ScheduleFit | None]


def branch_table(
    branches: Branches,
    problems: Sequence[BranchProblem],
    verdicts: Mapping[tuple[int, str], bool],
    tokenizer: PreTrainedTokenizerBase,
    config: BranchConfig,
) -> pd.DataFrame:
    """Return one row per branch; docs/branch_viability.md lists the columns. The control is a column."""
    rows = []
    for problem in problems:
        spine = branches.spines[problem.index]
        for fork in branches.forks[problem.index]:
            control, _ = _success(branches, (problem.index, fork.offset, 0), verdicts)
            for alternative in fork.alternatives:
                key = (problem.index, fork.offset, alternative.rank)
                share, truncated = _success(branches, key, verdicts)
                rows.append(
                    {
                        "problem": problem.index,
                        "position": fork.offset + 1,
                        "relative_position": relative_position(fork.offset, len(spine.tokens)),
                        "spine_tokens": len(spine.tokens),
                        "spine_correct": bool(verdicts.get((problem.index, spine.answer), False)),
                        "spine_truncated": spine.truncated,
                        "rank": alternative.rank,
                        "token_id": alternative.token_id,
                        "token": printable(tokenizer.decode([alternative.token_id]), 80),
                        "is_spine_token": alternative.token_id == spine.tokens[fork.offset],
                        "teacher_entropy": fork.teacher_entropy,
                        "student_entropy": fork.student_entropy,
                        "teacher_probability": alternative.teacher_probability,
                        "student_probability": alternative.student_probability,
                        "margin": fork.margin,
                        "kl": fork.kl,
                        "continuations": config.continuations,
                        "viability": share,
                        "viable": share >= config.viable_share,
                        "control_viability": control,
                        "control_viable": control >= config.viable_share,
                        "relative_viability": share - control,
                        "truncated_share": truncated,
                    }
                )
    return pd.DataFrame(rows)


def _success(branches: Branches, key, verdicts) -> tuple[float, float]:
    """Return the share of continuations that recover the answer and the share that were cut."""
    samples = branches.continued[key].values()
    recovered = sum(bool(verdicts.get((key[0], done.answer), False)) for done in samples)
    return recovered / len(samples), sum(done.truncated for done in samples) / len(samples)


def analyse(table: pd.DataFrame, config: BranchConfig) -> Analysis:
    """Compute every figure of the report. All intervals use the same resamples of the problems."""
    names, codes = np.unique(table["problem"].to_numpy(), return_inverse=True)
    weights = resample_weights(len(names), resamples=config.resamples, seed=config.seed)
    table = table.assign(code=codes)
    spines = table.drop_duplicates("problem")
    return Analysis(
        subsets=[_subset(name, table[choose(table)], weights) for name, choose in SUBSETS.items()],
        curve=_curve(table, weights),
        by_rank=_by_rank(table, weights),
        spine_success=float(spines["spine_correct"].mean()),
        truncated=float(table["truncated_share"].mean()),
        schedules=_schedules(table, weights) if config.suggest_schedule else {},
    )


def _subset(name: str, table: pd.DataFrame, weights: NDArray[np.float64]) -> Subset:
    relative = relative_label(table["viability"], table["control_viability"])
    rows = []
    for predictor in PREDICTORS:
        scores = table[predictor.column].to_numpy(dtype=float) * (1 if predictor.higher_is_viable else -1)
        outcomes = (table["viable"].to_numpy(dtype=float), relative, table["relative_viability"].to_numpy())
        rows.append(Row(predictor, *(clustered_auroc(scores, y, table["code"], weights) for y in outcomes)))
    return Subset(
        name,
        len(table),
        table["problem"].nunique(),
        float(table["viable"].mean()) if len(table) else float("nan"),
        float(np.isnan(relative).mean()) if len(table) else float("nan"),
        rows,
    )


def _curve(table: pd.DataFrame, weights: NDArray[np.float64]) -> list[CurvePoint]:
    points = []
    edges = np.linspace(0, 1, CURVE_BINS + 1)
    for low, high in pairwise(edges):
        inside = table[(table["relative_position"] >= low) & (table["relative_position"] < high)]
        # The control belongs to the fork: counted once, not once per alternative.
        forks = inside.drop_duplicates(["problem", "position"])
        points.append(
            CurvePoint(
                float(low),
                float(high),
                len(inside),
                clustered_mean(inside["viability"], inside["code"], weights),
                clustered_mean(forks["control_viability"], forks["code"], weights),
                clustered_mean(inside["relative_viability"], inside["code"], weights),
            )
        )
    return points


def _by_rank(table: pd.DataFrame, weights: NDArray[np.float64]):
    found = []
    for rank, rows in table.groupby("rank"):
        success = clustered_mean(rows["viability"], rows["code"], weights)
        difference = clustered_mean(rows["relative_viability"], rows["code"], weights)
        found.append((int(rank), len(rows), float(rows["teacher_probability"].mean()), success, difference))
    return found


def _schedules(table: pd.DataFrame, weights: NDArray[np.float64]) -> dict[str, ScheduleFit | None]:
    """Fit schedules; a branch counts with the teacher's probability of its token."""
    columns = (table["relative_position"], table["viability"], table["code"], weights)
    importance = table["teacher_probability"]
    return {
        "absolute": fit_schedule(*columns, importance=importance),
        "relative": fit_schedule(*columns, control=table["control_viability"], importance=importance),
    }
