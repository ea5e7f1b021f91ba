"""A value proves two answers different only where math_verify finds them different, in both orders."""

from __future__ import annotations

import itertools
import random

import pytest
import sympy

from opsd.answer_value import clearly_different, value_of
from opsd.fast_parsing import use_fast_numbers, use_fast_prediction
from opsd.grading_worker import _parse
from tests.answer_forms import DIFFERENT_PAIRS, HOSTILE, SAME_PAIRS

x, y = sympy.symbols("x y", real=True)


def differ(a: str, b: str) -> bool:
    return _parse(a).differs_from(_parse(b))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("5", "7", True),
        ("5", "5.0", False),
        ("\\frac{1}{3}", "0.333333", False),
        ("\\frac{1}{3}", "0.3", True),
        ("10^{20}+1-10^{20}", "1", False),
        ("2^{25} \\cdot 26!", "2^{26} \\cdot 26!", True),
        ("x^2+1", "x^2-1", True),
        ("x^2-1", "(x-1)(x+1)", False),
        # A lone symbol is compared by name: `abc` is equal to the product of a, b and c.
        ("abc", "a", False),
        ("\\text{even}", "5", False),
        ("3, 5", "5, 3", False),
        ("3, 5", "3, 6", True),
        ("(3,5)", "3, 5", False),
        ("(3,5)", "[3,5]", True),
        ("(3,\\infty)", "(3,4)", True),
        ("5", "(-\\infty, 2) \\cup (3, \\infty)", True),
        ("x=5", "5", False),
        ("x=5", "6", True),
        # Two equations are compared as equations.
        ("x=5", "y=6", False),
        # 9 % is equal to 9 for math_verify.
        ("9\\%", "9", False),
        ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 3 \\end{pmatrix}", True),
    ],
)
def test_what_is_clearly_different(a, b, expected):
    assert differ(a, b) is expected
    assert differ(b, a) is expected


def test_never_against_math_verify():
    """All pairs of a draw from the table: whatever is proven different, math_verify finds different."""
    from math_verify import verify

    forms = [form for gold, others in SAME_PAIRS for form in (gold, *others)]
    forms += [text for pair in DIFFERENT_PAIRS for text in pair]
    sample = random.Random(1).sample(sorted(set(forms)), 24)
    proven = 0
    for a, b in itertools.combinations(sample, 2):
        if differ(a, b):
            proven += 1
            assert not verify(_parse(a).trees, _parse(b).trees, timeout_seconds=5), (a, b)
            assert not verify(_parse(b).trees, _parse(a).trees, timeout_seconds=5), (b, a)
    # Of the 276 pairs most are different, and for most of these it is proven.
    assert proven > 120


@pytest.mark.parametrize(
    "tree",
    [
        sympy.factorial(10**8, evaluate=False),
        sympy.Pow(9, sympy.Pow(9, sympy.Pow(9, 9, evaluate=False), evaluate=False), evaluate=False),
        sympy.Integer(10) ** 500,
        sympy.zoo,
        sympy.nan,
        sympy.Function("f")(x),
        sympy.Symbol("i", real=False) + 1,
        sympy.Add(*[x**n for n in range(1000)]),
        sympy.UnevaluatedExpr(sympy.Rational(1, 100)),
        "text",
    ],
    ids=str,
)
def test_what_has_no_value(tree):
    assert value_of(tree) is None


def test_no_value_is_never_a_proof():
    assert not clearly_different(None, value_of(sympy.Integer(5)))
    assert not clearly_different(value_of(x + 1), None)


@pytest.mark.parametrize("text", [str(n) for n in (0, 7, 42, 204, 10**17)] + ["-5", "007", "-0", "000"])
def test_plain_integers_are_what_math_verify_parses(text):
    from math_verify import parse

    assert _parse(text).trees == parse(f"${text}$", fallback_mode="no_fallback")


@pytest.fixture
def untouched():
    """The LaTeX parser's class as it is installed; what a test changes in it is undone."""
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy

    names = ("parse", "create_parser", "parse_number", "sll", "fast_numbers")
    before = {name: vars(_Latex2Sympy)[name] for name in names if name in vars(_Latex2Sympy)}
    assert before.keys() == set(names[:3]), "another test left its changes behind"
    yield _Latex2Sympy
    for name in names:
        if name in before:
            setattr(_Latex2Sympy, name, before[name])
        elif name in vars(_Latex2Sympy):
            delattr(_Latex2Sympy, name)


def test_the_fast_parser_gives_the_same_trees(untouched):
    """Including texts on which the fast prediction fails (polynomials) and that are no LaTeX at all."""
    from math_verify import parse, parser

    forms = sorted({form for gold, others in SAME_PAIRS for form in (gold, *others)})
    forms += ["x^2+", "\\frac{", *(text for text in HOSTILE if len(text) < 200 and "!" not in text)]

    def trees() -> list[str]:
        parser.parse_latex_cached.cache_clear()
        return [
            sympy.srepr(parse(f"${form}$", fallback_mode="no_fallback"))
            for form in forms
            if "^{9^" not in form
        ]

    slow, plain_parse = trees(), untouched.parse
    use_fast_prediction()
    use_fast_numbers()
    assert untouched.parse is not plain_parse
    assert untouched.fast_numbers
    assert trees() == slow


@pytest.mark.parametrize(
    "text",
    [
        *("0", "7", "007", "000", "1,000", "12345678901234567890" * 3, "1" * 400),
        *("4.5", "4.50", ".35625", "00.10", "0.1", "3.14159265358979323846", "5.", "0." + "3" * 150),
        *("1e5", "1.5e3"),
    ],
)
def test_fast_numbers_are_the_parsers_own(untouched, text):
    converter = untouched.__new__(untouched)
    slow = sympy.srepr(converter.parse_number(text))
    use_fast_numbers()
    assert sympy.srepr(converter.parse_number(text)) == slow
