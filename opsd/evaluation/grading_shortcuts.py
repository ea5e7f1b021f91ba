"""Decide cheap pairs of answers without math_verify. For grading processes alone."""

from __future__ import annotations

import re
import zlib
from typing import Any

from mpmath import MPContext
from sympy import Add, E, Expr, Float, I, Integer, Interval, Mul, Pow, Rational, Symbol, Union, pi

_PLAIN_NUMBER = re.compile(r"-?[0-9]{1,9}(\.[0-9]{1,6})?")
# math_verify rounds decimals to 6 places, far below MARGIN; 60 digits outlast a cancellation.
MARGIN, LARGEST = 1e-3, 1e9
_mp = MPContext()
_mp.dps = 60
_CONSTANTS = {pi: _mp.pi, E: _mp.e, I: _mp.j}


def plain_number(text: str) -> Integer | Float | None:
    """Return the number that math_verify parses from a plain integer or decimal; None for other text."""
    match = _PLAIN_NUMBER.fullmatch(text)
    return None if match is None else Float(text) if match[1] else Integer(int(text))


def value(tree: Any) -> Any:
    """Evaluate sums, products and powers of numbers and real symbols, each symbol at a point in [1, 2]."""
    if isinstance(tree, (Rational, Float)):
        result = _mp.mpf(tree.p) / tree.q if isinstance(tree, Rational) else _mp.convert(tree.num)
    elif isinstance(tree, Symbol) and tree.is_real:
        result = 1 + _mp.mpf(zlib.crc32(tree.name.encode("utf-8", "replace"))) / 2**32
    elif isinstance(tree, (Add, Mul)):
        result = (_mp.fsum if isinstance(tree, Add) else _mp.fprod)(map(value, tree.args))
    elif isinstance(tree, Pow):
        base, exponent = value(tree.base), value(tree.exp)
        # A base that may be zero or lie beside the branch cut has no safe power.
        if abs(base) < MARGIN or (base.imag and exponent != _mp.nint(exponent.real)):
            raise ArithmeticError
        result = base**exponent
    else:
        result = +_CONSTANTS[tree]
    if not abs(result) < LARGEST:
        raise ArithmeticError
    return result


def summary(trees: list) -> Any:
    """Return the value of a parsed answer, "interval" for an infinite set of numbers, None for the rest."""
    tree = trees[0] if len(trees) == 1 else None
    if isinstance(tree, Interval) or (
        isinstance(tree, Union) and any(isinstance(s, Interval) for s in tree.args)
    ):
        return "interval"
    # math_verify compares a lone symbol by its name.
    if not isinstance(tree, Expr) or isinstance(tree, Symbol):
        return None
    try:
        return value(tree)
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return None


def clearly_different(a: Any, b: Any) -> bool:
    """Whether two summaries prove that math_verify finds the answers different, in either order."""
    if a is None or b is None or a == b:
        return False
    # A finite number of points is no interval.
    return "interval" in (a, b) or abs(a - b) > MARGIN
