"""95 % intervals of a paired difference of two methods, their power, and what more data would give.

Problems are crossed with methods and training seeds, training seeds are nested in methods, samples in both.
The variance is the sum of its components (analysis of variance of the crossed layout); the quantile is
Student's with Satterthwaite's degrees of freedom (Satterthwaite 1946, Biometrics Bulletin 2:110; each method
keeps a variance over training seeds of its own, as in Welch 1947, Biometrika 34:28; for readers crossed with
cases see Hillis 2007, Statistics in Medicine 26:596). `bench/bench_intervals.py` measures the coverage.

Every function takes arrays with any leading dimensions `...`, so that many simulated worlds are one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

LEVEL, POWER = 0.95, 0.8
# Draws of the simulated analyses behind the power: its standard error is then below 0.4 points.
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
        mass = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
        quantiles.append(np.sqrt(df) * np.tan(np.interp(LEVEL * mass[-1], mass, angle)))
    return inverse, np.array(quantiles)


def t_quantile(df: np.ndarray) -> np.ndarray:
    """Return the two-sided LEVEL quantile of Student's t; fewer than 1 degree of freedom count as 1."""
    return np.interp(1 / np.maximum(df, 1), *_quantile_table())


class Components(NamedTuple):
    """Estimated parts of the variance of one difference; each [...], in squared shares.

    Attributes:
        difference: mean of the benchmarks' differences, first minus second method, as a share.
        problems: variance over problems of the paired differences; holds samples and interactions too.
        problems_df: its degrees of freedom.
        seeds: for each method, variance of its mean over training seeds; 0 for a single one.
        overlap: for each method, what `problems` and `seeds` both hold (seeds x problems, samples).
        samples: the part of `problems` that more samples would remove; NaN with one sample a problem.
        seed_counts: training seeds of each method.
    """

    difference: np.ndarray
    problems: np.ndarray
    problems_df: np.ndarray
    seeds: np.ndarray
    overlap: np.ndarray
    samples: np.ndarray
    seed_counts: tuple[int, int]

    @property
    def training(self) -> np.ndarray:
        """The part of the variance that training seeds add."""
        return np.maximum(self.seeds.sum(0) - self.overlap.sum(0), 0)

    @property
    def variance(self) -> np.ndarray:
        """The variance of the difference."""
        return self.problems + self.training

    @property
    def df(self) -> np.ndarray:
        """Satterthwaite's degrees of freedom of `variance`."""
        above = [np.maximum(count - 1, 1) for count in self.seed_counts]
        terms = sum(seed**2 / df for seed, df in zip(self.seeds, above, strict=True))
        spread = self.problems**2 / self.problems_df + np.where(self.training > 0, terms, 0)
        return self.variance**2 / np.where(spread > 0, spread, np.inf)

    @property
    def half_width(self) -> np.ndarray:
        """Half the width of the LEVEL interval."""
        return t_quantile(self.df) * np.sqrt(self.variance)


def components(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], samples: tuple[float, float]
) -> Components:
    """Estimate difference and variances from the share of correct samples of each problem.

    Args:
        first, second: of each method, a [..., training seeds, P] array for each benchmark; the problems (at
            least 2) of a benchmark are in the same order in both, the seeds of a method in all benchmarks.
        samples: samples a problem and training seed, of each method.
    """
    gaps = [a.mean(-2) - b.mean(-2) for a, b in zip(first, second, strict=True)]
    weight = 1 / len(gaps)
    each = np.array([weight**2 * gap.var(-1, ddof=1) / gap.shape[-1] for gap in gaps])
    spread = sum(part**2 / (gap.shape[-1] - 1) for part, gap in zip(each, gaps, strict=True))
    problems = each.sum(0)
    drawn, seeds, overlap = np.zeros_like(problems), [], []
    for arrays, count in zip((first, second), samples, strict=True):
        trained = arrays[0].shape[-2]
        seeds.append(np.zeros_like(problems))
        overlap.append(np.zeros_like(problems))
        if trained > 1:
            seeds[-1] = np.mean([array.mean(-1) for array in arrays], axis=0).var(-1, ddof=1) / trained
        for array in arrays:
            cells = weight**2 / trained / array.shape[-1]
            with np.errstate(divide="ignore", invalid="ignore"):
                drawn = drawn + cells * (array * (1 - array)).mean((-2, -1)) / (np.float64(count) - 1)
            if trained > 1:
                centred = array - array.mean(-1, keepdims=True)
                overlap[-1] += cells * _mean_square(centred - centred.mean(-2, keepdims=True))
    df = np.divide(problems**2, spread, out=np.ones_like(problems), where=spread > 0)
    gap = np.mean([gap.mean(-1) for gap in gaps], axis=0)
    drawn = np.minimum(drawn, problems)
    counts = (first[0].shape[-2], second[0].shape[-2])
    return Components(gap, problems, df, np.array(seeds), np.array(overlap), drawn, counts)


def _mean_square(residuals: np.ndarray) -> np.ndarray:
    """Return the mean square of the [..., T, P] interaction residuals."""
    rows, columns = residuals.shape[-2:]
    return (residuals**2).sum((-2, -1)) / ((rows - 1) * (columns - 1))


def simulated_analyses(found: Components) -> tuple[np.ndarray, np.ndarray]:
    """Draw POWER_DRAWS analyses of new data with one estimate's components and no true difference.

    Returns:
        The drawn differences and the half widths of their intervals.
    """
    random = np.random.default_rng(0)

    def drawn(value: np.ndarray, df: float) -> np.ndarray:
        return value * random.chisquare(df, POWER_DRAWS) / df

    counts = found.seed_counts
    # The variance over seeds is at least what samples and interactions give the seeds' means.
    seeds = [
        drawn(np.maximum(seed, both), max(count - 1, 1))
        for seed, both, count in zip(found.seeds, found.overlap, counts, strict=True)
    ]
    overlap = [
        drawn(both, found.problems_df * max(count - 1, 1))
        for both, count in zip(found.overlap, counts, strict=True)
    ]
    noise = random.normal(0, np.sqrt(found.variance), POWER_DRAWS)
    problems = drawn(found.problems, float(found.problems_df))
    new = found._replace(problems=problems, seeds=np.array(seeds), overlap=np.array(overlap))
    return noise, new.half_width


def detectable(found: Components) -> float:
    """Return the true difference (share) that the same design would resolve with probability POWER."""
    noise, half_width = simulated_analyses(found)
    return float(np.quantile(half_width - noise, POWER))


def resolving_factors(found: Components) -> tuple[float | None, float | None]:
    """Return by how much samples a problem, and problems, must grow to resolve the observed difference.

    Resolve means with probability POWER, if the true difference is the observed one; None where no number is
    enough, or one sample a problem leaves it unknown.
    """
    reach = detectable(found)
    if not found.difference or not reach:
        return None, None
    wanted = found.variance * (found.difference / reach) ** 2

    def factor(removable: np.ndarray) -> float | None:
        room = wanted - (found.variance - removable)
        return float(removable / room) if room > 0 else None

    return factor(found.samples), factor(found.problems)
