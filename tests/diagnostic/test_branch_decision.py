"""The value of the teacher's choices predicts whether the schedule helps: worlds of known answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from opsd.diagnostic.analysis import Decision, analyse, decide, fork_values
from opsd.diagnostic.config import BranchConfig
from opsd.diagnostic.report import prediction
from opsd.diagnostic.schedule import fit_schedule
from opsd.diagnostic.statistics import clustered_mean, resample_weights

ROOT = Path(__file__).resolve().parents[2]
OWN = 0.1  # how often the student itself takes the token that misleads
GOOD, BAD = 0.6, 0.1  # success behind each token


def world(seed: int, *, misled: float, problems: int = 60, noise: bool = False) -> pd.DataFrame:
    """Two tokens a fork. The teacher follows a reference that misleads early, with probability `misled`.

    The student cannot see which forks mislead: it takes the bad token with probability OWN at each. Under
    `noise` the teacher differs from the student by chance, and both tokens are good.
    """
    draw, forks = np.random.default_rng(seed), 12
    problem, fork = np.divmod(np.arange(problems * forks), forks)
    f = (fork + draw.random(len(fork))) / forks
    bad = np.where((f < 0.3) & (draw.random(len(f)) < misled), 0.98, 0.02)
    bad = OWN + draw.uniform(-0.09, 0.09, len(f)) if noise else bad
    behind = GOOD if noise else BAD
    control = draw.binomial(8, (1 - OWN) * GOOD + OWN * behind, len(f)) / 8
    rows = pd.DataFrame({"problem": problem, "code": problem, "position": fork, "relative_position": f})
    rows["kl"] = bad * np.log(bad / OWN) + (1 - bad) * np.log((1 - bad) / (1 - OWN))
    tokens = []
    for teacher, student, success in ((1 - bad, 1 - OWN, GOOD), (bad, OWN, behind)):
        relative = draw.binomial(8, success, len(f)) / 8 - control
        columns = {"teacher_probability": teacher, "student_probability": student}
        tokens.append(rows.assign(**columns, relative_viability=relative))
    return pd.concat(tokens)


def decided(table: pd.DataFrame, *importance) -> Decision:
    weights = resample_weights(table["code"].nunique(), resamples=400, seed=0)
    return decide(fork_values(table), weights, *importance)


@pytest.mark.parametrize(
    ("misled", "side"), [(0.0, "worse than"), (0.3, "better than"), (1.0, "better than")]
)
def test_less_early_weight_helps_where_early_choices_mislead(misled, side):
    """The sign is that of how much more often the teacher misleads than the student misleads itself."""
    table = world(0, misled=misled)
    decision, forks = decided(table), fork_values(table)
    assert prediction(decision) == f"PW-OPSD (Moderate) is predicted {side} OPSD"
    truth = (GOOD - BAD) * (OWN - 0.02 - 0.96 * misled)
    early = forks["relative_position"] < 0.3
    assert forks["value"][early].mean() == pytest.approx(truth, abs=0.03)
    assert forks["value"][~early].mean() == pytest.approx((GOOD - BAD) * (OWN - 0.02), abs=0.01)
    assert (decision.difference.low > 0) == (misled > 0)


def test_at_the_students_own_rate_only_the_gradient_is_neutral():
    """A teacher that misleads as often as the student changes nothing on average; KL says that it harms."""
    table = world(1, misled=(OWN - 0.02) / 0.96, problems=400)
    forks = fork_values(table)
    assert forks["value"][forks["relative_position"] < 0.3].mean() == pytest.approx(0.0, abs=0.01)
    assert decided(table, forks["kl"]).early.high < -0.1
    assert "better" not in prediction(decided(table))


def test_the_null_is_covered():
    """Choices that make no difference: the interval holds 0 as often as it says."""
    early = [decided(world(seed, misled=0, noise=True, problems=20)).early for seed in range(60)]
    assert 50 <= sum(one.low <= 0 <= one.high for one in early) <= 60


def test_the_suggestion_follows_from_the_value():
    weights = resample_weights(60, resamples=100, seed=0)
    fits = []
    for misled in (1.0, 0.0):
        forks = fork_values(world(2, misled=misled))
        fits.append(fit_schedule(forks["relative_position"], forks["value"], forks["code"], weights))
    assert fits[0].w_min.high < 0.2
    assert fits[0].tau.value == pytest.approx(0.35, abs=0.1)
    assert any("whether the weight should rise" in phrase for phrase in fits[1].undetermined())


def test_the_recorded_run_of_the_small_world():
    """The figures that docs/branch_viability.md states."""
    table = pd.read_csv(ROOT / "docs" / "branch_viability_small" / "branches.csv")
    analysis = analyse(table, BranchConfig(model_name_or_path="", dataset="", output_dir=""))
    assert prediction(analysis.decision) == "PW-OPSD (Moderate) is predicted worse than OPSD"
    assert analysis.decision.early.text(digits=3) == "0.003 [0.001, 0.006]"
    assert analysis.subsets[0].aurocs["relative_position"]["absolute"].text() == "0.47 [0.41, 0.53]"


def test_weighted_means_are_those_of_a_loop():
    draw = np.random.default_rng(0)
    values, first, second = draw.random((3, 60)) + 0.5
    codes = np.arange(60) % 12
    weights = resample_weights(12, resamples=200, seed=1)
    by_hand = []
    for row in weights:
        members = np.concatenate([np.repeat(np.flatnonzero(codes == c), int(row[c])) for c in range(12)])
        means = [np.average(values[members], weights=share[members]) for share in (first, second)]
        by_hand.append(means[0] - means[1])
    found = clustered_mean(values, codes, weights, first, second)
    expected = np.average(values, weights=first) - np.average(values, weights=second)
    assert found.value == pytest.approx(expected)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(by_hand, [0.025, 0.975])))
    # One problem that carries nearly all of the weight leaves no interval.
    heavy = clustered_mean(values, codes, weights, np.where(codes == 3, 100.0, 0.01))
    assert (heavy.low, heavy.high) == (None, None)
    assert clustered_mean([], [], weights).text() == "–"
    plain = clustered_mean(values, codes, weights)
    assert plain == clustered_mean(values, codes, weights, np.full(60, 2.0))
    assert plain.value == pytest.approx(values.mean())
