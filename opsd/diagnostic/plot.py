"""The diagnostic's picture: the value of the teacher's choices, viability, and the suggested schedule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opsd.diagnostic.schedule import MODERATE, PLACES, Array, schedule
from opsd.report import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

    from opsd.diagnostic.analysis import Analysis
    from opsd.diagnostic.statistics import Estimate

POSITION = "relative position f on the spine"


def draw(analysis: Analysis, path: Path, *, top_k: int) -> None:
    """Write the picture: value, success, difference to the control and, if there is one, the schedule."""
    fit, curve = analysis.suggestion, analysis.curve
    figure, (decides, *axes) = plots.small_multiples(3 + (fit is not None), columns=2 if fit else 3)
    for axis in (decides, *axes):
        axis.set_xlim(0, 1)
    f = np.array([group.key for group in curve])
    blue, orange, green, purple = plots.COLOURS[:4]
    title = "Value of the teacher's choices"
    plots.label(decides, title=title, x=POSITION, y="success against the student's own")
    decides.axhline(0, color="0.3", linewidth=0.9, linestyle="--")
    value = _band(decides, f, [group.value for group in curve], purple, label="weight 1 (OPSD)", marker="o")
    weighted = schedule(f, **MODERATE) * value
    decides.plot(f, weighted, color="0.3", linestyle=":", label="× w(f), Moderate (PW-OPSD)")
    decides.legend(fontsize=8, loc="best", frameon=False)
    title = "Continuations that recover the answer"
    plots.label(axes[0], title=title, x=POSITION, y="share (95 % over problems)")
    forced = f"teacher's top {top_k}, forced"
    _band(axes[0], f, [group.success for group in curve], blue, label=forced, marker="o")
    control = "control: nothing forced"
    _band(axes[0], f, [group.control for group in curve], orange, label=control, marker="s")
    axes[0].set_ylim(-0.02, 1.02)
    axes[0].legend(fontsize=8, loc="best", frameon=False)
    plots.label(axes[1], title="Viability relative to the control", x=POSITION, y="difference of shares")
    axes[1].axhline(0, color="0.3", linewidth=0.9, linestyle="--")
    relative = "forced − control, same prefix"
    _band(axes[1], f, [group.difference for group in curve], green, label=relative, marker="o")
    # Head room for the legend: a band as wide as these leaves no other place for it.
    low, high = axes[1].get_ylim()
    axes[1].set_ylim(low, high + 0.2 * (high - low))
    axes[1].legend(fontsize=8, loc="upper right", frameon=False)
    if fit is not None:
        plots.label(axes[2], title="Position weight w(f)", x=POSITION, y="weight (95 % over problems)")
        note = ", undetermined" if fit.undetermined() else ""
        _band(axes[2], PLACES, fit.curve, blue, label=f"suggested{note}")
        moderate = schedule(PLACES, **MODERATE)
        axes[2].plot(PLACES, moderate, color="0.3", linestyle="--", label="Moderate (the paper)")
        axes[2].set_ylim(-0.02, 1.02)
        axes[2].legend(fontsize=7, loc="best", frameon=False)
    plots.save(figure, path)


def _band(axis: Axes, x: ArrayLike, estimates: Sequence[Estimate], colour: str, **line: str) -> Array:
    """Draw estimates, a gap where one is unknown, with their intervals where known; return their values."""
    value, low, high = np.array([(e.value, e.low, e.high) for e in estimates], dtype=float).T
    axis.plot(x, value, color=colour, markersize=4, **line)
    axis.fill_between(x, low, high, color=colour, alpha=0.17, linewidth=0)
    return value
