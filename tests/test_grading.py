"""Boxed extraction, verdicts against math_verify's own, clustering, vote, and answers that never end."""

from __future__ import annotations

import random

import pytest

from opsd import grading_worker
from opsd.errors import UsageError
from opsd.grading import Grader, ProblemGrade, _Memory, extract_boxed
from opsd.grading_worker import Job, group, walk
from tests.answer_forms import DIFFERENT_PAIRS, HOSTILE, SAME_PAIRS

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


@pytest.fixture(scope="module")
def grader():
    # Honest answers take milliseconds; the limit is for a machine that does ten other things.
    with Grader(workers=2, time_limit_s=30.0) as grader:
        yield grader


def plain(gold: str, predicted: str) -> bool:
    """The protocol's equivalence read off, with math_verify's own time limit."""
    from math_verify import parse, verify

    trees = [
        parse(text if "$" in text else f"${text}$", fallback_mode="no_fallback") for text in (gold, predicted)
    ]
    return verify(*trees, timeout_seconds=5)


def test_real_answers_equal_their_rewritten_forms(grader):
    pairs = [(gold, form) for gold, forms in SAME_PAIRS for form in (gold, *forms)]
    wrong = [pair for pair, verdict in zip(pairs, grader.equivalent(pairs), strict=True) if not verdict]
    assert wrong == []


def test_real_answers_differ_from_wrong_ones(grader):
    wrong = [p for p, v in zip(DIFFERENT_PAIRS, grader.equivalent(DIFFERENT_PAIRS), strict=True) if v]
    assert wrong == []


def test_verdicts_are_math_verifys_own(grader):
    """Every form against every other of a random draw, in both orders, oddities included."""
    odd = [
        "1}}}}}}{{{",
        "\\text{Evelyn}",
        "\\frac{",
        "",
        "$5$",
        "x = 5",
        "5 = x",
        "$",
        "50\\%",
        "0.5",
        "é",
        "\x00",
    ]
    forms = odd + [form for gold, others in SAME_PAIRS for form in (gold, *others)]
    rng = random.Random(5)
    pairs = [(a, b) for a in odd for b in odd] + [tuple(rng.sample(forms, 2)) for _ in range(120)]
    verdicts = grader.equivalent(pairs)
    differing = [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict != plain(*pair)]
    assert differing == []
    # The table exercises both outcomes.
    assert 10 < sum(verdicts) < len(pairs) - 10


def test_known_oddities(grader):
    pairs = [("1}}}}}}{{{", "1"), ("\\text{Evelyn}", "\\text{Evelyn}"), ("\\frac{", "\\frac{"), ("9", "9\\%")]
    assert grader.equivalent(pairs) == [True, True, False, True]
    # An escaped dollar keeps the text from being wrapped, and math_verify then finds nothing in it.
    assert grader.equivalent([("\\$18.90", "\\$18.90"), ("\\$18.90", "18.90")]) == [False, False]


def test_an_unparseable_answer_founds_a_cluster_each_time(grader):
    grade = grader.grade_problem("5", ["\\frac{", "\\frac{", "5"])
    assert grade.clusters == [[0], [1], [2]]
    assert (grade.winner, grade.majority_correct) == (0, False)


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
    assert grader.grade_problem(gold, predicted) == expected


def test_clustering_takes_either_direction():
    equal_only_as = {(2, 1)}
    assert group([1, 2], lambda a, b: a == b or (a, b) in equal_only_as) == [[0, 1]]
    # The other direction of a killed comparison is not tried.
    assert group([1, 2], lambda a, b: None if (a, b) == (1, 2) else True) == [[0], [1]]


def test_a_pair_is_decided_once(monkeypatch):
    asked = []
    job = Job(("5", "6", "7"), True)
    walk(job, lambda i, j: asked.append((i, j)) or i == j)
    assert set(asked) == {(0, 1), (0, 2), (1, 1), (2, 2), (1, 2), (2, 1)}

    with Grader(workers=1) as grader:
        first = grader.grade_problem("5", ["5", "6", "5", "6"])
        monkeypatch.setattr(grader, "_launch", lambda *_: pytest.fail("everything is known already"))
        assert grader.grade_problem("5", ["5", "6", "5", "6"]) == first


def test_hostile_answers_are_killed_and_the_rest_is_graded():
    with Grader(workers=2, time_limit_s=1.0) as grader:
        problems = [("5", ["5", hostile, "7", hostile, "5.0"]) for hostile in HOSTILE]
        for grade in grader.grade(problems):
            assert grade.correct == [True, False, False, False, True]
            assert grade.majority_correct
        texts = {text for killed in grader.killed for text in (killed.text, killed.predicted)}
        # The factorial of 10^8 is decided by nobody in a second.
        assert "100000000!" in texts
        # No hostile answer costs its limit twice although each meets three other answers.
        assert len(grader.killed) <= len(HOSTILE)
        assert grader.limits()["killed"] == len(grader.killed)


def test_a_string_whose_parse_died_costs_nothing_again():
    memory = _Memory()
    memory.parse_died("bad")
    job = memory.job(("5", "bad", "6"), True)
    assert job.dead == {1}
    decider = grading_worker.Decider(job, 0, ledger=-1, time_limit_s=1, deadline=float("inf"))
    assert decider._compute(0, 1) is False


def test_who_is_to_blame_for_a_killed_comparison():
    memory = _Memory()
    memory.comparison_died("gold", "slow", against_gold=True)
    assert memory.suspects == {"slow"}
    # Between predictions: the one that gets stuck with a second partner, whose partners are then cleared.
    memory = _Memory()
    memory.comparison_died("a", "stuck", against_gold=False)
    assert memory.suspects == set()
    memory.comparison_died("b", "stuck", against_gold=False)
    assert memory.suspects == {"stuck"}
    memory.comparison_died("a", "other", against_gold=False)
    assert memory.suspects == {"stuck"}
    assert len(memory.killed) == 3


def test_suspects_are_still_equal_to_themselves():
    same = grading_worker._parse("12!")
    assert grading_worker._structurally_equal(same.trees, grading_worker._parse("12!").trees)
    assert not grading_worker._structurally_equal(same.trees, grading_worker._parse("13!").trees)


def test_the_memory_of_a_worker_is_bounded():
    with Grader(workers=1, time_limit_s=5.0, memory_limit_mb=256) as grader:
        # 3^(10^9) has 200 MB; the worker survives or is ended, and the next answer is graded.
        assert grader.grade_problem("5", ["5", "3^{1000000000} - 3^{999999999}"]).correct == [True, False]
        assert grader.grade_problem("7", ["7"]).correct == [True]


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"time_limit_s": 0}, {"memory_limit_mb": 1}])
def test_limits_are_checked(wrong):
    with pytest.raises(UsageError, match=r"at least|more than"):
        Grader(**wrong)
