"""The study's tables and pictures, from the committed records alone: `python testbed/study.py report`"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opsd.errors import ArtefactError
from opsd.files import atomic_write_text
from opsd.objectives import Hyperparameters, position_weights
from opsd.report import comparison_plot, plots
from opsd.report.comparison import HEADER, Comparison, comparisons
from opsd.report.samples import Samples
from opsd.report.summary import Run, Table, build_tables
from testbed.study import (
    BENCHMARKS,
    CELLS,
    METHODS,
    RECORDS,
    ROOT,
    SEARCH_TAIL,
    chosen_rate,
    read_records,
    search_scores,
)

TITLES = {"small": "training difficulty (`small`)", "small_hard": "harder (`small_hard`)"}
ABLATION = {
    "pwopsd": ("schedule on", "mean per sequence"),
    "pwopsd_global": ("schedule on", "mean over all tokens"),
    "pwopsd_flat": ("schedule off", "mean per sequence"),
    "opsd": ("schedule off", "mean over all tokens"),
}
SMOOTHING = 10
PAIRS = (
    ("pwopsd", "opsd"),
    ("eopd", "opsd"),
    ("reopold", "opsd"),
    ("pwopsd", "pwopsd_flat"),
    ("pwopsd", "pwopsd_global"),
)
Results = Sequence[Mapping[str, Any]]


def of_kind(records: Results, *kinds: str) -> list[Mapping[str, Any]]:
    """Return the records of these kinds: "study", "long", "search"."""
    return [record for record in records if record["kind"] in kinds]


def seed_means(results: Results, cell: str, benchmark: str, metric: str) -> dict[int | None, float]:
    """Return {training seed: mean over the evaluation seeds, percent}."""
    values = defaultdict(list)
    for record in results:
        if record["cell"] == cell and record["benchmark"] == benchmark:
            values[record["training_seed"]].append(record[metric])
    return {
        seed: float(np.mean(found)) for seed, found in sorted(values.items(), key=lambda item: item[0] or 0)
    }


def spread(values: Sequence[float]) -> str:
    """Return `81.2 ± 1.3`: mean and sample standard deviation (n − 1); no ± for a single value."""
    if not values:
        return "—"
    text = f"{np.mean(values):.1f}"
    return f"{text} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else text


def study_table(results: Results) -> Table:
    """Return the study's evaluations as the table that `summarize_results.py` makes of result files."""
    runs = []
    for record in of_kind(results, "study"):
        n, benchmark, training_seed = record["val_n"], record["benchmark"], record["training_seed"]
        right = np.arange(n) < np.array(record["num_correct"])[:, None]
        facts = {"base_model": record["cell"], "val_n": n, "num_problems": len(right), "max_new_tokens": 160}
        samples = Samples(right, None, None, [], [""] * len(right), [])
        names = (Path(f"{record['cell']}_t{training_seed}"), record["cell"], "small", record["cell"])
        shares = {"average": right.mean(1)}
        runs.append(Run(*names, training_seed, None, benchmark, record["seed"], facts, shares, samples))
    (table,) = build_tables(runs, print)
    return table


def study_comparisons(results: Results, pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
    """Return the differences on both benchmarks and their mean of the pairs whose cells have results."""
    table = study_table(results)
    rows = {row.method: row for row in table.rows}
    known = [(rows[cell], rows[other]) for cell, other in pairs if cell in rows and other in rows]
    return comparisons(table, known, print)


def interval(results: Results, cell: str, other: str, benchmark: str) -> str:
    """Return the difference of two cells with its 95 % interval, as `+1.2 [-0.3, +2.7]`; a dash without."""
    for found in study_comparisons(results, [(cell, other)]):
        if found.benchmark == benchmark:
            return f"{found.difference:+.1f} [{found.interval[0]:+.1f}, {found.interval[1]:+.1f}]"
    return "—"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose header is the first row."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])


def main_table(results: Results, training: Results) -> str:
    """Return base and four methods: Avg@n on both held-out sets, rollouts at the end, minutes."""
    results, training = of_kind(results, "study"), of_kind(training, "study")
    n = results[0]["val_n"]
    rows = [
        [
            "",
            *(f"Avg@{n}, {TITLES[b]}" for b in BENCHMARKS),
            f"right rollouts, last {SMOOTHING} steps",
            "minutes a run",
        ]
    ]
    for cell in ("base", *METHODS):
        runs = [record for record in training if record["cell"] == cell]
        values = [list(seed_means(results, cell, b, "average_at_n").values()) for b in BENCHMARKS]
        ends = [100 * float(np.mean(run["rollout_accuracy"][-SMOOTHING:])) for run in runs]
        minutes = f"{np.mean([run['seconds'] for run in runs]) / 60:.1f}" if runs else "—"
        rows.append([CELLS[cell], *map(spread, [*values, ends]), minutes])
    return markdown(rows)


def long_table(results: Results, training: Results) -> str:
    """Return the accuracy before and after 100 steps, one run a method."""
    runs = {record["cell"]: record for record in of_kind(training, "long")}
    after = of_kind(results, "long")
    rows = [["", *(f"{TITLES[b]}, before → after" for b in BENCHMARKS), "steps", "learning rate", "minutes"]]
    for method in METHODS:
        cells = []
        for benchmark in BENCHMARKS:
            base = list(seed_means(results, "base", benchmark, "average_at_n").values())
            trained = list(seed_means(after, method, benchmark, "average_at_n").values())
            cells.append(f"{spread(base)} → {spread(trained)}")
        run = runs[method]
        minutes = f"{run['seconds'] / 60:.1f}"
        rows.append([CELLS[method], *cells, str(run["steps"]), f"{run['learning_rate']:g}", minutes])
    return markdown(rows)


def ablation_table(results: Results) -> str:
    """Return the 2 × 2 ablation: position schedule × reduction."""
    results = of_kind(results, "study")
    rows = [["position schedule", "reduction", "run", *(TITLES[b] for b in BENCHMARKS)]]
    for cell, (schedule, reduction) in ABLATION.items():
        values = [list(seed_means(results, cell, b, "average_at_n").values()) for b in BENCHMARKS]
        rows.append([schedule, reduction, f"`small_{cell}_t*`", *map(spread, values)])
    return markdown(rows)


def clip_table(results: Results) -> str:
    """Return OPSD and PW-OPSD with the published clip, without it, and with the cap on a token's term."""
    results = of_kind(results, "study")
    cells = [f"{method}{form}" for method in ("opsd", "pwopsd") for form in ("", "_noclip", "_tokenclip")]
    rows = [["", *(TITLES[b] for b in BENCHMARKS), *(f"against the clip, {TITLES[b]}" for b in BENCHMARKS)]]
    for cell in cells:
        method = cell.split("_")[0]
        values = [list(seed_means(results, cell, b, "average_at_n").values()) for b in BENCHMARKS]
        gaps = ["—" if cell == method else interval(results, cell, method, b) for b in BENCHMARKS]
        rows.append([CELLS[cell], *map(spread, values), *gaps])
    gaps = [interval(results, "pwopsd_noclip", "opsd_noclip", b) for b in BENCHMARKS]
    rows.append(["PW-OPSD − OPSD, both without the clip", *gaps, "", ""])
    return markdown(rows)


def search_table(training: Results) -> str:
    """Return the percentage of right rollouts in the search's last steps, the chosen rate in bold."""
    scores = search_scores(training)
    rates = sorted({rate for by_rate in scores.values() for rate in by_rate})
    rows = [["", *(f"{rate:g}" for rate in rates)]]
    for method in METHODS:
        chosen = chosen_rate(scores[method])
        cells = [f"{scores[method][r]:.1f}" if r in scores[method] else "—" for r in rates]
        cells = [f"**{c}**" if r == chosen else c for r, c in zip(rates, cells, strict=True)]
        rows.append([CELLS[method], *cells])
    return markdown(rows)


def other_metrics_table(results: Results) -> str:
    """Return Pass@n, truncation and length on the set of the training difficulty."""
    results = of_kind(results, "study")
    n = results[0]["val_n"]
    rows = [["", f"Pass@{n}", "cut off", "tokens"]]
    for cell in CELLS:
        columns = [
            list(seed_means(results, cell, "small", metric).values())
            for metric in ("pass_at_n", "truncated", "tokens")
        ]
        rows.append([CELLS[cell], *map(spread, columns)])
    return markdown(rows)


def differences_table(results: Results) -> str:
    """Return paired differences to OPSD and between cells of the ablation."""
    text = markdown([HEADER, *(found.line for found in study_comparisons(results, PAIRS))])
    return re.sub(r" \(3 training seeds\)|, 3 training seeds", "", text)


def facts(results: Results, training: Results) -> str:
    """Return the numbers of runs, seeds, samples and problems as text."""
    main, searched, long = (of_kind(training, kind) for kind in ("study", "search", "long"))
    results = of_kind(results, "study")
    training_seeds = len({record["seed"] for record in main})
    evaluation_seeds = len({record["seed"] for record in results})
    problems = {record["benchmark"]: record["problems"] for record in results}
    seconds = sum(record["seconds"] for record in training)
    rates = ", ".join(sorted({f"{record['learning_rate']:g}" for record in main}))
    return (
        f"{len(main)} runs of {main[0]['steps']} optimizer steps: {len({r['cell'] for r in main})} cells × "
        f"{training_seeds} training seeds, at learning rate {rates} after a search of {len(searched)} runs "
        f"of {searched[0]['steps']} steps; {len(long)} long runs of {long[0]['steps']} steps. Evaluated with "
        f"{evaluation_seeds} evaluation seeds × {results[0]['val_n']} samples of "
        + " and ".join(f"{problems[b]} problems (`{b}`)" for b in BENCHMARKS)
        + f". Training took {seconds / 60:.0f} minutes of one thread in all. Means ± sample standard "
        "deviations are over the training seeds, each the mean of its evaluation seeds; the base is one "
        "model."
    )


def smoothed(values: np.ndarray, width: int = SMOOTHING) -> np.ndarray:
    """Return the trailing mean over `width` steps, over fewer at the start."""
    total = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def draw_curves(training: Results, path: Path) -> None:
    """Draw learning curves: right rollouts of fresh problems by step, and the student's entropy."""
    figure, axes = plots.small_multiples(2)
    for colour, method in zip(plots.COLOURS, METHODS, strict=False):
        runs = [record for record in of_kind(training, "study") if record["cell"] == method]
        for axis, values in (
            (axes[0], [100 * smoothed(np.array(r["rollout_accuracy"])) for r in runs]),
            (axes[1], [smoothed(np.array(r["metrics"]["student/entropy"])) for r in runs]),
        ):
            rows = np.array(values)
            steps = np.arange(1, rows.shape[1] + 1)
            axis.plot(steps, rows.mean(0), color=colour, label=CELLS[method])
            axis.fill_between(steps, rows.min(0), rows.max(0), color=colour, alpha=0.15, linewidth=0)
    plots.label(axes[0], title=f"Right rollouts of fresh problems (last {SMOOTHING} steps)", x="step", y="%")
    plots.label(axes[1], title="Student entropy", x="step", y="nats per token")
    axes[0].legend(fontsize=8, frameon=False)
    plots.save(figure, path)


def draw_weights(path: Path) -> None:
    """Draw the position weights of the 2 × 2's two schedules."""
    figure, axes = plots.small_multiples(1)
    lengths = torch.tensor([1000])
    fractions = (torch.arange(1000) + 0.5) / 1000
    for colour, (name, w_min) in zip(
        plots.COLOURS, (("Moderate: 0.25, 0.30, 0.10", 0.25), ("off: w_min = 1", 1.0)), strict=False
    ):
        weights = position_weights(lengths, Hyperparameters(position_w_min=w_min))
        axes[0].plot(fractions, weights, color=colour, label=name)
    axes[0].set_ylim(0, 1.05)
    plots.label(axes[0], title="Position weight w(f)", x="relative position f", y="weight")
    axes[0].legend(fontsize=8, frameon=False, loc="lower right")
    plots.save(figure, path)


def draw_accuracy(results: Results, path: Path) -> None:
    """Draw the accuracy of every cell, a dot for each training seed; the base as a line."""
    results = of_kind(results, "study")
    figure, axes = plots.small_multiples(len(BENCHMARKS), columns=2)
    cells = [cell for cell in CELLS if cell != "base"]
    for axis, benchmark in zip(axes, BENCHMARKS, strict=True):
        base = np.mean(list(seed_means(results, "base", benchmark, "average_at_n").values()))
        axis.axhline(base, color="0.3", linestyle="--", linewidth=1, label="base model")
        for place, cell in enumerate(cells):
            values = list(seed_means(results, cell, benchmark, "average_at_n").values())
            colour = plots.COLOURS[place % len(plots.COLOURS)]
            axis.plot([place] * len(values), values, "o", color=colour, markersize=5, alpha=0.8)
            axis.plot([place - 0.25, place + 0.25], [np.mean(values)] * 2, color=colour, linewidth=2)
        axis.set_xticks(range(len(cells)), [c.replace("_", "\n") for c in cells], fontsize=8)
        plots.label(axis, title=TITLES[benchmark].replace("`", ""), x="", y="Avg@n, %")
        axis.legend(fontsize=8, frameon=False, loc="upper right")
    plots.save(figure, path)


def replace_parts(path: Path, parts: Mapping[str, str]) -> None:
    """Put each text between `<!-- study:NAME -->` and `<!-- study:end -->` of a document.

    Raises:
        ArtefactError: the document has no such place.
    """
    text = path.read_text(encoding="utf-8")
    for name, content in parts.items():
        pattern = re.compile(rf"(<!-- study:{name} -->\n).*?(<!-- study:end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ArtefactError(f"{path} has no place for the study's {name} (<!-- study:{name} -->)")
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text, count=1)
    atomic_write_text(path, text)


def report() -> int:
    """Write every table and picture."""
    training, results = read_records("training.jsonl"), read_records("results.jsonl")
    main = main_table(results, training)
    draw_curves(training, RECORDS / "learning_curves.png")
    draw_weights(RECORDS / "position_weights.png")
    draw_accuracy(results, RECORDS / "accuracy.png")
    figure = comparison_plot.forest(study_comparisons(results, PAIRS), of_kind(results, "study")[0]["val_n"])
    plots.save(figure, RECORDS / "differences.png")
    replace_parts(ROOT / "README.md", {"main": main})
    replace_parts(
        ROOT / "docs" / "small_world.md",
        {
            "facts": facts(results, training),
            "main": main,
            "long": long_table(results, training),
            "differences": differences_table(results),
            "ablation": ablation_table(results),
            "clip": clip_table(results),
            "search": search_table(training),
            "other": other_metrics_table(results),
        },
    )
    print(main)
    print(f"search: right rollouts of the last {SEARCH_TAIL} steps\n{search_table(training)}")
    return 0
