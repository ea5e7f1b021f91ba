"""python data/prepare_hmmt25.py [--source HUB_ID or FILE.jsonl, .json, .csv, .parquet] [--output FILE]

Makes the parquet that the hmmt25 benchmark reads: 30 rows with the columns `problem` and `answer`, both text,
from MathArena's release of HMMT February 2025 on the hub or from a local copy of it.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from opsd.errors import ArtefactError, OneLineParser, run_cli
from opsd.evaluation.benchmarks import BENCHMARKS, HMMT25_DEFAULT, HMMT25_VARIABLE, answer_text
from opsd.files import atomic_write_bytes
from opsd.tables import load_table

HUB_ID = "MathArena/hmmt_feb_2025"
REPOSITORY = Path(__file__).resolve().parent.parent
# A problem that needs a picture cannot be given to a text model. Drawing commands (TikZ) are text.
IMAGE_MARKS = ("\\includegraphics", "![", "<img")


def clean_rows(rows: list[dict[str, Any]], source: str) -> list[dict[str, str]]:
    """`rows` reduced to `problem` and `answer` as text.

    Raises:
        ArtefactError: their number is not the benchmark's, one has an image, lacks a text, or appears twice.
    """
    size = BENCHMARKS["hmmt25"].size
    if len(rows) != size:
        raise ArtefactError(f"{source} holds {len(rows)} problems; HMMT February 2025 has {size}")
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
    """Write `rows` whole, both columns as strings. Raises ArtefactError where that is not possible."""
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
    parser.add_argument("--source", default=HUB_ID, help="a hub id or a local file (default %(default)s)")
    parser.add_argument("--split", default="train", help="split on the hub (default %(default)s)")
    parser.add_argument("--output", type=Path, default=REPOSITORY / HMMT25_DEFAULT)
    args = parser.parse_args(argv)
    rows = load_table(args.source, split=args.split, remedy="give a local copy with --source FILE")
    write_parquet(clean_rows(list(rows), args.source), args.output)
    print(f"{args.output}: {len(rows)} problems")
    if args.output.resolve() != (REPOSITORY / HMMT25_DEFAULT).resolve():
        print(f"set {HMMT25_VARIABLE}={args.output} to use it")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
