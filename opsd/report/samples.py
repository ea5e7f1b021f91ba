"""What the single samples of a result show beyond Avg, Pass and Maj at n: fewer samples, lengths, no box."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsd.evaluation.grading import Grader
from opsd.evaluation.results import ground_truth, predicted_answer

KS = (1, 2, 4, 8, 12)
# Maj@k takes every subset of k of the n samples where there are no more than this, else so many random ones.
MAX_SUBSETS = 1000


@dataclass(frozen=True)
class Samples:
    """The samples of one result file, arrays of [P problems, n samples] in the order of the file.

    Attributes:
        tokens: length of each sample; None where the file does not state it. So is `truncated`.
        answers: what each sample answers, None without a box.
        gold: the right answer of each problem.
    """

    correct: np.ndarray
    truncated: np.ndarray | None
    tokens: np.ndarray | None
    answers: list[list[str | None]]
    gold: list[str]

    @property
    def counts(self) -> list[int]:
        """The numbers of samples k of the curves: those of KS below n, and n."""
        n = self.correct.shape[1]
        return [k for k in KS if k < n] + [n]


def read_samples(result: Mapping[str, Any]) -> Samples:
    """Return the samples of a result that `load_result` has checked."""
    generations = [record["generations"] for record in result["results"]]

    def column(name: str) -> np.ndarray | None:
        rows = [[generation.get(name) for generation in row] for row in generations]
        known = all(isinstance(value, int) for row in rows for value in row)
        return np.array(rows) if known else None

    answers = [[predicted_answer(generation) for generation in row] for row in generations]
    gold = [ground_truth(record) for record in result["results"]]
    correct = np.array([[generation["correct"] for generation in row] for row in generations])
    return Samples(correct, column("truncated"), column("tokens"), answers, gold)


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """Return the unbiased Pass@k [P] of [P, n] verdicts: 1 - C(n - c, k) / C(n, k), c of n being right.

    Source: Chen et al. 2021, arXiv:2107.03374, equation 1.
    """
    n = correct.shape[1]
    by_count = np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])
    return by_count[correct.sum(1)]


def majority_at_k(clusters: np.ndarray, correct: np.ndarray, k: int) -> np.ndarray:
    """Return the unbiased Maj@k [P]: the mean vote over the subsets of k of the n samples.

    The samples of a subset keep their order and vote as in `grading`: the largest cluster wins, the earliest
    on a tie, and its first member is graded. With k = n this is the Maj@n of the result.

    Args:
        clusters: [P, n] number of the cluster of each sample, from `vote_clusters`.
    """
    n = clusters.shape[1]
    if math.comb(n, k) <= MAX_SUBSETS:
        subsets = np.array(list(itertools.combinations(range(n), k)))
    else:
        order = np.random.default_rng(0).random((MAX_SUBSETS, n)).argsort(1)
        subsets = np.sort(order[:, :k], axis=1)
    votes = np.empty(len(clusters))
    for problem, (cluster, right) in enumerate(zip(clusters, correct, strict=True)):
        drawn = cluster[subsets]
        sizes = (drawn[:, :, None] == drawn[:, None, :]).sum(2)
        # The first sample whose cluster is largest is the first member of the winner.
        first = subsets[np.arange(len(subsets)), sizes.argmax(1)]
        votes[problem] = right[first].mean()
    return votes


def vote_clusters(samples: Samples, grader: Grader) -> np.ndarray:
    """Return the [P, n] number of each sample's cluster in the vote over all samples of its problem."""
    numbers = np.empty(samples.correct.shape, dtype=int)
    for row, grade in zip(
        numbers, grader.grade(list(zip(samples.gold, samples.answers, strict=True))), strict=True
    ):
        for number, members in enumerate(grade.clusters):
            row[members] = number
    return numbers


def accuracy_by_length(tokens: np.ndarray, correct: np.ndarray) -> list[tuple[int, int, float]]:
    """Return (shortest length, samples, share right) for each doubling of the length in tokens."""
    bins = np.floor(np.log2(np.maximum(tokens, 1))).astype(int)
    found = [(number, bins == number) for number in np.unique(bins)]
    return [(2 ** int(number), int(here.sum()), float(correct[here].mean())) for number, here in found]


@dataclass(frozen=True)
class Profile:
    """The figures of one cell, in percent but for `tokens`; None where a file does not state what they need.

    Attributes:
        pass_at, majority_at: by k, mean over the training seeds of the mean over their runs.
        tokens: mean length of a sample.
        cut, boxless: share of samples that hit the limit of new tokens, and without a boxed answer.
        lengths: (shortest length, samples, accuracy) of `accuracy_by_length` over all runs.
    """

    pass_at: dict[int, float]
    majority_at: dict[int, float]
    tokens: float | None
    cut: float | None
    boxless: float
    lengths: list[tuple[int, int, float]]


def profile(groups: Sequence[Sequence[Samples]], grader: Grader) -> Profile:
    """Return the profile of a cell from the samples of its runs, grouped by training seed."""
    every = [samples for group in groups for samples in group]
    clusters = {id(samples): vote_clusters(samples, grader) for samples in every}

    def percent(figure: Callable[[Samples], np.ndarray]) -> float:
        return 100 * float(
            np.mean([np.mean([figure(samples).mean() for samples in group]) for group in groups])
        )

    def stated(name: str) -> float | None:
        known = all(getattr(samples, name) is not None for samples in every)
        return percent(lambda samples: getattr(samples, name)) if known else None

    counts = every[0].counts
    tokens = stated("tokens")
    lengths = []
    if tokens is not None:
        together = [
            np.concatenate([getattr(samples, name).ravel() for samples in every])
            for name in ("tokens", "correct")
        ]
        lengths = [(low, n, 100 * share) for low, n, share in accuracy_by_length(*together)]
    return Profile(
        pass_at={k: percent(lambda s, k=k: pass_at_k(s.correct, k)) for k in counts},
        majority_at={k: percent(lambda s, k=k: majority_at_k(clusters[id(s)], s.correct, k)) for k in counts},
        tokens=None if tokens is None else tokens / 100,
        cut=stated("truncated"),
        boxless=percent(lambda s: np.array([[answer is None for answer in row] for row in s.answers])),
        lengths=lengths,
    )
