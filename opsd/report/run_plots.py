"""From the metrics.jsonl of one or more training runs to a picture: a panel per quantity, a colour per run.

The keys are those that `opsd/trainer.py` and `opsd/step_metrics.py` log. A panel without data in any run is
left out; each `method/…` metric has a panel, under its key where this file does not know it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from opsd.errors import MALFORMED, ArtefactError, UsageError, printable
from opsd.report import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
LINE_STYLES = ("-", "--", ":")
# A run that logged fewer points than this would show lines too short to be seen.
MARKERS_BELOW = 12
# What is set rather than measured has no noise to smooth, and a mean would show a step that never was.
NOT_SMOOTHED = ("learning rate", "phase")


@dataclass(frozen=True)
class Panel:
    """One panel: what it is called, its unit, and the logged keys that it shows with a label each."""

    title: str
    unit: str
    series: tuple[tuple[str, str], ...]


PANELS = (
    Panel("Loss (each method has its own)", "loss", (("loss", "loss"),)),
    Panel(
        "Divergence from the teacher",
        "nats per token",
        (
            ("loss/divergence", "KL(teacher ‖ student), all entries"),
            ("loss/sampled_divergence", "log p_S − log p_T, sampled tokens"),
        ),
    ),
    Panel(
        "Entropy",
        "nats per token",
        (("student/entropy", "student"), ("teacher/entropy", "privileged teacher")),
    ),
    Panel(
        "Completion length",
        "tokens",
        (("rollout/completion_tokens", "mean"), ("rollout/completion_tokens_max", "longest")),
    ),
    Panel("Completions cut at the limit", "share", (("rollout/truncated_share", "cut"),)),
    Panel("Gradient norm, before clipping", "norm", (("grad_norm", "gradient"),)),
    Panel("Tokens with an entry at the clip", "share of tokens", (("loss/clipped_token_share", "clipped"),)),
    Panel("Learning rate", "learning rate", (("learning_rate", "learning rate"),)),
    Panel(
        "Seconds per optimizer step",
        "seconds",
        (("time/step_s", "whole step"), ("time/rollout_s", "rollout"), ("time/teacher_s", "teacher pass")),
    ),
    Panel(
        "Sampler against trainer",
        "nats per token",
        (("rollout/logprob_difference", "mean |difference of log p|"),),
    ),
    Panel("Tokens outside the sampler's support", "share", (("rollout/outside_support_share", "outside"),)),
)
# Title and unit of the methods' own metrics.
METHOD_PANELS = {
    "method/mean_weight": ("PW-OPSD: mean position weight", "weight"),
    "method/gate_share": ("EOPD: tokens above the entropy gate", "share of tokens"),
    "method/advantage": ("EOPD: mean advantage", "nats per token"),
    "method/topk_divergence": ("EOPD: top-k forward KL", "nats per token"),
    "method/kept_share": ("REOPOLD: tokens kept", "share of tokens"),
    "method/below_floor_share": ("REOPOLD: rewards below the floor", "share of tokens"),
    "method/reward": ("REOPOLD: mean reward", "nats per token"),
    "method/refinement": ("REOPOLD: phase (1 = refinement)", "phase"),
}


@dataclass
class Run:
    """What one run logged: {key: (steps, values)}; a value is NaN where the log holds null."""

    name: str
    series: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)


def read_metrics(run_folder: Path) -> list[dict[str, float | None]]:
    """Return the logged steps of a run, in order; none where it has not logged yet.

    What follows the last newline is a line that is being written, or that a kill cut short: it is left out,
    with a warning.

    Raises:
        ArtefactError: a line is not a logged step.
    """
    path = run_folder / METRICS_NAME
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    if lines.pop():
        logger.warning("%s: the last line is incomplete and left out", printable(path))
    return [_row(line, path, number) for number, line in enumerate(lines, start=1)]


def load_run(folder: Path) -> Run:
    """Return the logged steps of a run as series.

    Raises:
        ArtefactError: no such folder, no metrics.jsonl in it, no logged step in that, or a damaged line.
    """
    if not folder.is_dir():
        raise ArtefactError(f"{str(folder)!r} is no folder; give the output folder of a training run")
    path = folder / METRICS_NAME
    if not path.is_file():
        raise ArtefactError(f"{str(folder)!r} holds no {METRICS_NAME}: no run has logged a step there")
    run = Run(folder.resolve().name)
    for row in read_metrics(folder):
        for key, value in row.items():
            if key != "step":
                steps, values = run.series.setdefault(key, ([], []))
                steps.append(row["step"])
                values.append(math.nan if value is None else float(value))
    if not any(key in run.series for panel in panels_of([run]) for key, _ in panel.series):
        raise ArtefactError(f"{str(path)!r} holds no logged step yet")
    return run


def _row(line: bytes, path: Path, number: int) -> dict[str, float | None]:
    try:
        row = json.loads(line)
        # A name with half a surrogate pair cannot be drawn; steps beyond 2**53 are no exact numbers.
        good = type(row["step"]) is int and 0 <= row["step"] < 2**53
        for name, value in row.items():
            good &= bool(name.encode()) and (value is None or (value is not True and math.isfinite(value)))
    except MALFORMED:
        good = False
    if not good:
        raise ArtefactError(
            f"line {number} of {str(path)!r} is damaged: {line.decode('utf-8', 'replace')[:60]!r} is no "
            "logged step; delete the line, or train anew"
        )
    return row


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Every run, under names that tell them apart.

    Raises:
        UsageError: a folder stands twice, or more runs than there are colours.
        ArtefactError: see `load_run`.
    """
    if len(folders) > len(plots.COLOURS):
        raise UsageError(f"{len(folders)} runs are too many for one picture: at most {len(plots.COLOURS)}")
    places = [folder.resolve() for folder in folders]
    for place in places:
        if places.count(place) > 1:
            raise UsageError(f"{str(place)!r} is given twice")
    runs = [load_run(folder) for folder in folders]
    names = [run.name for run in runs]
    for run, place in zip(runs, places, strict=True):
        if names.count(run.name) > 1:
            run.name = f"{place.parent.name}/{place.name}"
    return runs


def panels_of(runs: Sequence[Run]) -> list[Panel]:
    """The panels for which some run has a number, the methods' own after the common ones."""
    found = [key for run in runs for key in run.series if key.startswith("method/")]
    known = {key: METHOD_PANELS.get(key, (key, "value")) for key in (*METHOD_PANELS, *found)}
    own = [Panel(title, unit, ((key, title),)) for key, (title, unit) in known.items()]
    panels = []
    for panel in (*PANELS, *own):
        held = tuple(
            (key, label)
            for key, label in panel.series
            if any(not all(map(math.isnan, run.series[key][1])) for run in runs if key in run.series)
        )
        if held:
            panels.append(Panel(panel.title, panel.unit, held))
    return panels


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window` − 1 before it. NaN stays NaN and is left out of the means."""
    means = []
    for end, value in enumerate(values, start=1):
        past = [v for v in values[max(0, end - window) : end] if not math.isnan(v)]
        means.append(value if math.isnan(value) else sum(past) / len(past))
    return means


def draw(runs: Sequence[Run], path: Path, *, smooth: int = 1) -> list[str]:
    """Write the picture and return the titles of its panels.

    Args:
        path: ends in one of `plots.FORMATS`.
        smooth: running mean over so many logged steps, the raw values faint behind it; 1 = raw alone.
    """
    panels = panels_of(runs)
    figure, axes = plots.small_multiples(len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        _panel(axis, panel, runs, smooth)
    title = plots.plain(runs[0].name, 80) if len(runs) == 1 else ""
    if smooth > 1:
        title += f"{'   ' if title else ''}(running mean over {smooth} steps, raw values faint)"
    if title:
        figure.suptitle(title, fontsize=11)
    if len(runs) > 1:
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], color=colour, linewidth=2, label=plots.plain(run.name, 60))
            for run, colour in zip(runs, plots.COLOURS, strict=False)
        ]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(len(runs), 4), frameon=False, fontsize=9
        )
    plots.save(figure, path)
    return [panel.title for panel in panels]


def _panel(axis: Axes, panel: Panel, runs: Sequence[Run], smooth: int) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    smooth = 1 if panel.unit in NOT_SMOOTHED else smooth
    for run, colour in zip(runs, plots.COLOURS, strict=False):
        for (key, _), style in zip(panel.series, LINE_STYLES, strict=False):
            if key not in run.series:
                continue
            steps, values = run.series[key]
            marker = "o" if len(steps) < MARKERS_BELOW else None
            line = {"color": colour, "linestyle": style, "linewidth": 1.4, "marker": marker, "markersize": 3}
            if smooth > 1:
                axis.plot(steps, values, **{**line, "alpha": 0.25, "linewidth": 0.8, "marker": None})
            axis.plot(steps, smoothed(values, smooth), **line)
    plots.label(axis, title=panel.title, x="optimizer step", y=panel.unit)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    _set_range(axis, panel)
    if len(panel.series) > 1:
        handles = [
            Line2D([], [], color="0.25", linestyle=style, label=label)
            for (_, label), style in zip(panel.series, LINE_STYLES, strict=False)
        ]
        axis.legend(handles=handles, fontsize=7, loc="best", frameon=False)


def _set_range(axis: Axes, panel: Panel) -> None:
    """Start at 0 where nothing is below it: a constant is not blown up into a curve of rounding errors."""
    low, high = axis.dataLim.intervaly
    if panel.unit.startswith("share") or panel.unit == "phase":
        top = 1.02 if high > 0.5 else max(1.15 * high, 0.1)
        # Room for a line at 0 to be seen above the axis.
        axis.set_ylim(-0.03 * top, top)
    elif low >= 0 and high > 0:
        axis.set_ylim(0, 1.1 * high)
