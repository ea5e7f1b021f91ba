"""From the text of a sample to verdicts: boxed extraction, equivalence, clustering, vote.

The rules are those of the evaluation protocol (docs/evaluation.md): math_verify decides whether two answers
are equivalent, in separate processes that are killed when a comparison does not end. Imports neither torch
nor vLLM, so that stored results can be graded again anywhere.

    with Grader() as grader:
        (grade,) = grader.grade([("\\\\frac{1}{2}", ["0.5", None, "\\\\frac12", "3"])])
    grade.correct, grade.majority_correct
"""

from __future__ import annotations

import json
import os
import queue
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from opsd import REPO_ROOT
from opsd.evaluation.grading_shortcuts import MARGIN, plain_number
from opsd.options import AT_LEAST_ONE, POSITIVE, Range, check_range

# What the authors' files, and ours, hold as `predicted_answer` of an unformatted sample.
NO_ANSWER = "[No boxed answer found]"
DEFAULT_TIME_LIMIT_S = 5.0
DEFAULT_MEMORY_LIMIT_MB = 1024
# How many killed items a result names, and how much of each text.
NAMED_KILLS, NAMED_CHARACTERS = 50, 200
# After this many killed items of one problem, as many as it has samples, what is left of it gets a tenth of
# the limit: ordinary answers need a hundredth, and a problem of hostile ones ends in minutes.
FULL_LIMIT_KILLS = 12
# Deaths of a worker in one problem before it began to work, after which grading gives up.
MAX_IDLE_DEATHS = 5

Verdict = bool | None  # None: the comparison was killed, which counts as not equal
Equal = Callable[[str, str], Verdict]  # of two answers, the gold side first

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
        correct: of each sample, in order; an unformatted one is False.
        clusters: sample indices by cluster, in the order in which the clusters were founded.
        winner: index in `clusters` of the largest, the earliest on a tie; None without samples.
        majority_correct: whether the winner is not the INVALID cluster and its first member is correct.
    """

    correct: list[bool]
    clusters: list[list[int]]
    winner: int | None
    majority_correct: bool

    @property
    def num_correct(self) -> int:
        return sum(self.correct)


def group(texts: Sequence[str], equal: Equal) -> list[list[int]]:
    """Return clusters of positions: each text joins the first whose first member is equivalent either way."""
    clusters: list[list[int]] = []
    for position, text in enumerate(texts):
        for cluster in clusters:
            first = texts[cluster[0]]
            verdict = equal(first, text)
            # The other direction of a killed comparison is not tried: it counts as not equal.
            if verdict or (verdict is False and first != text and equal(text, first)):
                cluster.append(position)
                break
        else:
            clusters.append([position])
    return clusters


def grade_answers(gold: str, predicted: Sequence[str | None], equal: Equal) -> ProblemGrade:
    """Grade the samples of one problem and vote."""
    correct = [text is not None and bool(equal(gold, text)) for text in predicted]
    formatted = [(position, text) for position, text in enumerate(predicted) if text is not None]
    clusters = [[formatted[i][0] for i in cluster] for cluster in group([t for _, t in formatted], equal)]
    if invalid := [position for position, text in enumerate(predicted) if text is None]:
        clusters = sorted([*clusters, invalid], key=lambda cluster: cluster[0])
    if not clusters:
        return ProblemGrade(correct, clusters, None, False)
    winner = max(range(len(clusters)), key=lambda index: len(clusters[index]))
    # The first member of the INVALID cluster is unformatted and therefore not correct.
    return ProblemGrade(correct, clusters, winner, correct[clusters[winner][0]])


@dataclass(frozen=True)
class Killed:
    """A parse (`predicted` is None) or comparison that was killed twice, the second time alone."""

    gold: str
    predicted: str | None = None


class Grader:
    """Grades answers in `workers` processes that are killed when one parse or comparison exceeds its limit.

    A context manager; processes start with the first answer that needs one. Each distinct pair is decided
    once, across calls too. A killed parse or comparison is tried once more alone in a fresh process; killed
    again, it counts as not equal, in its problem alone, and is kept in `killed`.

    Args:
        workers: processes; None takes the cores this process may use, at most 8.
        time_limit_s: seconds of CPU time for one parse or one comparison.
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
        check_range("workers", workers, AT_LEAST_ONE)
        check_range("time_limit_s", time_limit_s, POSITIVE)
        check_range("memory_limit_mb", memory_limit_mb, Range(256))
        self.workers = workers or min(8, len(os.sched_getaffinity(0)))
        self.time_limit_s = time_limit_s
        self.memory_limit_mb = memory_limit_mb
        self.killed: list[Killed] = []
        self._verdicts: dict[tuple[str, str], Verdict] = {}
        self._lock = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None
        # The connection of each worker; None where its process has not started, or has died.
        self._workers: queue.SimpleQueue[socket.socket | None] = queue.SimpleQueue()
        for _ in range(self.workers):
            self._workers.put(None)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes. The grader may be used again and then starts new ones."""
        for _ in range(self.workers):
            if (connection := self._workers.get()) is not None:
                connection.close()
            self._workers.put(None)
        if self._server is not None:
            self._requests.close()
            self._server.kill()
            self._server.wait()
            self._server = None

    def limits(self, *, since: int = 0) -> dict[str, Any]:
        """Return what a result records about its grading; `since` leaves out the first kills."""
        killed = self.killed[since:]
        cut = slice(NAMED_CHARACTERS)
        return {
            "math_verify": version("math-verify"),
            "time_limit_s": self.time_limit_s,
            "memory_limit_mb": self.memory_limit_mb,
            "killed": len(killed),
            "killed_items": [
                {"gold": k.gold[cut], "predicted": k.predicted and k.predicted[cut]}
                for k in killed[:NAMED_KILLS]
            ],
        }

    def equivalent(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Return math_verify's verdict on each (gold, predicted), False where it was killed."""
        answers: dict[str, dict[str, None]] = {}
        for gold, predicted in pairs:
            answers.setdefault(gold, {})[predicted] = None

        def verdicts(gold: str, equal: Equal) -> dict[tuple[str, str], Verdict]:
            return {(gold, predicted): equal(gold, predicted) for predicted in answers[gold]}

        known = {pair: verdict for part in self._map(verdicts, answers) for pair, verdict in part.items()}
        return [bool(known[pair]) for pair in pairs]

    def grade(self, problems: Sequence[tuple[str, Sequence[str | None]]]) -> list[ProblemGrade]:
        """Return the grade of each (gold answer, predicted answers; None = unformatted)."""
        return self._map(lambda problem, equal: grade_answers(problem[0], problem[1], equal), problems)

    def _map(self, decide: Callable[[Any, Equal], Any], problems: Iterable[Any]) -> list[Any]:
        """Return `decide(problem, equal)` of each problem, in order; as many at a time as workers."""

        def run(problem: Any) -> tuple[Any, list[Killed]]:
            equal = _Comparison(self)
            try:
                return decide(problem, equal), equal.killed
            finally:
                self._workers.put(equal._connection)

        with ThreadPoolExecutor(self.workers) as threads:
            done = list(threads.map(run, problems))
        for _, killed in done:
            self.killed += killed
        return [result for result, _ in done]

    def _new_process(self) -> socket.socket:
        """Return the socket of a fresh worker process, which the server forks."""
        with self._lock:
            if self._server is None or self._server.poll() is not None:
                self._requests, theirs = socket.socketpair()
                # The server imports what this process would import, from whichever folder it was started.
                code = (
                    f"import sys; sys.path[:] = {[str(REPO_ROOT), *sys.path]!r}; "
                    "from opsd.evaluation.grading_worker import serve_forks; "
                    f"serve_forks({self.memory_limit_mb})"
                )
                # A session of its own: Ctrl-C is this process's to handle.
                self._server = subprocess.Popen(
                    [sys.executable, "-P", "-c", code], stdin=theirs.fileno(), start_new_session=True
                )
                theirs.close()
            ours, theirs = socket.socketpair()
            with theirs:
                socket.send_fds(self._requests, [b"w"], [theirs.fileno()])
            return ours


class _Comparison:
    """`Equal` for one problem: what is killed in it counts in it alone."""

    def __init__(self, grader: Grader) -> None:
        self.killed: list[Killed] = []
        self._grader = grader
        self._connection = grader._workers.get()
        self._own: dict[tuple[str, str], Verdict] = {}
        self._killed_texts: set[str] = set()
        self._idle_deaths = 0

    def __call__(self, gold: str, predicted: str) -> Verdict:
        known, pair = self._grader._verdicts, (gold, predicted)
        if pair not in known and pair not in self._own:
            a, b = plain_number(gold), plain_number(predicted)
            if a is not None and b is not None and (a == b or abs(a - b) > MARGIN):
                verdict = a == b
            else:
                verdict = self._decide(gold, predicted)
            own = verdict is None or self._killed_texts.intersection(pair)
            (self._own if own else known)[pair] = verdict
        return self._own[pair] if pair in self._own else known[pair]

    def _decide(self, gold: str, predicted: str) -> Verdict:
        """Let a worker decide; what dies is tried once more, in a fresh process that did nothing else."""
        died_once: set[tuple[str, ...]] = set()
        while not self._killed_texts.intersection((gold, predicted)):
            limit_s = self._grader.time_limit_s
            if len(self.killed) >= FULL_LIMIT_KILLS:
                limit_s /= 10
            answer = self._ask(gold, predicted, limit_s)
            if answer in ("0", "1"):
                return answer == "1"
            item = {"": (), "g": (gold,), "p": (predicted,), "c": (gold, predicted)}[answer]
            if not item:
                self._idle_deaths += 1
                if self._idle_deaths > MAX_IDLE_DEATHS:
                    raise RuntimeError(
                        f"grading workers ended {self._idle_deaths} times before they began to work; "
                        f"memory_limit_mb={self._grader.memory_limit_mb} may be too small"
                    )
            elif item in died_once:
                self.killed.append(Killed(*item))
                if len(item) == 2:
                    return None
                self._killed_texts.update(item)
            else:
                died_once.add(item)
        return False

    def _ask(self, gold: str, predicted: str, cpu_limit_s: float) -> str:
        """Return "1" or "0"; when the process died, the stage it was at (see `grading_worker`) or ""."""
        last = ""
        try:
            if self._connection is None:
                self._connection = self._grader._new_process()
            self._connection.sendall(json.dumps([gold, predicted, cpu_limit_s]).encode("ascii") + b"\n")
            while received := self._connection.recv(64).decode("ascii"):
                last = received[-1]
                if last in "01":
                    return last
        except OSError:
            pass
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        return last
