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
        truncated, tokens: None where the file does not state them for every sample.
        answers: what each sample answers, None without a box.
        problems, gold: text and right answer of each problem.
    """

    correct: np.ndarray
    truncated: np.ndarray | None
    tokens: np.ndarray | None
    answers: list[list[str | None]]
    problems: list[str]
    gold: list[str]


def read_samples(records: Sequence[Mapping[str, Any]]) -> Samples:
    """Return the samples of the `results` of a file that `load_result` has checked."""

    def column(name: str) -> np.ndarray | None:
        rows = np.array([[sample.get(name) for sample in record["generations"]] for record in records])
        return rows if rows.dtype.kind in "biu" else None

    correct = np.array([[sample["correct"] for sample in record["generations"]] for record in records])
    answers = [[predicted_answer(sample) for sample in record["generations"]] for record in records]
    problems = [str(record.get("problem", "")) for record in records]
    gold = [ground_truth(record) for record in records]
    return Samples(correct, column("truncated"), column("tokens"), answers, problems, gold)


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:
    """Return the unbiased Pass@k [P] of [P, n] verdicts: 1 - C(n - c, k) / C(n, k), c of n being right.

    Source: Chen et al. 2021, arXiv:2107.03374, equation 1.
    """
    n = correct.shape[1]
    by_count = [1 - math.comb(n - count, k) / math.comb(n, k) for count in range(n + 1)]
    return np.array(by_count)[correct.sum(1)]


def majority_at_k(clusters: np.ndarray, correct: np.ndarray, k: int) -> np.ndarray:
    """Return the unbiased Maj@k [P]: the mean vote over the subsets of k of the n samples.

    The samples of a subset keep their order and vote as in `grading`: the largest cluster wins, the earliest
    on a tie, and its first member is graded. With k = n this is the Maj@n of the result. `clusters` is the
    [P, n] of `vote_clusters`.
    """
    n = clusters.shape[1]
    subsets = np.sort(np.random.default_rng(0).random((MAX_SUBSETS, n)).argsort(1)[:, :k], axis=1)
    if math.comb(n, k) <= MAX_SUBSETS:
        subsets = np.array(list(itertools.combinations(range(n), k)))
    votes = []
    for cluster, right in zip(clusters, correct, strict=True):
        drawn = cluster[subsets]
        # The first sample whose cluster is largest is the first member of the winner.
        winner = (drawn[:, :, None] == drawn[:, None, :]).sum(2).argmax(1)
        votes.append(right[subsets[np.arange(len(subsets)), winner]].mean())
    return np.array(votes)


def vote_clusters(samples: Samples, grader: Grader) -> np.ndarray:
    """Return the [P, n] number of each sample's cluster in the vote over all samples of its problem."""
    numbers = np.empty(samples.correct.shape, dtype=int)
    grades = grader.grade(list(zip(samples.gold, samples.answers, strict=True)))
    for row, grade in zip(numbers, grades, strict=True):
        for number, members in enumerate(grade.clusters):
            row[members] = number
    return numbers


@dataclass(frozen=True)
class Profile:
    """The figures of one cell by metric, and its accuracy by length.

    Attributes:
        figures: `pass@k` and `majority@k` (percent), `tokens` (mean length of a sample), `cut off` and
            `no box` (percent of the samples); without those that a file does not state.
        lengths: (shortest length in tokens, samples, percent right) for each doubling of the length.
    """

    figures: dict[str, float]
    lengths: list[tuple[int, int, float]]


def profile(groups: Sequence[Sequence[Samples]], grader: Grader) -> Profile:
    """Return the profile of a cell from the samples of its runs, grouped by training seed."""
    every = [samples for group in groups for samples in group]
    clusters = {id(samples): vote_clusters(samples, grader) for samples in every}

    def mean(of: Callable[[Samples], np.ndarray]) -> float:
        return float(np.mean([np.mean([of(samples).mean() for samples in group]) for group in groups]))

    n = every[0].correct.shape[1]
    counts = [*(k for k in KS if k < n), n]
    votes = {k: mean(lambda s, k=k: majority_at_k(clusters[id(s)], s.correct, k)) for k in counts}
    figures = {f"pass@{k}": 100 * mean(lambda s, k=k: pass_at_k(s.correct, k)) for k in counts}
    figures |= {f"majority@{k}": 100 * vote for k, vote in votes.items()}
    figures["no box"] = 100 * mean(lambda s: np.array([[text is None for text in row] for row in s.answers]))
    if all(samples.truncated is not None for samples in every):
        figures["cut off"] = 100 * mean(lambda s: np.asarray(s.truncated))
    lengths = []
    if all(samples.tokens is not None for samples in every):
        figures["tokens"] = mean(lambda s: np.asarray(s.tokens))
        bins = np.floor(np.log2(np.maximum([samples.tokens for samples in every], 1))).astype(int)
        right = np.array([samples.correct for samples in every])
        for number in np.unique(bins):
            here = right[bins == number]
            lengths.append((2 ** int(number), here.size, 100 * float(here.mean())))
    return Profile(figures, lengths)
