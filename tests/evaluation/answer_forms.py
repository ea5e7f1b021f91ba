"""Answers in the forms that competition benchmarks and models really use, typed in, with rewritten forms."""

from __future__ import annotations


def plain_equivalent(gold: str, predicted: str, *, limit_s: int = 120) -> bool:
    """Return the protocol's verdict (section 5): parse both, verify, compare the strings when that raises.

    The limit is math_verify's own and counts wall clock, which a busy machine uses up.
    """
    from math_verify import parse, verify

    texts = [text if "$" in text else f"${text}$" for text in (gold, predicted)]
    try:
        trees = [parse(t, fallback_mode="no_fallback", parsing_timeout=limit_s) for t in texts]
        return verify(*trees, timeout_seconds=limit_s)
    except Exception:
        strip = str.maketrans("", "", "$ ")
        return gold.translate(strip).lower() == predicted.translate(strip).lower()


# (gold answer, forms that count as equal)
SAME_PAIRS: list[tuple[str, list[str]]] = [
    ("204", ["204.0", " 204", "204\\text{ minutes}", "\\text{}204"]),
    ("-984", ["-984.0", "- 984"]),
    ("033", ["33"]),
    ("58,500", ["58500", "58{,}500", "58,\\!500"]),
    ("10,\\!080", ["10080", "10,080"]),
    ("11,\\! 111,\\! 111,\\! 100", ["11111111100"]),
    ("\\frac{3}{56}", ["3/56", "\\dfrac{3}{56}", "\\frac{6}{112}", "\\tfrac{3}{56}"]),
    ("\\frac65", ["\\frac{6}{5}", "1.2", "6/5"]),
    ("\\frac9{19}", ["\\frac{9}{19}"]),
    ("-\\frac{35}{9}", ["\\frac{-35}{9}", "-35/9"]),
    ("1\\frac{4}{5}", ["\\frac{9}{5}", "1.8"]),
    ("137 \\frac{1}{2}", ["137.5", "\\frac{275}{2}"]),
    (".35625", ["0.35625", "\\frac{57}{160}"]),
    ("4.5", ["\\frac{9}{2}", "4.50"]),
    ("$18.90$", ["18.90", "18.9"]),
    ("50\\%", ["50", "50\\%"]),
    ("90^\\circ", ["90", "90^{\\circ}"]),
    ("\\frac{270}7\\text{ degrees}", ["\\frac{270}{7}"]),
    ("15\\mbox{ cm}^2", ["15"]),
    ("5.4 \\text{ cents}", ["5.4"]),
    ("\\sqrt{66}", ["66^{1/2}"]),
    ("11\\sqrt2", ["11\\sqrt{2}", "\\sqrt{242}", "11 \\sqrt{2}"]),
    ("3\\sqrt{13}", ["\\sqrt{117}", "\\sqrt{13}\\cdot 3"]),
    ("\\frac{\\sqrt{3}}{3}", ["\\frac{1}{\\sqrt{3}}", "\\sqrt{3}/3"]),
    ("\\frac{9 \\sqrt{23}}{23}", ["\\frac{9}{\\sqrt{23}}"]),
    ("14+4\\sqrt{37}", ["4\\sqrt{37}+14", "2(7+2\\sqrt{37})"]),
    ("\\sqrt{\\frac{95}{24}}", ["\\frac{\\sqrt{570}}{12}", "\\sqrt{95/24}"]),
    ("\\sqrt{23}-2 \\sqrt{3}", ["-2\\sqrt{3}+\\sqrt{23}"]),
    ("1-\\frac{2}{\\pi}", ["\\frac{\\pi-2}{\\pi}"]),
    ("-\\frac{\\pi}{6}", ["-\\pi/6", "\\frac{-\\pi}{6}"]),
    ("\\frac{20000}{\\pi}", ["20000/\\pi"]),
    ("288 \\pi", ["288\\pi", "\\pi \\cdot 288"]),
    ("2^{25} \\cdot 26!", ["26! \\cdot 2^{25}", "2^{25}\\times 26!"]),
    ("6 - 5i", ["6-5i", "-5i+6"]),
    ("1+274i", ["274i + 1"]),
    ("1 \\pm \\sqrt{19}", ["1+\\sqrt{19}, 1-\\sqrt{19}", "1-\\sqrt{19}, 1+\\sqrt{19}"]),
    ("\\{1\\pm\\sqrt{5},-2\\}", ["-2, 1+\\sqrt{5}, 1-\\sqrt{5}"]),
    (
        "\\frac{-1+\\sqrt{17}}{2}, \\frac{-1-\\sqrt{17}}{2}",
        ["\\frac{-1-\\sqrt{17}}{2}, \\frac{-1+\\sqrt{17}}{2}"],
    ),
    ("1,-2", ["-2,1", "-2, 1", "\\{1,-2\\}"]),
    ("3, 5, 7", ["7,5,3", "\\{3,5,7\\}"]),
    ("(6,31,-1)", ["(6, 31, -1)", "\\left(6,31,-1\\right)"]),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", ["(3, \\frac{\\pi}{2})", "(3,\\pi/2)"]),
    ("\\left( \\frac{3}{2}, -13 \\right)", ["(1.5, -13)", "(3/2,-13)"]),
    ("(3,4]", ["\\left(3, 4\\right]"]),
    ("(2,\\infty)", ["(2, \\infty)", "\\left(2,+\\infty\\right)"]),
    ("(-\\infty, 2) \\cup (3, \\infty)", ["\\left(-\\infty,2\\right)\\cup\\left(3,\\infty\\right)"]),
    ("x \\in [-2,7]", ["[-2,7]", "x\\in[-2, 7]"]),
    ("x=5", ["5", "x = 5"]),
    ("y = 2x + 3", ["y=2x+3", "y = 3 + 2x"]),
    ("5x - 7y + 11z + 4 = 0", ["5x-7y+11z+4=0"]),
    ("x^3+3x-6", ["-6+3x+x^3", "x^3 + 3x - 6"]),
    ("6r^2-4r-24", ["2(3r^2-2r-12)"]),
    ("(a+5)(b+2)", ["(b+2)(a+5)", "ab+2a+5b+10"]),
    ("\\frac{11+9a}{20}", ["\\frac{9a+11}{20}"]),
    ("p - q", ["-q+p"]),
    ("\\cot x", ["\\frac{1}{\\tan x}", "\\cot(x)"]),
    ("4210_{5}", ["4210_5"]),
    ("\\text{Evelyn}", ["Evelyn", "\\text{evelyn}"]),
    ("\\text{(C)}", ["C", "\\text{C}", "(C)"]),
    ("\\text{even}", ["even"]),
    ("\\begin{pmatrix} -7 \\\\ 16 \\\\ 5 \\end{pmatrix}", ["\\begin{bmatrix}-7\\\\16\\\\5\\end{bmatrix}"]),
    ("\\begin{pmatrix} 1/5 \\\\ -18/5 \\end{pmatrix}", ["\\begin{pmatrix}0.2\\\\-3.6\\end{pmatrix}"]),
    ("\\begin{pmatrix} -1 & 0 \\\\ 0 & -1 \\end{pmatrix}", ["\\begin{pmatrix}-1&0\\\\0&-1\\end{pmatrix}"]),
]

DIFFERENT_PAIRS: list[tuple[str, str]] = [
    ("204", "205"),
    ("204", "-204"),
    ("204", "20.4"),
    ("\\frac{3}{56}", "\\frac{56}{3}"),
    ("\\frac{1}{3}", "0.333"),
    ("11\\sqrt2", "11"),
    ("1-\\frac{2}{\\pi}", "\\frac{2}{\\pi}"),
    ("2^{25} \\cdot 26!", "2^{26} \\cdot 26!"),
    ("6 - 5i", "6 + 5i"),
    ("1 \\pm \\sqrt{19}", "1 + \\sqrt{19}"),
    ("3, 5, 7", "3, 5"),
    ("(6,31,-1)", "(31,6,-1)"),
    ("(3,4]", "[3,4)"),
    ("(2,\\infty)", "[2,\\infty)"),
    ("(-\\infty, 2) \\cup (3, \\infty)", "(-\\infty, 3) \\cup (3, \\infty)"),
    ("x^3+3x-6", "x^3-3x-6"),
    ("x=5", "6"),
    ("y = 2x + 3", "y = 3x + 2"),
    ("\\text{even}", "odd"),
    ("\\text{(C)}", "B"),
    ("\\begin{pmatrix} -7 \\\\ 16 \\\\ 5 \\end{pmatrix}", "\\begin{pmatrix} 7 \\\\ 16 \\\\ 5 \\end{pmatrix}"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\\\ 0 \\end{pmatrix}"),
]

# Answers over which sympy, a parser or a regular expression may never end.
HOSTILE = [
    "100000000!",
    "\\binom{1000000000}{500000000}",
    "9^{9^{9^9}}",
    "\\sqrt{" * 2000 + "2" + "}" * 2000,
    "\\{" + ",".join(map(str, range(1000))) + "\\}",
    "x and so on " * 17_000,
    "(" * 5000,
    "1" * 50_000,
]
