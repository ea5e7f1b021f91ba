"""Fit a position schedule to a measured viability curve, and say how far the data determine it.

The schedule of PW-OPSD is w(f) = w_min + (1 − w_min)·σ((f − τ)/s) at relative position f
(arXiv:2605.21606). Its scale is free (the learning rate absorbs it), so a·w(f) with a ceiling a is fitted:
the success of branches in bin b is about a · w(f_b) · C_b.

C_b = 1 for absolute viability, the success of the unforced control in the bin for relative viability. With
α = a·w_min and β = a·(1 − w_min), both at least 0, the model is linear in (α, β): (τ, s) are searched on a
grid, the rest is solved exactly, so there is no local minimum, and every resample is fitted in full.

So free a curve finds a rise in noise too. A permutation test decides whether there is one: the forks of each
problem exchange their positions at random.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from opsd.diagnostic.statistics import MIN_CLUSTERS, Estimate, interval

BINS = 20
TAUS = np.linspace(0.0, 1.0, 41)
WIDTHS = np.geomspace(0.02, 1.0, 25)
SHUFFLES = 500
SHOWN_AT = (0.1, 0.3, 0.5, 0.7, 0.9)
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
    ceiling: Estimate  # a, the success at w = 1
    weights: tuple[Estimate, ...]  # w(f) at `SHOWN_AT`, better determined than the parameters
    shuffled_share: float  # p value of the permutation test for a rise
    problems: int
    explained: float  # share of the bins' weighted variance that the curve explains, against a constant
    grid: Array  # [F] places
    curve: Array  # [F]
    band: tuple[Array, Array]  # 95 %, [F] each

    def undetermined(self) -> list[str]:
        """Return a phrase for everything that the data leave open."""
        if self.w_min.low is None:
            return [f"{self.problems} problems are too few for any interval"]
        found = []
        if self.shuffled_share > SIGNIFICANCE:
            found.append(
                f"whether the weight should rise at all: {self.shuffled_share:.0%} of random shuffles of the "
                "positions fit a rise as good"
            )
        wide = (
            ("w_min", self.w_min, self.w_min.high - self.w_min.low > WIDE_WEIGHT, ()),
            ("τ", self.tau, self.tau.high - self.tau.low > WIDE_TAU, (TAUS[0], TAUS[-1])),
            ("s", self.s, self.s.high / self.s.low > WIDE_WIDTH_RATIO, (WIDTHS[0], WIDTHS[-1])),
        )
        for name, fitted, too_wide, ends in wide:
            if too_wide:
                found.append(f"{name}: anything in [{fitted.low:.2f}, {fitted.high:.2f}] fits")
            elif fitted.value in ends:
                found.append(f"{name}: the best fit lies at the end of its range ({fitted.value:.2f})")
        return found


def schedule(f: ArrayLike, *, w_min: float, tau: float, s: float) -> Array:
    """Return w(f), elementwise; written so that a far tail neither overflows nor warns."""
    return w_min + (1 - w_min) * 0.5 * (1 + np.tanh((np.asarray(f, dtype=np.float64) - tau) / (2 * s)))


def fit_schedule(
    position: ArrayLike,
    success: ArrayLike,
    clusters: ArrayLike,
    weights: Array,
    *,
    control: ArrayLike = 1.0,
    importance: ArrayLike = 1.0,
) -> ScheduleFit | None:
    """Fit w_min, τ and s to success along the spine.

    Args:
        position: [n] relative positions in (0, 1).
        success: [n] share of a branch's continuations that recover the answer.
        clusters: [n] problem codes 0..G−1.
        weights: [R, G] of `opsd.diagnostic.statistics.resample_weights`.
        control: [n] share of the control's; 1 fits absolute viability.
        importance: [n] how much each branch counts, e.g. the teacher's probability of its token.

    Returns:
        None where no branch succeeded, or branches lie in fewer than four bins: four numbers are fitted.
    """
    # [4, n]: each branch's importance, f, success and control.
    columns = np.stack(np.broadcast_arrays(importance, position, success, control)).astype(np.float64)
    codes = np.asarray(clusters, dtype=np.int64)
    per_problem = _bin_sums(columns, codes, weights.shape[1])
    total = per_problem.sum(axis=1)
    if (total[0] > 0).sum() < 4 or total[2].sum() == 0 or total[3].sum() == 0:
        return None
    best = _solve(total[:, None])[0][0]
    problems = int((per_problem[0].sum(axis=1) > 0).sum())
    used = weights if problems >= MIN_CLUSTERS else weights[:0]
    samples = _solve(np.einsum("rg,kgb->krb", used, per_problem))[0]
    samples = samples[np.isfinite(samples).all(axis=1)]
    grid = np.linspace(0.0, 1.0, 101)
    curves = np.stack([_curve(f, samples.T) for f in grid], axis=1)
    band = np.quantile(curves, [0.025, 0.975], axis=0) if len(curves) >= 20 else np.full((2, 101), np.nan)
    gain, spread = _against_constant(total[:, None])
    names = ("ceiling", "w_min", "tau", "s")
    return ScheduleFit(
        **{name: Estimate(float(best[k]), *interval(samples[:, k])) for k, name in enumerate(names)},
        weights=tuple(Estimate(float(_curve(f, best)), *interval(_curve(f, samples.T))) for f in SHOWN_AT),
        shuffled_share=_shuffled_share(columns, codes, gain[0]),
        problems=problems,
        explained=float(gain[0] / spread[0]) if spread[0] > 1e-12 else 0.0,
        grid=grid,
        curve=_curve(grid, best),
        band=(band[0], band[1]),
    )


def _shuffled_share(columns: Array, codes: NDArray[np.int64], gain: float) -> float:
    """Return how often a fit to shuffled positions gains as much over a constant as `gain`."""
    forks, member = np.unique(np.stack([codes, columns[1]], axis=1), axis=0, return_inverse=True)
    drawn = np.random.default_rng(len(forks))
    shuffled = np.empty((4, SHUFFLES, BINS))
    for k in range(SHUFFLES):
        # Sorting by (problem, random number) permutes the forks inside each problem.
        order = np.lexsort((drawn.random(len(forks)), forks[:, 0]))
        moved = columns.copy()
        moved[1] = forks[order, 1][member.reshape(-1)]
        shuffled[:, k] = _bin_sums(moved, np.zeros_like(codes), 1)[:, 0]
    as_good = (_against_constant(shuffled)[0] >= gain - 1e-12).sum()
    return float((1 + as_good) / (1 + SHUFFLES))


def _curve(f: ArrayLike, fit: Array) -> Array:
    _, w_min, tau, s = fit
    return schedule(f, w_min=w_min, tau=tau, s=s)


def _bin_sums(columns: Array, codes: NDArray[np.int64], count: int) -> Array:
    """Return [4, G, BINS]: per problem and bin the importance, and f, success and control weighted by it."""
    weight, position = columns[:2]
    flat = codes * BINS + np.minimum((position * BINS).astype(int), BINS - 1)
    parts = (weight, *(weight * columns[1:]))
    summed = np.stack([np.bincount(flat, weights=part, minlength=count * BINS) for part in parts])
    return summed.reshape(4, count, BINS)


def _means(sums: Array) -> Array:
    """Return [4, ..., BINS] sums as [3, ..., BINS] means of f, success and control; 0 in an empty bin."""
    return np.divide(sums[1:], sums[0], out=np.zeros_like(sums[1:]), where=sums[0] > 0)


def _solve(sums: Array) -> tuple[Array, Array]:
    """Fit [4, R, BINS]: [R, 4] of (a, w_min, τ, s), NaN where nothing succeeds, and [R] residual sums."""
    size = sums[0]
    f, y, c = _means(sums)
    best = np.full(len(size), np.inf)
    found = np.full((len(size), 4), np.nan)
    for width in WIDTHS:
        for tau in TAUS:
            sigma = schedule(f, w_min=0.0, tau=tau, s=width) * c
            alpha, beta, error = _two_coefficients(size, y, c, sigma)
            # Strictly better, by more than rounding: equal fits keep the first, so a flat curve is stable.
            better = error < best - 1e-12
            scale = alpha + beta
            with np.errstate(invalid="ignore", divide="ignore"):
                row = np.stack(np.broadcast_arrays(scale, alpha / scale, tau, width), 1)
            found[better] = row[better]
            best = np.where(better, error, best)
    return found, best


def _two_coefficients(n, y, u, v):
    """Solve least squares of y on α·u + β·v with weights n and α, β ≥ 0, row by row: (α, β, residual sum)."""

    def dot(p, q):
        return (n * p * q).sum(axis=1)

    uu, vv, uv, uy, vy, yy = dot(u, u), dot(v, v), dot(u, v), dot(u, y), dot(v, y), dot(y, y)
    determinant = uu * vv - uv * uv
    with np.errstate(invalid="ignore", divide="ignore"):
        alpha = (uy * vv - vy * uv) / determinant
        beta = (vy * uu - uy * uv) / determinant
        only_u = np.maximum(np.where(uu > 0, uy / uu, 0.0), 0.0)
        only_v = np.maximum(np.where(vv > 0, vy / vv, 0.0), 0.0)
    inside = (determinant > 1e-12 * np.maximum(uu * vv, 1e-300)) & (alpha >= 0) & (beta >= 0)

    def error(a, b):
        return yy - 2 * a * uy - 2 * b * vy + a * a * uu + 2 * a * b * uv + b * b * vv

    take_u = error(only_u, 0.0) <= error(0.0, only_v)
    alpha = np.where(inside, alpha, np.where(take_u, only_u, 0.0))
    beta = np.where(inside, beta, np.where(take_u, 0.0, only_v))
    return alpha, beta, error(alpha, beta)


def _against_constant(sums: Array) -> tuple[Array, Array]:
    """Return [R] squared error that the fit saves against a constant weight, and [R] that error."""
    n = sums[0]
    _, y, c = _means(sums)
    constant = (n * c * y).sum(1) / np.maximum((n * c * c).sum(1), 1e-300)
    spread = (n * (y - constant[:, None] * c) ** 2).sum(1)
    return spread - _solve(sums)[1], spread
