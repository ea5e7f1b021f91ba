"""--suggest_schedule: a known schedule comes back, and too little data is called that."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest

from opsd.diagnostic.schedule import (
    BINS,
    FLOORS,
    PLACES,
    SHOWN,
    TAUS,
    WIDTHS,
    ScheduleFit,
    _bin_sums,
    _solve,
    fit_schedule,
    schedule,
)
from opsd.diagnostic.statistics import MIN_CLUSTERS, Estimate, resample_weights
from opsd.objectives import Hyperparameters, position_weights

MODERATE = {"w_min": 0.25, "tau": 0.30, "s": 0.10}


@pytest.fixture(autouse=True)
def fewer_shuffles(monkeypatch):
    """The smallest p value is 1/101 then, which decides against a level of 5 % as well as 1/501."""
    monkeypatch.setattr("opsd.diagnostic.schedule.SHUFFLES", 100)


def world(seed: int, *, problems: int, curve, forks: int = 12):
    """(position, value, codes) of forks spread over the spine, as `fork_offsets` spreads them."""
    draw = np.random.default_rng(seed)
    codes = np.repeat(np.arange(problems), forks)
    position = (np.tile(np.arange(forks), problems) + draw.random(problems * forks)) / forks
    return position, draw.binomial(8, np.abs(curve(position))) / 8 * np.sign(curve(position)), codes


def fitted(columns, *, resamples: int = 60) -> ScheduleFit | None:
    weights = resample_weights(int(columns[2].max()) + 1, resamples=resamples, seed=0)
    return fit_schedule(*columns, weights)


def moderate(f):
    return schedule(f, **MODERATE)


@functools.cache
def moderate_fit() -> ScheduleFit:
    return fitted(world(0, problems=200, curve=moderate))


def test_the_schedule_is_the_one_that_training_uses():
    import torch

    lengths = torch.tensor([7, 40])
    ours = position_weights(lengths, Hyperparameters())
    f = np.concatenate([(np.arange(n) + 0.5) / n for n in (7, 40)])
    assert np.allclose(ours.numpy(), moderate(f), atol=1e-6)
    # Far tails neither overflow nor warn.
    with np.errstate(all="raise"):
        assert schedule(np.array([0.0, 1.0]), w_min=0.2, tau=0.5, s=1e-3).tolist() == [0.2, 1.0]


def test_a_known_schedule_comes_back():
    """Success follows Moderate: every parameter is found, inside its interval, and nothing is left open."""
    fit = moderate_fit()
    assert fit.undetermined() == []
    for name, true in MODERATE.items():
        parameter: Estimate = getattr(fit, name)
        assert parameter.low - 0.02 <= true <= parameter.high + 0.02, name
    assert fit.tau.value == pytest.approx(0.30, abs=0.05)
    assert fit.w_min.value == pytest.approx(0.25, abs=0.08)
    for k in SHOWN:
        assert fit.curve[k].value == pytest.approx(float(moderate(PLACES[k])), abs=0.05)
    assert fit.problems == 200
    assert np.mean([point.low <= point.value + 1e-9 for point in fit.curve]) > 0.95


def test_a_negative_value_gets_no_weight():
    fit = fitted(world(2, problems=100, curve=lambda f: np.where(f < 0.3, -0.3, 0.5)))
    assert fit.w_min.value == 0.0
    assert fit.tau.value == pytest.approx(0.30, abs=0.05)
    assert not any("rise" in phrase for phrase in fit.undetermined())


def test_a_flat_curve_is_undetermined():
    fit = fitted(world(4, problems=40, curve=lambda f: np.full_like(f, 0.6)))
    assert any("whether the weight should rise" in phrase for phrase in fit.undetermined())


def test_fewer_problems_than_an_interval_needs():
    fit = fitted(world(6, problems=MIN_CLUSTERS - 1, curve=moderate))
    assert fit.undetermined() == [f"{MIN_CLUSTERS - 1} problems are too few for any interval"]
    assert fit.tau.text(unknown="–").endswith("[–]")


def test_nothing_to_fit():
    position, value, codes = world(7, problems=10, curve=moderate)
    for columns in ((position, 0 * value, codes), (position, -value, codes), (position * 0.1, value, codes)):
        assert fitted(columns) is None


def test_the_fit_is_the_best_of_the_grid():
    """Against least squares with a scale of at least 0 for every schedule, one at a time."""
    position, value, codes = world(9, problems=12, curve=moderate)
    sums = _bin_sums(position, value, codes, 12).sum(axis=1)
    (found,), (gain,) = _solve(sums[:, None])
    size, y, f = sums[0], sums[1] / sums[0], (np.arange(BINS) + 0.5) / BINS

    def residual(w_min, tau, s):
        w = schedule(f, w_min=w_min, tau=tau, s=s)
        return (size * (y - max(size @ (w * y) / (size @ w**2), 0) * w) ** 2).sum()

    best = min(residual(*each) for each in itertools.product(FLOORS[::4], TAUS[::2], WIDTHS[::2]))
    assert residual(*found) == pytest.approx(residual(1.0, 0.0, 1.0) - gain, abs=1e-9)
    assert residual(*found) <= best + 1e-9


def test_parameters_at_the_edge_of_their_range_are_called_so():
    fit = moderate_fit()
    at_edge = ScheduleFit(**{**vars(fit), "s": Estimate(float(WIDTHS[0]), WIDTHS[0], WIDTHS[0])})
    assert any(phrase.startswith("s: the best fit lies at the end") for phrase in at_edge.undetermined())
    wide = ScheduleFit(**{**vars(fit), "w_min": Estimate(0.4, 0.0, 0.9), "tau": Estimate(0.5, 0.1, 0.9)})
    assert [phrase.split(":")[0] for phrase in wide.undetermined()] == ["w_min", "τ"]
