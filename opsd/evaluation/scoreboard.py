"""Finished samples come in, in any order; problems are graded as they complete; a bar shows the progress."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from opsd.evaluation.benchmarks import Problem
from opsd.evaluation.grading import Grader, ProblemGrade, extract_boxed
from opsd.evaluation.results import problem_record

# Seconds between two lines of progress where the output is a log file and not a terminal.
LOG_INTERVAL_S = 30.0


class Scoreboard:
    """Collects the samples of every problem and grades each problem in the background once it is complete.

    A context manager. The grading happens in the grader's processes, driven by one thread, so that an engine
    in this process never waits for it.

    Args:
        problems: the benchmark's.
        val_n: samples a problem.
        show: whether to draw the progress bar (on stderr).

    A sample is `{"problem": index in problems, "sample": 0..val_n-1, "text", "truncated", "tokens", …}`.
    """

    def __init__(self, problems: Sequence[Problem], *, val_n: int, grader: Grader, show: bool = True) -> None:
        self._problems = problems
        self._val_n = val_n
        self._grader = grader
        self._samples: list[dict[int, Mapping[str, Any]]] = [{} for _ in problems]
        self._grades: dict[int, ProblemGrade] = {}
        self._predicted: dict[int, list[str | None]] = {}
        self._complete: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._abandoned = False
        self._truncated = 0
        self._resumed = 0
        self._thread = threading.Thread(target=self._grade_complete, name="grading", daemon=True)
        interval = 0.5 if sys.stderr.isatty() else LOG_INTERVAL_S
        self._bar = tqdm(
            total=len(problems) * val_n,
            unit="sample",
            desc="evaluating",
            mininterval=interval,
            disable=not show,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Scoreboard:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        # After an error nobody asks for the grades: what is being graded is the last.
        self._abandoned = error[0] is not None
        self._complete.put(None)
        self._thread.join()
        self._bar.close()

    def missing(self) -> list[tuple[int, int]]:
        """(problem, sample) of every sample that has not come in, problem by problem."""
        return [
            (problem, sample)
            for problem, samples in enumerate(self._samples)
            for sample in range(self._val_n)
            if sample not in samples
        ]

    def add(self, record: Mapping[str, Any], *, resumed: bool = False) -> bool:
        """Take one sample; False if it was there already. A `resumed` one is no progress of this run."""
        samples = self._samples[record["problem"]]
        if record["sample"] in samples:
            return False
        samples[record["sample"]] = record
        self._truncated += bool(record["truncated"])
        if len(samples) == self._val_n:
            self._complete.put(record["problem"])
        if resumed:
            # The estimate divides what is left by the speed of this run alone.
            self._resumed += 1
            self._bar.initial = self._bar.n = self._resumed
        else:
            self._bar.update()
        return True

    def finish(self) -> list[dict[str, Any]]:
        """Wait for the grading and give the result's record of every problem, in order.

        Raises:
            ValueError: samples are missing.
            Exception: what went wrong in the grading thread.
        """
        if self.missing():
            raise ValueError(f"{len(self.missing())} samples are missing")
        self._complete.put(None)
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return [self._record(index) for index in range(len(self._problems))]

    def write(self, line: str) -> None:
        """A line on stderr that does not tear the bar."""
        self._bar.write(line, file=sys.stderr)

    def _record(self, index: int) -> dict[str, Any]:
        problem, samples = self._problems[index], self._ordered(index)
        record = problem_record(
            problem_id=problem.problem_id,
            problem=problem.problem,
            ground_truth=problem.answer,
            texts=[sample["text"] for sample in samples],
            predicted=self._predicted[index],
            truncated=[sample["truncated"] for sample in samples],
            grade=self._grades[index],
        )
        for generation, sample in zip(record["generations"], samples, strict=True):
            generation["tokens"] = sample["tokens"]
        return record

    def _ordered(self, index: int) -> list[Mapping[str, Any]]:
        return [self._samples[index][sample] for sample in range(self._val_n)]

    def _grade_complete(self) -> None:
        try:
            while (batch := self._next_batch()) is not None and not self._abandoned:
                for index in batch:
                    self._predicted[index] = [
                        extract_boxed(sample["text"]) for sample in self._ordered(index)
                    ]
                questions = [(self._problems[index].answer, self._predicted[index]) for index in batch]
                self._grades.update(zip(batch, self._grader.grade(questions), strict=True))
                self._show()
        except Exception as failure:  # raised in the thread that asks for the grades
            self._failure = failure

    def _next_batch(self) -> list[int] | None:
        """Every problem that waits to be graded, at least one; None at the end."""
        batch = [self._complete.get()]
        while not self._complete.empty():
            batch.append(self._complete.get())
        problems = [index for index in batch if index is not None]
        if None in batch:
            self._complete.put(None)  # ends the next call
        return problems if problems or None not in batch else None

    def _show(self) -> None:
        correct = sum(grade.num_correct for grade in self._grades.values())
        graded = len(self._grades)
        self._bar.set_postfix_str(
            f"Avg@{self._val_n} {100 * correct / (graded * self._val_n):.1f} % on {graded} problems, "
            f"truncated {100 * self._truncated / sum(map(len, self._samples)):.1f} %",
            refresh=False,
        )
