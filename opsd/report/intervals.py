"""95 % intervals of a paired difference of two methods, their power, and what more data would give.

Problems are crossed with methods and training seeds. Seeds are crossed with methods too where both have the
same PAIRED_SEEDS or more (equal seeds share the order of their data), otherwise nested in them; samples are
nested in all. The variance is a sum of components (analysis of variance of this layout), the quantile
Student's with Satterthwaite's degrees of freedom (Satterthwaite 1946, Biometrics Bulletin 2:110). Unpaired
methods each have a variance over seeds of their own, as in Welch 1947, Biometrika 34:28; Hillis 2007,
Statistics in Medicine 26:596 treats readers crossed with cases as seeds with problems here.
`bench/bench_intervals.py` measures coverage and power.

Arrays may have leading dimensions `...`, so that many simulated worlds are one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

LEVEL, POWER = 0.95, 0.8
# Two pairs leave one degree of freedom, with which Satterthwaite's intervals cover less than 90 %.
PAIRED_SEEDS = 3
# Simulated analyses behind a power, whose standard error is then below 0.4 points.
POWER_DRAWS = 20_000


@lru_cache
def _quantile_table() -> tuple[np.ndarray, np.ndarray]:
    """Return a grid of 1/df from 0 to 1 and the two-sided LEVEL quantile of Student's t at each."""
    inverse = np.linspace(0, 1, 401)
    quantiles = [NormalDist().inv_cdf(0.5 + LEVEL / 2)]
    # With x = sqrt(df) tan(angle) the density of t is proportional to cos(angle)^(df - 1).
    angle = np.linspace(0, np.pi / 2, 40_001)
    for df in 1 / inverse[1:]:
        density = np.cos(angle) ** (df - 1)
        mass = np.cumsum(density) - (density + density[0]) / 2
        quantiles.append(np.sqrt(df) * np.tan(np.interp(LEVEL * mass[-1], mass, angle)))
    return inverse, np.array(quantiles)


def t_quantile(df: np.ndarray) -> np.ndarray:
    """Return the two-sided LEVEL quantile of Student's t; fewer than 1 degree of freedom count as 1."""
    return np.interp(1 / np.maximum(df, 1), *_quantile_table())


class Components(NamedTuple):
    """A difference and the estimated parts of its variance, in (squared) shares.

    Attributes:
        difference: [...] mean of the benchmarks' differences, first minus second method.
        problems: [...] variance over problems, which holds samples and seeds x problems too.
        problems_df: [...] its degrees of freedom.
        samples: [...] the part of it that more samples would remove; NaN with one sample a problem.
        seeds: [arms, ...] variance over training seeds of the mean of each arm, which is a method or, with
            paired seeds, the difference of both; 0 for a single seed.
        overlap: [arms, ...] what `problems` and `seeds` both hold.
        seed_counts: training seeds of each arm.
    """

    difference: np.ndarray
    problems: np.ndarray
    problems_df: np.ndarray
    samples: np.ndarray
    seeds: np.ndarray
    overlap: np.ndarray
    seed_counts: tuple[int, ...]

    @property
    def training(self) -> np.ndarray:
        """What training seeds add to the variance."""
        return np.maximum(self.seeds.sum(0) - self.overlap.sum(0), 0)

    @property
    def variance(self) -> np.ndarray:
        return self.problems + self.training

    @property
    def df(self) -> np.ndarray:
        """Satterthwaite's degrees of freedom of `variance`."""
        seeds = sum(part**2 / max(n - 1, 1) for part, n in zip(self.seeds, self.seed_counts, strict=True))
        spread = self.problems**2 / self.problems_df + np.where(self.training > 0, seeds, 0)
        return self.variance**2 / np.where(spread > 0, spread, np.inf)

    @property
    def half_width(self) -> np.ndarray:
        return t_quantile(self.df) * np.sqrt(self.variance)


def components(
    first: Sequence[np.ndarray],
    second: Sequence[np.ndarray],
    sample_counts: tuple[float, float],
    *,
    same_seeds: bool,
) -> Components:
    """Estimate difference and variances.

    Args:
        first, second: of each method, the share of right samples [..., training seeds, P] for each benchmark:
            its P >= 2 problems in the same order in both, a method's seeds in the same order in all.
        sample_counts: samples a problem and training seed, of each method.
        same_seeds: whether both methods have the same training seeds, in the same order.
    """
    gaps = [a.mean(-2) - b.mean(-2) for a, b in zip(first, second, strict=True)]
    weight = 1 / len(gaps)
    each = np.array([weight**2 * gap.var(-1, ddof=1) / gap.shape[-1] for gap in gaps])
    spread = sum(part**2 / (gap.shape[-1] - 1) for part, gap in zip(each, gaps, strict=True))
    problems, samples = each.sum(0), np.zeros(each.shape[1:])
    for arrays, count in zip((first, second), sample_counts, strict=True):
        for array in arrays:
            with np.errstate(divide="ignore", invalid="ignore"):
                drawn = (array * (1 - array)).mean((-2, -1)) / np.float64(count - 1)
            samples = samples + weight**2 * drawn / array.shape[-2] / array.shape[-1]
    arms = [first, second]
    if same_seeds and first[0].shape[-2] >= PAIRED_SEEDS:
        arms = [[a - b for a, b in zip(first, second, strict=True)]]
    seeds, overlap = np.zeros((2, len(arms), *problems.shape))
    for arm, arrays in enumerate(arms):
        if (trained := arrays[0].shape[-2]) > 1:
            seeds[arm] = np.mean([array.mean(-1) for array in arrays], axis=0).var(-1, ddof=1) / trained
            for array in arrays:
                rest = array - array.mean(-1, keepdims=True)
                rest = rest - rest.mean(-2, keepdims=True)
                cells = trained * (trained - 1) * array.shape[-1] * (array.shape[-1] - 1)
                overlap[arm] += weight**2 * (rest**2).sum((-2, -1)) / cells
    return Components(
        difference=np.mean([gap.mean(-1) for gap in gaps], axis=0),
        problems=problems,
        problems_df=np.divide(problems**2, spread, out=np.ones_like(problems), where=spread > 0),
        samples=np.minimum(samples, problems),
        seeds=seeds,
        overlap=overlap,
        seed_counts=tuple(arrays[0].shape[-2] for arrays in arms),
    )


def simulated_analyses(found: Components) -> tuple[np.ndarray, np.ndarray]:
    """Draw POWER_DRAWS analyses of new data with one estimate's components and no true difference.

    Returns:
        The drawn differences and the half widths of their intervals.
    """
    random = np.random.default_rng(0)
    above = np.maximum(np.array(found.seed_counts) - 1, 1)[:, None]

    def drawn(value: np.ndarray, df: np.ndarray) -> np.ndarray:
        size = (*np.shape(value), POWER_DRAWS)
        return value[..., None] * random.chisquare(df, size) / df

    new = found._replace(
        problems=drawn(found.problems, found.problems_df),
        # The variance over seeds is at least what samples and interactions give the seeds' means.
        seeds=drawn(np.maximum(found.seeds, found.overlap), above),
        overlap=drawn(found.overlap, above * found.problems_df),
    )
    return random.normal(0, np.sqrt(found.variance), POWER_DRAWS), new.half_width


def detectable(found: Components) -> float:
    """Return the true difference (share) that the same design would resolve with probability POWER."""
    noise, half_width = simulated_analyses(found)
    return float(np.quantile(half_width - noise, POWER))


def resolving_factors(found: Components, reach: float) -> tuple[float | None, float | None]:
    """Return by how much samples a problem, and problems, must grow for a `detectable` like the difference.

    Args:
        reach: the `detectable` of `found`.

    Returns:
        None where no number is enough, or one sample a problem leaves it unknown.
    """

    def factor(removable: np.ndarray) -> float | None:
        wanted = found.variance * (found.difference / reach) ** 2 if reach else 0
        room = wanted - (found.variance - removable)
        return float(removable / room) if room > 0 else None

    return factor(found.samples), factor(found.problems)
