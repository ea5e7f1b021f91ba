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
import glob
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from opsd.errors import ArtefactError, OneLineParser, UsageError, printable, run_cli
from opsd.files import atomic_write_text
from opsd.report.markdown import markdown_table
from opsd.report.notes import Notes, missing_commands, regime_line
from opsd.report.plots import check_picture
from opsd.report.summary import (
    BENCHMARK_TITLES,
    METRICS,
    Run,
    Statistic,
    Table,
    build_tables,
    load_run,
    paper_rows,
    row_title,
)

DEFAULT_PATTERN = "eval_results/*_38k*.json"
PAPER_NUMBERS = Path(__file__).resolve().parent / "opsd" / "report" / "paper_numbers.json"
CSV_LABELS = ["source", "model", "method", "benchmark", "metric"]
CSV_COLUMNS = [*CSV_LABELS, "mean", "deviation", "values", "low95", "high95", "notes"]
DASH = "—"
METRIC_TITLES = {"average": "Avg", "pass": "Pass", "majority": "Maj"}


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


def grid(table: Table, metric: str, text: Callable[[Statistic | None], str], notes: Notes) -> list[list[str]]:
    """Return header and rows of one metric of one table, cells with the numbers of their notes."""
    name = f"{METRIC_TITLES[metric]}@{table.val_n}"
    header = [BENCHMARK_TITLES.get(name, name) for name in table.columns]
    header += [f"{name}, {title}" for title, _ in table.figures[len(table.columns) :]]
    lines = [["method", *header]]
    for row in table.rows:
        figures = [(row.statistic(metric, columns), columns) for _, columns in table.figures]
        texts = [text(figure) + (notes.mark(row, columns) if figure else "") for figure, columns in figures]
        lines.append([row_title(row), *texts])
    return lines


def paper_lines(table: Table, numbers: dict) -> list[list[str]]:
    """Return the paper's rows in the columns of `table`; none for a table without its benchmarks."""
    lines = []
    for _, title, figures in paper_rows(numbers, table.model):
        texts = [" ± ".join(f"{x:.2f}" for x in figures.get(columns, [])) for _, columns in table.figures]
        if any(texts):
            lines.append([f"{title} (paper)", *(text or DASH for text in texts)])
    return lines


def sections(table: Table, numbers: dict) -> list[tuple[str, list[list[str]], list[str]]]:
    """Return (title, lines, notes) of the four tables of one model in one regime."""
    name, notes = f"@{table.val_n}", Notes(table)
    below = [regime_line(table), *notes.numbered()]
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
    below = "".join(f"\n{printable(note)}\n" for note in notes)
    return f"### {printable(title)}\n\n{markdown_table(lines[0], lines[1:])}{below}"


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
    from pandas import DataFrame

    lines = []
    for table in tables:
        regime, notes = regime_line(table), Notes(table)
        for row, metric in itertools.product(table.rows, METRICS):
            for title, columns in table.figures:
                if figure := row.statistic(metric, columns):
                    labels = ["ours", table.model, row_title(row), title, metric]
                    deviation = "" if figure.deviation is None else f"{figure.deviation:.4f}"
                    mean, low, high = (f"{value:.4f}" for value in (figure.mean, *figure.interval))
                    said = " ".join([regime, *notes.of(row, columns)])
                    lines.append([*labels, mean, deviation, str(figure.count), low, high, said])
        for _, method, figures in paper_rows(numbers, table.model):
            for title, columns in table.figures:
                if columns in figures:
                    labels = ["paper", table.model, method, title, "average"]
                    mean, *deviation = figures[columns]
                    spread = [*deviation, "3"] if deviation else ["", ""]
                    lines.append([*labels, mean, *spread, "", "", ""])

    def safe(value: object) -> object:
        # A spreadsheet takes a text that begins like this for a formula.
        formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@"))
        return printable(f"'{value}" if formula else value) if isinstance(value, str) else value

    rows = [list(map(safe, line)) for line in lines]
    return DataFrame(rows, columns=CSV_COLUMNS, dtype=object).to_csv(index=False)


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
    runs: list[Run] = []
    for path in paths:
        try:
            runs.append(load_run(path))
        except ArtefactError as error:
            skipped.append(str(error))
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
