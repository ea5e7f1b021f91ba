"""Fit a position schedule to the value of the teacher's choices, and say how far the data determine it.

The schedule of PW-OPSD is w(f) = w_min + (1 − w_min)·σ((f − τ)/s) at relative position f
(arXiv:2605.21606). Its scale is free (the learning rate absorbs it), so a·w(f) with a scale a ≥ 0 is fitted
to the value v_b of the teacher's choices in bin b by least squares: of all schedules of one mean square, this
one has the largest Σ w_b·v_b, which is what training gains to first order. The best of a grid is taken, so
there is no local minimum, and every resample is fitted in full.

So free a curve finds a rise in noise too. A permutation test decides whether there is one: the forks of each
problem exchange their positions at random.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from opsd.diagnostic.statistics import MIN_CLUSTERS, Estimate, interval

MODERATE = {"w_min": 0.25, "tau": 0.30, "s": 0.10}  # the paper's schedule, and training's default
BINS = 20
# The constant weight comes first: of equal fits the first is taken.
FLOORS = np.linspace(1.0, 0.0, 41)
TAUS = np.linspace(0.0, 1.0, 41)
WIDTHS = np.geomspace(0.02, 1.0, 25)
# Resamples that are fitted at once, in 70 MB.
CHUNK = 200
SHUFFLES = 500
# The positions at which a fitted curve is given, and the indices of those that the report shows.
PLACES = np.linspace(0.0, 1.0, 101)
SHOWN = (10, 30, 50, 70, 90)
# An interval as wide as these says little more than the parameter's range.
WIDE_WEIGHT, WIDE_TAU, WIDE_WIDTH_RATIO = 0.5, 0.4, 10.0
# The permutation test's level.
SIGNIFICANCE = 0.05

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ScheduleFit:
    """A fitted schedule."""

    w_min: Estimate
    tau: Estimate
    s: Estimate
    curve: list[Estimate]  # w(f) at `PLACES`, better determined than the parameters
    shuffled_share: float  # p value of the permutation test for a rise
    problems: int

    def undetermined(self) -> list[str]:
        """Return a phrase for everything that the data leave open."""
        if self.w_min.low is None:
            return [f"{self.problems} problems are too few for any interval"]
        share, w_min, tau, s = self.shuffled_share, self.w_min, self.tau, self.s
        shuffles = f"{share:.0%} of random shuffles of the positions fit a rise as good"
        found = [f"whether the weight should rise at all: {shuffles}"] if share > SIGNIFICANCE else []
        for name, fitted, too_wide, ends in (
            ("w_min", w_min, w_min.high - w_min.low > WIDE_WEIGHT, ()),
            ("τ", tau, tau.high - tau.low > WIDE_TAU, TAUS[[0, -1]]),
            ("s", s, s.high / s.low > WIDE_WIDTH_RATIO, WIDTHS[[0, -1]]),
        ):
            if too_wide:
                found.append(f"{name}: anything in [{fitted.low:.2f}, {fitted.high:.2f}] fits")
            elif fitted.value in ends:
                found.append(f"{name}: the best fit lies at the end of its range ({fitted.value:.2f})")
        return found


def schedule(f: ArrayLike, *, w_min: float, tau: float, s: float) -> Array:
    """Return w(f), elementwise; written so that a far tail neither overflows nor warns."""
    return w_min + (1 - w_min) * 0.5 * (1 + np.tanh((np.asarray(f, dtype=np.float64) - tau) / (2 * s)))


def fit_schedule(
    position: ArrayLike, value: ArrayLike, clusters: ArrayLike, weights: Array
) -> ScheduleFit | None:
    """Fit w_min, τ and s to a value along the spine.

    Args:
        position: [n] relative positions in (0, 1).
        value: [n] what a unit of weight gains at each fork.
        clusters: [n] problem codes 0..G−1.
        weights: [R, G] of `opsd.diagnostic.statistics.resample_weights`.

    Returns:
        None where no schedule gains anything, or forks lie in fewer than four bins: four numbers are fitted.
    """
    position, value = np.asarray(position, dtype=np.float64), np.asarray(value, dtype=np.float64)
    codes = np.asarray(clusters, dtype=np.int64)
    per_problem = _bin_sums(position, value, codes, weights.shape[1])
    total = per_problem.sum(axis=1)
    (best,), gain = _solve(total[:, None])
    if (total[0] > 0).sum() < 4 or not np.isfinite(best).all():
        return None
    problems = int((per_problem[0].sum(axis=1) > 0).sum())
    used = weights if problems >= MIN_CLUSTERS else weights[:0]
    samples = _solve(np.einsum("rg,kgb->krb", used, per_problem))[0]
    samples = samples[np.isfinite(samples).all(axis=1)].T
    return ScheduleFit(
        *(Estimate(float(value), *interval(some)) for value, some in zip(best, samples, strict=True)),
        curve=[Estimate(float(_curve(f, best)), *interval(_curve(f, samples))) for f in PLACES],
        shuffled_share=_shuffled_share(position, value, codes, gain[0]),
        problems=problems,
    )


def _shuffled_share(position: Array, value: Array, codes: NDArray[np.int64], gain: float) -> float:
    """Return how often a fit to shuffled positions gains as much over a constant as `gain`."""
    drawn, by_problem = np.random.default_rng(len(codes)), np.argsort(codes, kind="stable")
    shuffled, moved = np.empty((2, SHUFFLES, BINS)), np.empty_like(position)
    for k in range(SHUFFLES):
        # Sorting by (problem, random number) permutes the forks inside each problem.
        moved[by_problem] = position[np.lexsort((drawn.random(len(codes)), codes))]
        shuffled[:, k] = _bin_sums(moved, value, np.zeros_like(codes), 1)[:, 0]
    as_good = (_solve(shuffled)[1] >= gain - 1e-12).sum()
    return float((1 + as_good) / (1 + SHUFFLES))


def _curve(f: ArrayLike, fit: Array) -> Array:
    w_min, tau, s = fit
    return schedule(f, w_min=w_min, tau=tau, s=s)


def _bin_sums(position: Array, value: Array, codes: NDArray[np.int64], count: int) -> Array:
    """Return [2, G, BINS]: per problem and bin, how many forks and the sum of their values."""
    flat = codes * BINS + np.minimum((position * BINS).astype(int), BINS - 1)
    return np.stack([np.bincount(flat, p, count * BINS).reshape(count, BINS) for p in (None, value)])


def _solve(sums: Array) -> tuple[Array, Array]:
    """Fit [2, R, BINS]: weighted least squares of the value on a·w(f), f being the bins' middles.

    Returns:
        [R, 3] of (w_min, τ, s), NaN where no a > 0 fits better than nothing; [R] the squared error that the
        fit saves against a constant weight.
    """
    grid = np.stack(np.meshgrid(FLOORS, TAUS, WIDTHS, indexing="ij"), axis=-1).reshape(-1, 3)
    curves = _curve((np.arange(BINS)[:, None] + 0.5) / BINS, grid.T)
    fits, gain = np.full((sums.shape[1], 3), np.nan), np.zeros(sums.shape[1])
    for start in range(0, len(fits), CHUNK):
        rows = slice(start, start + CHUNK)
        size, total = sums[:, rows]
        # The squared error that the best a ≥ 0 saves against a = 0, [R, K].
        saved = np.maximum(total @ curves, 0.0) ** 2 / np.maximum(size @ curves**2, 1e-300)
        best = (saved > saved.max(axis=1, keepdims=True) - 1e-12).argmax(axis=1)
        most = np.take_along_axis(saved, best[:, None], axis=1)
        fits[rows] = np.where(most > 0, grid[best], np.nan)
        gain[rows] = most[:, 0] - saved[:, 0]
    return fits, gain
