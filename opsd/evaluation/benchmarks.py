"""A benchmark is a row of data: where its problems come from and how many there must be.

A local file or folder can replace the source of any of them (`dataset_path`); its size is still checked. Any
other file with the columns `problem` and `answer` is a benchmark too, under a name of the caller's choice.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsd import REPO_ROOT
from opsd.errors import ArtefactError, UsageError
from opsd.evaluation.grading import extract_boxed
from opsd.tables import load_table


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One row: `size` problems of a split on the Hugging Face hub, or of a local file.

    Attributes:
        path: file of a local benchmark below the repository; the environment's `variable` replaces it.
        remedy: how to get a local file that is missing.
    """

    size: int
    hub_id: str | None = None
    split: str = "train"
    path: str = ""
    variable: str = ""
    remedy: str = "restore it with `git checkout testbed/data`"


def _hmmt(name: str, *, size: int) -> Benchmark:
    """Return a row for a file that data/prepare_hmmt25.py makes."""
    variable = f"{name.upper()}_PARQUET_PATH"
    remedy = f"create it with `python data/prepare_hmmt25.py --benchmark {name}`, or set {variable}"
    return Benchmark(path=f"data/{name}_clean/train.parquet", variable=variable, size=size, remedy=remedy)


BENCHMARKS = {
    "math500": Benchmark(hub_id="HuggingFaceH4/MATH-500", split="test", size=500),
    "aime24": Benchmark(hub_id="HuggingFaceH4/aime_2024", size=30),
    "aime25": Benchmark(hub_id="yentinglin/aime_2025", size=30),
    "hmmt25": _hmmt("hmmt25", size=30),
    # Newer than the three base models.
    "aime26": Benchmark(hub_id="MathArena/aime_2026", size=30),
    "hmmt_feb26": _hmmt("hmmt_feb26", size=33),
    "small": Benchmark(path="testbed/data/heldout.jsonl", size=256),
    "small_hard": Benchmark(path="testbed/data/heldout_hard.jsonl", size=256),
}
PAPER_BENCHMARKS = ("math500", "aime24", "aime25", "hmmt25")
# In characters. To encode 50 million of them takes 19 GB and five minutes.
LONGEST_PROBLEM = 1_000_000


@dataclass(frozen=True)
class Problem:
    """One problem; `problem_id` is its row number."""

    problem_id: int
    problem: str
    answer: str
    solution: str | None = None


@dataclass(frozen=True)
class LoadedBenchmark:
    """Problems in the order of their source, the `fingerprint` of all of them, and where they came from."""

    problems: list[Problem]
    fingerprint: str
    source: str


def benchmark_row(name: str, dataset_path: Path | str | None) -> Benchmark | None:
    """Return the row of a benchmark; None for another name with a `dataset_path`, UsageError without one."""
    if name not in BENCHMARKS and dataset_path is None:
        raise UsageError(
            f"unknown benchmark {name!r}; choose from {', '.join(BENCHMARKS)}, or give any name with "
            "--dataset_path FILE (columns problem and answer)"
        )
    return BENCHMARKS.get(name)


def load_benchmark(name: str, *, dataset_path: Path | str | None = None) -> LoadedBenchmark:
    """Load a benchmark by name, from `dataset_path` where given.

    Raises:
        UsageError: the name is unknown and no dataset_path is given.
        ArtefactError: the source, a column or an answer is missing, or the number of problems is wrong.
    """
    row = benchmark_row(name, dataset_path)
    split = row.split if row is not None else "test"
    if row is not None and row.hub_id is not None and dataset_path is None:
        source, where = row.hub_id, f"{row.hub_id}:{split}"
    else:
        remedy = "check --dataset_path"
        if row is not None and dataset_path is None:
            dataset_path, remedy = os.environ.get(row.variable) or REPO_ROOT / row.path, row.remedy
        source = where = str(dataset_path)
        if not os.path.exists(source):
            raise ArtefactError(f"the problems of {name} are not at {source}; {remedy}")
    rows = load_table(source, split=split, remedy="pass --dataset_path FILE").to_list()
    problems = [_problem(index, fields, source) for index, fields in enumerate(rows)]
    if row is not None and len(problems) != row.size:
        raise ArtefactError(
            f"{where} holds {len(problems)} problems, but {name} has {row.size}; "
            "use the right file, or another name for another set of problems"
        )
    return LoadedBenchmark(problems, fingerprint(problems), where)


def fingerprint(problems: Iterable[Problem], *, solutions: bool = False) -> str:
    """Return 16 hexadecimal digits of a SHA-256 over every problem's text and answer (and solution)."""
    digest = hashlib.sha256()
    for problem in problems:
        texts = [problem.problem, problem.answer, *([problem.solution] if solutions else [])]
        digest.update(json.dumps(texts, ensure_ascii=True).encode("ascii"))
    return digest.hexdigest()[:16]


def _problem(index: int, fields: Mapping[str, Any], source: str) -> Problem:
    text, where = fields.get("problem"), f"row {index} of {source} has"
    if not isinstance(text, str) or not text.strip():
        raise ArtefactError(f"{where} no text in column `problem` (columns: {', '.join(map(str, fields))})")
    if len(text) > LONGEST_PROBLEM:
        raise ArtefactError(
            f"{where} a problem of {len(text)} characters, more than a model can read; give problems of at "
            f"most {LONGEST_PROBLEM}"
        )
    answer = answer_text(fields.get("answer"))
    solution = fields.get("solution") if isinstance(fields.get("solution"), str) else None
    if not answer and solution:
        answer = extract_boxed(solution) or ""
    if not answer:
        raise ArtefactError(f"{where} neither an `answer` nor a `solution` with a \\boxed answer")
    return Problem(index, text, answer, solution or None)


def answer_text(value: Any) -> str:
    """Return a gold answer as text, 27 for 27.0, '' for None and NaN. ArtefactError for another type."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArtefactError(f"an answer is {value!r}; it must be text or a number")
    return str(int(value)) if value == value // 1 else repr(value)
