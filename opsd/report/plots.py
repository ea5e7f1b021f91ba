"""What every picture of this project shares: colours, small multiples, writing a file atomically."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

from opsd.errors import UsageError
from opsd.files import atomic_write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which readers with a colour-vision deficiency can distinguish too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C00")
FORMATS = (".png", ".pdf", ".svg")
PANEL_INCHES = (4.2, 3.0)
DPI = 130


def check_picture(path: Path) -> None:
    """Raise UsageError if the ending is not one of `FORMATS`, or the name is a folder's."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{str(path)!r} must end in {', '.join(FORMATS)}")
    if path.is_dir():
        raise UsageError(f"{str(path)!r} is a folder; name a file in it")


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of a size in inches, which needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def small_multiples(panels: int, *, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """Return a figure of equal panels in rows, the last row filled up with blanks."""
    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    figure = new_figure(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[panels:]:
        spare.set_axis_off()
    for axis in axes[:panels]:
        style(axis)
    return figure, axes[:panels]


def style(axis: Axes) -> None:
    """Draw a light grid behind the data, no box around it, small figures on the axes."""
    axis.grid(visible=True, color="0.9", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def label(axis: Axes, *, title: str, x: str, y: str) -> None:
    """Set title and axis labels in the sizes that fit a panel."""
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)


def plain(text: str, limit: int = 40) -> str:
    """Return `text` for a legend: short, its dollar signs no mathematics."""
    cut = text if len(text) <= limit else f"{text[: limit - 1]}…"
    return cut.replace("$", r"\$")


def save(figure: Figure, path: Path) -> None:
    """Write the picture atomically, in the format of its ending."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=DPI)
    atomic_write_bytes(path, buffer.getvalue())
