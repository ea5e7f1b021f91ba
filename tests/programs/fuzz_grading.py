"""python -m tests.programs.fuzz_grading [--pairs 20000] [--seed 0] [--load 4]

Compare the grader's verdicts with plain math_verify's (protocol, section 5) on random pairs of answers: forms
of `answer_forms`, generated numbers, pairs, intervals, lists, expressions and equations, their rewritten
forms, and damaged texts. --load starts that many busy processes, and the grader's limits stay in force. Exits
with 1 when a verdict differs or a pair was killed.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import random
import sys
from collections.abc import Iterator

from opsd.evaluation.grading import Grader
from tests.evaluation.answer_forms import SAME_PAIRS, plain_equivalent

KNOWN = [form for gold, others in SAME_PAIRS for form in (gold, *others)]
PAIRS_OF_A_PROBLEM = 50
TEMPLATES = (
    "{a}", "{a}", "-{a}", "{a}.{b}", "{a}.0", "0{a}", "\\frac{{{a}}}{{{b}}}", "-\\dfrac{{{a}}}{{{b}}}",
    "{a}/{b}", "{a}\\sqrt{{{b}}}", "\\sqrt{{{a}}}", "{a}^{{1/2}}", "{a}+{b}\\sqrt{{{c}}}", "{a}\\pi",
    "{a}^\\circ", "{a}\\%", "{b}!", "2^{{{b}}}\\cdot {b}!", "(-{a})^{{{b}/3}}", "{a}{b}", "{a},{b}00",
    "{a}.{b}0000{c}", "x^{b}+{a}x-{c}", "({a},{b})", "({a},{b})", "[{a},{b})", "({a},{b}]", "[{a},{a}]",
    "({a},{b}00)", "({a},{b},{c})", "({a},\\infty)", "(-\\infty,{a})\\cup({b},\\infty)",
    "({a},{b})\\cup({b},{c})", "(\\frac{{{a}}}{{{b}}},-{c})", "\\{{{a},{b}\\}}", "{a},{b}", "{a},{b},{c}",
    "{a}\\text{{ or }}{b}", "{a}\\text{{ and }}{b}", "{a}<x<{b}", "x={a}", "y = {a}x + {b}", "{a}+{b}i",
    "x", "e", "ab", "\\text{{(C)}}", "\\text{{even}}", "\\text{{}}{a}", "{a}\\pm{b}", "\\infty",
    "\\emptyset", "\\begin{{pmatrix}}{a}\\\\{b}\\end{{pmatrix}}", "{a}\\text{{ cm}}", "{a} x", "n{a}",
)  # fmt: skip


def rewritten(text: str, rng: random.Random) -> str:
    """Return `text` as another sample may write it, or damaged."""
    cut = rng.randrange(len(text) + 1)
    return rng.choice(
        (
            text.replace("\\frac", "\\dfrac"),
            text.replace("(", "\\left(").replace(")", "\\right)"),
            text.replace(",", ", "),
            text.replace(" ", ""),
            f" {text} ",
            f"\\text{{}}{text}",
            f"${text}$",
            f"{text}.",
            f"-{text}",
            text[:cut] + text[cut + 1 :],
            text[:cut] + rng.choice("0123 ,.()[]{}\\^x=!%$") + text[cut:],
        )
    )


def answers(rng: random.Random) -> Iterator[str]:
    """Yield random answers; small numbers, so that equal ones meet."""
    while True:
        a, b, c = (rng.choice((rng.randrange(1, 6), rng.randrange(100))) for _ in range(3))
        text = rng.choice(KNOWN) if rng.random() < 0.2 else rng.choice(TEMPLATES).format(a=a, b=b, c=c)
        yield rewritten(text, rng) if rng.random() < 0.3 else text


def differences(pairs: int, seed: int) -> tuple[list[tuple[str, str, bool]], int, int]:
    """Return the (gold, predicted, grader's verdict) that differ, the killed items, the equal pairs."""
    rng = random.Random(seed)
    source = answers(rng)
    drawn: list[tuple[str, str]] = []
    while len(drawn) < pairs:
        gold = next(source)
        others = [next(source) for _ in range(PAIRS_OF_A_PROBLEM // 2 - 3)]
        others += [gold, *(rewritten(gold, rng) for _ in range(2))]
        drawn += [pair for other in others for pair in ((gold, other), (other, gold))]
    drawn = drawn[:pairs]
    with Grader() as grader:
        verdicts = grader.equivalent(drawn)
        killed = len(grader.killed)
    differing = [
        (*pair, verdict)
        for pair, verdict in zip(drawn, verdicts, strict=True)
        if verdict != plain_equivalent(*pair)
    ]
    return differing, killed, sum(verdicts)


def _spin(parent: int) -> None:
    while os.getppid() == parent:  # a killed program takes its load with it
        pass


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--load", type=int, default=4, help="busy processes beside the grader")
    args = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    busy = [
        multiprocessing.get_context("spawn").Process(target=_spin, args=(os.getpid(),), daemon=True)
        for _ in range(args.load)
    ]
    for process in busy:
        process.start()
    differing, killed, equal = differences(args.pairs, args.seed)
    for process in busy:
        process.kill()
    for gold, predicted, verdict in differing:
        print(f"gold {gold!r}, predicted {predicted!r}: the grader says {verdict}")
    outcome = f"{equal} equal, {len(differing)} differ, {killed} killed"
    print(f"{args.pairs} pairs, {outcome}, {args.load} busy processes")
    return 1 if differing or killed else 0


if __name__ == "__main__":
    sys.exit(main())
