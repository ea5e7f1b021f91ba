"""How well a number predicts viability: AUROC, and its bootstrap interval with problems as the unit.

Branches of one problem share their spine, so they are not independent: an interval that resamples branches
is far too narrow. Here whole problems are drawn with replacement. The AUROC is a ratio of two counts of
pairs, so the counts are formed once for every pair of problems, and a resample is a quadratic form in how
often each problem was drawn; thousands of resamples cost one matrix product.

Shapes: n branches, G problems (clusters), R resamples. Imports numpy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
# With fewer problems on either side of a comparison, resampling them shows too little of how they vary: a
# single problem that holds every viable branch would give a narrow interval around whatever it says.
MIN_CLUSTERS = 8


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval.

    Attributes:
        value: None where it is not defined (no two branches differ in their outcome).
        low: lower end of the 95 % percentile interval over resampled problems; None where fewer than
            `MIN_CLUSTERS` problems are on one side of the comparison.
        high: its upper end.
        branches: how many branches it rests on.
        clusters: how many problems they come from.
        resamples: how many resamples defined the figure; the rest held a single outcome.
    """

    value: float | None
    low: float | None
    high: float | None
    branches: int
    clusters: int
    resamples: int

    def text(self, digits: int = 2) -> str:
        """`0.83 [0.66, 0.95]`, or a dash."""
        if self.value is None:
            return "–"
        if self.low is None or self.high is None:
            return f"{self.value:.{digits}f} [too few]"
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def midranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks 1..n; equal values share the mean of their ranks."""
    values = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse]


def auroc(scores: ArrayLike, labels: ArrayLike) -> float | None:
    """P(score of a positive > score of a negative), ties counting half: the Mann-Whitney rank statistic.

    Args:
        scores: [n], a higher one speaks for a positive.
        labels: [n] booleans.

    Returns:
        None where positives or negatives are missing.
    """
    scores, labels = _finite(scores), np.asarray(labels, dtype=bool)
    if scores.shape != labels.shape or scores.ndim != 1:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape} must be two lists of one length")
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return None
    rank_sum = midranks(scores)[labels].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def cluster_codes(clusters: Sequence | NDArray) -> tuple[NDArray[np.int64], int]:
    """Cluster labels as 0..G−1 in sorted order, and G."""
    names, codes = np.unique(np.asarray(clusters), return_inverse=True)
    return codes, len(names)


def resample_weights(clusters: int, *, resamples: int, seed: int) -> NDArray[np.float64]:
    """[R, G]: how often each of G problems occurs among G drawn with replacement."""
    draws = np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples)
    return draws.astype(np.float64)


def pair_counts(
    scores: ArrayLike, outcomes: ArrayLike, codes: NDArray[np.int64], clusters: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Concordant and comparable pairs between clusters, [G, G] each.

    Entry (c, d) runs over branches i of c and j of d whose outcome is higher in i: `comparable` counts them,
    `concordant` counts those whose score is higher in i too, and equal scores half. With outcomes 0 and 1 the
    ratio of the sums is the AUROC; with graded outcomes it is the probability that, of two branches, the more
    viable one has the higher score.
    """
    order = np.argsort(codes, kind="stable")
    scores, outcomes, codes = _finite(scores)[order], _finite(outcomes)[order], codes[order]
    concordant, comparable = np.zeros((clusters, clusters)), np.zeros((clusters, clusters))
    present, starts = np.unique(codes, return_index=True)
    ends = [*starts[1:], len(codes)]
    for cluster, start, end in zip(present, starts, ends, strict=True):
        span = slice(start, end)
        better = outcomes[span, None] > outcomes[None, :]
        wins = (scores[span, None] > scores[None, :]) + 0.5 * (scores[span, None] == scores[None, :])
        comparable[cluster, present] = np.add.reduceat(better.sum(0, dtype=np.float64), starts)
        concordant[cluster, present] = np.add.reduceat((better * wins).sum(0), starts)
    return concordant, comparable


def clustered_auroc(
    scores: ArrayLike, outcomes: ArrayLike, clusters: Sequence | NDArray, weights: NDArray[np.float64]
) -> Estimate:
    """AUROC (graded outcomes: concordance, see `pair_counts`) with its interval over resampled problems.

    Args:
        scores: [n], a higher one speaks for a higher outcome, an orientation fixed without the data.
        outcomes: [n]; NaN leaves the branch out.
        clusters: [n] problem codes 0..G−1.
        weights: [R, G] of `resample_weights`; the same for every figure that is compared.
    """
    scores, outcomes = np.asarray(scores, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    codes = np.asarray(clusters, dtype=np.int64)
    kept = ~np.isnan(outcomes)
    scores, outcomes, codes = scores[kept], outcomes[kept], codes[kept]
    counted = {"branches": len(scores), "clusters": len(np.unique(codes))}
    if not len(scores):
        return Estimate(None, None, None, **counted, resamples=0)
    concordant, comparable = pair_counts(scores, outcomes, codes, weights.shape[1])
    if comparable.sum() == 0:
        return Estimate(None, None, None, **counted, resamples=0)
    above = np.einsum("rg,rg->r", weights @ concordant, weights)
    below = np.einsum("rg,rg->r", weights @ comparable, weights)
    defined = below > 0
    low, high = interval(above[defined] / below[defined])
    sides = ((comparable.sum(1) > 0).sum(), (comparable.sum(0) > 0).sum())
    if min(sides) < MIN_CLUSTERS:
        low = high = None
    value = float(concordant.sum() / comparable.sum())
    return Estimate(value, low, high, **counted, resamples=int(defined.sum()))


def clustered_mean(values: ArrayLike, clusters: Sequence | NDArray, weights: NDArray[np.float64]) -> Estimate:
    """Mean over branches with its interval over resampled problems. Arguments as `clustered_auroc`."""
    values, codes = np.asarray(values, dtype=np.float64), np.asarray(clusters, dtype=np.int64)
    if not len(values):
        return Estimate(None, None, None, 0, 0, 0)
    sums = np.bincount(codes, weights=values, minlength=weights.shape[1])
    counts = np.bincount(codes, minlength=weights.shape[1])
    size = weights @ counts
    defined = size > 0
    low, high = interval((weights @ sums)[defined] / size[defined])
    return Estimate(float(values.mean()), low, high, len(values), int((counts > 0).sum()), int(defined.sum()))


def interval(samples: NDArray[np.float64]) -> tuple[float | None, float | None]:
    """The 95 % percentile interval; (None, None) of fewer than 20 samples, which have no 2.5 % tail."""
    if len(samples) < 20:
        return None, None
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def relative_label(viability: ArrayLike, control: ArrayLike) -> NDArray[np.float64]:
    """[n]: 1 where a branch succeeds more often than its control, 0 where less often, NaN where as often.

    A tie is left out rather than counted as either: near the end of a spine branch and control both always
    succeed, and "not worse than the control" would then be true by saturation alone. Without ties, a branch
    whose continuations are drawn like the control's gets 1 and 0 with equal probability at every position, so
    a predictor of nothing scores 0.5 whatever the success rate does along the spine.
    """
    difference = np.asarray(viability, dtype=np.float64) - np.asarray(control, dtype=np.float64)
    # Shares of one m are equal exactly when their counts are; half a count absorbs rounding in the division.
    return np.where(np.abs(difference) < 1e-9, np.nan, (difference > 0).astype(np.float64))


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(values, dtype=np.float64)
    if np.isnan(values).any():
        raise ValueError(f"{int(np.isnan(values).sum())} of {values.size} values are NaN")
    return values
