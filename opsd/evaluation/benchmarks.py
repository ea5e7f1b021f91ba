"""A benchmark is a row of data: where its problems come from, which columns, how many there must be.

A local file or folder can stand in for any of them (`dataset_path`); its size is checked all the same. Any
other file with the columns `problem` and `answer` is a benchmark too, under a name of the caller's choice.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsd.errors import MALFORMED, ArtefactError, UsageError
from opsd.evaluation.grading import extract_boxed

REPOSITORY = Path(__file__).resolve().parents[2]
HMMT25_VARIABLE = "HMMT25_PARQUET_PATH"
HMMT25_DEFAULT = "data/hmmt25_clean/train.parquet"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One row.

    Attributes:
        hub_id: dataset on the Hugging Face hub, or None for one that is local.
        split: its split on the hub.
        size: how many problems it has.
        local: path under the repository of a local benchmark.
        variable: environment variable that replaces `local`.
        remedy: how to make a local file that is missing.
    """

    name: str
    size: int
    hub_id: str | None = None
    split: str = "train"
    local: str | None = None
    variable: str | None = None
    remedy: str = ""


_TESTBED = "the small world's files are part of the repository; restore them with `git checkout testbed/data`"
BENCHMARKS = {
    row.name: row
    for row in (
        Benchmark(name="math500", hub_id="HuggingFaceH4/MATH-500", split="test", size=500),
        Benchmark(name="aime24", hub_id="HuggingFaceH4/aime_2024", size=30),
        Benchmark(name="aime25", hub_id="yentinglin/aime_2025", size=30),
        Benchmark(
            name="hmmt25",
            local=HMMT25_DEFAULT,
            variable=HMMT25_VARIABLE,
            size=30,
            remedy=f"make it with `python data/prepare_hmmt25.py`, or set {HMMT25_VARIABLE}",
        ),
        Benchmark(name="small", local="testbed/data/heldout.jsonl", size=256, remedy=_TESTBED),
        Benchmark(name="small_hard", local="testbed/data/heldout_hard.jsonl", size=256, remedy=_TESTBED),
    )
}
# In characters. To encode 50 million of them takes 19 GB and five minutes.
LONGEST_PROBLEM = 1_000_000
PAPER_BENCHMARKS = ("math500", "aime24", "aime25", "hmmt25")


@dataclass(frozen=True)
class Problem:
    """One problem: its row number, its text, its gold answer as text."""

    problem_id: int
    problem: str
    answer: str


@dataclass(frozen=True)
class LoadedBenchmark:
    """Problems in the order of their source, a hash of their texts and answers, and where they came from."""

    name: str
    problems: list[Problem]
    fingerprint: str
    source: str


def load_benchmark(name: str, *, dataset_path: Path | str | None = None) -> LoadedBenchmark:
    """Load a benchmark by name, from `dataset_path` where given.

    Raises:
        UsageError: the name is unknown and no dataset_path is given.
        ArtefactError: the source is missing or unreadable, a column or an answer is missing, or a named
            benchmark has another number of problems than it must have.
    """
    row = BENCHMARKS.get(name)
    if row is None and dataset_path is None:
        raise UsageError(
            f"unknown benchmark {name!r}; choose from {', '.join(BENCHMARKS)}, or give any name with "
            "--dataset_path FILE (columns problem and answer)"
        )
    if dataset_path is None and row.hub_id is not None:
        source, rows = f"{row.hub_id}:{row.split}", hub_rows(row.hub_id, row.split)
    else:
        path = Path(dataset_path) if dataset_path is not None else _local_path(row)
        if not path.exists():
            remedy = row.remedy if row is not None and dataset_path is None else "check --dataset_path"
            raise ArtefactError(f"the problems of {name} are not at {path}; {remedy}")
        source, rows = str(path), read_rows(path)
    problems = [_problem(index, fields, source) for index, fields in enumerate(rows)]
    if not problems:
        raise ArtefactError(f"{source} holds no problem")
    if row is not None and len(problems) != row.size:
        raise ArtefactError(
            f"{source} holds {len(problems)} problems, but {name} has {row.size}; "
            "use the right file, or another name for another set of problems"
        )
    return LoadedBenchmark(name, problems, fingerprint(problems), source)


def fingerprint(problems: Iterable[Problem]) -> str:
    """16 hexadecimal digits of a SHA-256 over every problem's text and answer, in order."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps([problem.problem, problem.answer], ensure_ascii=True).encode("ascii"))
    return digest.hexdigest()[:16]


def _local_path(row: Benchmark) -> Path:
    if row.variable and os.environ.get(row.variable):
        return Path(os.environ[row.variable])
    return REPOSITORY / row.local


def _problem(index: int, fields: Mapping[str, Any], source: str) -> Problem:
    text = fields.get("problem")
    if not isinstance(text, str) or not text.strip():
        columns = ", ".join(map(str, fields))
        raise ArtefactError(f"row {index} of {source} has no text in column `problem` (columns: {columns})")
    if len(text) > LONGEST_PROBLEM:
        raise ArtefactError(
            f"row {index} of {source} has a problem of {len(text)} characters, more than a model can read; "
            f"give problems of at most {LONGEST_PROBLEM}"
        )
    answer = answer_text(fields.get("answer"))
    if not answer and isinstance(fields.get("solution"), str):
        answer = extract_boxed(fields["solution"]) or ""
    if not answer:
        raise ArtefactError(
            f"row {index} of {source} has neither an `answer` nor a `solution` with a \\boxed answer"
        )
    return Problem(index, text, answer)


def answer_text(value: Any) -> str:
    """A gold answer as text: integers without a decimal point, '' for none.

    Raises:
        ArtefactError: it is neither text nor a number.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArtefactError(f"an answer is {value!r}; it must be text or a number")
    if isinstance(value, float):
        if value != value:
            return ""
        return str(int(value)) if value.is_integer() else repr(value)
    return str(value)


# -- sources -------------------------------------------------------------------------------------------------


def hub_rows(hub_id: str, split: str, *, remedy: str = "pass --dataset_path FILE") -> list[dict[str, Any]]:
    """Rows of a dataset on the hub, or in the local cache when offline.

    Raises:
        ArtefactError: neither holds it.
    """
    from datasets import load_dataset

    try:
        return list(load_dataset(hub_id, split=split))
    except (OSError, ValueError) as error:
        # Not found, offline without a cache, no such split: all are derived from these two.
        first_line = (str(error).splitlines() or [""])[0]
        raise ArtefactError(
            f"cannot load {hub_id} (split {split}): {type(error).__name__}: {first_line}; connect to the hub "
            f"once, set HF_HOME to a cache that holds it, or {remedy}"
        ) from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl, .json (a list of objects), .csv or .parquet file, or of a folder that holds one.

    Numbers in JSON keep the digits they are written with. A folder that `Dataset.save_to_disk` wrote is read
    too.

    Raises:
        ArtefactError: another kind of file, or a damaged one.
    """
    if path.is_dir():
        return _folder_rows(path)
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    if path.suffix.lower() not in readers:
        raise ArtefactError(f"{path} is not a {', '.join(readers)} file")
    try:
        rows = readers[path.suffix.lower()](path)
    except (OSError, csv.Error, *MALFORMED) as error:
        raise ArtefactError(f"{path} is damaged: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ArtefactError(f"{path} holds something else than objects with columns")
    for number, row in enumerate(rows):
        try:
            json.dumps(row, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            raise ArtefactError(f"row {number} of {path} is not text ({error}); repair it") from error
    return rows


def _folder_rows(path: Path) -> list[dict[str, Any]]:
    if (path / "state.json").exists():
        from datasets import load_from_disk

        try:
            return list(load_from_disk(str(path)))
        except (OSError, ValueError) as error:
            raise ArtefactError(f"{path} is damaged: {error}") from error
    files = sorted(f for f in path.rglob("*") if f.suffix in (".jsonl", ".json", ".csv", ".parquet"))
    if len(files) != 1:
        raise ArtefactError(f"{path} holds {len(files)} data files; name the one to use")
    return read_rows(files[0])


def _jsonl_rows(path: Path) -> list[Any]:
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line, parse_int=str, parse_float=str))
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from error
    return rows


def _json_rows(path: Path) -> list[Any]:
    rows = json.loads(path.read_text("utf-8"), parse_int=str, parse_float=str)
    if not isinstance(rows, list):
        raise ValueError("its top level is not a list")
    return rows


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()
