"""Draw the metrics.jsonl of one or more training runs: a panel for each quantity, a colour for each run.

The keys are those that `opsd/trainer.py` and `opsd/step_metrics.py` log. A panel without data in any run is
left out; each `method/…` metric has a panel, under its key where this file does not know it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from opsd.errors import ArtefactError, UsageError
from opsd.records import METRICS_NAME, read_metrics
from opsd.report import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

LINE_STYLES = ("-", "--", ":")
# A run that logged fewer points than this would show lines too short to be seen.
MARKERS_BELOW = 12
# What is set rather than measured has no noise to smooth, and a mean would show a step that never was.
NOT_SMOOTHED = ("learning rate", "phase")
DIVERGENCE = "Divergence from the teacher"
# Title and unit of the panel, and the label in it, of each logged key.
PANELS = {
    "loss": ("Loss (each method has its own)", "loss", "loss"),
    "loss/divergence": (DIVERGENCE, "nats per token", "KL(teacher ‖ student), all entries"),
    "loss/sampled_divergence": (DIVERGENCE, "nats per token", "log p_S − log p_T, sampled tokens"),
    "student/entropy": ("Entropy", "nats per token", "student"),
    "teacher/entropy": ("Entropy", "nats per token", "privileged teacher"),
    "rollout/completion_tokens": ("Completion length", "tokens", "mean"),
    "rollout/completion_tokens_max": ("Completion length", "tokens", "longest"),
    "rollout/truncated_share": ("Completions cut at the limit", "share", "cut"),
    "grad_norm": ("Gradient norm, before clipping", "norm", "gradient"),
    "loss/clipped_token_share": ("Tokens with an entry at the clip", "share of tokens", "clipped"),
    "learning_rate": ("Learning rate", "learning rate", "learning rate"),
    "time/step_s": ("Seconds per optimizer step", "seconds", "complete step"),
    "time/rollout_s": ("Seconds per optimizer step", "seconds", "rollout"),
    "time/teacher_s": ("Seconds per optimizer step", "seconds", "teacher pass"),
    "rollout/logprob_difference": ("Sampler against trainer", "nats per token", "mean |difference of log p|"),
    "rollout/outside_support_share": ("Tokens outside the sampler's support", "share", "outside"),
    "method/mean_weight": ("PW-OPSD: mean position weight", "weight", ""),
    "method/gate_share": ("EOPD: tokens above the entropy gate", "share of tokens", ""),
    "method/advantage": ("EOPD: mean advantage", "nats per token", ""),
    "method/topk_divergence": ("EOPD: top-k forward KL", "nats per token", ""),
    "method/kept_share": ("REOPOLD: tokens kept", "share of tokens", ""),
    "method/below_floor_share": ("REOPOLD: rewards below the floor", "share of tokens", ""),
    "method/reward": ("REOPOLD: mean reward", "nats per token", ""),
    "method/refinement": ("REOPOLD: phase (1 = refinement)", "phase", ""),
}
# The keys of one panel with their labels, by its title and unit.
Panels = dict[tuple[str, str], dict[str, str]]
# What one run logged, by key: values by step, NaN where the log has null.
Run = dict[str, pd.Series]


def load_run(folder: Path) -> Run:
    """Return the logged steps of a run; raise ArtefactError where there are none, or a line is damaged."""
    if not folder.is_dir():
        raise ArtefactError(f"{str(folder)!r} is no folder; give the output folder of a training run")
    if not (folder / METRICS_NAME).is_file():
        raise ArtefactError(f"{str(folder)!r} holds no {METRICS_NAME}: no run has logged a step there")
    rows = read_metrics(folder)
    keys = dict.fromkeys(key for row in rows for key in row if key != "step")
    values = {key: {row["step"]: row[key] for row in rows if key in row} for key in keys}
    run = {key: pd.Series(some, dtype=float) for key, some in values.items()}
    if not panels_of([run]):
        raise ArtefactError(f"{str(folder / METRICS_NAME)!r} holds no logged step yet")
    return run


def load_runs(folders: Sequence[Path]) -> dict[str, Run]:
    """Return the runs by names that differ.

    Raises:
        UsageError: a folder is given twice, or more runs than there are colours.
    """
    if len(folders) > len(plots.COLOURS):
        raise UsageError(f"{len(folders)} runs are too many for one picture: at most {len(plots.COLOURS)}")
    places = [folder.resolve() for folder in folders]
    for place in places:
        if places.count(place) > 1:
            raise UsageError(f"{str(place)!r} is given twice")
    # The shortest ends of the paths that differ.
    tails = (["/".join(place.parts[-length:]) for place in places] for length in itertools.count(1))
    names = next(names for names in tails if len(set(names)) == len(names))
    return dict(zip(names, map(load_run, folders), strict=True))


def panels_of(runs: Iterable[Run]) -> Panels:
    """Return the panels for which some run has a number, those of unknown `method/…` keys last."""
    found = {key for run in runs for key, values in run.items() if values.notna().any()}
    unknown = sorted(key for key in found.difference(PANELS) if key.startswith("method/"))
    panels: Panels = {}
    for key, (title, unit, label) in (PANELS | {key: (key, "value", "") for key in unknown}).items():
        if key in found:
            panels.setdefault((title, unit), {})[key] = label
    return panels


def smoothed(values: pd.Series, window: int) -> pd.Series:
    """Return the mean of each value and up to `window` − 1 before it; NaN stays NaN and counts in no mean."""
    return values.rolling(window, min_periods=1).mean().where(values.notna())


def draw(runs: dict[str, Run], path: Path, *, smooth: int = 1) -> None:
    """Write the picture: for `smooth` > 1 a running mean over so many logged steps, raw values faint."""
    panels = panels_of(runs.values())
    figure, axes = plots.small_multiples(len(panels))
    for axis, ((title, unit), labels) in zip(axes, panels.items(), strict=True):
        plots.label(axis, title=title, x="optimizer step", y=unit)
        _panel(axis, unit, labels, list(runs.values()), 1 if unit in NOT_SMOOTHED else smooth)
    title = plots.plain(next(iter(runs)), 80) if len(runs) == 1 else ""
    title += f"   (running mean over {smooth} steps, raw values faint)" if smooth > 1 else ""
    if title:
        figure.suptitle(title.strip(), fontsize=11)
    if len(runs) > 1:
        styles = [{"color": colour, "linewidth": 2} for colour in plots.COLOURS]
        lines = _handles([plots.plain(name, 60) for name in runs], styles)
        columns = min(len(runs), 4)
        figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    plots.save(figure, path)


def _handles(labels: list[str], styles: list[dict[str, Any]]) -> list[Line2D]:
    """Return a line for a legend per label; there may be more styles than labels."""
    from matplotlib.lines import Line2D

    pairs = zip(labels, styles[: len(labels)], strict=True)
    return [Line2D([], [], label=label, **style) for label, style in pairs]


def _panel(axis: Axes, unit: str, labels: dict[str, str], runs: list[Run], smooth: int) -> None:
    from matplotlib.ticker import MaxNLocator

    for run, colour in zip(runs, plots.COLOURS[: len(runs)], strict=True):
        for key, style in zip(labels, LINE_STYLES[: len(labels)], strict=True):
            if key not in run:
                continue
            values = run[key]
            if smooth > 1:
                axis.plot(values, color=colour, linestyle=style, linewidth=0.8, alpha=0.25)
            marker = "o" if len(values) < MARKERS_BELOW else None
            line = {"color": colour, "linestyle": style, "linewidth": 1.4}
            axis.plot(smoothed(values, smooth), marker=marker, markersize=3, **line)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    low, high = axis.dataLim.intervaly
    if unit.startswith("share") or unit == "phase":
        top = 1.02 if high > 0.5 else max(1.15 * high, 0.1)
        # Room for a line at 0 to be seen above the axis.
        axis.set_ylim(-0.03 * top, top)
    elif low >= 0 and high > 0:
        # A range that starts at 0 does not show a constant as a curve of rounding errors.
        axis.set_ylim(0, 1.1 * high)
    if len(labels) > 1:
        styles = [{"color": "0.25", "linestyle": style} for style in LINE_STYLES]
        lines = _handles(list(labels.values()), styles)
        axis.legend(handles=lines, fontsize=7, loc="best", frameon=False)
