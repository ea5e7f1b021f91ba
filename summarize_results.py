"""python summarize_results.py [PATTERN ...] [--format md|csv|latex] [--output FILE] [--plot FILE.png]

Puts result files into the paper's table: a row for each method and model, a column for each benchmark, mean ±
sample standard deviation of Avg@n over the evaluation seeds, and the equal-weight mean of the benchmarks.
The paper's own numbers stand below, labelled as such. Pass@n, Maj@n and bootstrap intervals over problems
follow, then the commands that would fill the cells that are missing.

Runs of different regimes are never averaged: each sampling regime has a table of its own, which states it in
a line, and footnotes mark the cells that are not the paper's. A damaged or foreign file and a cell of unlike
runs are left out with a line on stderr, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import csv
import glob
import io
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from opsd.errors import OneLineParser, UsageError, printable, run_cli
from opsd.files import atomic_write_text
from opsd.report.commands import missing_commands
from opsd.report.notes import regime_line, table_notes
from opsd.report.plots import check_picture
from opsd.report.summary import (
    METRICS,
    Row,
    Statistic,
    Table,
    benchmark_title,
    build_tables,
    collect,
    paper_row,
    row_title,
)

DEFAULT_PATTERN = "eval_results/*_38k*.json"
PAPER_NUMBERS = Path(__file__).resolve().parent / "opsd" / "report" / "paper_numbers.json"
CSV_COLUMNS = [
    "source",
    "model",
    "method",
    "benchmark",
    "metric",
    "mean",
    "deviation",
    "values",
    "low95",
    "high95",
    "notes",
]
DASH = "—"
METRIC_TITLES = {"average": "Avg", "pass": "Pass", "majority": "Maj"}


# -- cells as text -------------------------------------------------------------------------------------------


def with_deviation(statistic: Statistic | None) -> str:
    """`66.67 ± 1.27`, without ± for a single run."""
    if statistic is None:
        return DASH
    return f"{statistic.mean:.2f}" + ("" if statistic.deviation is None else f" ± {statistic.deviation:.2f}")


def with_interval(statistic: Statistic | None) -> str:
    """`66.67 [60.10, 72.85]`."""
    if statistic is None:
        return DASH
    return f"{statistic.mean:.2f} [{statistic.interval[0]:.2f}, {statistic.interval[1]:.2f}]"


class Notes:
    """The notes of a table's cells, numbered in the order in which they first occur."""

    def __init__(self, table: Table) -> None:
        self._cells = table_notes(table)
        self.texts = list(dict.fromkeys(text for texts in self._cells.values() for text in texts))

    def of(self, row: Row, columns: Sequence[str]) -> list[str]:
        """Return the notes of the row's cells in `columns`."""
        found = {text for name in columns for text in self._cells.get((row, name), [])}
        return [text for text in self.texts if text in found]

    def mark(self, row: Row, columns: Sequence[str]) -> str:
        """Return ` [1, 3]`, nothing for cells without notes."""
        numbers = ", ".join(str(self.texts.index(text) + 1) for text in self.of(row, columns))
        return f" [{numbers}]" if numbers else ""


def grid(table: Table, metric: str, text: Callable[[Statistic | None], str], notes: Notes) -> list[list[str]]:
    """Return header and rows of one metric of one table, cells with the numbers of their notes."""
    name = f"{METRIC_TITLES[metric]}@{table.val_n}"
    mean = [f"{name}, mean of {len(table.averaged)}"] if table.averaged else []
    lines = [["method", *map(benchmark_title, table.columns), *mean]]
    for row in table.rows:
        cells = [(row.cells[c].statistic(metric) if c in row.cells else None, (c,)) for c in table.columns]
        if table.averaged:
            cells.append((row.average(metric, table.averaged), table.averaged))
        texts = [text(value) + (notes.mark(row, columns) if value else "") for value, columns in cells]
        lines.append([row_title(row), *texts])
    return lines


def paper_lines(table: Table, numbers: dict) -> list[list[str]]:
    """The paper's rows in the columns of `table`."""
    lines = []
    if not set(table.columns) & set(numbers["benchmarks"]):
        return lines
    for title, cells, mean in paper_row(numbers, table.model):
        by_name = dict(zip(numbers["benchmarks"], cells, strict=True))
        texts = [
            f"{by_name[c][0]:.2f} ± {by_name[c][1]:.2f}" if c in by_name else DASH for c in table.columns
        ]
        lines.append([f"{title} (paper)", *texts, f"{mean:.2f}"])
    return lines


def sections(table: Table, numbers: dict) -> list[tuple[str, list[list[str]], list[str]]]:
    """Return (title, lines, notes) of everything that is said about one model in one regime."""
    name, notes = f"@{table.val_n}", Notes(table)
    below = [regime_line(table), *(f"[{number}] {text}" for number, text in enumerate(notes.texts, 1))]
    main = grid(table, "average", with_deviation, notes) + paper_lines(table, numbers)
    interval = grid(table, "average", with_interval, notes)
    return [
        (f"{table.model}: Avg{name}, mean ± sample standard deviation over seeds (percent)", main, below),
        (f"{table.model}: Avg{name} with 95 % bootstrap interval over problems", interval, below),
        (f"{table.model}: Pass{name}", grid(table, "pass", with_deviation, notes), below),
        (f"{table.model}: Maj{name}", grid(table, "majority", with_deviation, notes), below),
    ]


# -- formats -------------------------------------------------------------------------------------------------


def markdown(title: str, lines: list[list[str]], notes: list[str]) -> str:
    escaped = [[printable(cell).replace("|", "\\|") for cell in line] for line in lines]
    header, *rows = [f"| {' | '.join(line)} |" for line in escaped]
    rule = f"|{' --- |' * len(lines[0])}"
    return "\n".join(
        [f"### {printable(title)}\n", header, rule, *rows, *(f"\n{printable(n)}" for n in notes), ""]
    )


def latex(title: str, lines: list[list[str]], notes: list[str]) -> str:
    from pandas import DataFrame

    def tabular(lines: list[list[str]], columns: str) -> str:
        header, *body = [[printable(cell) for cell in line] for line in lines]
        text = DataFrame(body, columns=header).to_latex(index=False, escape=True, column_format=columns)
        return text.replace("±", "$\\pm$").replace(DASH, "--")

    table = tabular(lines, "l" + "c" * (len(lines[0]) - 1))
    return f"% {printable(title)}\n{table}\n" + tabular([[note] for note in notes], "p{\\textwidth}")


def csv_text(tables: Sequence[Table], numbers: dict) -> str:
    """Return one line for each statistic, in percent."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()

    def safe(text: str) -> str:
        # A spreadsheet takes a text that begins like this for a formula.
        return printable(f"'{text}" if text.startswith(("=", "+", "-", "@")) else text)

    def write(*known: str, **figures: object) -> None:
        writer.writerow(dict(zip(CSV_COLUMNS, map(safe, known), strict=False)) | figures)

    for table in tables:
        regime, notes = regime_line(table), Notes(table)
        mean_title = f"mean of {len(table.averaged)}"
        for row, metric in itertools.product(table.rows, METRICS):
            cells = [(name, (name,), cell.statistic(metric)) for name, cell in row.cells.items()]
            if table.averaged:
                cells.append((mean_title, table.averaged, row.average(metric, table.averaged)))
            for title, columns, s in cells:
                if s is not None:
                    said = safe(" ".join([regime, *notes.of(row, columns)]))
                    figures = {
                        "mean": s.mean,
                        "deviation": s.deviation,
                        "low95": s.interval[0],
                        "high95": s.interval[1],
                    }
                    texts = {name: f"{value:.4f}" for name, value in figures.items() if value is not None}
                    write(
                        "ours", row.model, row_title(row), title, metric, values=s.count, notes=said, **texts
                    )
        for title, cells, mean in paper_row(numbers, table.model):
            for column, (value, deviation) in zip(numbers["benchmarks"], cells, strict=True):
                write(
                    "paper", table.model, title, column, "average", mean=value, deviation=deviation, values=3
                )
            write("paper", table.model, title, "mean of 4", "average", mean=mean)
    return buffer.getvalue()


def render(tables: Sequence[Table], numbers: dict, form: str, seeds: Sequence[int] | None) -> str:
    """All tables and, but for csv, the commands that would fill what is missing (see `missing_commands`)."""
    if form == "csv":
        return csv_text(tables, numbers)
    one = markdown if form == "md" else latex
    parts = [one(*section) for table in tables for section in sections(table, numbers)]
    commands = [command for table in tables for command in missing_commands(table, seeds)]
    if commands:
        listing = "\n".join(map(printable, commands))
        parts.append(
            f"### Commands that fill the missing cells\n\n```\n{listing}\n```\n"
            if form == "md"
            else "% missing:\n" + "\n".join(f"% {command}" for command in listing.splitlines()) + "\n"
        )
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(
        prog="summarize_results.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("patterns", nargs="*", default=[DEFAULT_PATTERN], metavar="PATTERN")
    parser.add_argument("--format", choices=("md", "csv", "latex"), default="md")
    parser.add_argument("--output", type=Path, help="write the tables here instead of on the terminal")
    parser.add_argument("--plot", type=Path, help="draw every table into this .png, .pdf or .svg file")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="evaluation seeds that each cell should have (default: 1 2 3 for the paper's benchmarks, for "
        "others the seeds that are there)",
    )
    args = parser.parse_args(argv)
    if args.plot:
        check_picture(args.plot)
    paths = sorted({Path(name) for pattern in args.patterns for name in glob.glob(pattern, recursive=True)})
    if not paths:
        raise UsageError(f"no file matches {' '.join(args.patterns)!r}")
    skipped: list[str] = []
    runs = collect(paths, skipped.append)
    numbers = json.loads(PAPER_NUMBERS.read_text("utf-8"))
    tables = build_tables(runs, skipped.append)
    for message in skipped:
        print(f"skipped: {printable(message)}", file=sys.stderr)
    text = render(tables, numbers, args.format, args.seeds)
    if not args.output:
        print(text, end="")
    try:
        if args.output:
            atomic_write_text(args.output, text)
        if args.plot and tables:
            from opsd.report.summary_plot import draw

            draw(tables, numbers, args.plot)
    except OSError as error:
        raise UsageError(f"{error.filename or args.output} cannot be written: {error.strerror}") from error
    return 1 if skipped else 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
