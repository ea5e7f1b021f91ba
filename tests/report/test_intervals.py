"""Intervals of paired differences: against scipy, by hand, and in simulated worlds of known effect."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from bench import paper_verdict
from bench.bench_intervals import EASY, HARD, World, measure, wrong
from opsd.report.intervals import components, detectable, resolving_factors, t_quantile

RANDOM = np.random.default_rng(5)


def shares(*shape: int, chance: float = 0.6, samples: int = 12) -> np.ndarray:
    return RANDOM.binomial(samples, chance, shape) / samples


def test_the_quantiles_are_students():
    df = np.array([0.4, 1, 1.3, 2, 3.7, 9, 29, 116.5, 499, 1e5])
    assert t_quantile(df) == pytest.approx(stats.t.ppf(0.975, np.maximum(df, 1)), rel=2e-4)


def test_one_training_seed_is_the_paired_t_interval():
    first, second = shares(1, 30), shares(1, 30, chance=0.5)
    found = components([first], [second], (12, 12), same_seeds=False)
    interval = stats.ttest_rel(first[0], second[0]).confidence_interval(0.95)
    assert found.difference - found.half_width == pytest.approx(interval.low, rel=1e-3)
    assert found.difference + found.half_width == pytest.approx(interval.high, rel=1e-3)


def test_the_components_by_hand():
    """Two training seeds of the first method, two problems; every figure in twelfths or in halves."""
    first, second = np.array([[0.5, 1.0], [0.5, 0.5]]), np.array([[0.5, 0.5]])
    found = components([first], [second], (3, 3), same_seeds=False)
    # Gaps of the problems: 0 and 0.25, so the variance is 0.03125, halved for the mean of two problems.
    assert found.difference == 0.125
    assert found.problems == pytest.approx(0.03125 / 2)
    # Means of the seeds: 0.75 and 0.5 with variance 0.03125; half of it for the mean of two.
    assert found.seeds.tolist() == pytest.approx([0.03125 / 2, 0])
    # Interaction residuals are all ±0.125: mean square 4 · 0.015625 / 1, over 2 seeds · 2 problems.
    assert found.overlap.tolist() == pytest.approx([0.0625 / 4, 0])
    assert found.training == 0
    # x(1 − x)/(3 − 1): 0.125 of a half, 0 of a whole; first: (3 · 0.125)/(2 · 2)²; second: (2 · 0.125)/2².
    assert found.samples == pytest.approx(min(0.375 / 16 + 0.25 / 4, found.problems))


@pytest.mark.parametrize("same_seeds", [False, True])
def test_the_variance_of_the_crossed_layout_is_estimated_without_bias(same_seeds):
    """A Gaussian world with known components; two benchmarks, whose training seeds are the same."""
    worlds, problem, seed, both = 4000, 0.2, 0.2, 0.3
    random = np.random.default_rng(1)
    shared = random.normal(0, 1.0, (worlds, 3, 1)) * same_seeds

    def method() -> list[np.ndarray]:
        shift = shared + random.normal(0, seed, (worlds, 3, 1))
        return [
            shift + random.normal(0, problem, (worlds, 1, size)) + random.normal(0, both, (worlds, 3, size))
            for size in (10, 40)
        ]

    found = components(method(), method(), (12, 12), same_seeds=same_seeds)
    over_problems = sum(2 * (problem**2 + both**2 / 3) / size for size in (10, 40)) / 4
    true = over_problems + 2 * seed**2 / 3
    assert found.variance.mean() == pytest.approx(true, rel=0.05)
    assert found.difference.var() == pytest.approx(true, rel=0.1)


@pytest.mark.parametrize(
    "world",
    [
        World("30", ((30, HARD),), 1, 0.5),
        World("500", ((500, HARD),), 3, 1.0),
        World("30", ((30, HARD),), 3, 1.0, shared=True),
        World("mean of 4", ((500, EASY), (30, HARD), (30, HARD), (30, HARD)), 2, 0.5),
    ],
    ids=lambda world: f"{world.name}-{world.seeds}-{world.shared}",
)
def test_coverage_false_verdicts_and_power_in_simulated_worlds(world):
    figures = measure(world, 1000)
    assert wrong(figures, 1000) == [], figures


def test_single_training_seeds_say_nothing_of_other_training_runs():
    figures = measure(World("500", ((500, HARD),), 1, 1.0), 500)
    assert figures.coverage > 92
    assert figures.of_methods < 75


def test_what_would_resolve_a_difference():
    # All variance is of samples: every problem has the same chance of success.
    found = components([shares(1, 4000)], [shares(1, 4000, chance=0.58)], (12, 12), same_seeds=False)
    more_samples, more_problems = resolving_factors(found, detectable(found))
    wanted = (detectable(found) / found.difference) ** 2
    assert more_samples == pytest.approx(wanted, rel=0.15)
    assert more_problems == pytest.approx(wanted)
    # All variance is between problems: no number of samples is enough.
    first = np.repeat([[0.0, 1.0, 1.0]], 10, axis=1)
    found = components([first], [np.repeat([[0.0, 0.0, 1.0]], 10, axis=1) * 0.9], (12, 12), same_seeds=False)
    assert found.samples < found.problems
    assert detectable(found) == pytest.approx(
        math.sqrt(found.variance) * (t_quantile(found.df) + 0.8416), rel=0.05
    )
    assert (
        resolving_factors(found._replace(samples=np.float64(0), difference=np.float64(0.01)), 0.1)[0] is None
    )


def test_equal_results_are_not_resolved():
    found = components([np.ones((1, 30))], [np.ones((1, 30))], (12, 12), same_seeds=False)
    assert (found.difference, found.half_width, detectable(found)) == (0, 0, 0)
    assert resolving_factors(found, detectable(found)) == (None, None)


def test_the_papers_own_numbers_by_hand():
    """Two methods, two benchmarks, deviations 3 and 4: pooled variances 9 and 16."""
    rows = [
        {"model": "m", "method": method, "title": method, "cells": [[50, 3], [50, 4]], "mean": mean}
        for method, mean in (("opsd", 50.0), ("near", 51.0), ("far", 40.0))
    ]
    near, far = paper_verdict.verdicts({"rows": rows})
    # Of a difference of means of 3: 2 · 25 / 3, over 2 benchmarks; 25² / (9²/6 + 16²/6) degrees of freedom.
    error = math.sqrt(50 / 3) / 2
    half = error * stats.t.ppf(0.975, 625 / (337 / 6))
    assert near[2:5] == ["+1.00", f"[{1 - half:+.2f}, {1 + half:+.2f}]", "not resolved"]
    assert near[5:] == [f"{half + 0.8416 * error:.2f}", str(math.ceil(3 * (half + 0.8416 * error) ** 2))]
    assert far[4:] == ["worse", near[5], "—"]
