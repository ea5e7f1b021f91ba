"""Read plain numbers and pairs as math_verify does, only faster; tests/programs/fuzz_grading.py compares."""

import re
from fractions import Fraction
from typing import Any

MARGIN = 1e-3  # math_verify rounds decimals to 6 places
_FILLING = re.compile(r"\\left(?=\()|\\right(?=\))|\\text\{\}|(?<![0-9a-zA-Z]) | (?![0-9a-zA-Z])")
_NUMBER = r"([-+]?)(?:(\d{1,9}(?:\.\d{1,6})?)|\\d?frac\{(\d{1,9})\}\{([1-9]\d{0,8})\}|(\\infty))"
_PAIR = re.compile(r"\(([^,()]+),(?!\d{3})([^,()]+)\)", re.ASCII)  # `(1,000)` is one number


def plain_number(text: str) -> Fraction | float | None:
    """Return the value of a plain integer, decimal, fraction or infinity; None for another text."""
    if match := re.fullmatch(_NUMBER, _FILLING.sub("", text), re.ASCII):
        sign, decimal, top, bottom, infinity = match.groups()
        return float(f"{sign}inf") if infinity else Fraction(sign + (decimal or f"{top}/{bottom}"))
    return None


def plain_tree(text: str) -> Any:
    """Return math_verify's parse of a plain number, pair or open interval; None for another text."""
    import sympy as sp  # here and below: the process that drives the workers does without

    bare = _FILLING.sub("", text)
    if pair := _PAIR.fullmatch(bare):
        start, end = map(plain_tree, pair.groups())
        return None if None in (start, end) else (sp.Interval.open if start < end else sp.Tuple)(start, end)
    number = plain_number(bare)
    return sp.Float(bare) if number is not None and "." in bare else sp.sympify(number)


def value(trees: list) -> complex | None:
    """Return an expression's value at a fixed point; infinity for a pair or interval; else None."""
    import sympy as sp

    nodes = (sp.Rational, sp.Float, sp.NumberSymbol, type(sp.I), sp.Add, sp.Mul, sp.Symbol, sp.factorial)
    tree = trees[0] if len(trees) == 1 else None
    if isinstance(tree, (sp.Interval, sp.Union, sp.Tuple)) and len(tree.args) > 1 and not tree.free_symbols:
        return complex("inf")
    tree = tree.rhs if isinstance(tree, sp.Eq) and isinstance(tree.lhs, sp.Symbol) else tree
    if not isinstance(tree, sp.Expr) or isinstance(tree, sp.Symbol):  # a lone symbol is compared by its name
        return None
    try:
        others = [node for node in sp.preorder_traversal(tree) if not isinstance(node, nodes)]
        # The power of a base beside the branch cut has no safe value.
        if not all(n.is_Pow and (n.args[1].is_Integer or n.args[0].is_positive) for n in others):
            return None
        point: Any = {s: 1 + int.from_bytes(str(s).encode()) % 9973 / 9973 for s in tree.free_symbols}
        return complex(tree.evalf(subs=point))
    except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError):
        return None
