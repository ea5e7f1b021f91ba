"""Decide simple pairs as math_verify does, which tests/programs/fuzz_grading.py checks, and faster."""

import re
import zlib
from fractions import Fraction
from typing import Any

import sympy as sp

MARGIN = 1e-3  # math_verify rounds decimals to 6 places
_NUMBER = re.compile(r"-?\d{1,9}(?:\.\d{1,6})?|(-?)\\d?frac\{(\d{1,9})\}\{([1-9]\d{0,8})\}", re.ASCII)
# Numbers of three digits are left out: `(1,000)` is one number.
_END = r"(?:-?\d{1,2}|-?\\d?frac\{\d{1,2}\}\{[1-9]\d?\}|[-+]?\\infty)"
_PAIRS = re.compile(rf"\({_END},{_END}\)(?:\\cup\({_END},{_END}\))?", re.ASCII)
_LETTER, _WORD = r"[a-zA-Z](?![a-zA-Z])", r"\\text\{(?!and|or)[a-z]*\}"
_ONE = rf"(?:[-+0-9.^{{}}! ]|{_LETTER}|{_WORD}|\\(?:d?frac|sqrt|pi|cdot|circ)(?![a-zA-Z]))+"
_EXPRESSION = re.compile(rf"(?:[a-z] ?= ?)?{_ONE}")

_NODES = (sp.Rational, sp.Float, sp.NumberSymbol, type(sp.I), sp.Add, sp.Mul, sp.Symbol, sp.factorial)


def plain_number(text: str) -> sp.Number | None:
    """Return what math_verify parses from a plain integer or decimal; None for other texts."""
    match = _NUMBER.fullmatch(text)
    return None if match is None or match[2] else sp.Float(text) if "." in text else sp.Integer(int(text))


def decide_texts(gold: str, predicted: str) -> bool | None:
    """Decide two plain numbers, or a pair or interval against the same or one expression; else None."""
    texts = (gold, predicted)
    if all(matches := [_NUMBER.fullmatch(text) for text in texts]):
        a, b = [Fraction(f"{m[1]}{m[2]}/{m[3]}" if m[2] else m[0]) for m in matches if m]
        return False if abs(a - b) > MARGIN else None if "." in gold + predicted else a == b
    bare = [re.sub(r"\\left(?=\()|\\right(?=\))|\\text\{\}| ", "", text) for text in texts]
    pairs = [_PAIRS.fullmatch(text) for text in bare]
    if all(pairs):
        return True if bare[0] == bare[1] else None
    return False if any(pairs) and any(map(_EXPRESSION.fullmatch, texts)) else None


def value(trees: list) -> complex | None:
    """Return the value of one parsed sum, product or power, each symbol at a fixed point; else None."""

    def is_plain(node: Any) -> bool:
        if isinstance(node, sp.Pow):  # the power of a base beside the branch cut has no safe value
            return node.exp.is_Integer or bool(node.base.is_positive)
        return isinstance(node, _NODES)

    # math_verify compares a lone symbol by its name.
    if len(trees) != 1 or not isinstance(trees[0], sp.Expr) or isinstance(trees[0], sp.Symbol):
        return None
    try:
        if all(map(is_plain, sp.preorder_traversal(trees[0]))):
            points = {s: 1 + zlib.crc32(str(s).encode()) / 2**32 for s in trees[0].free_symbols}
            return complex(trees[0].evalf(subs=points))
    except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError):
        pass
    return None
