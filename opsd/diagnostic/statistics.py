"""AUROC and means with bootstrap intervals that resample problems with all of their branches.

Branches of one problem share their spine and are not independent. The AUROC is a ratio of two counts of
pairs, formed once for every pair of problems; a resample is then a quadratic form in how often each problem
was drawn. Shapes: n branches, G problems (clusters), R resamples. Imports numpy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
# With fewer problems on either side of a comparison, the resamples show too little of how problems vary.
MIN_CLUSTERS = 8


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % percentile interval over resampled problems."""

    value: float | None  # None where it is not defined (no two branches differ in their outcome)
    low: float | None = None  # None where fewer than `MIN_CLUSTERS` problems are on one side
    high: float | None = None

    def text(self, *, unknown: str = "too few", digits: int = 2) -> str:
        """Return `0.83 [0.66, 0.95]`, `unknown` in place of a missing interval, or a dash without a value."""
        if self.value is None:
            return "–"
        known = [end for end in (self.low, self.high) if end is not None]
        ends = ", ".join(f"{end:.{digits}f}" for end in known) or unknown
        return f"{self.value:.{digits}f} [{ends}]"


def resample_weights(clusters: int, *, resamples: int, seed: int) -> NDArray[np.float64]:
    """Return [R, G]: how often each of G problems occurs among G drawn with replacement."""
    draws = np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples)
    return draws.astype(np.float64)


def pair_counts(
    scores: ArrayLike, outcomes: ArrayLike, codes: NDArray[np.int64], clusters: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Count concordant and comparable pairs between clusters, [G, G] each.

    Entry (c, d) runs over branches i of c and j of d whose outcome is higher in i: `comparable` counts them,
    `concordant` those whose score is higher in i too, equal scores half. With outcomes 0 and 1 the ratio of
    the sums is the AUROC; else the probability that the more viable of two branches scores higher.

    Raises:
        ValueError: a score or an outcome is NaN.
    """
    if missing := int(np.isnan(scores).sum() + np.isnan(outcomes).sum()):
        raise ValueError(f"{missing} of {len(codes)} scores or outcomes are NaN")
    scores, outcomes = np.asarray(scores), np.asarray(outcomes)
    concordant, comparable = np.zeros((2, clusters, clusters))
    for cluster in np.unique(codes):
        own = codes == cluster
        better = outcomes[own, None] > outcomes
        wins = (scores[own, None] > scores) + 0.5 * (scores[own, None] == scores)
        comparable[cluster] = np.bincount(codes, better.sum(0), clusters)
        concordant[cluster] = np.bincount(codes, (better * wins).sum(0), clusters)
    return concordant, comparable


def clustered_auroc(
    scores: ArrayLike, outcomes: ArrayLike, clusters: Sequence | NDArray, weights: NDArray[np.float64]
) -> Estimate:
    """Estimate the AUROC (for graded outcomes the concordance, see `pair_counts`).

    Args:
        scores: [n], a higher one speaks for a higher outcome; the direction is fixed without the data.
        outcomes: [n]; NaN leaves the branch out.
        clusters: [n] problem codes 0..G−1.
        weights: [R, G] of `resample_weights`; the same for every figure that is compared.
    """
    scores, outcomes = np.asarray(scores, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    kept = ~np.isnan(outcomes)
    codes = np.asarray(clusters, dtype=np.int64)[kept]
    concordant, comparable = pair_counts(scores[kept], outcomes[kept], codes, weights.shape[1])
    if comparable.sum() == 0:
        return Estimate(None)
    value = float(concordant.sum() / comparable.sum())
    if min((comparable.sum(1) > 0).sum(), (comparable.sum(0) > 0).sum()) < MIN_CLUSTERS:
        return Estimate(value)
    above = np.einsum("rg,rg->r", weights @ concordant, weights)
    below = np.einsum("rg,rg->r", weights @ comparable, weights)
    defined = below > 0
    return Estimate(value, *interval(above[defined] / below[defined]))


def clustered_mean(
    values: ArrayLike, clusters: Sequence | NDArray, weights: NDArray[np.float64], *shares: ArrayLike
) -> Estimate:
    """Estimate the mean over branches, weighted by a share [n] where one is given.

    With a second share, estimate how much larger the mean weighted by the first is. No interval where less
    than MIN_CLUSTERS problems carry the weight, counted as (Σ s)² / Σ s² over the problems' weights s. Other
    arguments as in `clustered_auroc`.
    """
    values, codes = np.asarray(values, dtype=np.float64), np.asarray(clusters, dtype=np.int64)
    # The sample itself, then its resamples.
    weights = np.vstack([np.ones(weights.shape[1]), weights])
    means = np.zeros(len(weights))
    for k, share in enumerate(shares or (np.ones_like(values),)):
        size, total = (np.bincount(codes, share * factor, weights.shape[1]) for factor in (1.0, values))
        if not size.sum() > 0:
            return Estimate(None)
        if size.sum() ** 2 / (size**2).sum() < MIN_CLUSTERS - 1e-9:
            weights, means = weights[:1], means[:1]
        with np.errstate(invalid="ignore"):
            means = means + (-1) ** k * (weights @ total) / (weights @ size)
    return Estimate(float(means[0]), *interval(means[1:][np.isfinite(means[1:])]))


def interval(samples: NDArray[np.float64]) -> tuple[float | None, float | None]:
    """Return the 95 % percentile interval; (None, None) for fewer than 20 samples."""
    if len(samples) < 20:
        return None, None
    low, high = np.quantile(samples, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def relative_label(viability: ArrayLike, control: ArrayLike) -> NDArray[np.float64]:
    """Return [n]: 1 where a branch succeeds more often than its control, 0 where less often, NaN for a tie.

    Near the end of a spine branch and control both always succeed; to count such ties as "not worse" would
    make the position a predictor by saturation alone.
    """
    difference = np.asarray(viability, dtype=np.float64) - np.asarray(control, dtype=np.float64)
    # Shares of one m are equal exactly when their counts are; half a count absorbs rounding in the division.
    return np.where(np.abs(difference) < 1e-9, np.nan, (difference > 0).astype(np.float64))
