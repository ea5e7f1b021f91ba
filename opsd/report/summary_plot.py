"""The picture of the results table: a panel for each benchmark, a place in it for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsd.report import plots
from opsd.report.summary import Row, Statistic, Table, benchmark_title, method_stem, paper_row, row_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL_WIDTH_INCHES, ROW_INCHES = 2.4, 0.34
_ORDER = ("pwopsd", "opsd", "eopd", "reopold")
# Drawn below the method's own mean, so that neither hides the other.
PAPER_OFFSET = 0.28


def draw(tables: Sequence[Table], numbers: Mapping[str, Any], path: Path) -> None:
    """Write the picture in the format of the ending of `path`: a line of panels for each table.

    A dot is one evaluation (the mean of one training seed's, where there are several), the thick bar the mean
    ± sample standard deviation, the thin line the 95 % bootstrap interval over problems, an open diamond the
    paper's mean.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wide = max(len(table.columns) + bool(table.averaged) for table in tables)
    heights = [ROW_INCHES * max(len(_drawn(table)), 2) + 0.9 for table in tables]
    figure = Figure(figsize=(PANEL_WIDTH_INCHES * wide + 1.6, sum(heights) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(tables), wide, squeeze=False, gridspec_kw={"height_ratios": heights})
    with_paper = False
    for table, line in zip(tables, grid, strict=True):
        panels = [*table.columns, *([None] if table.averaged else [])]
        for axis, column in zip(line, panels, strict=False):
            with_paper |= _panel(axis, table, column, numbers)
            axis.tick_params(labelleft=axis is line[0])
        for spare in line[len(panels) :]:
            spare.set_axis_off()
        facts = table.runs[0].facts
        regime = f"temperature {facts['temperature']:g},\n{facts['max_new_tokens']:,} tokens"
        line[0].set_ylabel(f"{plots.plain(table.model)}\n{regime}", fontsize=7)
    figure.legend(handles=_legend(with_paper), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    plots.save(figure, path)


def _drawn(table: Table) -> list[Row]:
    return [row for row in table.rows if row.cells]


def _panel(axis: Axes, table: Table, column: str | None, numbers: Mapping[str, Any]) -> bool:
    """One benchmark's panel, or with None that of the mean. Returns whether the paper has a part in it."""
    plots.style(axis)
    rows = _drawn(table)
    paper = _paper_values(numbers, table.model, column)
    for place, row in enumerate(rows):
        statistic, single = _values(row, table, column)
        if statistic is not None:
            _estimate(axis, place, statistic, single, _colour(row))
        if row.method in paper:
            diamond = {"color": _colour(row), "markerfacecolor": "white", "markersize": 5}
            axis.plot(paper[row.method], place + PAPER_OFFSET, "D", **diamond)
    title = f"mean of {len(table.averaged)}" if column is None else benchmark_title(column)
    plots.label(axis, title=plots.plain(title), x=f"Avg@{table.val_n} (%)", y="")
    axis.set_yticks(range(len(rows)), [plots.plain(row_title(row)) for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    return any(row.method in paper for row in rows)


def _values(row: Row, table: Table, column: str | None) -> tuple[Statistic | None, list[float]]:
    """The statistic to draw and the percentages behind it."""
    if column is None:
        return row.average("average", table.averaged), []
    if column not in row.cells:
        return None, []
    cell = row.cells[column]
    return cell.statistic("average"), cell.values("average")


def _estimate(axis: Axes, place: int, s: Statistic, single: Sequence[float], colour: str) -> None:
    axis.hlines(place, *s.interval, color=colour, linewidth=1, alpha=0.7)
    if s.deviation is not None:
        axis.hlines(place, s.mean - s.deviation, s.mean + s.deviation, color=colour, linewidth=5, alpha=0.45)
    axis.vlines(s.mean, place - 0.2, place + 0.2, color=colour, linewidth=2)
    if len(single) > 1:
        axis.plot(single, [place] * len(single), "o", color="black", markersize=2.2, zorder=3)


def _paper_values(numbers: Mapping[str, Any], model: str, column: str | None) -> dict[str, float]:
    """The paper's mean for each of its methods."""
    if column is not None and column not in numbers["benchmarks"]:
        return {}
    methods = [row["method"] for row in numbers["rows"] if row["model"] == model]
    return {
        method: mean if column is None else cells[numbers["benchmarks"].index(column)][0]
        for method, (_, cells, mean) in zip(methods, paper_row(numbers, model), strict=True)
    }


def _colour(row: Row) -> str:
    """One colour for a method and its variants, in every picture; the base and other names are grey."""
    stem = method_stem(row.method)
    return plots.COLOURS[_ORDER.index(stem)] if stem in _ORDER else "0.35"


def _legend(with_paper: bool) -> list[Any]:
    from matplotlib.lines import Line2D

    grey = "0.35"
    handles = [
        Line2D([], [], color=grey, linewidth=5, alpha=0.45, label="mean ± standard deviation over seeds"),
        Line2D([], [], color="black", marker="o", linestyle="", markersize=3, label="one seed"),
        Line2D([], [], color=grey, linewidth=1, label="95 % bootstrap over problems"),
    ]
    if with_paper:
        handles.append(
            Line2D([], [], color=grey, marker="D", linestyle="", markerfacecolor="white", label="the paper")
        )
    return handles
