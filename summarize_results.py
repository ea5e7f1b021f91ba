"""python summarize_results.py [PATTERN ...] [--compare A B] [--against REFERENCE] [--html report.html]

Puts result files into the paper's table: a row for each method and model, a column for each benchmark, mean ±
sample standard deviation of Avg@n over the evaluation seeds, and the equal-weight mean of the benchmarks.
The paper's own numbers stand below, labelled as such. Pass@n, Maj@n and bootstrap intervals over problems
follow, then the commands that would fill the cells that are missing. --compare A B and --against REFERENCE
say which method is better, or what would tell (`opsd/report/comparison.py`); --profiles adds Pass@k, Maj@k,
tokens, samples without a box and accuracy by length; --html writes one page with all of it.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from opsd.errors import ArtefactError, OneLineParser, UsageError, printable, run_cli
from opsd.files import atomic_write_text
from opsd.report.comparison import HEADER, Comparison, comparison_notes, comparisons, find_pairs
from opsd.report.markdown import markdown_table
from opsd.report.notes import Notes, missing_commands, regime_line
from opsd.report.plots import check_picture
from opsd.report.samples import Profile, profile
from opsd.report.summary import (
    BENCHMARK_TITLES,
    METRICS,
    Row,
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
Section = tuple[str, list[list[str]], list[str]]
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


@dataclass
class Report:
    """One table, and what was asked for besides."""

    table: Table
    pairs: list[tuple[Row, Row]] = field(default_factory=list)
    compared: list[Comparison] = field(default_factory=list)
    profiles: dict[tuple[Row, str], Profile] = field(default_factory=dict)


def sections(report: Report, numbers: dict) -> list[Section]:
    """Return (title, lines, notes) of every table of one model in one regime."""
    table = report.table
    name, notes = f"@{table.val_n}", Notes(table)
    below = [regime_line(table), *notes.numbered()]
    main = grid(table, "average", with_deviation, notes) + paper_lines(table, numbers)
    interval = grid(table, "average", with_interval, notes)
    return [
        (f"{table.model}: Avg{name}, mean ± sample standard deviation over seeds (percent)", main, below),
        *comparison_section(report),
        (f"{table.model}: Avg{name} with 95 % bootstrap interval over problems", interval, below),
        (f"{table.model}: Pass{name}", grid(table, "pass", with_deviation, notes), below),
        (f"{table.model}: Maj{name}", grid(table, "majority", with_deviation, notes), below),
        *profile_sections(report),
    ]


def comparison_section(report: Report) -> list[Section]:
    """Return the section of the comparisons; none without one."""
    lines = [HEADER, *(comparison.line for comparison in report.compared)]
    title = f"{report.table.model}: differences in Avg@{report.table.val_n}, and what would resolve them"
    return [(title, lines, comparison_notes(report.compared))] if report.compared else []


def profile_sections(report: Report) -> list[Section]:
    """Return the sections of Pass@k, Maj@k and the samples, and of the accuracy by length."""
    names = list(dict.fromkeys(name for found in report.profiles.values() for name in found.figures))
    titles = [name.replace("pass", "Pass").replace("majority", "Maj") for name in names]
    figures, lengths = [["method", "benchmark", *titles]], [["method", "benchmark"]]
    shortest = sorted({low for found in report.profiles.values() for low, *_ in found.lengths})
    lengths[0] += [f"{low:,} to {2 * low - 1:,}" for low in shortest]
    for (row, dataset), found in report.profiles.items():
        labels = [row_title(row), BENCHMARK_TITLES.get(dataset, dataset)]
        values = [found.figures.get(name) for name in names]
        figures.append([*labels, *(DASH if value is None else f"{value:.2f}" for value in values)])
        by_length = {low: f"{share:.1f} of {count:,}" for low, count, share in found.lengths}
        lengths.append([*labels, *(by_length.get(low, DASH) for low in shortest)])
    units = ["Percent, and tokens a sample. Pass@k and Maj@k are unbiased means over subsets of k samples."]
    found = [("Pass@k, Maj@k and the samples", figures, units)] if report.profiles else []
    if shortest:
        counted = ["Percent of the samples that are right, and how many samples are so long."]
        found.append(("right samples by length in tokens", lengths, counted))
    return [(f"{report.table.model}: {title}", lines, notes) for title, lines, notes in found]


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


def figure_lines(report: Report, numbers: dict) -> list[dict[str, Any]]:
    """Return one mapping of CSV_COLUMNS for each figure, in percent, points or tokens; None is unknown."""
    table, lines = report.table, []
    regime, notes = regime_line(table), Notes(table)

    def add(*labels: str, mean: float, said: Sequence[str] = (), **more: Any) -> None:
        line = dict(zip(CSV_LABELS, labels, strict=True)) | {"mean": mean, "notes": " ".join(said)} | more
        lines.append({name: line.get(name) for name in CSV_COLUMNS})

    for row, metric in itertools.product(table.rows, METRICS):
        for title, columns in table.figures:
            if figure := row.statistic(metric, columns):
                low, high = figure.interval
                rest = {"deviation": figure.deviation, "values": figure.count, "low95": low, "high95": high}
                said = [regime, *notes.of(row, columns)]
                add("ours", table.model, row_title(row), title, metric, mean=figure.mean, said=said, **rest)
    for (row, name), found in report.profiles.items():
        by_length = {f"right from {low} tokens": share for low, _, share in found.lengths}
        for metric, value in (found.figures | by_length).items():
            add("ours", table.model, row_title(row), name, metric, mean=value, said=[regime])
    for one in report.compared:
        labels = ("difference", table.model, f"{one.first} against {one.second}", one.benchmark, "average")
        low, high = one.interval
        add(*labels, mean=one.difference, said=[one.verdict], low95=low, high95=high)
    for _, method, figures in paper_rows(numbers, table.model):
        for title, columns in table.figures:
            if columns in figures:
                mean, *deviation = figures[columns]
                rest = {"deviation": deviation[0], "values": 3} if deviation else {}
                add("paper", table.model, method, title, "average", mean=mean, **rest)
    return lines


def csv_text(reports: Sequence[Report], numbers: dict) -> str:
    """Return one line for each figure."""
    from pandas import DataFrame

    def safe(value: Any, source: str) -> Any:
        if isinstance(value, float) and source != "paper":
            return f"{value:.4f}"
        # A spreadsheet takes a text that begins like this for a formula.
        formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@"))
        return printable(f"'{value}" if formula else value) if isinstance(value, str) else value

    lines = [line for report in reports for line in figure_lines(report, numbers)]
    rows = [[safe(value, line["source"]) for value in line.values()] for line in lines]
    return DataFrame(rows, columns=CSV_COLUMNS, dtype=object).to_csv(index=False)


def json_text(reports: Sequence[Report], numbers: dict) -> str:
    """Return the figures of CSV and every comparison with all that is known of it."""
    parts = [
        {
            "model": report.table.model,
            "regime": regime_line(report.table),
            "figures": figure_lines(report, numbers),
            "comparisons": [asdict(one) | {"verdict": one.verdict} for one in report.compared],
            "notes": comparison_notes(report.compared) if report.compared else [],
        }
        for report in reports
    ]
    return json.dumps(parts, indent=1, allow_nan=False) + "\n"


def render(reports: Sequence[Report], numbers: dict, form: str, seeds: Sequence[int] | None) -> str:
    """All tables and, for Markdown and LaTeX, the commands that would fill what is missing."""
    if form in ("csv", "json"):
        return (csv_text if form == "csv" else json_text)(reports, numbers)
    one = markdown if form == "md" else latex
    parts = [one(*section) for report in reports for section in sections(report, numbers)]
    commands = [command for report in reports for command in missing_commands(report.table, seeds)]
    if commands:
        listing = "\n".join(map(printable, commands))
        parts.append(
            f"### Commands that fill the missing cells\n\n```\n{listing}\n```\n"
            if form == "md"
            else "% missing:\n" + "\n".join(f"% {command}" for command in listing.splitlines()) + "\n"
        )
    return "\n".join(parts)


# -- the command ---------------------------------------------------------------------------------------------


def build_reports(
    tables: Sequence[Table], args: argparse.Namespace, on_skip: Callable[[str], None]
) -> list[Report]:
    """Compare and profile what the flags ask for. UsageError where no table has the rows that they name."""
    from opsd.evaluation.grading import Grader

    reports = [Report(table, find_pairs(table, args.compare, args.against)) for table in tables]
    if (args.compare or args.against) and not any(report.pairs for report in reports):
        rows = {
            name
            for table in tables
            for row in table.rows
            if row.cells
            for name in (row.method, row_title(row))
        }
        asked = " and ".join([*args.compare, *([args.against] if args.against else [])])
        raise UsageError(f"no table has rows to compare for {asked!r}; there are {', '.join(sorted(rows))}")
    for report in reports:
        report.compared = comparisons(report.table, report.pairs, on_skip)
    if args.profiles or args.html or args.pictures:
        with Grader() as grader:
            for report in reports:
                cells = {(row, name): cell for row in report.table.rows for name, cell in row.cells.items()}
                for place, cell in cells.items():
                    groups = [[run.samples for run in runs] for runs in cell.by_training_seed]
                    report.profiles[place] = profile(groups, grader)
    return reports


def pictures(report: Report) -> dict[str, Any]:
    """Return the figures of a report by name."""
    from opsd.report.comparison_plot import forest, profiles_plot

    found = {"differences": forest(report.compared, report.table.val_n)} if report.compared else {}
    found["Pass@k and Maj@k"] = profiles_plot(report.table, report.profiles, lengths=False)
    if any(one.lengths for one in report.profiles.values()):
        found["right samples by length"] = profiles_plot(report.table, report.profiles, lengths=True)
    return found


def write_extras(reports: Sequence[Report], numbers: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Write the pictures and the page that the flags ask for."""
    from opsd.report import plots
    from opsd.report.page import render_page

    if args.plot and reports:
        from opsd.report.summary_plot import draw

        draw([report.table for report in reports], numbers, args.plot)
    drawn = [pictures(report) for report in reports] if args.pictures or args.html else []
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
        for number, (report, figures) in enumerate(zip(reports, drawn, strict=True), 1):
            for name, figure in figures.items():
                stem = f"{report.table.model}_{number}_{name}".replace(" ", "_").replace("@", "_at_")
                plots.save(figure, args.pictures / f"{stem}.png")
    if args.html:
        values = [
            {
                "table": report.table,
                "pairs": report.pairs,
                "pictures": figures,
                "sections": sections(report, numbers),
            }
            for report, figures in zip(reports, drawn, strict=True)
        ]
        atomic_write_text(args.html, render_page(values))


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(
        prog="summarize_results.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("patterns", nargs="*", default=[DEFAULT_PATTERN], metavar="PATTERN")
    parser.add_argument("--format", choices=("md", "csv", "latex", "json"), default="md")
    parser.add_argument("--output", type=Path, help="write the tables here instead of on the terminal")
    parser.add_argument("--plot", type=Path, help="draw every table into this .png, .pdf or .svg file")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        help="evaluation seeds that each cell should have (default: 1 2 3 for the paper's benchmarks, for "
        "others the seeds that are there)",
    )
    parser.add_argument(
        "--compare", nargs=2, default=[], metavar=("A", "B"), help="which row is better, A or B"
    )
    parser.add_argument("--against", metavar="REFERENCE", help="compare every row with this one")
    parser.add_argument("--profiles", action="store_true", help="add Pass@k, Maj@k, lengths (votes again)")
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="draw differences and profiles as .png"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page with tables and pictures")
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
    reports = build_reports(tables, args, skipped.append)
    for message in skipped:
        print(f"skipped: {printable(message)}", file=sys.stderr)
    text = render(reports, numbers, args.format, args.seeds)
    if not args.output:
        print(text, end="")
    try:
        if args.output:
            atomic_write_text(args.output, text)
        write_extras(reports, numbers, args)
    except OSError as error:
        raise UsageError(f"{error.filename or args.output} cannot be written: {error.strerror}") from error
    return 1 if skipped else 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
