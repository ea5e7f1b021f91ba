"""Pictures of a comparison: differences with intervals, Pass@k and Maj@k, accuracy against length.

Readable without colour: methods differ in their markers, a resolved difference has a filled one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from opsd.report import plots
from opsd.report.comparison import UNRESOLVED, Comparison
from opsd.report.samples import Profile
from opsd.report.summary import BENCHMARK_TITLES, Row, Table, method_stem, row_title
from opsd.report.summary_plot import GREY, METHOD_COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# A share of fewer samples than this is not drawn.
FEW_SAMPLES = 30


def forest(found: Sequence[Comparison], val_n: int) -> Figure:
    """Draw each pair in a line, each benchmark in a panel: difference, 95 % interval, what was detectable."""
    from matplotlib.lines import Line2D

    benchmarks = list(dict.fromkeys(comparison.benchmark for comparison in found))
    pairs = list(dict.fromkeys((comparison.first, comparison.second) for comparison in found))
    figure, axes = plots.small_multiples(len(benchmarks), columns=len(benchmarks))
    figure.set_size_inches(2.4 * len(benchmarks) + 2.6, 0.42 * len(pairs) + 1.4)
    for axis, benchmark in zip(axes, benchmarks, strict=True):
        axis.axvline(0, color="black", linewidth=0.8)
        for comparison in (comparison for comparison in found if comparison.benchmark == benchmark):
            place = pairs.index((comparison.first, comparison.second))
            axis.barh(place, 2 * comparison.detectable, 0.6, left=-comparison.detectable, color="0.88")
            axis.hlines(place, *comparison.interval, color="black", linewidth=1.4)
            fill = "white" if comparison.verdict == UNRESOLVED else "black"
            axis.plot(comparison.difference, place, "o", color="black", markerfacecolor=fill)
        names = [f"{plots.plain(first)} against\n{plots.plain(second)}" for first, second in pairs]
        axis.set_yticks(range(len(pairs)), names)
        axis.set_ylim(len(pairs) - 0.4, -0.6)
        axis.grid(visible=False, axis="y")
        axis.tick_params(labelleft=axis is axes[0])
        title = plots.plain(BENCHMARK_TITLES.get(benchmark, benchmark))
        plots.label(axis, title=title, x=f"difference in Avg@{val_n} (points)", y="")
    handles = [
        Line2D([], [], color="black", marker="o", label="resolved, 95 % interval"),
        Line2D([], [], color="black", marker="o", markerfacecolor="white", label="not resolved"),
        Line2D([], [], color="0.88", linewidth=9, label="too small for this design (power below 80 %)"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def profiles_plot(table: Table, profiles: Mapping[tuple[Row, str], Profile], *, lengths: bool) -> Figure:
    """Draw Pass@k and Maj@k of each method, or with `lengths` its accuracy by the length of the samples."""
    from matplotlib.lines import Line2D

    figure, axes = plots.small_multiples(len(table.columns), columns=2)
    handles = []
    for place, row in enumerate(row for row in table.rows if row.cells):
        colour = METHOD_COLOURS.get(method_stem(row.method), GREY)
        style = {"color": colour, "marker": MARKERS[place % len(MARKERS)], "markersize": 5, "linewidth": 1.2}
        handles.append(Line2D([], [], label=plots.plain(row_title(row)), **style))
        for axis, name in zip(axes, table.columns, strict=True):
            if (found := profiles.get((row, name))) is None:
                continue
            if lengths:
                known = [(low, share) for low, count, share in found.lengths if count >= FEW_SAMPLES]
                axis.plot([1.5 * low for low, _ in known], [share for _, share in known], **style)
            for metric, line in () if lengths else (("pass@", "-"), ("majority@", "--")):
                curve = {
                    int(key.split("@")[1]): v for key, v in found.figures.items() if key.startswith(metric)
                }
                axis.plot(list(curve), list(curve.values()), linestyle=line, **style)
                axis.set_xticks(list(curve))
    for axis, name in zip(axes, table.columns, strict=True):
        x, y = "samples k", "Pass@k (solid), Maj@k (dashed), %"
        if lengths:
            x, y = "length of a sample (tokens)", "right samples (%)"
        if lengths and axis.lines:
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:,.0f}")
        plots.label(axis, title=plots.plain(BENCHMARK_TITLES.get(name, name)), x=x, y=y)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure
