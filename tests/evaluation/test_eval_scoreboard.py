"""The bar of an evaluation: running figures by hand, and an estimate that resumed samples do not flatter."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from opsd.evaluation.benchmarks import Problem
from opsd.evaluation.grading import ProblemGrade
from opsd.evaluation.scoreboard import Scoreboard

PROBLEMS = [Problem(0, "1+1?", "2"), Problem(1, "1+2?", "3")]


class EqualStrings:
    """Grades as the grader does, by equality of strings; fails on the answer `x`."""

    workers = 2

    def grade(self, problems: Sequence[tuple[str, Sequence[str | None]]]) -> list[ProblemGrade]:
        if any("x" in answers for _, answers in problems):
            raise RuntimeError("no grading today")
        verdicts = [[answer == gold for answer in answers] for gold, answers in problems]
        return [ProblemGrade(row, [list(range(len(row)))], 0, row[0]) for row in verdicts]


def sample(problem: int, number: int, answer: str, *, truncated: bool = False) -> dict:
    text = f"so \\boxed{{{answer}}}"
    return {"problem": problem, "sample": number, "text": text, "tokens": 3, "truncated": truncated}


def test_running_figures_by_hand():
    with Scoreboard(PROBLEMS, val_n=3, grader=EqualStrings()) as board:
        for number, answer in enumerate(["2", "5", "2"]):
            board.add(sample(0, number, answer, truncated=number == 1))
        # One problem is complete, 2 of its 3 samples right; one of the 3 samples so far was cut.
        while "Avg@3 66.7 % on 1 problems, truncated 33.3 %" not in str(board._bar):
            time.sleep(0.005)
        board.add(sample(1, 2, "3"))
        assert "| 4/6 [" in str(board._bar)
        assert board.missing() == [(1, 0), (1, 1)]
        with pytest.raises(ValueError, match="2 samples are missing"):
            board.finish()
        board.add(sample(1, 0, "3"))
        board.add(sample(1, 1, "4"))
        records = board.finish()
    assert "Avg@3 66.7 % on 2 problems, truncated 16.7 %" in str(board._bar)
    # In the order of sampling, whatever the order of arrival.
    assert [g["predicted_answer"] for g in records[1]["generations"]] == ["3", "4", "3"]
    assert [r["num_correct"] for r in records] == [2, 2]


def test_a_resumed_sample_counts_once_and_is_no_speed():
    resumed = [sample(0, number, "2") for number in (0, 1, 1)] + [sample(1, n, "3") for n in range(3)]
    with Scoreboard(PROBLEMS, val_n=3, grader=EqualStrings(), resumed=resumed) as board:
        board.add(sample(0, 2, "2"))
        # The estimate divides what is left by (n - initial) / seconds.
        assert (board.resumed, board._bar.initial, board._bar.n) == (5, 5, 6)
        assert [record["num_correct"] for record in board.finish()] == [3, 3]


def test_an_error_of_the_grading_is_raised_where_the_grades_are_asked_for():
    with Scoreboard(PROBLEMS[:1], val_n=1, grader=EqualStrings(), show=False) as board:
        board.add(sample(0, 0, "x"))
        with pytest.raises(RuntimeError, match="no grading today"):
            board.finish()
