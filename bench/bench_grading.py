"""python bench/bench_grading.py [--problems 500] [--samples 12] [--benchmark FILE.jsonl] [--hostile 200]

Two measurements, printed as one Markdown table each.

1. Grading and voting over problems x samples answers: `opsd.evaluation.grading.Grader` against the plain
   form, one process that calls math_verify's parse and verify for each comparison. All verdicts must be
   equal. The ratio is of processor seconds, which a busy machine leaves alone. It leaves out the imports of
   the plain form and the start of the grader's processes, which is printed too.
2. Hostile answers, each graded three times beside ordinary ones: seconds for each, killed comparisons, and
   the largest memory of a worker.

The gold answers are forms typed in from competition answers with random numbers, or those of --benchmark
(JSON lines with `answer`). About three quarters of the samples are correct, a quarter of these rewritten.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from opsd.errors import ArtefactError, run_cli
from opsd.evaluation.grading import Grader, ProblemGrade
from tests.evaluation.answer_forms import plain_equivalent

Problems = list[tuple[str, list[str | None]]]

# Shapes of gold answers of the four benchmarks, `{a}` and so on being small positive integers.
FORMS = (
    *["{a}"] * 18,
    *["{a}{b}"] * 8,
    *["\\frac{{{a}}}{{{b}}}"] * 6,
    "-\\frac{{{a}}}{{{b}}}",
    "{a}\\sqrt{{{b}}}",
    "\\sqrt{{{a}}}",
    "{a} + {b}\\sqrt{{{c}}}",
    "({a},{b})",
    "({a},\\infty)",
    "\\left( \\frac{{{a}}}{{{b}}}, -{c} \\right)",
    "{a}\\pi",
    "\\frac{{\\pi}}{{{a}}}",
    "{a}^\\circ",
    "\\text{{even}}",
    "x^{a} + {b}x - {c}",
    "y = {a}x + {b}",
    "{a},{b},{c}",
    "\\begin{{pmatrix}} {a} \\\\ -{b} \\\\ {c} \\end{{pmatrix}}",
    "(-\\infty, {a}) \\cup ({b}, \\infty)",
    "{a}+{b}i",
    "\\${a}.{b}0",
    "{a}.{b}",
    "2^{{{a}}} \\cdot {b}!",
)


def gold_answers(count: int, rng: random.Random) -> list[str]:
    """`count` answers in the forms above."""
    golds = []
    for _ in range(count):
        a, b, c = rng.sample(range(2, 40), 3)
        golds.append(rng.choice(FORMS).format(a=a, b=b, c=c))
    return golds


def rewritten(gold: str, rng: random.Random) -> str:
    """The same answer as another model run may write it."""
    return rng.choice(
        (
            gold.replace("\\frac", "\\dfrac"),
            gold.replace("(", "\\left(").replace(")", "\\right)") if "\\left" not in gold else gold,
            f"{gold} ",
            f"\\text{{}}{gold}",
            gold.replace(" ", ""),
            f"{gold}.0" if gold.isdigit() else f" {gold}",
            gold.replace("+", " + "),
        )
    )


def make_problems(golds: Sequence[str], samples: int, rng: random.Random) -> Problems:
    """Samples as a model gives them: a problem's own accuracy, few wrong answers, some unformatted."""
    problems: Problems = []
    for gold in golds:
        accuracy = rng.betavariate(2.4, 0.8)
        wrong = [*gold_answers(3, rng), str(rng.randrange(1000))]
        answers: list[str | None] = []
        for _ in range(samples):
            draw = rng.random()
            if draw < 0.02:
                answers.append(None)
            elif rng.random() < accuracy:
                answers.append(rewritten(gold, rng) if rng.random() < 0.25 else gold)
            else:
                answers.append(rng.choice(wrong))
        problems.append((gold, answers))
    return problems


# -- the plain form ------------------------------------------------------------------------------------------


def plain_grade(gold: str, answers: Sequence[str | None]) -> ProblemGrade:
    """The protocol's grading and vote, read off."""
    correct = [answer is not None and plain_equivalent(gold, answer) for answer in answers]
    clusters: list[list[int]] = []
    for index, answer in enumerate(answers):
        for cluster in clusters:
            first = answers[cluster[0]]
            if (answer is None) != (first is None):
                continue
            if answer is None or plain_equivalent(first, answer) or plain_equivalent(answer, first):
                cluster.append(index)
                break
        else:
            clusters.append([index])
    sizes = [len(cluster) for cluster in clusters]
    winner = sizes.index(max(sizes))
    first = clusters[winner][0]
    return ProblemGrade(correct, clusters, winner, answers[first] is not None and correct[first])


# -- hostile answers -----------------------------------------------------------------------------------------


def hostile_answers(count: int) -> list[str]:
    """`count` distinct answers on which sympy, a regular expression or a parser may take for ever."""
    kinds: tuple[Callable[[int], str], ...] = (
        lambda n: f"{10**8 + n}!",
        lambda n: f"\\binom{{{10**9 + n}}}{{{5 * 10**8}}}",
        lambda n: f"9^{{9^{{9^{{{9 + n}}}}}}}",
        lambda n: "\\sqrt{" * (2000 + n) + "2" + "}" * (2000 + n),
        lambda n: "\\{" + ",".join(str(k + n) for k in range(1000)) + "\\}",
        lambda n: f"{n} and so on " * 15_000,
        lambda n: f"({n}" + "(" * 5000,
        lambda n: "x" * (100_000 + n),
        lambda n: "\\frac{" * (500 + n) + "1",
        lambda n: f"\\sum_{{k=1}}^{{{10**9 + n}}} \\frac{{1}}{{k^2+k+{n}}}",
        lambda n: f"\\int_0^{{{n}}} e^{{-x^2}} \\sin(x^3) \\log(x+{n}) dx",
        lambda n: "+".join(f"\\sqrt{{{k * k + n + 1}}}" for k in range(60)),
        lambda n: f"\\prod_{{k=1}}^{{{10**7 + n}}} (k^2+1)",
        lambda n: "1" * (50_000 + n),
        lambda n: f"10^{{10^{{{10 + n}}}}} - 10^{{10^{{{9 + n}}}}}",
        lambda n: f"(x+y+z+{n})^{{{500 + n}}}",
        lambda n: (
            "\\begin{pmatrix}" + "\\\\".join("&".join([str(n)] * 40) for _ in range(40)) + "\\end{pmatrix}"
        ),
        lambda n: f"\x00\ud800{n}\u202e{{}}}}{{" + "$" * n,
        lambda n: f"\\sin^{{{10**6 + n}}}(x) + \\cos^{{{10**6 + n}}}(x) = 1",
        lambda n: "-" * (3000 + n) + "1",
    )
    return [kinds[index % len(kinds)](index // len(kinds)) for index in range(count)]


def descendants() -> list[tuple[float, float]]:
    """Resident memory (MiB) and processor time so far (seconds) of each descendant of this process."""
    parents, used = {}, {}
    page_mb, tick_s = os.sysconf("SC_PAGE_SIZE") / 2**20, 1 / os.sysconf("SC_CLK_TCK")
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                resident_mb = int((entry / "statm").read_text().split()[1]) * page_mb
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
            used[int(entry.name)] = (resident_mb, (int(fields[11]) + int(fields[12])) * tick_s)
    found = []
    for pid in used:
        ancestor = parents[pid]
        while ancestor in parents and ancestor != os.getpid():
            ancestor = parents[ancestor]
        if ancestor == os.getpid():
            found.append(used[pid])
    return found


def worker_memory_mb(stop: threading.Event, largest: list[float]) -> None:
    """Sample the resident memory of this process's descendants into `largest[0]`, in MiB, until stopped."""
    while not stop.wait(0.2):
        largest[0] = max(largest[0], *(resident_mb for resident_mb, _ in descendants()), 0.0)


def processor_s() -> float:
    """Processor time of this process and its descendants so far, in seconds."""
    return time.process_time() + sum(seconds for _, seconds in descendants())


# -- the measurements ----------------------------------------------------------------------------------------


def measure_speed(problems: Problems, workers: int) -> None:
    """Time both forms on `problems` and print the ratio. Raises ArtefactError when a verdict differs."""
    import math_verify  # noqa: F401  (the plain form's import is not timed)

    start, start_cpu = time.perf_counter(), processor_s()
    with Grader(workers=workers) as grader:
        # As many problems as keep every worker busy, so that all of them have started.
        grader.grade([("x", [f"x + {n}"]) for n in range(1, 65)])
        start_s, start_cpu_s = time.perf_counter() - start, processor_s() - start_cpu
        start, start_cpu = time.perf_counter(), processor_s()
        grades = grader.grade(problems)
        fast_s, fast_cpu_s = time.perf_counter() - start, processor_s() - start_cpu
    start, start_cpu = time.perf_counter(), time.process_time()
    expected = [plain_grade(*problem) for problem in problems]
    plain_s, plain_cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    differing = [p for p, ours, plain in zip(problems, grades, expected, strict=True) if ours != plain]
    if differing:
        raise ArtefactError(
            f"{len(differing)} problems are graded differently, the first being {differing[0]}"
        )
    answers = sum(len(answers) for _, answers in problems)
    distinct = sum(len({*answers} - {None}) for _, answers in problems)
    print(f"{len(problems)} problems, {answers} answers, {distinct} distinct within their problem")
    print("| form | processor seconds, all processes | ratio | seconds |\n| --- | --- | --- | --- |")
    print(f"| one process, parse and verify each | {plain_cpu_s:.1f} | 1 | {plain_s:.1f} |")
    ratio = plain_cpu_s / fast_cpu_s
    print(f"| Grader, {workers} workers, started | {fast_cpu_s:.2f} | {ratio:.1f} | {fast_s:.2f} |")
    print(f"| start of the workers | {start_cpu_s:.2f} | | {start_s:.2f} |")
    print(f"verdicts, clusters and votes identical; killed: {len(grader.killed)}\n")


def measure_hostile(count: int, workers: int, time_limit_s: float) -> None:
    """Grade hostile answers one problem at a time and print what the slowest took."""
    stop, largest, seconds = threading.Event(), [0.0], []
    watcher = threading.Thread(target=worker_memory_mb, args=(stop, largest), daemon=True)
    watcher.start()
    with Grader(workers=workers, time_limit_s=time_limit_s) as grader:
        grader.grade([("5", ["x"])])
        for hostile in hostile_answers(count):
            start = time.perf_counter()
            (grade,) = grader.grade([("5", ["5", hostile, "7", hostile, "5.0", hostile])])
            seconds.append(time.perf_counter() - start)
            if grade.correct != [True, False, False, False, True, False]:
                raise ArtefactError(f"ordinary answers beside {hostile[:40]!r} are graded {grade.correct}")
        killed = len(grader.killed)
    stop.set()
    watcher.join()
    print(
        f"{count} hostile answers, limit {time_limit_s:g} s and {grader.memory_limit_mb} MiB for each worker"
    )
    print("| slowest | mean | killed | largest worker |\n| --- | --- | --- | --- |")
    print(f"| {max(seconds):.2f} s | {sum(seconds) / count:.2f} s | {killed} | {largest[0]:.0f} MiB |")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=500)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument(
        "--benchmark", type=Path, help="JSON lines with `answer`, instead of random gold answers"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--hostile", type=int, default=200, help="how many hostile answers; 0 leaves them out"
    )
    parser.add_argument("--time_limit_s", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rng = random.Random(args.seed)
    if args.benchmark:
        golds = [str(json.loads(line)["answer"]) for line in args.benchmark.read_text("utf-8").splitlines()]
    else:
        golds = gold_answers(args.problems, rng)
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(
        f"{platform.machine()}, {cores} cores, load average {load:.1f}, Python {platform.python_version()}\n"
    )
    if args.problems:
        measure_speed(make_problems(golds[: args.problems], args.samples, rng), args.workers)
    if args.hostile:
        measure_hostile(args.hostile, args.workers, args.time_limit_s)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
