"""The grading processes: a server that forks workers, and what a worker does.

A parse or a comparison can be stuck in C code (the factorial of 10^8), where no Python signal handler ever
runs. Each therefore runs under two timers of the kernel whose default action ends the process: one of CPU
time, which a busy or stopped machine does not use up, and behind it a generous one of wall clock.

A worker reads jobs as lines of JSON from its socket and answers in lines: `start I [J]` before it parses text
I or compares text I (gold side) with text J, `verdict I J 0|1` after a comparison, `done` at the end.
When it dies its socket closes, and the last line says what it was doing.
"""

from __future__ import annotations

import ctypes
import functools
import json
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# The wall-clock limit of one parse or comparison, in units of its limit of CPU time.
WALL_FACTOR = 60

Verdict = bool | None  # None: the comparison was killed, which counts as not equal

# The kinds of answers that competitions have. Parsing them fills the parser's tables before a fork.
_WARM_FORMS = (
    "\\frac{1}{2}", "-\\frac{3}{4}\\pi", "2\\sqrt{3}", "\\frac{1+\\sqrt{5}}{2}", "1 + 2\\sqrt{3}", "2.5",
    "90^\\circ", "(1,2)", "\\left(\\frac{1}{2}, -3\\right)", "[1, 2)", "(-\\infty, 1) \\cup (2, \\infty)",
    "\\{1, 2\\}", "1,2,3", "x^2 + 2x - 1", "y = 2x + 1", "(x+1)(x-2)", "2^{10} \\cdot 3!", "1+2i", "\\sin x",
    "\\log_2 3", "50\\%", "10,\\!080", "\\begin{pmatrix} 1 \\\\ -2 \\end{pmatrix}", "\\text{(C)}",
    "\\text{even}", "12_{5}", "\\binom{4}{2}",
)  # fmt: skip


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


def walk(count: int, clustered: bool, equal: Callable[[int, int], Verdict]) -> None:
    """Ask `equal` for every verdict that grading `count` texts can need; text 0 is the gold answer."""
    answers = range(1, count)
    for index in answers:
        equal(0, index)
    if clustered:
        # Each text twice, because a text need not equal itself and then founds a second cluster.
        group([index for index in answers for _ in range(2)], equal)


@functools.lru_cache(maxsize=8192)
def parse_answer(text: str) -> tuple[list, complex | None]:
    """Return math_verify's parse of `text` and its value (see `grading_shortcuts`)."""
    from math_verify import parse

    from opsd.evaluation.grading_shortcuts import plain_number, value

    wrapped = text if "$" in text else f"${text}$"
    # The time limit is the worker's: math_verify's own cannot interrupt C code.
    number = plain_number(text)
    trees = (
        [number] if number is not None else parse(wrapped, fallback_mode="no_fallback", parsing_timeout=None)
    )
    return trees, value(trees)


def compare(gold: str, predicted: str) -> bool:
    """Return math_verify's verdict on two answers."""
    from math_verify import verify

    from opsd.evaluation.grading_shortcuts import MARGIN

    (gold_trees, gold_value), (trees, its_value) = parse_answer(gold), parse_answer(predicted)
    if gold_value is not None and its_value is not None and abs(gold_value - its_value) > MARGIN:
        return False
    try:
        return verify(gold_trees, trees, timeout_seconds=None)
    except Exception:
        # The protocol's own rule for whatever math_verify raises, its type unknown beforehand.
        strip = str.maketrans("", "", "$ ")
        return gold.translate(strip).lower() == predicted.translate(strip).lower()


def decide(job: dict[str, Any], write: Callable[..., None]) -> None:
    """Decide every pair that `job` needs, writing a line before each step and after each verdict.

    Args:
        job: `texts`, of which the first is the gold answer; `clustered`; `alone`, a single text [I] or pair
            [I, J] to decide instead of all; `known`, the verdicts [I, J, verdict] there are; `unparsable`,
            the texts whose parse was killed; `cpu_limit_s` for each parse and comparison.
    """
    from opsd.evaluation.grading_shortcuts import decide_texts

    texts, parsed = job["texts"], set()
    known = {(i, j): verdict for i, j, verdict in job["known"]}

    def limited(function: Callable[..., Any], *indices: int) -> Any:
        write("start", *indices)
        signal.setitimer(signal.ITIMER_REAL, WALL_FACTOR * job["cpu_limit_s"])
        signal.setitimer(signal.ITIMER_PROF, job["cpu_limit_s"])
        result = function(*(texts[index] for index in indices))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        return result

    def parse_once(index: int) -> None:
        if index not in parsed:
            limited(parse_answer, index)
            parsed.add(index)

    def equal(i: int, j: int) -> Verdict:
        if (i, j) not in known:
            if i in job["unparsable"] or j in job["unparsable"]:
                known[i, j] = False
            else:
                known[i, j] = decide_texts(texts[i], texts[j])
            if known[i, j] is None:
                parse_once(i)
                parse_once(j)
                known[i, j] = limited(compare, i, j)
            write("verdict", i, j, int(known[i, j]))
        return known[i, j]

    if not job["alone"]:
        walk(len(texts), job["clustered"], equal)
    elif len(job["alone"]) == 1:
        parse_once(*job["alone"])
    else:
        equal(*job["alone"])
    write("done")


def serve_jobs(connection: socket.socket, memory_limit_mb: int) -> None:
    """Work as a worker: bounded memory (MiB above what is mapped), no core dump, dies with the server."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with open("/proc/self/statm", encoding="ascii") as statm:
        mapped = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory_limit_mb * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # ANTLR reports syntax errors of hostile answers on the terminal.
    devnull = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(devnull, descriptor)

    def write(*fields: object) -> None:
        connection.sendall((" ".join(map(str, fields)) + "\n").encode("ascii"))

    for line in connection.makefile("rb"):
        decide(json.loads(line), write)


def serve_forks(memory_limit_mb: int) -> None:
    """Fork a worker for each socket that arrives on standard input; end when that is closed."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    for form in _WARM_FORMS:
        parse_answer(form)
    parse_answer.cache_clear()
    # The kernel reaps workers that end.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    requests = socket.socket(fileno=os.dup(0))
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1, 1)
        if not message:
            return
        with socket.socket(fileno=descriptors[0]) as connection:
            if os.fork() == 0:
                requests.close()
                serve_jobs(connection, memory_limit_mb)
                os._exit(0)
