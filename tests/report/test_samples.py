"""Pass@k and Maj@k against every subset, lengths by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from opsd.evaluation.grading import Grader, grade_answers
from opsd.report import samples
from opsd.report.samples import Samples, accuracy_by_length, majority_at_k, pass_at_k, profile, vote_clusters

RANDOM = np.random.default_rng(3)
GOLD = "7"


def drawn(problems: int, n: int) -> Samples:
    """Samples that answer 7 (right), 8, 9 or nothing."""
    answers = RANDOM.choice(["7", "8", "9", ""], (problems, n), p=[0.35, 0.3, 0.1, 0.25])
    texts = [[answer or None for answer in row] for row in answers]
    return Samples(answers == GOLD, answers == "", np.full(answers.shape, 100), texts, [GOLD] * problems)


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_every_subset_has_its_say(k):
    """The vote of each subset is the protocol's own, with its order, its tie rule and its INVALID cluster."""
    found = drawn(40, 5)
    with Grader(workers=1) as grader:
        clusters = vote_clusters(found, grader)
    for row, (texts, right) in enumerate(zip(found.answers, found.correct, strict=True)):
        subsets = [list(chosen) for chosen in itertools.combinations(range(5), k)]
        votes = [
            grade_answers(GOLD, [texts[i] for i in chosen], lambda a, b: a == b).majority_correct
            for chosen in subsets
        ]
        assert majority_at_k(clusters, found.correct, k)[row] == pytest.approx(np.mean(votes))
        assert pass_at_k(found.correct, k)[row] == pytest.approx(np.mean([right[s].any() for s in subsets]))


def test_many_samples_are_drawn_at_random_and_all_of_them_are_the_vote(monkeypatch):
    found = drawn(30, 12)
    with Grader(workers=1) as grader:
        clusters = vote_clusters(found, grader)
        stored = [grade.majority_correct for grade in grader.grade([(GOLD, row) for row in found.answers])]
    assert majority_at_k(clusters, found.correct, 12).tolist() == stored
    exact = majority_at_k(clusters, found.correct, 4)
    monkeypatch.setattr(samples, "MAX_SUBSETS", 400)
    assert majority_at_k(clusters, found.correct, 4) == pytest.approx(exact, abs=0.1)


def test_a_profile_by_hand():
    one = Samples(
        correct=np.array([[True, False], [True, True]]),
        truncated=np.array([[False, True], [False, False]]),
        tokens=np.array([[3, 8], [2, 15]]),
        answers=[["7", None], ["7", "7.0"]],
        gold=["7", "7"],
    )
    with Grader(workers=1) as grader:
        found = profile([[one]], grader)
        unstated = profile([[Samples(one.correct, None, None, one.answers, one.gold)]], grader)
    assert found.pass_at == {1: 75, 2: 100}
    # The first sample is the earliest cluster of the tie between 7 and no answer.
    assert found.majority_at == {1: 75, 2: 100}
    assert (found.tokens, found.cut, found.boxless) == (7, 25, 25)
    assert found.lengths == [(2, 2, 100), (8, 2, 50)]
    assert (unstated.tokens, unstated.cut, unstated.lengths) == (None, None, [])
    assert accuracy_by_length(np.array([[0, 1]]), np.array([[True, False]])) == [(1, 2, 0.5)]
