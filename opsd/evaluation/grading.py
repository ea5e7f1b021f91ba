"""From the text of a sample to verdicts: boxed extraction, equivalence, clustering, vote.

The rules are those of the evaluation protocol (docs/evaluation.md): math_verify decides whether two answers
are equivalent, in separate processes that are killed when a comparison does not end. Imports neither torch
nor vLLM, so that stored results can be graded again anywhere.

    with Grader() as grader:
        grade = grader.grade_problem("\\\\frac{1}{2}", ["0.5", None, "\\\\frac12", "3"])
    grade.correct, grade.majority_correct
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from opsd.errors import UsageError
from opsd.evaluation.grading_worker import Verdict, group, walk

# What the authors' files, and ours, hold as `predicted_answer` of an unformatted sample.
NO_ANSWER = "[No boxed answer found]"
DEFAULT_TIME_LIMIT_S = 5.0
DEFAULT_MEMORY_LIMIT_MB = 1024
# How many killed items a result names, and how much of each text.
NAMED_KILLS, NAMED_CHARACTERS = 50, 200
# After this many killed items of one problem, as many as it has samples, what is left of it gets a tenth of
# the limit: ordinary answers need a hundredth, and a problem of hostile ones ends in minutes.
FULL_LIMIT_KILLS = 12
# Deaths of a worker in one problem while it was at no item, before grading gives up.
MAX_IDLE_DEATHS = 5
ROOT = Path(__file__).resolve().parents[2]

Pair = tuple[int, int]  # indices of two texts of a problem, gold side first

_BOX_TOKENS = re.compile(r"\\boxed\{|[{}]")


def extract_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}` with balanced braces, stripped; None if none, or if it is empty.

    Every brace counts, an escaped one too. `\boxed 5` and `\fbox{5}` are not boxed answers, an unclosed box
    is passed over, a box inside a think block counts like any other, and of nested boxes the inner one starts
    last. Takes time linear in the length of `text`.
    """
    open_braces: list[tuple[bool, int]] = []
    last: tuple[int, int] | None = None
    for match in _BOX_TOKENS.finditer(text):
        if match.group() != "}":
            open_braces.append((match.group() != "{", match.end()))
        elif open_braces:
            is_box, start = open_braces.pop()
            if is_box and (last is None or start > last[0]):
                last = (start, match.start())
    return (text[slice(*last)].strip() or None) if last else None


@dataclass(frozen=True)
class ProblemGrade:
    """Verdicts on the samples of one problem.

    Attributes:
        correct: for each sample, in order, whether it is equivalent to the gold answer; unformatted is False.
        clusters: sample indices by cluster, in the order in which the clusters were founded.
        winner: index in `clusters` of the largest cluster, the earliest on a tie; None without samples.
        majority_correct: whether the winner is not the INVALID cluster and its first member is correct.
    """

    correct: list[bool]
    clusters: list[list[int]]
    winner: int | None
    majority_correct: bool

    @property
    def num_correct(self) -> int:
        return sum(self.correct)

    @property
    def passed(self) -> bool:
        return any(self.correct)


@dataclass(frozen=True)
class Killed:
    """One parse (`predicted` is None) or comparison that was killed twice, the second time alone."""

    gold: str
    predicted: str | None = None


class Grader:
    """Grades answers in `workers` processes that are killed when one parse or comparison exceeds its limit.

    A context manager; processes start with the first answer. Each distinct string is parsed once per problem
    and each distinct pair decided once, across calls too. A killed parse or comparison is tried once more
    alone in a fresh process; killed again, it counts as not equal, in its problem alone, and is kept in
    `killed`.

    Args:
        workers: processes; None takes the cores this process may use, at most 8.
        time_limit_s: seconds of CPU time for one parse or one comparison; afterwards the kernel ends it.
        memory_limit_mb: MiB of address space for each worker.

    Raises:
        UsageError: a limit is out of range.
    """

    def __init__(
        self,
        *,
        workers: int | None = None,
        time_limit_s: float = DEFAULT_TIME_LIMIT_S,
        memory_limit_mb: int = DEFAULT_MEMORY_LIMIT_MB,
    ) -> None:
        if workers is not None and workers < 1:
            raise UsageError(f"grading needs at least one worker process, not {workers}")
        if not time_limit_s > 0:
            raise UsageError(f"the grading time limit must be more than 0 seconds, not {time_limit_s}")
        if memory_limit_mb < 256:
            raise UsageError(f"the grading memory limit must be at least 256 MiB, not {memory_limit_mb}")
        self.workers = workers or min(8, len(os.sched_getaffinity(0)))
        self.time_limit_s = time_limit_s
        self.memory_limit_mb = memory_limit_mb
        self.killed: list[Killed] = []
        self._verdicts: dict[tuple[str, str], Verdict] = {}
        self._lock = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None
        self._workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(self.workers):
            self._workers.put(_Worker())

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes. The grader may be used again and then starts new ones."""
        for _ in range(self.workers):
            worker = self._workers.get()
            worker.close()
            self._workers.put(worker)
        if self._server is not None:
            self._requests.close()
            self._server.kill()
            self._server.wait()
            self._server = None

    def limits(self, *, since: int = 0) -> dict[str, Any]:
        """Return what a result records about its grading; `since` leaves out the first kills."""
        killed = self.killed[since:]
        return {
            "math_verify": version("math-verify"),
            "time_limit_s": self.time_limit_s,
            "memory_limit_mb": self.memory_limit_mb,
            "killed": len(killed),
            "killed_items": [
                {
                    "gold": k.gold[:NAMED_CHARACTERS],
                    "predicted": k.predicted and k.predicted[:NAMED_CHARACTERS],
                }
                for k in killed[:NAMED_KILLS]
            ],
        }

    def equivalent(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Return math_verify's verdict on each (gold, predicted), False where it was killed."""
        by_gold: dict[str, dict[str, None]] = defaultdict(dict)
        for gold, predicted in pairs:
            by_gold[gold][predicted] = None
        decided = self._decide([((gold, *answers), False) for gold, answers in by_gold.items()])
        verdicts = dict(zip(by_gold, decided, strict=True))
        return [bool(verdicts[gold][gold, predicted]) for gold, predicted in pairs]

    def grade_problem(self, gold: str, predicted: Sequence[str | None]) -> ProblemGrade:
        """Return `grade` of a single problem."""
        return self.grade([(gold, predicted)])[0]

    def grade(self, problems: Sequence[tuple[str, Sequence[str | None]]]) -> list[ProblemGrade]:
        """Return the grade of each (gold answer, predicted answers; None = unformatted)."""
        texts = [
            (gold, *dict.fromkeys(p for p in predicted if p is not None)) for gold, predicted in problems
        ]
        decided = self._decide([(job_texts, True) for job_texts in texts])
        return [_grade(*problem, verdicts) for problem, verdicts in zip(problems, decided, strict=True)]

    def _decide(self, jobs: Sequence[tuple[tuple[str, ...], bool]]) -> list[dict[tuple[str, str], Verdict]]:
        """Return for each (texts, clustered) every verdict that it needs, by pair of texts."""
        distinct = list(dict.fromkeys(jobs))
        with ThreadPoolExecutor(self.workers) as threads:
            decided = dict(zip(distinct, threads.map(self._decide_problem, distinct), strict=True))
        verdicts = []
        for texts, clustered in jobs:
            known, killed = decided[texts, clustered]
            self.killed += killed
            killed.clear()
            verdicts.append({(texts[i], texts[j]): verdict for (i, j), verdict in known.items()})
        return verdicts

    def _decide_problem(self, job: tuple[tuple[str, ...], bool]) -> tuple[dict[Pair, Verdict], list[Killed]]:
        """Return every verdict that one problem needs, and what was killed on the way."""
        texts, clustered = job
        pairs = [(i, j) for i in range(len(texts) if clustered else 1) for j in range(1, len(texts))]
        known = {
            (i, j): self._verdicts[texts[i], texts[j]]
            for i, j in pairs
            if (texts[i], texts[j]) in self._verdicts
        }
        with contextlib.suppress(KeyError):
            walk(len(texts), clustered, lambda i, j: known[i, j])
            return known, []
        worker = self._workers.get()
        try:
            killed = self._ask(worker, texts, clustered, known)
        finally:
            self._workers.put(worker)
        if not killed:  # what was killed in one problem says nothing about another
            self._verdicts.update({(texts[i], texts[j]): verdict for (i, j), verdict in known.items()})
        return known, killed

    def _ask(
        self, worker: _Worker, texts: tuple[str, ...], clustered: bool, known: dict[Pair, Verdict]
    ) -> list[Killed]:
        """Add to `known` what is missing; what dies is tried once more alone in a fresh process."""
        killed: list[Killed] = []
        unparsable: list[int] = []
        alone: tuple[int, ...] = ()
        idle_deaths = 0
        while True:
            patient = len(killed) < FULL_LIMIT_KILLS
            job = {
                "texts": texts,
                "clustered": clustered,
                "alone": alone,
                "known": [(*pair, verdict) for pair, verdict in known.items()],
                "unparsable": unparsable,
                "cpu_limit_s": self.time_limit_s if patient else self.time_limit_s / 10,
            }
            died = worker.run(job, known, self._new_worker)
            if died is None and not alone:
                return killed
            if died == ():
                idle_deaths += 1
                if idle_deaths > MAX_IDLE_DEATHS:
                    raise RuntimeError(
                        f"grading workers ended {idle_deaths} times before they began to work; "
                        f"memory_limit_mb={self.memory_limit_mb} may be too small"
                    )
            elif died and died == alone:
                killed.append(Killed(*(texts[index] for index in died)))
                if len(died) == 1:
                    unparsable += died
                else:
                    known[died] = None
                alone = ()
            else:
                alone = died or ()

    def _new_worker(self) -> socket.socket:
        """Return the socket of a fresh worker process, which the server forks."""
        with self._lock:
            if self._server is None or self._server.poll() is not None:
                self._requests, theirs = socket.socketpair()
                # The server imports what this process would import, from whichever folder it was started.
                code = (
                    f"import sys; sys.path[:] = {[str(ROOT), *sys.path]!r}; "
                    "from opsd.evaluation.grading_worker import serve_forks; "
                    f"serve_forks({self.memory_limit_mb})"
                )
                # A session of its own: Ctrl-C is this process's to handle.
                self._server = subprocess.Popen(
                    [sys.executable, "-P", "-c", code], stdin=theirs, start_new_session=True
                )
                theirs.close()
            ours, theirs = socket.socketpair()
            with theirs:
                socket.send_fds(self._requests, [b"w"], [theirs.fileno()])
            return ours


class _Worker:
    """One worker process at a time; after its death the next job gets a fresh one."""

    def __init__(self) -> None:
        self._stream: Any = None

    def close(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
            self._stream = None

    def run(
        self, job: dict[str, Any], known: dict[Pair, Verdict], start: Callable[[], socket.socket]
    ) -> tuple[int, ...] | None:
        """Give `job` to the process and take its verdicts into `known`.

        Returns:
            None when the job is done; when the process died, the indices of the text that it was parsing or
            of the two that it was comparing, () if it was at neither.
        """
        item: tuple[int, ...] = ()
        try:
            if self._stream is None:
                with start() as connection:
                    self._stream = connection.makefile("rw", encoding="ascii")
            self._stream.write(json.dumps(job) + "\n")
            self._stream.flush()
            for line in self._stream:
                kind, *fields = line.split()
                if kind == "done":
                    return None
                item = tuple(map(int, fields[:2]))
                if kind == "verdict":
                    known[item], item = fields[2] == "1", ()
        except OSError:
            pass
        self.close()
        return item


def _grade(
    gold: str, predicted: Sequence[str | None], verdicts: dict[tuple[str, str], Verdict]
) -> ProblemGrade:
    correct = [text is not None and bool(verdicts[gold, text]) for text in predicted]
    formatted = [position for position, text in enumerate(predicted) if text is not None]
    members = group([predicted[position] for position in formatted], lambda a, b: verdicts[a, b])
    clusters = [[formatted[position] for position in cluster] for cluster in members]
    invalid = [position for position, text in enumerate(predicted) if text is None]
    clusters = sorted([*clusters, invalid] if invalid else clusters, key=lambda cluster: cluster[0])
    if not clusters:
        return ProblemGrade(correct, clusters, None, False)
    winner = max(range(len(clusters)), key=lambda index: len(clusters[index]))
    # The first member of the INVALID cluster is unformatted and therefore not correct.
    return ProblemGrade(correct, clusters, winner, correct[clusters[winner][0]])
