"""The grading processes: a server that forks workers, and what a worker does.

A parse or a comparison can be stuck in C code (the factorial of 10^8), where no Python signal handler ever
runs. Each therefore runs under two timers of the kernel whose default action ends the process: one of CPU
time, which a busy or stopped machine does not use up, and behind it a generous one of wall clock.

A worker reads questions `[gold, predicted, seconds of CPU time]` as lines of JSON from its socket. It answers
each with letters: `g` or `p` before it parses the gold or the predicted answer, `c` before it compares, then
`1` or `0`. When it dies its socket closes, and the last letter says what it was doing.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable
from typing import Any

from opsd.evaluation.grading_shortcuts import MARGIN, plain_tree, value

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# The wall-clock limit of one parse or comparison, in units of its limit of CPU time.
WALL_FACTOR = 60

MAX_PARSED = 8192
# The kinds of answers that competitions have. Parsing them fills the parser's tables before a fork.
_WARM_FORMS = (
    "\\frac{1}{2}", "-\\frac{3}{4}\\pi", "2\\sqrt{3}", "\\frac{1+\\sqrt{5}}{2}", "1 + 2\\sqrt{3}", "2.5",
    "90^\\circ", "(1,2)", "\\left(\\frac{1}{2}, -3\\right)", "[1, 2)", "(-\\infty, 1) \\cup (2, \\infty)",
    "\\{1, 2\\}", "1,2,3", "x^2 + 2x - 1", "y = 2x + 1", "(x+1)(x-2)", "2^{10} \\cdot 3!", "1+2i", "\\sin x",
    "\\log_2 3", "50\\%", "10,\\!080", "\\begin{pmatrix} 1 \\\\ -2 \\end{pmatrix}", "\\text{(C)}",
    "\\text{even}", "12_{5}", "\\binom{4}{2}",
)  # fmt: skip
_parsed: dict[str, tuple[list, complex | None]] = {}


def parse_answer(text: str) -> tuple[list, complex | None]:
    """Return math_verify's parse of `text` and its value (see `grading_shortcuts`)."""
    from math_verify import parse

    tree = plain_tree(text)
    wrapped = text if "$" in text else f"${text}$"
    # The time limit is the worker's: math_verify's own cannot interrupt C code.
    trees = [tree] if tree is not None else parse(wrapped, fallback_mode="no_fallback", parsing_timeout=0)
    return trees, value(trees)


def compare(gold: str, predicted: str) -> bool:
    """Return math_verify's verdict on two parsed answers."""
    from math_verify import verify

    (gold_trees, a), (trees, b) = _parsed[gold], _parsed[predicted]
    if a is not None and b is not None:
        # Two equations may be equivalent although their right sides differ.
        equations = gold_trees[0].is_Relational and trees[0].is_Relational
        if abs(a - b) > MARGIN and not equations:
            return False
    try:
        return verify(gold_trees, trees, timeout_seconds=0)
    except Exception:
        # The protocol's own rule for whatever math_verify raises, its type unknown beforehand.
        strip = str.maketrans("", "", "$ ")
        return gold.translate(strip).lower() == predicted.translate(strip).lower()


def decide(gold: str, predicted: str, cpu_limit_s: float, write: Callable[[str], None]) -> bool:
    """Return the verdict on two answers, writing a letter before each step."""

    def limited(letter: str, function: Callable[..., Any], *texts: str) -> Any:
        write(letter)
        signal.setitimer(signal.ITIMER_REAL, WALL_FACTOR * cpu_limit_s)
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
        result = function(*texts)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        return result

    if len(_parsed) > MAX_PARSED:
        _parsed.clear()
    for letter, text in (("g", gold), ("p", predicted)):
        if text not in _parsed:
            _parsed[text] = limited(letter, parse_answer, text)
    return limited("c", compare, gold, predicted)


def serve_jobs(connection: socket.socket, memory_limit_mb: int) -> None:
    """Work as a worker: bounded memory (MiB above what is mapped), no core dump, dies with the server."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with open("/proc/self/statm", encoding="ascii") as statm:
        mapped = int(statm.read().split()[0]) * resource.getpagesize()
    limit = mapped + memory_limit_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # ANTLR reports syntax errors of hostile answers on the terminal.
    devnull = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(devnull, descriptor)

    def write(letter: str) -> None:
        connection.sendall(letter.encode("ascii"))

    for line in connection.makefile("rb"):
        gold, predicted, cpu_limit_s = json.loads(line)
        write(str(int(decide(gold, predicted, cpu_limit_s, write))))


def serve_forks(memory_limit_mb: int) -> None:
    """Fork a worker for each socket that arrives on standard input; end when that is closed."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    for form in _WARM_FORMS:
        parse_answer(form)
    # The collector of a worker leaves alone, and so does not copy, what it shares with the server.
    gc.freeze()
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
