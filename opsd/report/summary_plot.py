"""The picture of the results table: a panel for each benchmark, a place in it for each method."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsd.report import plots
from opsd.report.notes import Notes
from opsd.report.summary import BENCHMARK_TITLES, Row, Table, method_stem, paper_rows, row_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL_WIDTH_INCHES, ROW_INCHES, NOTE_INCHES = 2.4, 0.34, 0.11
NOTE_CHARACTERS = 20  # per inch of a note's line
# One colour for a method and its variants in every picture; the base and other names are grey.
GREY = "0.35"
METHOD_COLOURS = dict(zip(("pwopsd", "opsd", "eopd", "reopold"), plots.COLOURS[:4], strict=True))
# Drawn below the method's own mean, so that neither hides the other.
PAPER_OFFSET = 0.28
PAPER_STYLE = {"marker": "D", "linestyle": "", "markerfacecolor": "white"}
DEVIATION_STYLE = {"linewidth": 5, "alpha": 0.45}


def draw(tables: Sequence[Table], numbers: Mapping[str, Any], path: Path) -> None:
    """Write the picture in the format of the ending of `path`: a line of panels for each table.

    A dot is one evaluation (the mean of one training seed's, where there are several), the thick bar the mean
    ± sample standard deviation, the thin line the 95 % bootstrap interval over problems, an open diamond the
    paper's mean. A number in brackets is a note's, which is below.
    """
    from matplotlib.lines import Line2D

    wide = max(len(table.figures) for table in tables)
    width = PANEL_WIDTH_INCHES * wide + 1.6
    heights = [ROW_INCHES * max(len(_drawn(table)), 2) + 0.9 for table in tables]
    notes, characters = Notes(*tables), int(NOTE_CHARACTERS * width)
    below = [line for text in notes.numbered() for line in textwrap.wrap(text, characters)]
    figure = plots.new_figure(width, sum(heights) + 0.5 + NOTE_INCHES * len(below))
    figure.supxlabel(plots.plain("\n".join(below), 10_000), fontsize=6, x=0.01, ha="left")
    grid = figure.subplots(len(tables), wide, squeeze=False, gridspec_kw={"height_ratios": heights})
    for table, line in zip(tables, grid, strict=True):
        paper = {method: figures for method, _, figures in paper_rows(numbers, table.model)}
        for axis, (title, columns) in zip(line[: len(table.figures)], table.figures, strict=True):
            _panel(axis, table, title, columns, paper, notes)
            axis.tick_params(labelleft=axis is line[0])
        for spare in line[len(table.figures) :]:
            spare.set_axis_off()
        facts = table.runs[0].facts
        regime = f"temperature {facts['temperature']:g},\n{facts['max_new_tokens']:,} tokens"
        line[0].set_ylabel(f"{plots.plain(table.model)}\n{regime}", fontsize=7)
    handles = [
        Line2D([], [], color=GREY, label="mean ± standard deviation over seeds", **DEVIATION_STYLE),
        Line2D([], [], color="black", marker="o", linestyle="", markersize=3, label="one seed"),
        Line2D([], [], color=GREY, linewidth=1, label="95 % bootstrap over problems"),
        Line2D([], [], color=GREY, label="the paper", **PAPER_STYLE),
    ]
    if not any(paper_rows(numbers, table.model) for table in tables):
        handles.pop()
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    plots.save(figure, path)


def _drawn(table: Table) -> list[Row]:
    return [row for row in table.rows if row.cells]


def _panel(axis: Axes, table: Table, title: str, columns: tuple[str, ...], paper: dict, notes: Notes) -> None:
    plots.style(axis)
    rows = _drawn(table)
    for place, row in enumerate(rows):
        colour = METHOD_COLOURS.get(method_stem(row.method), GREY)
        if (s := row.statistic("average", columns)) is not None:
            axis.hlines(place, *s.interval, color=colour, linewidth=1, alpha=0.7)
            if s.deviation is not None:
                ends = (s.mean - s.deviation, s.mean + s.deviation)
                axis.hlines(place, *ends, color=colour, **DEVIATION_STYLE)
            axis.vlines(s.mean, place - 0.2, place + 0.2, color=colour, linewidth=2)
            mark = {"xytext": (0, 4), "textcoords": "offset points", "fontsize": 6, "ha": "right"}
            axis.annotate(notes.mark(row, columns), (s.interval[1], place), **mark)
            single = row.cells[columns[0]].values("average") if len(columns) == 1 else []
            if len(single) > 1:
                axis.plot(single, [place] * len(single), "o", color="black", markersize=2.2, zorder=3)
        if figure := paper.get(row.method, {}).get(columns):
            axis.plot(figure[0], place + PAPER_OFFSET, color=colour, markersize=5, **PAPER_STYLE)
    plots.label(axis, title=plots.plain(BENCHMARK_TITLES.get(title, title)), x=f"Avg@{table.val_n} (%)", y="")
    axis.set_yticks(range(len(rows)), [plots.plain(row_title(row)) for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
