"""What runs inside a grading process: parse each string once, decide comparisons, write every verdict down.

A comparison can be stuck in C code (the factorial of 10^8), where no Python signal handler ever runs. So each
parse and each comparison runs under an alarm whose action is the kernel's default: it ends this process. What
was decided before stands in the ledger, and its last line names the string or pair that was being worked on.

Imports neither torch nor vLLM; sympy and math_verify are imported only where a process is meant to grade.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from opsd.fast_parsing import use_fast_numbers, use_fast_prediction

PARSE, COMPARE, VERDICT, DONE = "parse", "compare", "verdict", "done"
_PLAIN_INTEGER = re.compile(r"-?[0-9]{1,18}")
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

Verdict = bool | None  # None: the comparison was killed, which counts as not equal


@dataclass(frozen=True)
class Job:
    """One problem's answers to grade and, if `clustered`, to compare with each other.

    Attributes:
        texts: entry 0 is the gold answer, the others are the distinct predicted answers in the order in which
            they were first seen.
        clustered: False decides gold against each answer only.
        known: verdicts already decided, by (index of gold side, index of predicted side).
        dead: indices of strings whose parse was killed before.
        suspects: indices of strings that get no further chance to be stuck (see `Decider`).
    """

    texts: tuple[str, ...]
    clustered: bool
    known: dict[tuple[int, int], Verdict] = field(default_factory=dict)
    dead: frozenset[int] = frozenset()
    suspects: frozenset[int] = frozenset()


def start_worker(memory_limit_mb: int) -> None:
    """Bound this process (memory in MiB of address space, no core dump, dies with its parent) and warm up."""
    if os.uname().sysname == "Linux":
        # A worker that is stuck when its parent is killed would otherwise burn a core for ever.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # What is mapped by now is no answer's doing: multiprocessing imports the caller's main script into
        # every worker, and that may hold torch.
        with open("/proc/self/statm", encoding="ascii") as statm:
            mapped = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_limit_mb * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # ANTLR reports syntax errors of hostile answers on the terminal.
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    warm_up()


# The kinds of answers that competitions have. Each teaches the parser's automaton the transitions that it
# takes for its kind, at a few hundredths of a second each.
_WARM_FORMS = (
    "\\frac{1}{2}", "-\\frac{3}{4}\\pi", "2\\sqrt{3}", "\\frac{1+\\sqrt{5}}{2}", "1 + 2\\sqrt{3}", "2.5",
    "90^\\circ", "(1,2)", "\\left(\\frac{1}{2}, -3\\right)", "[1, 2)", "(-\\infty, 1) \\cup (2, \\infty)",
    "\\{1, 2\\}", "1,2,3", "x^2 + 2x - 1", "y = 2x + 1", "(x+1)(x-2)", "2^{10} \\cdot 3!", "1+2i", "\\sin x",
    "\\log_2 3", "50\\%", "10,\\!080", "\\begin{pmatrix} 1 \\\\ -2 \\end{pmatrix}", "\\text{(C)}",
    "\\text{even}", "12_{5}", "\\binom{4}{2}",
)  # fmt: skip


@functools.cache
def warm_up() -> None:
    """Make the parser fast, and let it meet the kinds of answers that are usual.

    The server process from which workers are forked does it once (`opsd.grading_warm`), so that each new
    worker, one after a kill included, begins with what it learnt.
    """
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    use_fast_prediction()
    use_fast_numbers()
    for form in _WARM_FORMS:
        _parse(form)


class Parsed:
    """What math_verify's parse gives for one string, usually one expression, and the value of each."""

    def __init__(self, trees: list) -> None:
        from opsd.answer_value import value_of

        self.trees = trees
        self.values = [value_of(tree) for tree in trees]

    def differs_from(self, other: Parsed) -> bool:
        """Whether the values prove that math_verify finds no equivalent pair, in either order."""
        from opsd.answer_value import clearly_different

        return all(clearly_different(a, b) for a in self.values for b in other.values)


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> Parsed:
    from math_verify import parse
    from sympy import Integer

    if _PLAIN_INTEGER.fullmatch(text):
        # What math_verify makes of it, at a thousandth of the time.
        return Parsed([Integer(int(text))])
    wrapped = text if "$" in text else f"${text}$"
    # The time limit is the alarm around this call; math_verify's own cannot interrupt C code.
    return Parsed(parse(wrapped, fallback_mode="no_fallback", parsing_timeout=None))


def _plain_equal(gold: str, predicted: str) -> bool:
    return (
        gold.replace("$", "").replace(" ", "").lower() == predicted.replace("$", "").replace(" ", "").lower()
    )


def _structurally_equal(gold: list, predicted: list) -> bool:
    # For equal expression trees math_verify's first test already says yes (except for nan and zoo).
    from sympy import Basic, MatrixBase, nan, zoo

    kinds = (Basic, MatrixBase)
    return any(
        isinstance(g, kinds) and isinstance(p, kinds) and g not in (nan, zoo) and bool(g == p)
        for g in gold
        for p in predicted
    )


class SliceOver(Exception):
    """The time slice of this call is used up; what is left is for the next call."""


@contextlib.contextmanager
def _alarm(time_limit_s: float) -> Iterator[None]:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, time_limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@dataclass
class Decider:
    """Decides pairs of one job and writes each verdict to the ledger before going on.

    A suspect is a string in whose comparisons workers were killed. It is still equal to what parses to the
    same expression tree; nothing more expensive is tried with it, so that one hostile answer costs its limit
    once and not once for each answer it meets.
    """

    job: Job
    number: int
    ledger: int
    time_limit_s: float
    deadline: float
    parsed: dict[int, Parsed] = field(default_factory=dict)

    def _write(self, *fields: object) -> None:
        os.write(self.ledger, (" ".join(map(str, (self.number, *fields))) + "\n").encode("ascii"))

    def _parse(self, index: int) -> Parsed:
        if index not in self.parsed:
            self._write(PARSE, index)
            with _alarm(self.time_limit_s):
                self.parsed[index] = _parse(self.job.texts[index])
        return self.parsed[index]

    def _compute(self, i: int, j: int) -> bool:
        from math_verify import verify

        if i in self.job.dead or j in self.job.dead:
            return False
        gold, predicted = self._parse(i), self._parse(j)
        if gold.differs_from(predicted):
            return False
        self._write(COMPARE, i, j)
        with _alarm(self.time_limit_s):
            if i in self.job.suspects or j in self.job.suspects:
                return _structurally_equal(gold.trees, predicted.trees)
            try:
                return verify(gold.trees, predicted.trees, timeout_seconds=None)
            except Exception:
                # The protocol's own rule for whatever math_verify raises, its type unknown beforehand.
                return _plain_equal(self.job.texts[i], self.job.texts[j])

    def __call__(self, i: int, j: int) -> Verdict:
        if (i, j) not in self.job.known:
            if time.monotonic() > self.deadline:
                raise SliceOver
            self.job.known[i, j] = self._compute(i, j)
            self._write(VERDICT, i, j, int(self.job.known[i, j]))
        return self.job.known[i, j]


def group(order: Sequence[int], equal: Callable[[int, int], Verdict]) -> list[list[int]]:
    """Cluster samples: each joins the first cluster whose first member is equivalent in either direction.

    Args:
        order: the text index of each sample, in order of sampling.
        equal: verdict by (index of gold side, index of predicted side); None when it was killed.

    Returns:
        Clusters of positions in `order`, in the order in which they were founded.
    """
    clusters: list[list[int]] = []
    for position, text in enumerate(order):
        for cluster in clusters:
            first = order[cluster[0]]
            verdict = equal(first, text)
            # The other direction of a killed comparison is not tried: it counts as not equal.
            if verdict or (verdict is False and first != text and equal(text, first)):
                cluster.append(position)
                break
        else:
            clusters.append([position])
    return clusters


def walk(job: Job, equal: Callable[[int, int], Verdict]) -> None:
    """Ask `equal` for every verdict that grading `job` can need."""
    answers = range(1, len(job.texts))
    for index in answers:
        equal(0, index)
    if job.clustered:
        # Each text twice, because a text need not equal itself and then founds a second cluster.
        group([index for index in answers for _ in range(2)], equal)


def run_jobs(jobs: Sequence[Job], ledger_path: str, time_limit_s: float, slice_s: float) -> None:
    """Work through `jobs` until all are done or `slice_s` seconds have passed, verdicts going to the ledger.

    Ledger lines: `<job> parse <i>`, `<job> compare <i> <j>` (about to start), `<job> verdict <i> <j> <0|1>`,
    `<job> done`.
    """
    deadline = time.monotonic() + slice_s
    ledger = os.open(ledger_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        for number, job in enumerate(jobs):
            decider = Decider(job, number, ledger, time_limit_s, deadline)
            walk(job, decider)
            os.write(ledger, f"{number} {DONE}\n".encode("ascii"))
    except SliceOver:
        pass
    finally:
        os.close(ledger)
