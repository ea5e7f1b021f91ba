"""Pictures of a comparison: differences with intervals, Pass@k and Maj@k, accuracy against length.

Readable without colour: methods differ in their markers, a resolved difference has a filled one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from opsd.report import plots
from opsd.report.comparison import Comparison
from opsd.report.samples import Profile
from opsd.report.summary import BENCHMARK_TITLES, Row, Table, method_stem, row_title
from opsd.report.summary_plot import GREY, METHOD_COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# A share of fewer samples than this is drawn with an open marker.
FEW_SAMPLES = 30
Profiles = Mapping[tuple[Row, str], Profile]


def forest(found: Sequence[Comparison], val_n: int) -> Figure:
    """Draw each pair in a row, each benchmark in a panel: difference, 95 % interval, what was detectable."""
    from matplotlib.lines import Line2D

    benchmarks = list(dict.fromkeys(comparison.benchmark for comparison in found))
    pairs = list(dict.fromkeys((comparison.first, comparison.second) for comparison in found))
    figure, axes = plots.small_multiples(len(benchmarks), columns=len(benchmarks))
    figure.set_size_inches(2.5 * len(benchmarks) + 1.8, 0.42 * len(pairs) + 1.5)
    for axis, benchmark in zip(axes, benchmarks, strict=True):
        axis.axvline(0, color="black", linewidth=0.8)
        for comparison in (c for c in found if c.benchmark == benchmark):
            place = pairs.index((comparison.first, comparison.second))
            reach, resolved = comparison.detectable, comparison.verdict != "not resolved"
            axis.hlines(place, -reach, reach, color="0.85", linewidth=9)
            axis.hlines(place, *comparison.interval, color="black", linewidth=1.4)
            fill = "black" if resolved else "white"
            axis.plot(comparison.difference, place, "o", color="black", markerfacecolor=fill, markersize=6)
        axis.set_yticks(range(len(pairs)), [plots.plain(f"{a} against {b}", 60) for a, b in pairs])
        axis.set_ylim(len(pairs) - 0.4, -0.6)
        axis.grid(visible=False, axis="y")
        axis.tick_params(labelleft=axis is axes[0])
        title = plots.plain(BENCHMARK_TITLES.get(benchmark, benchmark))
        plots.label(axis, title=title, x=f"difference in Avg@{val_n} (points)", y="")
    handles = [
        Line2D([], [], color="black", marker="o", label="resolved, with 95 % interval"),
        Line2D([], [], color="black", marker="o", markerfacecolor="white", label="not resolved"),
        Line2D([], [], color="0.85", linewidth=9, label="differences detectable in less than 80 %"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def curves(table: Table, profiles: Profiles) -> Figure:
    """Draw Pass@k (solid) and Maj@k (dashed) of each method, a panel for each benchmark."""

    def draw(axis: Axes, profile: Profile, style: dict) -> None:
        for values, line in ((profile.pass_at, "-"), (profile.majority_at, "--")):
            axis.plot(list(values), list(values.values()), linestyle=line, **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(profile.pass_at), [str(k) for k in profile.pass_at])

    return _panels(table, profiles, draw, "k samples", "Pass@k (solid), Maj@k (dashed), %")


def accuracy_against_length(table: Table, profiles: Profiles) -> Figure:
    """Draw the accuracy of each method by the length of its samples; open markers for few samples."""

    def draw(axis: Axes, profile: Profile, style: dict) -> None:
        middles = [1.5 * low for low, _, _ in profile.lengths]
        axis.plot(middles, [share for *_, share in profile.lengths], linestyle="-", **style | {"marker": ""})
        for middle, (_, count, share) in zip(middles, profile.lengths, strict=True):
            fill = {"markerfacecolor": "white"} if count < FEW_SAMPLES else {}
            axis.plot(middle, share, linestyle="", **style | fill | {"label": None})
        axis.set_xscale("log", base=2)

    return _panels(table, profiles, draw, "length of a sample (tokens)", "right samples (%)")


def _panels(table: Table, profiles: Profiles, draw: object, x: str, y: str) -> Figure:
    from matplotlib.lines import Line2D

    figure, axes = plots.small_multiples(len(table.columns), columns=2)
    rows = [row for row in table.rows if row.cells]
    styles = {
        row: {
            "color": METHOD_COLOURS.get(method_stem(row.method), GREY),
            "marker": MARKERS[place % len(MARKERS)],
            "markersize": 5,
            "linewidth": 1.2,
        }
        for place, row in enumerate(rows)
    }
    for axis, name in zip(axes, table.columns, strict=True):
        for row in rows:
            if (row, name) in profiles:
                draw(axis, profiles[row, name], styles[row])
        plots.label(axis, title=plots.plain(BENCHMARK_TITLES.get(name, name)), x=x, y=y)
    handles = [Line2D([], [], label=plots.plain(row_title(row)), **styles[row]) for row in rows]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure
