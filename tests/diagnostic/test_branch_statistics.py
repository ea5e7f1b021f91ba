"""AUROC and its clustered bootstrap: against scikit-learn, plain loops, and worlds whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from opsd.diagnostic.statistics import (
    MIN_CLUSTERS,
    clustered_auroc,
    interval,
    pair_counts,
    relative_label,
    resample_weights,
)


def random_data(seed: int, *, branches: int = 120, problems: int = 15, levels: int | None = None):
    """Scores that lean towards the label, and problems that shift both. `levels`: few values, many ties."""
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, problems, branches)
    shift = draw.normal(size=problems)[codes]
    labels = draw.random(branches) < 1 / (1 + np.exp(-shift))
    scores = draw.normal(size=branches) + 0.7 * labels + 0.5 * shift
    return np.round(scores * levels) / levels if levels else scores, labels, codes


@pytest.mark.parametrize("levels", [None, 3, 1])
@pytest.mark.parametrize("seed", range(6))
def test_auroc_is_scikit_learns(seed, levels):
    scores, labels, codes = random_data(seed, levels=levels)
    expected = roc_auc_score(labels, scores)
    weights = resample_weights(15, resamples=20, seed=0)
    assert clustered_auroc(scores, labels, codes, weights).value == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("labels", [[True, True], [False, False]])
def test_one_outcome_alone_defines_no_auroc(labels):
    estimate = clustered_auroc([0.1, 0.2], labels, [0, 1], resample_weights(2, resamples=20, seed=0))
    assert (estimate.value, estimate.low, estimate.text()) == (None, None, "–")


def test_nan_scores_are_refused_rather_than_ranked():
    with pytest.raises(ValueError, match="1 of 3 scores or outcomes are NaN"):
        pair_counts([0.1, float("nan"), 0.3], [1, 0, 1], np.arange(3), 3)


def test_pair_counts_of_graded_outcomes():
    draw = np.random.default_rng(3)
    scores, outcomes = draw.integers(0, 4, 40) / 2, draw.integers(-2, 3, 40) / 4
    codes = draw.integers(0, 4, 40)
    better = outcomes[:, None] > outcomes
    wins = np.heaviside(scores[:, None] - scores, 0.5)
    # Problems 4 and 5 have no branch: their rows and columns stay 0.
    member = np.eye(6)[codes]
    concordant, comparable = pair_counts(scores, outcomes, codes, 6)
    assert np.array_equal(concordant, member.T @ (better * wins) @ member)
    assert np.array_equal(comparable, member.T @ better @ member)


def test_nan_outcomes_are_left_out():
    scores, labels, codes = random_data(1)
    outcomes = labels.astype(float)
    outcomes[::3] = np.nan
    kept = ~np.isnan(outcomes)
    weights = resample_weights(15, resamples=100, seed=0)
    estimate = clustered_auroc(scores, outcomes, codes, weights)
    assert estimate == clustered_auroc(scores[kept], labels[kept], codes[kept], weights)


def test_the_bootstrap_is_that_of_a_loop_over_resampled_problems():
    """The quadratic form gives what gathering the drawn problems' branches and ranking them anew gives."""
    scores, labels, codes = random_data(5, branches=80, problems=10, levels=2)
    weights = resample_weights(10, resamples=200, seed=7)
    by_hand = []
    for row in weights:
        members = np.concatenate([np.flatnonzero(codes == c) for c in range(10) for _ in range(int(row[c]))])
        if labels[members].all() or not labels[members].any():
            continue
        by_hand.append(roc_auc_score(labels[members], scores[members]))
    estimate = clustered_auroc(scores, labels, codes, weights)
    low, high = np.quantile(by_hand, [0.025, 0.975])
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-12)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """150 worlds of true AUROC 0.5, score and label each the problem's: 95 % of the intervals hold it."""
    weights = resample_weights(30, resamples=200, seed=0)
    covered = 0
    for seed in range(150):
        draw = np.random.default_rng(1000 + seed)
        codes = np.repeat(np.arange(30), 8)
        # Label and score vary mostly between problems, independently of each other.
        labels = draw.random(240) < np.where(draw.random(30) < 0.5, 0.9, 0.1)[codes]
        scores = draw.normal(size=30)[codes] + 0.2 * draw.normal(size=240)
        estimate = clustered_auroc(scores, labels, codes, weights)
        covered += estimate.low <= 0.5 <= estimate.high
    assert 0.88 <= covered / 150 <= 1.0


def test_too_few_problems_give_no_interval():
    """All viable branches in fewer problems than MIN_CLUSTERS: a value, no interval, and the text says so."""
    codes = np.repeat(np.arange(20), 5)
    weights = resample_weights(20, resamples=300, seed=0)
    scores = np.random.default_rng(0).random(100)
    few = clustered_auroc(scores, codes < MIN_CLUSTERS - 1, codes, weights)
    enough = clustered_auroc(scores, codes < MIN_CLUSTERS, codes, weights)
    assert few.value is not None
    assert few.low is few.high is None
    assert few.text().endswith("[too few]")
    assert enough.low < enough.value < enough.high
    assert enough.text() == f"{enough.value:.2f} [{enough.low:.2f}, {enough.high:.2f}]"


def test_an_interval_needs_twenty_samples():
    assert interval(np.arange(19.0)) == (None, None)
    assert interval(np.linspace(0, 1, 1001)) == pytest.approx((0.025, 0.975))


def test_ties_with_the_control_are_left_out():
    label = relative_label([1.0, 0.5, 0.25, 1 / 3], [1.0, 0.25, 0.5, 1 - 2 / 3])
    assert np.isnan(label[[0, 3]]).all()
    assert label[1:3].tolist() == [1.0, 0.0]
