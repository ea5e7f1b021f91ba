"""One HTML page of a set of results, which needs no network and runs no script.

Answers and problems are text from models and files: Jinja escapes every value, and the page's content
security policy lets a browser load nothing but the pictures inside it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opsd.errors import printable
from opsd.evaluation.results import ground_truth, load_result, predicted_answer
from opsd.report.summary import BENCHMARK_TITLES, Row, Run, Table, row_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = "page.html.j2"
SHOWN_PROBLEMS = 10
# Of a longer text the beginning and the end are shown, half of this each.
SHOWN_CHARACTERS = 3000


def render_page(**values: Any) -> str:
    """Return the page; `page.html.j2` names the values that it needs."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"line": printable, "text": _text}
    return environment.get_template(TEMPLATE).render(values)


def _text(value: str) -> str:
    """Return a text of several lines without control characters, its middle left out if it is long."""
    if len(value) > SHOWN_CHARACTERS:
        half, left_out = SHOWN_CHARACTERS // 2, len(value) - SHOWN_CHARACTERS
        value = f"{value[:half]}\n[… {left_out:,} characters left out …]\n{value[-half:]}"
    return "\n".join(printable(line, len(line)) for line in value.splitlines())


def picture(figure: Figure) -> str:
    """Return a figure as the data URI of an SVG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def provenance(table: Table) -> tuple[list[str], list[list[Any]]]:
    """Return header and rows that say where each result of a table comes from."""
    header = ["method", "benchmark", "file", "seed", "date", "model", "trained by", "problems", "grader"]

    def row_of(row: Row, run: Run) -> list[Any]:
        facts = run.facts
        training, grading = facts.get("training_run") or {}, facts.get("grading") or {}
        trained = [training.get("run_name"), training.get("method"), training.get("adapter_step")]
        return [
            row_title(row),
            BENCHMARK_TITLES.get(run.dataset, run.dataset),
            run.path.name,
            run.seed,
            facts.get("date"),
            str(facts.get("model_identity") or facts["base_model"])[:16],
            ", step ".join(str(part) for part in trained[::2] if part is not None) or trained[1],
            f"{facts['num_problems']}, {facts.get('dataset_fingerprint')}",
            grading.get("math_verify"),
        ]

    lines = [row_of(row, run) for row in table.rows for cell in row.cells.values() for run in cell.runs]
    return header, [["—" if value is None else value for value in line] for line in lines]


def differing_problems(one: Row, other: Row) -> list[dict[str, Any]]:
    """Return the SHOWN_PROBLEMS problems whose share of right samples differs most between two rows.

    Each has benchmark, problem, gold answer and, for both rows, title, share over all runs (percent) and the
    samples of the first run.
    """
    found = []
    for name in (name for name in one.cells if name in other.cells):
        shares = [
            100 * np.mean([run.samples.correct.mean(1) for run in row.cells[name].runs], axis=0)
            for row in (one, other)
        ]
        if len(shares[0]) == len(shares[1]):
            gaps = np.abs(shares[0] - shares[1])
            found += [(gap, name, index, [s[index] for s in shares]) for index, gap in enumerate(gaps) if gap]
    chosen = sorted(found, key=lambda item: -item[0])[:SHOWN_PROBLEMS]
    problems: dict[tuple[str, int], dict[str, Any]] = {}
    for side, row in enumerate((one, other)):
        for name in dict.fromkeys(item[1] for item in chosen):
            records = load_result(row.cells[name].runs[0].path)["results"]
            for _, _, index, shares in (item for item in chosen if item[1] == name):
                record = records[index]
                problem = problems.setdefault(
                    (name, index),
                    {
                        "benchmark": BENCHMARK_TITLES.get(name, name),
                        "problem": str(record.get("problem", "")),
                        "gold": ground_truth(record),
                        "sides": [],
                    },
                )
                side_of = {"title": row_title(row), "share": shares[side], "samples": list(_samples(record))}
                problem["sides"].append(side_of)
    return [problems[name, index] for _, name, index, _ in chosen]


def _samples(record: dict[str, Any]) -> Iterable[dict[str, Any]]:
    for generation in record["generations"]:
        yield {
            "answer": predicted_answer(generation),
            "correct": generation["correct"],
            "tokens": generation.get("tokens"),
            "cut": bool(generation.get("truncated")),
            "text": str(generation.get("full_generation", "")),
        }
