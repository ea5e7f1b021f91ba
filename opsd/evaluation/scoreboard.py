"""Collect finished samples in any order, grade each problem in the background, show the progress."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from opsd.evaluation.benchmarks import Problem
from opsd.evaluation.grading import Grader, extract_boxed
from opsd.evaluation.results import problem_record

# Seconds between two updates of the bar on a terminal, and between two lines in a log file.
TERMINAL_INTERVAL_S, LOG_INTERVAL_S = 0.5, 30.0


class Scoreboard:
    """The samples of every problem; a problem is graded while others are sampled, once it is complete.

    A context manager. A sample is `{"problem": index in problems, "sample": 0..val_n-1, "text", "truncated",
    "tokens", …}`.

    Args:
        val_n: samples a problem.
        resumed: samples of an earlier process; the estimate of the bar ignores them.
        show: whether to draw the bar on stderr.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        *,
        val_n: int,
        grader: Grader,
        resumed: Sequence[Mapping[str, Any]] = (),
        show: bool = True,
    ) -> None:
        self._problems, self._val_n, self._grader = problems, val_n, grader
        self._samples: list[dict[int, Mapping[str, Any]]] = [{} for _ in problems]
        for record in resumed:
            self._samples[record["problem"]][record["sample"]] = record
        self.resumed = sum(map(len, self._samples))
        interval_s = TERMINAL_INTERVAL_S if sys.stderr.isatty() else LOG_INTERVAL_S
        size = {"initial": self.resumed, "total": len(problems) * val_n, "dynamic_ncols": True}
        self._bar = tqdm(unit="sample", desc="evaluating", mininterval=interval_s, disable=not show, **size)
        self._graded = self._correct = 0
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(grader.workers, thread_name_prefix="grading")
        self._records: dict[int, Future[dict[str, Any]]] = {}
        for problem in range(len(problems)):
            self._grade_if_complete(problem)

    def __enter__(self) -> Scoreboard:
        return self

    def __exit__(self, *_: object) -> None:
        # After an error the grades that still wait are not needed.
        self._threads.shutdown(cancel_futures=True)
        self._bar.close()

    def missing(self) -> list[tuple[int, int]]:
        """Return (problem, sample) of every sample that is not there, problem by problem."""
        return [
            (problem, sample)
            for problem, samples in enumerate(self._samples)
            for sample in range(self._val_n)
            if sample not in samples
        ]

    def add(self, record: Mapping[str, Any]) -> None:
        """Take one new sample."""
        self._samples[record["problem"]][record["sample"]] = record
        self._bar.update()
        self._grade_if_complete(record["problem"])

    def finish(self) -> list[dict[str, Any]]:
        """Wait for the grading and return every problem's record, in order; raise what the grader raised."""
        if missing := self.missing():
            raise ValueError(f"{len(missing)} samples are missing")
        return [self._records[problem].result() for problem in range(len(self._problems))]

    def _grade_if_complete(self, problem: int) -> None:
        if len(self._samples[problem]) == self._val_n:
            self._records[problem] = self._threads.submit(self._grade, problem)

    def _grade(self, index: int) -> dict[str, Any]:
        problem = self._problems[index]
        samples = [self._samples[index][number] for number in range(self._val_n)]
        predicted = [extract_boxed(sample["text"]) for sample in samples]
        (grade,) = self._grader.grade([(problem.answer, predicted)])
        with self._lock:
            self._graded, self._correct = self._graded + 1, self._correct + grade.num_correct
            truncated = [bool(s["truncated"]) for taken in self._samples for s in list(taken.values())]
            self._bar.set_postfix_str(
                f"Avg@{self._val_n} {100 * self._correct / (self._graded * self._val_n):.1f} % on "
                f"{self._graded} problems, truncated {100 * sum(truncated) / len(truncated):.1f} %",
                refresh=False,
            )
        return problem_record(
            problem_id=problem.problem_id,
            problem=problem.problem,
            ground_truth=problem.answer,
            texts=[sample["text"] for sample in samples],
            predicted=predicted,
            truncated=[sample["truncated"] for sample in samples],
            tokens=[sample["tokens"] for sample in samples],
            grade=grade,
        )
