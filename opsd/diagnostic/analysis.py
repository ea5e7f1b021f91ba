"""Turn sampled branches into figures: a row per branch, AUROC of every predictor, curves along the spine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from opsd.diagnostic.config import BranchConfig
from opsd.diagnostic.schedule import MODERATE, ScheduleFit, fit_schedule, schedule
from opsd.diagnostic.statistics import (
    Estimate,
    clustered_auroc,
    clustered_mean,
    relative_label,
    resample_weights,
)
from opsd.errors import printable

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from transformers import PreTrainedTokenizerBase

    from opsd.diagnostic.sampling import Branches, BranchKey
    from opsd.diagnostic.spines import BranchProblem

CURVE_BINS = 10
# Columns of the table: label, and whether a high value was expected, before any data, to be viable.
PREDICTORS = {
    "relative_position": ("position, relative", True),
    "position": ("position, absolute", True),
    "teacher_entropy": ("teacher entropy", False),
    "student_entropy": ("student entropy", False),
    "teacher_probability": ("teacher probability of the token", True),
    "rank": ("rank among the teacher's tokens", False),
    "student_probability": ("student probability of the token", True),
    "margin": ("teacher margin (top 1 − top 2)", True),
    "kl": ("KL(teacher ‖ student)", False),
}
SUBSETS = {
    "all branches": lambda t: t["rank"] >= 1,
    "the teacher's first choice only": lambda t: t["rank"] == 1,
    "tokens that the spine does not hold there": lambda t: ~t["is_spine_token"],
    "spines that end right": lambda t: t["spine_correct"],
    "spines that end wrong": lambda t: ~t["spine_correct"],
}


@dataclass(frozen=True)
class Subset:
    """The figures of one subset of the branches."""

    name: str
    branches: int
    problems: int
    viable: float  # share
    ties: float  # share that succeeds as often as the control
    # By predictor: AUROC for `absolute` and `relative` viability, and `graded` concordance.
    aurocs: dict[str, dict[str, Estimate]]


@dataclass(frozen=True)
class Group:
    """The branches in a bin of relative position, or of one rank."""

    label: str
    key: float  # the bin's middle, or the rank
    branches: int
    probability: float  # mean teacher probability of the forced token
    success: Estimate
    control: Estimate  # success of the forks' unforced continuations
    difference: Estimate
    divergence: float  # mean KL(teacher ‖ student), nats
    value: Estimate  # mean over the forks of the value of the teacher's choices, see `Decision`


@dataclass(frozen=True)
class Decision:
    """Whether the paper's Moderate schedule w helps, to first order in the training step.

    The value of the teacher's choices at a fork is Σ (p_T − p_S)·(viability − control) over the forced
    tokens: the success that the teacher's next token has more than the student's own, and p_T − p_S is
    training's pull. A token that was not forced counts as the control. OPSD gains Σ value, PW-OPSD Σ w·value.
    """

    early: Estimate  # mean value weighted by 1 − w, what the schedule takes away
    late: Estimate  # weighted by w, what it keeps
    difference: Estimate  # late − early


@dataclass(frozen=True)
class Analysis:
    """The figures of the report and the picture."""

    subsets: list[Subset]
    curve: list[Group]  # bins of the spine
    by_rank: list[Group]
    spine_success: float  # share of the spines that end right
    truncated: float  # share of the forced continuations that were cut
    decision: Decision
    by_divergence: Decision  # the same with every fork weighted by KL besides
    suggestion: ScheduleFit | None  # None where none was asked for, or no schedule gains anything


def branch_table(
    branches: Branches,
    problems: Sequence[BranchProblem],
    verdicts: Mapping[tuple[int, str], bool],
    tokenizer: PreTrainedTokenizerBase,
    config: BranchConfig,
) -> pd.DataFrame:
    """Return one row per branch; docs/branch_viability.md lists the columns. The control is a column."""

    def success(key: BranchKey) -> tuple[float, float]:
        """Return the share of continuations that recover the answer and the share that were cut."""
        samples = branches.continued[key].values()
        recovered = sum(verdicts.get((key[0], done.answer), False) for done in samples)
        return recovered / len(samples), sum(done.truncated for done in samples) / len(samples)

    rows = []
    for problem in problems:
        spine = branches.spines[problem.index]
        for fork in branches.forks[problem.index]:
            control, _ = success((problem.index, fork.offset, 0))
            for alternative in fork.alternatives:
                share, truncated = success((problem.index, fork.offset, alternative.rank))
                rows.append(
                    {
                        "problem": problem.index,
                        "position": fork.offset + 1,
                        # f = (i − ½)/L of the forced token i: the position that the schedule weighs.
                        "relative_position": (fork.offset + 0.5) / len(spine.tokens),
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


def analyse(table: pd.DataFrame, config: BranchConfig) -> Analysis:
    """Compute every figure of the report. All intervals use the same resamples of the problems."""
    table = table.assign(code=pd.factorize(table["problem"], sort=True)[0])
    weights = resample_weights(table["problem"].nunique(), resamples=config.resamples, seed=config.seed)
    forks = fork_values(table)
    columns = (forks["relative_position"], forks["value"], forks["code"], weights)
    suggestion = fit_schedule(*columns) if config.suggest_schedule else None
    curve = []
    for low, high in pairwise(np.linspace(0, 1, CURVE_BINS + 1)):
        inside = table["relative_position"].between(low, high, inclusive="left")
        curve.append(_group(f"{low:.1f} to {high:.1f}", float((low + high) / 2), table[inside], weights))
    return Analysis(
        subsets=[_subset(name, table[choose(table)], weights) for name, choose in SUBSETS.items()],
        curve=curve,
        by_rank=[_group(str(rank), rank, rows, weights) for rank, rows in table.groupby("rank")],
        spine_success=float(table.drop_duplicates("problem")["spine_correct"].mean()),
        truncated=float(table["truncated_share"].mean()),
        decision=decide(forks, weights),
        by_divergence=decide(forks, weights, forks["kl"]),
        suggestion=suggestion,
    )


def fork_values(table: pd.DataFrame) -> pd.DataFrame:
    """Return the first row of each fork with the `value` of the teacher's choices there (see `Decision`)."""
    pull = table["teacher_probability"] - table["student_probability"]
    table = table.assign(value=pull * table["relative_viability"])
    values = table.groupby(["problem", "position"])["value"].transform("sum")
    return table.assign(value=values).drop_duplicates(["problem", "position"])


def decide(forks: pd.DataFrame, weights: NDArray[np.float64], importance: ArrayLike = 1.0) -> Decision:
    """Compute the decision from the rows of `fork_values`, each weighted by its importance."""
    weight = schedule(forks["relative_position"], **MODERATE)
    taken, kept = importance * (1 - weight), importance * weight
    columns = (forks["value"], forks["code"], weights)
    return Decision(*(clustered_mean(*columns, *shares) for shares in ((taken,), (kept,), (kept, taken))))


def _subset(name: str, table: pd.DataFrame, weights: NDArray[np.float64]) -> Subset:
    relative = relative_label(table["viability"], table["control_viability"])
    outcomes = {"absolute": table["viable"], "relative": relative, "graded": table["relative_viability"]}
    aurocs = {}
    for column, (_, higher_is_viable) in PREDICTORS.items():
        auroc = partial(clustered_auroc, table[column] * (1 if higher_is_viable else -1))
        aurocs[column] = {name: auroc(of, table["code"], weights) for name, of in outcomes.items()}
    problems, ties = table["problem"].nunique(), float(pd.Series(relative).isna().mean())
    return Subset(name, len(table), problems, float(table["viable"].mean()), ties, aurocs)


def _group(label: str, key: float, rows: pd.DataFrame, weights: NDArray[np.float64]) -> Group:
    # Control and value belong to the fork: counted once, not once per alternative.
    forks = fork_values(rows)
    columns = {"success": (rows, "viability"), "difference": (rows, "relative_viability")}
    columns |= {"control": (forks, "control_viability"), "value": (forks, "value")}
    estimates = {name: clustered_mean(t[of], t["code"], weights) for name, (t, of) in columns.items()}
    means = {"probability": rows["teacher_probability"].mean(), "divergence": forks["kl"].mean()}
    return Group(label, key, len(rows), **means, **estimates)
