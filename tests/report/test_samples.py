"""Pass@k and Maj@k against every subset, lengths by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from opsd.evaluation.grading import Grader, grade_answers
from opsd.report import samples
from opsd.report.samples import Samples, majority_at_k, pass_at_k, profile, vote_clusters

RANDOM = np.random.default_rng(3)
GOLD = "7"


def drawn(problems: int, n: int) -> Samples:
    """Samples that answer 7 (right), 8, 9 or nothing."""
    answers = RANDOM.choice(["7", "8", "9", ""], (problems, n), p=[0.35, 0.3, 0.1, 0.25])
    texts = [[answer or None for answer in row] for row in answers]
    return Samples(answers == GOLD, None, None, texts, [""] * problems, [GOLD] * problems)


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
        problems=["a", "b"],
        gold=["7", "7"],
    )
    none = Samples(~one.correct | True, None, None, one.answers, one.problems, one.gold)
    with Grader(workers=1) as grader:
        found = profile([[one]], grader)
        unstated = profile([[one, one], [none]], grader)
    # The first sample is the earliest cluster of the tie between 7 and no answer.
    curves = {"pass@1": 75, "pass@2": 100, "majority@1": 75, "majority@2": 100}
    assert found.figures == curves | {"no box": 25, "cut off": 25, "tokens": 7}
    assert found.lengths == [(2, 2, 100), (8, 2, 50)]
    # A mean over training seeds, whatever the number of their runs; lengths are not known of all.
    assert unstated.figures == {name: (value + 100) / 2 for name, value in curves.items()} | {"no box": 25}
    assert unstated.lengths == []
