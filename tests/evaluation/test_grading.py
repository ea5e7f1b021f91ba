"""Boxed extraction, verdicts against math_verify's own, clustering, vote, and answers that never end."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from opsd.errors import UsageError
from opsd.evaluation import grading
from opsd.evaluation.grading import Grader, ProblemGrade, extract_boxed, group
from tests.evaluation.answer_forms import DIFFERENT_PAIRS, HOSTILE, SAME_PAIRS, plain_equivalent
from tests.programs import fuzz_grading

SLOW = "\\binom{1000000000}{500000000}"
BOXES = [
    ("The answer is \\boxed{42}.", "42"),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{\\text{a {b} c}}", "\\text{a {b} c}"),
    ("first \\boxed{1}, then \\boxed{2}", "2"),
    ("\\boxed{\\boxed{5}}", "5"),
    ("\\boxed{7} and then \\boxed{\\frac{1}{2", "7"),
    ("\\boxed{1 + \\boxed{2} + 3", "2"),
    ("\\boxed{ 3 \n}", "3"),
    ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
    ("<think>maybe \\boxed{1}</think> so \\boxed{2}", "2"),
    ("<think>it is \\boxed{8}", "8"),
    ("}}} \\boxed{9} {{{", "9"),
    ("\\boxed{x=\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}}", "x=\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ("\\boxed 5", None),
    ("\\fbox{5}", None),
    ("\\boxed5", None),
    ("\\boxed{}", None),
    ("\\boxed{1} \\boxed{  }", None),
    ("\\boxed{1", None),
    ("no box", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "expected"), BOXES)
def test_extract_boxed(text, expected):
    assert extract_boxed(text) == expected


def test_extract_boxed_is_linear_in_unclosed_boxes():
    # A scan from each opening to the end would take minutes.
    assert extract_boxed("\\boxed{" * 300_000 + "1}") == "1"
    assert extract_boxed("\\boxed{" * 300_000) is None


def grade(grader: Grader, gold: str, predicted: list[str | None]) -> ProblemGrade:
    return grader.grade([(gold, predicted)])[0]


@pytest.fixture(scope="module")
def grader():
    # Honest answers take milliseconds; the limit is for a machine that does ten other things.
    with Grader(workers=2, time_limit_s=30.0) as grader:
        yield grader


def test_real_answers_equal_their_rewritten_forms(grader):
    pairs = [(gold, form) for gold, forms in SAME_PAIRS for form in (gold, *forms)]
    wrong = [pair for pair, verdict in zip(pairs, grader.equivalent(pairs), strict=True) if not verdict]
    assert wrong == []


def test_real_answers_differ_from_wrong_ones(grader):
    wrong = [p for p, v in zip(DIFFERENT_PAIRS, grader.equivalent(DIFFERENT_PAIRS), strict=True) if v]
    assert wrong == []


def test_verdicts_are_math_verifys_own(grader):
    """Every form against every other of a random draw, in both orders, oddities included."""
    odd = ["1}}}}}}{{{", "\\text{Evelyn}", "\\frac{", "", "$5$", "x = 5", "5 = x", "$", "50\\%", "0.5"]
    odd += ["é", "\x00"]
    forms = odd + [form for gold, others in SAME_PAIRS for form in (gold, *others)]
    rng = random.Random(5)
    pairs = [(a, b) for a in odd for b in odd] + [tuple(rng.sample(forms, 2)) for _ in range(120)]
    verdicts = grader.equivalent(pairs)
    assert [pair for pair, v in zip(pairs, verdicts, strict=True) if v != plain_equivalent(*pair)] == []
    # The table exercises both outcomes.
    assert 10 < sum(verdicts) < len(pairs) - 10


def test_random_pairs_get_math_verifys_verdicts():
    differing, killed, equal = fuzz_grading.differences(300, seed=11)
    assert (differing, killed) == ([], 0)
    assert equal > 10


def test_known_oddities(grader):
    pairs = [("1}}}}}}{{{", "1"), ("\\text{Evelyn}", "\\text{Evelyn}"), ("\\frac{", "\\frac{"), ("9", "9\\%")]
    assert grader.equivalent(pairs) == [True, True, False, True]
    # An escaped dollar keeps the text from being wrapped, and math_verify then finds nothing in it.
    assert grader.equivalent([("\\$18.90", "\\$18.90"), ("\\$18.90", "18.90")]) == [False, False]


def test_an_unparseable_answer_founds_a_cluster_each_time(grader):
    graded = grade(grader, "5", ["\\frac{", "\\frac{", "5"])
    assert graded.clusters == [[0], [1], [2]]
    assert (graded.winner, graded.majority_correct) == (0, False)


@pytest.mark.parametrize(
    ("gold", "predicted", "expected"),
    [
        ("5", ["5", "5.0", "6"], ProblemGrade([True, True, False], [[0, 1], [2]], 0, True)),
        # A tie goes to the cluster that was founded first.
        ("5", ["6", "5", "5", "6"], ProblemGrade([False, True, True, False], [[0, 3], [1, 2]], 0, False)),
        # INVALID competes like any other cluster, and is wrong where it wins.
        ("5", [None, "5", None], ProblemGrade([False, True, False], [[0, 2], [1]], 0, False)),
        ("5", ["5", None, "5", None], ProblemGrade([True, False] * 2, [[0, 2], [1, 3]], 0, True)),
        ("5", [None, "5", "5", None], ProblemGrade([False, True, True, False], [[0, 3], [1, 2]], 0, False)),
        ("5", [], ProblemGrade([], [], None, False)),
        ("5", [None], ProblemGrade([False], [[0]], 0, False)),
        # `x=5` equals 5 with either as gold; the first member is what is graded.
        ("x=5", ["5", "x=5", "7"], ProblemGrade([True, True, False], [[0, 1], [2]], 0, True)),
    ],
)
def test_votes(grader, gold, predicted, expected):
    assert grade(grader, gold, predicted) == expected


def test_clustering_takes_either_direction():
    equal_only_as = {("b", "a")}
    assert group(["a", "b"], lambda a, b: a == b or (a, b) in equal_only_as) == [[0, 1]]
    # The other direction of a killed comparison is not tried.
    assert group(["a", "b"], lambda a, b: None if (a, b) == ("a", "b") else True) == [[0], [1]]


def test_a_pair_is_decided_once(monkeypatch):
    answers = ["x+5", "x+6", "5+x", "x+6"]
    with Grader(workers=1, time_limit_s=30) as grader:
        first = grade(grader, "x+5", answers)
        monkeypatch.setattr(grading._Comparison, "_ask", lambda *_: pytest.fail("it is known"))
        assert grade(grader, "x+5", answers) == first


def test_hostile_answers_are_killed_and_the_rest_is_graded():
    with Grader(workers=2, time_limit_s=1.0) as grader:
        problems = [("5", ["5", hostile, "7", hostile, "5.0"]) for hostile in HOSTILE]
        for graded in grader.grade(problems):
            assert graded.correct == [True, False, False, False, True]
            assert graded.majority_correct
        texts = {text for killed in grader.killed for text in (killed.gold, killed.predicted)}
        # Nobody decides it in a second.
        assert SLOW in texts
        assert grader.limits()["killed"] == len(grader.killed)


def test_a_slow_text_leaves_other_problems_and_pairs_alone():
    with Grader(workers=1, time_limit_s=1.0) as grader:
        assert grade(grader, SLOW, ["0.5", "3"]).correct == [False, False]
        killed = len(grader.killed)
        # `0.5` met the slow gold answer; that says nothing about 0.5 with another partner.
        percent = plain_equivalent("0.5", "50\\%")
        assert grade(grader, "0.5", ["\\frac{1}{2}", "50\\%"]).correct == [True, percent]
        assert len(grader.killed) == killed > 0
        assert grader.limits()["killed_items"][0] == {"gold": SLOW, "predicted": None}


def test_a_stopped_worker_keeps_its_cpu_time_and_a_killed_item_is_tried_twice():
    """Stop a worker in the middle of an item for twice the limit, and watch it and its successor die."""
    used: dict[int, float] = {}
    with Grader(workers=1, time_limit_s=1.5) as grader:
        grade(grader, "x", ["x+5"])
        server = grader._server.pid
        grades: list[ProblemGrade] = []
        thread = threading.Thread(target=lambda: grades.append(grade(grader, "x+5", [SLOW])))
        thread.start()
        stopped = False
        while thread.is_alive():
            with contextlib.suppress(OSError, IndexError, ValueError):
                pid = int(Path(f"/proc/{server}/task/{server}/children").read_text().split()[-1])
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                used[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                if not stopped and used[pid] > 0.4:
                    os.kill(pid, signal.SIGSTOP)
                    time.sleep(3)
                    os.kill(pid, signal.SIGCONT)
                    stopped = True
            time.sleep(0.01)
        assert stopped
        assert [seconds > 1.0 for seconds in used.values()] == [True, True], used
        assert (grades[0].correct, len(grader.killed)) == ([False], 1)


def test_the_grader_works_from_another_folder(tmp_path):
    root = str(Path(__file__).resolve().parents[2])
    code = (
        f"import sys; sys.path.append({root!r})\n"
        "from opsd.evaluation.grading import Grader\n"
        "with Grader(workers=1, time_limit_s=1) as grader:\n"
        "    print(grader.grade([('5', ['5.0', '100000000!', 'x+5'])])[0].correct, len(grader.killed))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.startswith("[True, False, False]"), done.stderr


def test_the_memory_of_a_worker_is_bounded():
    with Grader(workers=1, time_limit_s=5.0, memory_limit_mb=256) as grader:
        # 3^(10^9) has 200 MB; the worker survives or is ended, and the next answer is graded.
        assert grade(grader, "5", ["5", "3^{1000000000} - 3^{999999999}"]).correct == [True, False]
        assert grade(grader, "7", ["7"]).correct == [True]


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"time_limit_s": 0}, {"memory_limit_mb": 1}])
def test_limits_are_checked(wrong):
    with pytest.raises(UsageError, match=r"at least|more than"):
        Grader(**wrong)
