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
from opsd.report.summary import BENCHMARK_TITLES, Row, Table, row_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_PROBLEMS = 10
# Of a longer text the beginning and the end are shown, half of this each.
SHOWN_CHARACTERS = 3000


def render_page(tables: Sequence[dict[str, Any]]) -> str:
    """Return the page of the `page_values` of each table."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"line": printable, "text": _text}
    return environment.get_template("page.html.j2").render(tables=tables)


def page_values(
    table: Table,
    pairs: Sequence[tuple[Row, Row]],
    pictures: Mapping[str, Figure],
    sections: Sequence[tuple[str, list[list[str]], list[str]]],
) -> dict[str, Any]:
    """Return what the template needs of one table; `sections` are (title, lines, notes)."""
    return {
        "model": table.model,
        "sections": sections,
        "pictures": {name: _data_uri(figure) for name, figure in pictures.items()},
        "provenance": _provenance(table),
        "differing": [
            (f"{row_title(one)} and {row_title(other)}", _differing_problems(one, other))
            for one, other in pairs
        ],
    }


def _text(value: str) -> str:
    """Return a text of several lines without control characters, its middle left out if it is long."""
    if len(value) > SHOWN_CHARACTERS:
        half, left_out = SHOWN_CHARACTERS // 2, len(value) - SHOWN_CHARACTERS
        value = f"{value[:half]}\n[… {left_out:,} characters left out …]\n{value[-half:]}"
    return "\n".join(printable(line, len(line)) for line in value.splitlines())


def _data_uri(figure: Figure) -> str:
    """Return a figure as the data URI of an SVG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _provenance(table: Table) -> list[list[Any]]:
    """Return header and lines that say where each result of a table comes from."""
    lines = [["method", "benchmark", "file", "seed", "date", "model", "trained by", "problems", "grader"]]
    placed = [(row, run) for row in table.rows for cell in row.cells.values() for run in cell.runs]
    for row, run in placed:
        facts, training = run.facts, run.facts.get("training_run") or {}
        trained = [training.get("run_name") or training.get("method"), training.get("adapter_step")]
        line = [row_title(row), BENCHMARK_TITLES.get(run.dataset, run.dataset), run.path.name, run.seed]
        line += [facts.get("date"), str(facts.get("model_identity") or facts["base_model"])[:16]]
        line += [", step ".join(str(part) for part in trained if part is not None) or None]
        line += [f"{facts['num_problems']}, {facts.get('dataset_fingerprint') or 'no fingerprint'}"]
        line += [(facts.get("grading") or {}).get("math_verify")]
        lines.append(["—" if value is None else value for value in line])
    return lines


def _differing_problems(one: Row, other: Row) -> list[dict[str, Any]]:
    """Return the SHOWN_PROBLEMS problems whose share of right samples differs most between two rows."""
    gaps: list[tuple[float, str, int]] = []
    shares: dict[tuple[str, int], np.ndarray] = {}
    for name in (name for name in one.cells if name in other.cells):
        runs = [row.cells[name].runs for row in (one, other)]
        if runs[0][0].samples.problems == runs[1][0].samples.problems:
            means = [np.mean([run.shares["average"] for run in some], axis=0) for some in runs]
            gaps += [
                (abs(a - b), name, index) for index, (a, b) in enumerate(zip(*means, strict=True)) if a != b
            ]
            shares |= {(name, index): np.array(pair) for index, pair in enumerate(zip(*means, strict=True))}
    chosen = [(name, index) for _, name, index in sorted(gaps, key=lambda gap: -gap[0])[:SHOWN_PROBLEMS]]
    records = {
        (row, name): load_result(row.cells[name].runs[0].path)["results"]
        for row in (one, other)
        for name in {name for name, _ in chosen}
    }
    return [
        {
            "benchmark": BENCHMARK_TITLES.get(name, name),
            "problem": str(records[one, name][index].get("problem", "")),
            "gold": ground_truth(records[one, name][index]),
            "sides": [
                (row_title(row), 100 * share, [_sample(g) for g in records[row, name][index]["generations"]])
                for row, share in zip((one, other), shares[name, index], strict=True)
            ],
        }
        for name, index in chosen
    ]


def _sample(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page shows of one sample of a result file."""
    shown = {"answer": predicted_answer(generation), "correct": generation["correct"]}
    shown |= {"tokens": generation.get("tokens"), "cut": bool(generation.get("truncated"))}
    return shown | {"text": str(generation.get("full_generation", ""))}
