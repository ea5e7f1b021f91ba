"""The diagnostic's picture: viability along the spine, with and without the control."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opsd.diagnostic.schedule import schedule
from opsd.report import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from opsd.diagnostic.analysis import Analysis, CurvePoint
    from opsd.diagnostic.schedule import ScheduleFit
    from opsd.diagnostic.statistics import Estimate

POSITION = "relative position f on the spine"
MODERATE = {"w_min": 0.25, "tau": 0.30, "s": 0.10}


def draw(analysis: Analysis, path: Path, *, top_k: int) -> None:
    """Write the picture: success, difference to the control and, where they were fitted, the schedules."""
    fits = {name: fit for name, fit in analysis.schedules.items() if fit is not None}
    figure, axes = plots.small_multiples(2 + bool(fits))
    _success(axes[0], analysis.curve, top_k)
    _difference(axes[1], analysis.curve)
    if fits:
        _schedules(axes[2], fits)
    for axis in axes:
        axis.set_xlim(0, 1)
    plots.save(figure, path)


def _band(axis: Axes, points: list[CurvePoint], name: str, *, colour: str, label: str, marker: str) -> None:
    estimates: list[tuple[float, Estimate]] = [
        ((p.low + p.high) / 2, getattr(p, name)) for p in points if getattr(p, name).value is not None
    ]
    x = [at for at, _ in estimates]
    axis.plot(x, [e.value for _, e in estimates], color=colour, marker=marker, markersize=4, label=label)
    ends = [(at, e.low, e.high) for at, e in estimates if e.low is not None]
    if ends:
        axis.fill_between(*map(list, zip(*ends, strict=True)), color=colour, alpha=0.18, linewidth=0)


def _success(axis: Axes, points: list[CurvePoint], top_k: int) -> None:
    blue, orange = plots.COLOURS[:2]
    _band(axis, points, "success", colour=blue, marker="o", label=f"teacher's top {top_k}, forced")
    _band(axis, points, "control", colour=orange, marker="s", label="control: nothing forced")
    axis.set_ylim(-0.02, 1.02)
    plots.label(
        axis, title="Continuations that recover the answer", x=POSITION, y="share (95 % over problems)"
    )
    axis.legend(fontsize=8, loc="best", frameon=False)


def _difference(axis: Axes, points: list[CurvePoint]) -> None:
    axis.axhline(0, color="0.3", linewidth=0.9, linestyle="--")
    _band(
        axis, points, "difference", colour=plots.COLOURS[2], marker="o", label="forced − control, same prefix"
    )
    plots.label(axis, title="Viability relative to the control", x=POSITION, y="difference of shares")
    # Head room for the legend: a band as wide as these leaves no other place for it.
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.2 * (high - low))
    axis.legend(fontsize=8, loc="upper right", frameon=False)


def _schedules(axis: Axes, fits: dict[str, ScheduleFit]) -> None:
    for colour, (name, fit) in zip(plots.COLOURS, fits.items(), strict=False):
        note = ", undetermined" if fit.undetermined() else ""
        axis.plot(fit.grid, fit.curve, color=colour, label=f"fitted to {name} viability{note}")
        axis.fill_between(fit.grid, *fit.band, color=colour, alpha=0.15, linewidth=0)
    grid = np.linspace(0, 1, 101)
    axis.plot(grid, schedule(grid, **MODERATE), color="0.3", linestyle="--", label="Moderate (the paper)")
    axis.set_ylim(-0.02, 1.02)
    plots.label(axis, title="Position weight w(f)", x=POSITION, y="weight (95 % over problems)")
    axis.legend(fontsize=7, loc="best", frameon=False)
