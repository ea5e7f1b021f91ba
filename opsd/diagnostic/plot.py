"""The diagnostic's picture: viability along the spine, with and without the control."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opsd.diagnostic.schedule import schedule
from opsd.report import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from opsd.diagnostic.analysis import Analysis, Group

POSITION = "relative position f on the spine"
MODERATE = {"w_min": 0.25, "tau": 0.30, "s": 0.10}


def draw(analysis: Analysis, path: Path, *, top_k: int) -> None:
    """Write the picture: success, difference to the control and, where they were fitted, the schedules."""
    fits = {name: fit for name, fit in analysis.schedules.items() if fit is not None}
    figure, axes = plots.small_multiples(2 + bool(fits))
    for axis in axes:
        axis.set_xlim(0, 1)
    title = "Continuations that recover the answer"
    plots.label(axes[0], title=title, x=POSITION, y="share (95 % over problems)")
    blue, orange, green = plots.COLOURS[:3]
    _band(axes[0], analysis.curve, "success", colour=blue, label=f"teacher's top {top_k}, forced", marker="o")
    _band(axes[0], analysis.curve, "control", colour=orange, label="control: nothing forced", marker="s")
    axes[0].set_ylim(-0.02, 1.02)
    axes[0].legend(fontsize=8, loc="best", frameon=False)
    plots.label(axes[1], title="Viability relative to the control", x=POSITION, y="difference of shares")
    axes[1].axhline(0, color="0.3", linewidth=0.9, linestyle="--")
    difference = "forced − control, same prefix"
    _band(axes[1], analysis.curve, "difference", colour=green, label=difference, marker="o")
    # Head room for the legend: a band as wide as these leaves no other place for it.
    low, high = axes[1].get_ylim()
    axes[1].set_ylim(low, high + 0.2 * (high - low))
    axes[1].legend(fontsize=8, loc="upper right", frameon=False)
    if fits:
        plots.label(axes[2], title="Position weight w(f)", x=POSITION, y="weight (95 % over problems)")
        for colour, (name, fit) in zip(plots.COLOURS, fits.items(), strict=False):
            note = ", undetermined" if fit.undetermined() else ""
            axes[2].plot(fit.grid, fit.curve, color=colour, label=f"fitted to {name} viability{note}")
            axes[2].fill_between(fit.grid, *fit.band, color=colour, alpha=0.15, linewidth=0)
        grid = np.linspace(0, 1, 101)
        moderate = schedule(grid, **MODERATE)
        axes[2].plot(grid, moderate, color="0.3", linestyle="--", label="Moderate (the paper)")
        axes[2].set_ylim(-0.02, 1.02)
        axes[2].legend(fontsize=7, loc="best", frameon=False)
    plots.save(figure, path)


def _band(axis: Axes, curve: list[Group], name: str, *, colour: str, label: str, marker: str) -> None:
    """Draw one estimate of every bin that has it, with its interval where that is known."""
    known = [(point.key, getattr(point, name)) for point in curve if getattr(point, name).value is not None]
    x, values = [at for at, _ in known], [estimate.value for _, estimate in known]
    axis.plot(x, values, color=colour, marker=marker, markersize=4, label=label)
    ends = [(at, estimate.low, estimate.high) for at, estimate in known if estimate.low is not None]
    if ends:
        axis.fill_between(*map(list, zip(*ends, strict=True)), color=colour, alpha=0.18, linewidth=0)
