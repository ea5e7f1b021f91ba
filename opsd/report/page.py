"""One HTML page of a set of results, which needs no network and runs no script.

Answers and problems are text from models and files: Jinja escapes every value, and the page's content
security policy lets a browser load nothing but the pictures inside it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opsd.errors import printable
from opsd.evaluation.results import ground_truth, load_result, predicted_answer
from opsd.report.summary import BENCHMARK_TITLES, Row, row_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_PROBLEMS = 10
# Of a longer text the beginning and the end are shown, half of this each.
SHOWN_CHARACTERS = 3000


def render_page(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return the page of several tables.

    Args:
        reports: for each, `table`, `pairs` of rows to show problems of, `pictures` by name and `sections`
            (title, lines, notes).
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "line": printable,
        "text": _text,
        "picture": _picture,
        "row": row_title,
        "benchmark": lambda name: BENCHMARK_TITLES.get(name, name),
        "answer": predicted_answer,
        "differing": differing_problems,
    }
    return environment.get_template("page.html.j2").render(reports=reports)


def _text(value: object) -> str:
    """Return a text of several lines without control characters, its middle left out if it is long."""
    text = str(value)
    if len(text) > SHOWN_CHARACTERS:
        half, left_out = SHOWN_CHARACTERS // 2, len(text) - SHOWN_CHARACTERS
        text = f"{text[:half]}\n[… {left_out:,} characters left out …]\n{text[-half:]}"
    return "\n".join(printable(line, len(line)) for line in text.splitlines())


def _picture(figure: Figure) -> str:
    """Return a figure as the data URI of an SVG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def differing_problems(pair: tuple[Row, Row]) -> list[dict[str, Any]]:
    """Return the SHOWN_PROBLEMS problems whose share of right samples differs most between two rows.

    Each has `benchmark`, `problem`, `gold` and `sides`: of each row its title, percent right over all runs,
    and the generations of the first run.
    """
    gaps: list[tuple[float, str, int, tuple[float, float]]] = []
    for name in (name for name in pair[0].cells if name in pair[1].cells):
        cells = [row.cells[name] for row in pair]
        if cells[0].runs[0].samples.problems == cells[1].runs[0].samples.problems:
            means = [np.mean([run.shares["average"] for run in cell.runs], axis=0) for cell in cells]
            both = enumerate(zip(*means, strict=True))
            gaps += [(abs(a - b), name, index, (a, b)) for index, (a, b) in both if a != b]
    chosen = sorted(gaps, key=lambda gap: -gap[0])[:SHOWN_PROBLEMS]
    names = {name for _, name, _, _ in chosen}
    records = [{name: load_result(row.cells[name].runs[0].path)["results"] for name in names} for row in pair]
    return [
        {
            "benchmark": name,
            "problem": records[0][name][index].get("problem", ""),
            "gold": ground_truth(records[0][name][index]),
            "sides": [
                (row_title(row), 100 * share, found[name][index]["generations"])
                for row, share, found in zip(pair, shares, records, strict=True)
            ],
        }
        for _, name, index, shares in chosen
    ]
