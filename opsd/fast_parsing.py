"""math_verify's LaTeX parser with the same trees in less time. For grading processes alone.

Both changes are made in the installed class at run time, only where it has the structure that they expect.
Imports sympy and the parser only when asked.
"""

from __future__ import annotations

import re
from typing import Any

_PLAIN_DIGITS = re.compile(r"[0-9]{1,300}")
_PLAIN_DECIMAL = re.compile(r"[0-9]{0,100}\.[0-9]{1,100}")


def use_fast_prediction() -> None:
    """Let the LaTeX parser try ANTLR's SLL prediction first and the full LL one where that fails.

    SLL either gives the tree that LL gives or reports a syntax error (so ANTLR's documentation), and takes
    a fifth of the time. Where the installed latex2sympy2_extended has another inner structure,
    nothing is changed.
    """
    from antlr4.atn.PredictionMode import PredictionMode
    from latex2sympy2_extended import latex2sympy2

    converter = getattr(latex2sympy2, "_Latex2Sympy", None)
    if (
        converter is None
        or not {"parse", "create_parser"} <= set(vars(converter))
        or hasattr(converter, "sll")
    ):
        return
    parse, create_parser = converter.parse, converter.create_parser

    def create_sll_parser(self: Any, latex: str) -> Any:
        parser = create_parser(self, latex)
        if self.sll:
            parser._interp.predictionMode = PredictionMode.SLL
        return parser

    def parse_in_two_stages(self: Any, latex: str) -> Any:
        self.sll = True
        try:
            return parse(self, latex)
        except Exception:
            # The listener raises bare Exception for a syntax error. LL then says whether it is one.
            self.sll = False
            return parse(self, latex)

    converter.sll = False
    converter.create_parser, converter.parse = create_sll_parser, parse_in_two_stages


def use_fast_numbers() -> None:
    """Let the LaTeX parser make plain numbers itself, where it asks sympy to evaluate them as Python source.

    The number is the same, and the parser spends a third of its time there. Where the installed
    latex2sympy2_extended has another inner structure, nothing is changed.
    """
    import sympy
    from latex2sympy2_extended import latex2sympy2

    converter = getattr(latex2sympy2, "_Latex2Sympy", None)
    if converter is None or "parse_number" not in vars(converter) or hasattr(converter, "fast_numbers"):
        return
    parse_number = converter.parse_number

    def parse_plain_number(self: Any, text: str) -> Any:
        if _PLAIN_DIGITS.fullmatch(text):
            return sympy.Integer(int(text))
        if _PLAIN_DECIMAL.fullmatch(text):
            return sympy.Float(text)
        return parse_number(self, text)

    converter.fast_numbers = True
    converter.parse_number = parse_plain_number
