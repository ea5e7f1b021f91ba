"""The bar of an evaluation: running figures by hand, and an estimate that resumed samples do not flatter."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest

from opsd.evaluation.benchmarks import Problem
from opsd.evaluation.grading import ProblemGrade
from opsd.evaluation.scoreboard import Scoreboard

PROBLEMS = [Problem(0, "1+1?", "2"), Problem(1, "1+2?", "3")]


class EqualStrings:
    """Grades as the grader does, by equality of strings."""

    def grade(self, problems: Sequence[tuple[str, Sequence[str | None]]]) -> list[ProblemGrade]:
        verdicts = [[answer == gold for answer in answers] for gold, answers in problems]
        return [ProblemGrade(row, [list(range(len(row)))], 0, row[0]) for row in verdicts]


class Broken:
    def grade(self, problems: object) -> list[ProblemGrade]:
        raise RuntimeError("no grading today")


def sample(problem: int, number: int, answer: str, *, truncated: bool = False) -> dict:
    text = f"so \\boxed{{{answer}}}"
    return {"problem": problem, "sample": number, "text": text, "tokens": 3, "truncated": truncated}


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.005)


def test_running_figures_by_hand():
    with Scoreboard(PROBLEMS, val_n=3, grader=EqualStrings()) as board:
        for number, answer in enumerate(["2", "5", "2"]):
            board.add(sample(0, number, answer, truncated=number == 1))
        board.add(sample(1, 2, "3"))
        # One problem is complete, 2 of its 3 samples right; one of the 4 samples so far was cut.
        wait_for(lambda: "Avg@3 66.7 % on 1 problems, truncated 25.0 %" in str(board._bar))
        assert "| 4/6 [" in str(board._bar)
        assert board.missing() == [(1, 0), (1, 1)]
        board.add(sample(1, 0, "3"))
        board.add(sample(1, 1, "4"))
        records = board.finish()
    assert "Avg@3 66.7 % on 2 problems, truncated 16.7 %" in str(board._bar)
    # In the order of sampling, whatever the order of arrival.
    assert [g["predicted_answer"] for g in records[1]["generations"]] == ["3", "4", "3"]
    assert [r["num_correct"] for r in records] == [2, 2]


def test_a_sample_counts_once_and_a_resumed_one_is_no_speed():
    with Scoreboard(PROBLEMS, val_n=3, grader=EqualStrings()) as board:
        assert board.add(sample(0, 0, "2"), resumed=True)
        assert board.add(sample(0, 1, "2"), resumed=True)
        assert not board.add(sample(0, 1, "7"))
        assert board.add(sample(0, 2, "2"))
        # The estimate divides what is left by (n - initial) / seconds.
        assert (board._bar.initial, board._bar.n) == (2, 3)
        with pytest.raises(ValueError, match="3 samples are missing"):
            board.finish()


def test_an_error_of_the_grading_thread_is_raised_where_the_grades_are_asked_for():
    with Scoreboard(PROBLEMS[:1], val_n=1, grader=Broken(), show=False) as board:
        board.add(sample(0, 0, "2"))
        with pytest.raises(RuntimeError, match="no grading today"):
            board.finish()
