"""From the text of a sample to verdicts: boxed extraction, equivalence, clustering, vote.

The rules are those of the evaluation protocol (docs/evaluation.md): math_verify decides whether two answers
are equivalent, in separate processes that are killed when a comparison does not end. Imports neither torch
nor vLLM, so that stored results can be graded again anywhere.

    with Grader() as grader:
        grade = grader.grade_problem("\\\\frac{1}{2}", ["0.5", None, "\\\\frac12", "3"])
    grade.correct, grade.majority_correct
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from pebble import ProcessExpired, ProcessPool

from opsd import grading_worker
from opsd.errors import UsageError
from opsd.grading_worker import COMPARE, DONE, PARSE, VERDICT, Job, Verdict

logger = logging.getLogger(__name__)

# What the authors' files, and ours, hold as `predicted_answer` of an unformatted sample.
NO_ANSWER = "[No boxed answer found]"
DEFAULT_TIME_LIMIT_S = 5.0
DEFAULT_MEMORY_LIMIT_MB = 1024
# A call into a worker returns after this many seconds with what it has decided.
SLICE_S = 1.0
# Seconds that pebble grants on top of slice and limit before it ends a worker that did not end itself.
BACKSTOP_S = 5.0
# Jobs in one call into a worker; small enough that two workers end together.
CHUNK = 8
# Deaths of a worker in a row without a verdict or a culprit before grading gives up.
MAX_FRUITLESS_DEATHS = 5

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
    """One parse (`predicted` is None) or comparison that was ended because of its time or memory."""

    text: str
    predicted: str | None = None


@dataclass
class _Memory:
    """What is known across calls: verdicts by pair of texts, texts that died, texts with no more chances."""

    verdicts: dict[tuple[str, str], Verdict] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    suspects: set[str] = field(default_factory=set)
    strikes: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    killed: list[Killed] = field(default_factory=list)

    def parse_died(self, text: str) -> None:
        self.dead.add(text)
        self.killed.append(Killed(text))

    def comparison_died(self, gold: str, predicted: str, *, against_gold: bool) -> None:
        """Count the pair as not equal and find out which of the two texts is to blame.

        Against the benchmark's own answer it is the prediction; between two predictions it is the one that
        gets stuck with a second partner, and then its partners are cleared.
        """
        self.verdicts[gold, predicted] = None
        self.killed.append(Killed(gold, predicted))
        if against_gold:
            self._blame(predicted)
            return
        for text, other in ((gold, predicted), (predicted, gold)):
            self.strikes[text].add(other)
        for text in (gold, predicted):
            if len(self.strikes[text]) > 1:
                self._blame(text)

    def _blame(self, text: str) -> None:
        self.suspects.add(text)
        for partner in self.strikes.pop(text, set()):
            self.strikes[partner].discard(text)

    def job(self, texts: tuple[str, ...], clustered: bool) -> Job:
        indices = range(len(texts))
        pairs = [(0, j) for j in indices[1:]]
        if clustered:
            pairs += [(i, j) for i in indices[1:] for j in indices[1:]]
        known = {
            (i, j): self.verdicts[texts[i], texts[j]]
            for i, j in pairs
            if (texts[i], texts[j]) in self.verdicts
        }
        dead = frozenset(i for i in indices if texts[i] in self.dead)
        suspects = frozenset(i for i in indices if texts[i] in self.suspects)
        return Job(texts, clustered, known, dead, suspects)

    def complete(self, job: Job) -> bool:
        try:
            grading_worker.walk(job, lambda i, j: job.known[i, j])
        except KeyError:
            return False
        return True


class Grader:
    """Grades answers in `workers` processes that are killed when one parse or comparison exceeds its limit.

    A context manager; processes start with the first answer. Each distinct string is parsed once per problem
    and each distinct pair decided once, across calls too. A killed parse or comparison counts as not equal
    and is kept in `killed`.

    Args:
        workers: processes; None takes the cores this process may use, at most 8.
        time_limit_s: seconds of wall clock for one parse or one comparison; afterwards the kernel ends it.
        memory_limit_mb: MiB of address space for each worker.
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
        self._memory = _Memory()
        self._pool: ProcessPool | None = None

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes. The grader may be used again and then starts new ones."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    @property
    def killed(self) -> list[Killed]:
        """Parses and comparisons that were ended so far, in the order in which that happened."""
        return self._memory.killed

    def limits(self) -> dict[str, object]:
        """What a result file records about how it was graded."""
        return {
            "math_verify": version("math-verify"),
            "time_limit_s": self.time_limit_s,
            "memory_limit_mb": self.memory_limit_mb,
            "killed": len(self.killed),
        }

    def equivalent(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """For each (gold, predicted), math_verify's verdict; False where it was killed. Not symmetric."""
        by_gold: dict[str, dict[str, None]] = defaultdict(dict)
        for gold, predicted in pairs:
            by_gold[gold][predicted] = None
        self._decide([((gold, *answers), False) for gold, answers in by_gold.items()])
        return [bool(self._memory.verdicts[pair]) for pair in pairs]

    def grade_problem(self, gold: str, predicted: Sequence[str | None]) -> ProblemGrade:
        """`grade` of a single problem."""
        return self.grade([(gold, predicted)])[0]

    def grade(self, problems: Sequence[tuple[str, Sequence[str | None]]]) -> list[ProblemGrade]:
        """Verdict, clusters and vote for each (gold answer, predicted answers; None = unformatted)."""
        texts = [
            (gold, *dict.fromkeys(p for p in predicted if p is not None)) for gold, predicted in problems
        ]
        self._decide([(job_texts, True) for job_texts in texts])
        return [self._grade(gold, predicted) for gold, predicted in problems]

    def _grade(self, gold: str, predicted: Sequence[str | None]) -> ProblemGrade:
        verdicts = self._memory.verdicts
        correct = [text is not None and bool(verdicts[gold, text]) for text in predicted]
        formatted = [position for position, text in enumerate(predicted) if text is not None]
        clusters = [
            [formatted[position] for position in cluster]
            for cluster in grading_worker.group(
                [predicted[position] for position in formatted], lambda a, b: verdicts[a, b]
            )
        ]
        invalid = [position for position, text in enumerate(predicted) if text is None]
        clusters = sorted([*clusters, invalid] if invalid else clusters, key=lambda cluster: cluster[0])
        if not clusters:
            return ProblemGrade(correct, clusters, None, False)
        winner = max(range(len(clusters)), key=lambda index: len(clusters[index]))
        # The first member of the INVALID cluster is unformatted and therefore not correct.
        return ProblemGrade(correct, clusters, winner, correct[clusters[winner][0]])

    # -- the processes -----------------------------------------------------------------------------------

    def _running_pool(self) -> ProcessPool:
        if self._pool is None:
            # Workers are forked from a small server process, never from this one with its threads and GPU.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["opsd.grading_warm"])
            self._pool = ProcessPool(
                max_workers=self.workers,
                initializer=grading_worker.start_worker,
                initargs=(self.memory_limit_mb,),
                context=context,
            )
        return self._pool

    def _decide(self, wanted: Sequence[tuple[tuple[str, ...], bool]]) -> None:
        """Fill the memory with every verdict that the (texts, clustered) in `wanted` need."""
        waiting = list(dict.fromkeys(wanted))
        fruitless = 0
        with tempfile.TemporaryDirectory(prefix="grading-") as folder:
            flying: dict[Future, tuple[list[Job], Path]] = {}
            serial = 0
            while waiting or flying:
                while waiting and len(flying) < 2 * self.workers:
                    jobs = []
                    while waiting and len(jobs) < CHUNK:
                        job = self._memory.job(*waiting.pop(0))
                        if not self._memory.complete(job):
                            jobs.append(job)
                    if jobs:
                        ledger = Path(folder) / str(serial)
                        serial += 1
                        flying[self._launch(jobs, ledger)] = (jobs, ledger)
                finished = self._wait(flying)
                for future in finished:
                    jobs, ledger = flying.pop(future)
                    progressed, unfinished = self._settle(jobs, ledger, died=_death(future))
                    waiting[:0] = [(job.texts, job.clustered) for job in unfinished]
                    fruitless = 0 if progressed else fruitless + 1
                if fruitless > MAX_FRUITLESS_DEATHS:
                    raise RuntimeError(
                        f"grading workers ended {fruitless} times without deciding anything; "
                        f"memory_limit_mb={self.memory_limit_mb} may be too small"
                    )

    def _launch(self, jobs: list[Job], ledger: Path) -> Future:
        # The worker's own alarm ends a stuck item; pebble's limit is for a worker that does not get there.
        backstop_s = SLICE_S + self.time_limit_s + BACKSTOP_S
        arguments = (jobs, str(ledger), self.time_limit_s, SLICE_S)
        return self._running_pool().schedule(grading_worker.run_jobs, args=arguments, timeout=backstop_s)

    def _wait(self, flying: dict[Future, tuple[list[Job], Path]]) -> list[Future]:
        """Futures that ended. When none does in time the pool has lost them: it is replaced."""
        if not flying:
            return []
        done, _ = wait(flying, SLICE_S + self.time_limit_s + 3 * BACKSTOP_S, FIRST_COMPLETED)
        if not done or any(isinstance(future.exception(), BrokenProcessPool) for future in done):
            logger.warning("the grading processes had to be started anew")
            self.close()
            return list(flying)
        return list(done)

    def _settle(self, jobs: list[Job], ledger: Path, *, died: bool) -> tuple[bool, list[Job]]:
        """Take a ledger's verdicts into memory, and the culprit if the worker died on one.

        Returns:
            Whether anything was learnt, and the jobs that are not done.
        """
        lines = ledger.read_text("ascii").splitlines() if ledger.exists() else []
        done = set()
        last: list[str] = []
        for line in lines:
            number, kind, *indices = last = line.split()
            job = jobs[int(number)]
            if kind == VERDICT:
                i, j, verdict = map(int, indices)
                self._memory.verdicts[job.texts[i], job.texts[j]] = bool(verdict)
            elif kind == DONE:
                done.add(int(number))
        if died and last and last[1] in (PARSE, COMPARE):
            texts = jobs[int(last[0])].texts
            if last[1] == PARSE:
                self._memory.parse_died(texts[int(last[2])])
            else:
                i, j = int(last[2]), int(last[3])
                self._memory.comparison_died(texts[i], texts[j], against_gold=i == 0)
        return bool(lines), [job for number, job in enumerate(jobs) if number not in done]


def _death(future: Future) -> bool:
    """Whether the worker of `future` ended before its work; other errors are defects and are raised."""
    if not future.done():
        return True
    error = future.exception()
    if error is None:
        return False
    if isinstance(error, (ProcessExpired, FutureTimeout, BrokenProcessPool)):
        return True
    raise error
