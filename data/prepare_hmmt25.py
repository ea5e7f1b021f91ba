"""python data/prepare_hmmt25.py [--benchmark hmmt25|hmmt_feb26] [--source HUB_ID or FILE] [--output FILE]

Make the parquet that the benchmark hmmt25 (or hmmt_feb26) reads: 30 (33) rows with the columns `problem` and
`answer`, both text, from MathArena's release of HMMT February 2025 (2026) on the hub, or from a local copy of
it (.jsonl, .json, .csv, .parquet).
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from opsd import REPO_ROOT
from opsd.errors import ArtefactError, OneLineParser, run_cli
from opsd.evaluation.benchmarks import BENCHMARKS, answer_text
from opsd.files import atomic_write_bytes
from opsd.tables import load_table

HUB_IDS = {"hmmt25": "MathArena/hmmt_feb_2025", "hmmt_feb26": "MathArena/hmmt_feb_2026"}
# A problem that needs a picture cannot be given to a text model. Drawing commands (TikZ) are text.
IMAGE_MARKS = ("\\includegraphics", "![", "<img")


def clean_rows(rows: list[dict[str, Any]], source: str, benchmark: str = "hmmt25") -> list[dict[str, str]]:
    """Return `rows` with `problem` and `answer` alone, as text.

    Raises:
        ArtefactError: their number is not the benchmark's, one has an image, lacks a text, or appears twice.
    """
    size = BENCHMARKS[benchmark].size
    if len(rows) != size:
        raise ArtefactError(f"{source} holds {len(rows)} problems; {benchmark} has {size}")
    cleaned = []
    for number, row in enumerate(rows, 1):
        problem, answer = row.get("problem"), answer_text(row.get("answer"))
        if not isinstance(problem, str) or not problem.strip() or not answer:
            columns = ", ".join(map(str, row))
            raise ArtefactError(f"row {number} of {source} lacks `problem` or `answer` (columns: {columns})")
        pictures = [name for name, value in row.items() if "image" in str(name).lower() and value]
        marks = [mark for mark in IMAGE_MARKS if mark in problem]
        if pictures or marks:
            raise ArtefactError(
                f"row {number} of {source} has an image ({', '.join(map(str, pictures + marks))}); "
                "this benchmark is text only, use the text release"
            )
        cleaned.append({"problem": problem.strip(), "answer": answer})
    if len({row["problem"] for row in cleaned}) != size:
        raise ArtefactError(f"{source} holds a problem twice")
    return cleaned


def write_parquet(rows: list[dict[str, str]], output: Path) -> None:
    """Write `rows` with both columns as strings; raise ArtefactError where that is not possible."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("problem", pyarrow.string()), ("answer", pyarrow.string())])
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), buffer)
    try:
        atomic_write_bytes(output, buffer.getvalue())
    except OSError as error:
        raise ArtefactError(f"{output} cannot be written: {error.strerror}") from error


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(
        prog="prepare_hmmt25.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--benchmark", choices=HUB_IDS, default="hmmt25", help="default %(default)s")
    parser.add_argument("--source", help="a hub id or a local file (default: MathArena's release)")
    parser.add_argument("--split", default="train", help="split on the hub (default %(default)s)")
    parser.add_argument("--output", type=Path, help="default: where the benchmark reads it")
    args = parser.parse_args(argv)
    row, source = BENCHMARKS[args.benchmark], args.source or HUB_IDS[args.benchmark]
    output = args.output or REPO_ROOT / row.path
    rows = load_table(source, split=args.split, remedy="give a local copy with --source FILE")
    write_parquet(clean_rows(list(rows), source, args.benchmark), output)
    print(f"{output}: {len(rows)} problems")
    if output.resolve() != (REPO_ROOT / row.path).resolve():
        print(f"set {row.variable}={output} to use it")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
