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
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from opsd.errors import OneLineParser, UsageError, printable, run_cli
from opsd.files import atomic_write_text
from opsd.plots import check_picture
from opsd.summary import (
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
from opsd.summary_commands import missing_commands
from opsd.summary_notes import Footnotes, footnotes, regime_line

DEFAULT_PATTERN = "eval_results/*_38k*.json"
PAPER_NUMBERS = Path(__file__).resolve().parent / "opsd" / "paper_numbers.json"
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


def grid(
    table: Table, metric: str, text: Callable[[Statistic | None], str], notes: Footnotes
) -> list[list[str]]:
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
    name, marks = f"@{table.val_n}", footnotes(table)
    notes = [regime_line(table), *(f"[{number}] {text}" for number, text in enumerate(marks.texts, 1))]
    main = grid(table, "average", with_deviation, marks) + paper_lines(table, numbers)
    return [
        (f"{table.model}: Avg{name}, mean ± sample standard deviation over seeds (percent)", main, notes),
        (
            f"{table.model}: Avg{name} with 95 % bootstrap interval over problems",
            grid(table, "average", with_interval, marks),
            notes,
        ),
        (f"{table.model}: Pass{name}", grid(table, "pass", with_deviation, marks), notes),
        (f"{table.model}: Maj{name}", grid(table, "majority", with_deviation, marks), notes),
    ]


# -- formats -------------------------------------------------------------------------------------------------


def markdown(title: str, lines: list[list[str]], notes: list[str]) -> str:
    escaped = [[printable(cell).replace("|", "\\|") for cell in line] for line in lines]
    rows = [f"| {' | '.join(line)} |" for line in escaped]
    listing = "".join(f"\n{printable(note)}\n" for note in notes)
    return (
        "\n".join([f"### {printable(title)}\n", rows[0], f"|{' --- |' * len(lines[0])}", *rows[1:]])
        + "\n"
        + listing
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
    """One line for each statistic, in percent."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        [
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
    )

    def safe(text: str) -> str:
        # A spreadsheet takes a text that begins like this for a formula.
        return printable(f"'{text}" if text.startswith(("=", "+", "-", "@")) else text)

    def write(row: Row, column: str, metric: str, s: Statistic | None, notes: str = "") -> None:
        if s is not None:
            deviation = "" if s.deviation is None else f"{s.deviation:.4f}"
            low, high = (f"{bound:.4f}" for bound in s.interval)
            known = ["ours", safe(row.model), safe(row_title(row)), safe(column), metric]
            writer.writerow([*known, f"{s.mean:.4f}", deviation, s.count, low, high, safe(notes)])

    for table in tables:
        regime, marks = regime_line(table), footnotes(table)
        for row in table.rows:
            for metric in METRICS:
                for column, cell in row.cells.items():
                    write(
                        row, column, metric, cell.statistic(metric), f"{regime} {marks.said(row, (column,))}"
                    )
                if table.averaged:
                    mean = row.average(metric, table.averaged)
                    write(row, f"mean of {len(table.averaged)}", metric, mean, regime)
        for title, cells, mean in paper_row(numbers, table.model):
            for column, (value, deviation) in zip(numbers["benchmarks"], cells, strict=True):
                writer.writerow(
                    ["paper", table.model, title, column, "average", value, deviation, 3, "", "", ""]
                )
            writer.writerow(["paper", table.model, title, "mean of 4", "average", mean, "", "", "", "", ""])
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
            from opsd.summary_plot import draw

            draw(tables, numbers, args.plot)
    except OSError as error:
        raise UsageError(f"{error.filename or args.output} cannot be written: {error.strerror}") from error
    return 1 if skipped else 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
