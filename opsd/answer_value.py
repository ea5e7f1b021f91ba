"""A cheap proof that two parsed answers differ, so that math_verify need not be asked.

Nearly all comparisons of a vote are between answers that differ, and math_verify takes longest over exactly
those: it simplifies their difference. Here each answer is evaluated once, to 100 digits, at one fixed
positive value for each of its symbols. Two expressions with clearly different values are not identical, so
their difference cannot simplify to zero. Only kinds of answers take part for which every path through
math_verify's comparison ends in that question (the tests check it against math_verify); the others go to
math_verify.

Imports sympy and mpmath, and belongs in a grading process.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

import mpmath
import sympy
from mpmath import mp

# Below this bound 60 decimals are left after any one cancellation.
LARGEST = mpmath.mpf(10) ** 40
DIGITS = 100
# A power's natural logarithm stays within this in size.
LARGEST_LOG = 50
LARGEST_FACTORIAL = 34
# math_verify rounds decimals to 6 places; values further apart than this are different by any of its tests.
ABSOLUTE, RELATIVE = 1e-3, 1e-5
MAX_NODES = 300

FUNCTIONS = {
    sympy.exp: mpmath.exp,
    sympy.sin: mpmath.sin,
    sympy.cos: mpmath.cos,
    sympy.tan: mpmath.tan,
    sympy.cot: mpmath.cot,
    sympy.sec: mpmath.sec,
    sympy.csc: mpmath.csc,
    sympy.Abs: abs,
}
CONSTANTS = {
    sympy.pi: lambda: +mp.pi,
    sympy.E: lambda: +mp.e,
    sympy.I: lambda: mpmath.mpc(0, 1),
    sympy.oo: lambda: mpmath.inf,
    sympy.S.NegativeInfinity: lambda: -mpmath.inf,
}


class NoValue(Exception):
    """The expression has no value that could serve in a proof."""


@dataclass(frozen=True)
class Value:
    """What is known of one parsed expression.

    Attributes:
        kind: "number" (an expression), "several" (a finite set or tuple), "interval", "union" (of sets, at
            least one of them an interval) or "matrix".
        shape: rows and columns of a matrix, openness of an interval's ends, otherwise empty.
        entries: the values of its parts; none for a union.
        equation: whether this is the right-hand side of `symbol = ...`.
    """

    kind: str
    shape: tuple[Any, ...]
    entries: tuple[mpmath.mpc, ...]
    equation: bool = False


def value_of(tree: Any) -> Value | None:
    """The value of one parsed expression, None where it cannot serve in a proof. Bounded in time."""
    try:
        with mp.workdps(DIGITS):
            return _value(tree)
    except (NoValue, ArithmeticError, ValueError):
        return None


def _value(tree: Any) -> Value:
    if (
        isinstance(tree, sympy.Eq)
        and isinstance(tree.lhs, sympy.Symbol)
        and not isinstance(tree.rhs, sympy.Rel)
    ):
        # `x = 5` is compared with what is no equation as 5; two equations are compared as such.
        return replace(_value(tree.rhs), equation=True)
    if isinstance(tree, sympy.Union) and any(isinstance(part, sympy.Interval) for part in tree.args):
        return Value("union", (), ())
    if isinstance(tree, sympy.MatrixBase):
        return Value("matrix", tuple(tree.shape), _entries(tree.flat()))
    if isinstance(tree, sympy.Interval):
        return Value(
            "interval", (bool(tree.left_open), bool(tree.right_open)), _entries((tree.start, tree.end))
        )
    if isinstance(tree, (sympy.FiniteSet, sympy.Tuple)):
        return Value("several", (), _entries(tree.args))
    return Value("number", (), _entries((tree,)))


def _entries(trees: Any) -> tuple[mpmath.mpc, ...]:
    trees = tuple(trees)
    # A lone symbol is compared by its name, and "abc" is equal to a product of a, b and c.
    if not trees or len(trees) > MAX_NODES or any(isinstance(tree, sympy.Symbol) for tree in trees):
        raise NoValue
    budget = [MAX_NODES]
    return tuple(_number(tree, budget) for tree in trees)


def _number(tree: Any, budget: list[int]) -> mpmath.mpc:
    """Value of one expression; every intermediate one is bounded by LARGEST."""
    budget[0] -= 1
    if budget[0] < 0 or not isinstance(tree, sympy.Expr):
        raise NoValue
    if isinstance(tree, sympy.Rational):
        if max(abs(tree.p), tree.q).bit_length() > 128:
            raise NoValue
        return mpmath.mpc(mpmath.mpf(int(tree.p)) / int(tree.q))
    if isinstance(tree, sympy.Float):
        return _bounded(mpmath.mpc(mpmath.mpf(tree._mpf_)))
    if tree.is_Atom and tree in CONSTANTS:
        return mpmath.mpc(CONSTANTS[tree]())
    if isinstance(tree, sympy.Symbol):
        return _symbol(tree)
    if isinstance(tree, (sympy.Add, sympy.Mul)):
        parts = [_finite(_number(part, budget)) for part in tree.args]
        combine = mpmath.fsum if isinstance(tree, sympy.Add) else mpmath.fprod
        for part in parts:
            _bounded(part)
        return _bounded(combine(parts))
    if isinstance(tree, sympy.Pow):
        return _power(*(_finite(_number(part, budget)) for part in tree.args))
    if tree.func is sympy.factorial:
        argument = tree.args[0]
        if not isinstance(argument, sympy.Integer) or not 0 <= argument <= LARGEST_FACTORIAL:
            raise NoValue
        return mpmath.mpc(math.factorial(int(argument)))
    if tree.func is sympy.log:
        arguments = [_finite(_number(part, budget)) for part in tree.args]
        if any(argument == 0 for argument in arguments):
            raise NoValue
        return _bounded(mpmath.mpc(mpmath.log(*arguments)))
    if tree.func in FUNCTIONS:
        argument = _finite(_number(tree.args[0], budget))
        if abs(argument) > 1e3:
            raise NoValue
        return _bounded(mpmath.mpc(FUNCTIONS[tree.func](argument)))
    raise NoValue


def _finite(value: mpmath.mpc) -> mpmath.mpc:
    if not mpmath.isfinite(value):
        raise NoValue
    return value


def _bounded(value: mpmath.mpc) -> mpmath.mpc:
    if abs(_finite(value)) > LARGEST:
        raise NoValue
    return value


def _symbol(symbol: sympy.Symbol) -> mpmath.mpc:
    """A fixed value between 1 and 2 for a real symbol, from its name."""
    if not symbol.is_real:
        raise NoValue
    digest = hashlib.sha256(symbol.name.encode("utf-8", "surrogatepass")).digest()
    return mpmath.mpc(1 + mpmath.mpf(int.from_bytes(digest[:12], "big")) / 2**96)


def _power(base: mpmath.mpc, exponent: mpmath.mpc) -> mpmath.mpc:
    if base == 0:
        if exponent.imag == 0 and exponent.real > 0:
            return mpmath.mpc(0)
        raise NoValue
    if abs(exponent) > 1e6 or abs(exponent) * abs(mpmath.log(base)) > LARGEST_LOG:
        raise NoValue
    return _bounded(mpmath.mpc(mpmath.power(base, exponent)))


def clearly_different(a: Value | None, b: Value | None) -> bool:
    """Whether two values prove that math_verify finds the answers different, in either order."""
    if a is None or b is None or (a.equation and b.equation):
        return False
    if "matrix" in (a.kind, b.kind):
        return a.kind == b.kind and (a.shape != b.shape or not all(map(_near, a.entries, b.entries)))
    if a.kind == b.kind == "interval":
        return a.shape != b.shape or not all(map(_near, a.entries, b.entries))
    if {a.kind, b.kind} in ({"number", "interval"}, {"number", "union"}, {"several", "union"}):
        # Finitely many values are no interval.
        return True
    if "union" in (a.kind, b.kind):
        return False
    # An open interval may be a pair, and a number stands for the set that holds it alone.
    return _has_stranger(a.entries, b.entries) or _has_stranger(b.entries, a.entries)


def _has_stranger(entries: tuple[mpmath.mpc, ...], others: tuple[mpmath.mpc, ...]) -> bool:
    return any(not any(_near(entry, other) for other in others) for entry in entries)


def _near(a: mpmath.mpc, b: mpmath.mpc) -> bool:
    if not (mpmath.isfinite(a) and mpmath.isfinite(b)):
        return a == b
    return abs(a - b) <= max(ABSOLUTE, RELATIVE * max(abs(a), abs(b)))
