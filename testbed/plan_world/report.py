"""The mechanism study's tables and picture, from the committed records alone: `study.py report`"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opsd.report import plots
from testbed.plan_world import world
from testbed.plan_world.study import RECORDS, ROOT, TAIL, TITLES, read_records
from testbed.study_report import markdown, replace_parts, seed_means, spread

Results = Sequence[dict[str, Any]]
PAGE = ROOT / "docs" / "mechanism.md"
RESAMPLES = 2000
PAIRS = (
    *((cell, "opsd") for cell in TITLES if cell not in ("base", "opsd")),
    ("pwopsd", "opsd_half"), ("opsd", "base"), ("pwopsd", "base"), ("steep", "base"), ("oracle", "base"),
)  # fmt: skip


def prepared(records: Results) -> list[dict[str, Any]]:
    """Return the records with the base model's one result for each seed and knob, and the rollouts' end."""
    trained = [record for record in records if record["cell"] != "base"]
    places = {(record["benchmark"], record["training_seed"]) for record in trained}
    (base,) = [record for record in records if record["cell"] == "base"]
    for record in trained:
        record["end_leaps"] = float(np.mean(record["rollouts_leaps"][-TAIL:]))
    return trained + [base | {"benchmark": b, "training_seed": s, "end_leaps": np.nan} for b, s in places]


def knobs(results: Results) -> list[str]:
    """Return the knobs that were run, in order."""
    return [name for name in world.REFERENCES if any(record["benchmark"] == name for record in results)]


def found(results: Results, cell: str, knob: str) -> bool:
    """Return whether there is a result of a cell at a knob."""
    return any(record["cell"] == cell and record["benchmark"] == knob for record in results)


def per_problem(results: Results, cell: str, knob: str) -> np.ndarray:
    """Return the [training seeds, P] share of right samples of each problem."""
    rows = [r for r in results if r["cell"] == cell and r["benchmark"] == knob]
    rows.sort(key=lambda record: record["training_seed"])
    return np.array([np.array(record["num_correct"]) / record["val_n"] for record in rows])


def difference(results: Results, cell: str, other: str, knob: str) -> tuple[float, float, float]:
    """Return the mean difference in points between two cells and its 95 % bootstrap interval.

    Training seeds (as pairs: equal seeds share their data order) and problems are resampled together.
    """
    gap = 100 * (per_problem(results, cell, knob) - per_problem(results, other, knob))
    draw = np.random.default_rng(0)
    seeds = draw.integers(0, gap.shape[0], (RESAMPLES, gap.shape[0]))
    problems = draw.integers(0, gap.shape[1], (RESAMPLES, gap.shape[1]))
    means = [gap[np.ix_(s, p)].mean() for s, p in zip(seeds, problems, strict=True)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(gap.mean()), float(low), float(high)


def value_table(results: Results, metric: str) -> str:
    """Return mean ± deviation over the training seeds, a row for each cell and a column for each knob."""
    rows = [["", *knobs(results)]]
    for cell, title in TITLES.items():
        values = [list(seed_means(results, cell, knob, metric).values()) for knob in rows[0][1:]]
        # The base is one model: its copies have no deviation.
        texts = [spread(v[:1] if cell == "base" else v) for v in values]
        rows.append([title, *("—" if text == "nan" else text for text in texts)])
    return markdown(rows)


def paired(results: Results, cell: str, other: str, knob: str) -> list[dict[str, Any]]:
    """Return two cells' records of the seeds that both have at a knob."""
    seeds = [set(seed_means(results, name, knob, "right")) for name in (cell, other)]
    common = seeds[0] & seeds[1]
    return [r for r in results if r["benchmark"] == knob and r["training_seed"] in common]


def difference_table(results: Results) -> str:
    """Return the paired differences in points with 95 % bootstrap intervals."""
    rows = [["difference, points", *knobs(results)]]
    for cell, other in PAIRS:
        texts = []
        for knob in rows[0][1:]:
            both = paired(results, cell, other, knob)
            if not both:
                texts.append("—")
                continue
            mean, low, high = difference(both, cell, other, knob)
            texts.append(f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]")
        rows.append([f"{TITLES[cell]} − {TITLES[other]}", *texts])
    return markdown(rows)


def crossing(results: Results, cell: str = "pwopsd", other: str = "opsd") -> str:
    """Return the k at which the difference of two cells changes its sign, with its 95 % bootstrap interval.

    k is interpolated linearly between the two knobs where the difference first turns positive; seeds and
    problems are resampled, equally at all knobs.
    """
    names = [n for n in knobs(results) if n.startswith("k") and paired(results, cell, other, n)]
    ks = np.array([world.REFERENCES[name][0] for name in names])
    gaps = [paired(results, cell, other, name) for name in names]
    gaps = [
        per_problem(rows, cell, n) - per_problem(rows, other, n) for rows, n in zip(gaps, names, strict=True)
    ]
    draw = np.random.default_rng(0)
    places = []
    for resample in range(RESAMPLES + 1):
        problems = draw.integers(0, gaps[0].shape[1], gaps[0].shape[1])
        means = []
        for gap in gaps:
            seeds = draw.integers(0, len(gap), len(gap))
            means.append(gap[np.ix_(seeds, problems)].mean() if resample else gap.mean())
        turn = next((n for n in range(1, len(means)) if means[n - 1] < 0 <= means[n]), None)
        if turn is None:
            # It does not turn: it is positive from the first knob on, or negative up to the last.
            places.append(-np.inf if means[0] >= 0 else np.inf)
        else:
            low, high = means[turn - 1], means[turn]
            places.append(ks[turn - 1] + (ks[turn] - ks[turn - 1]) * -low / (high - low))
    low, high = np.quantile(places[1:], (0.025, 0.975), method="nearest")
    words = [
        f"below {ks[0]:g}" if p == -np.inf else f"above {ks[-1]:g}" if p == np.inf else f"{p:.2f}"
        for p in (places[0], low, high)
    ]
    return f"{TITLES[cell]} overtakes {TITLES[other]} at k = {words[0]} [{words[1]}, {words[2]}]."


def draw(results: Results) -> None:
    """Draw accuracy over the knob, and accuracy and leaps of the rollouts along training at its largest k."""
    figure, axes = plots.small_multiples(3)
    names = [name for name in knobs(results) if name.startswith("k")]
    ks = [world.REFERENCES[name][0] for name in names]
    base = next(record for record in results if record["cell"] == "base")
    axes[0].axhline(base["right"], color="0.3", linestyle="--", linewidth=1, label="base model")
    axes[0].axvline(
        base["leaps"] / 100, color="0.6", linestyle=":", linewidth=1, label="its own rate of leaps"
    )
    shown = [
        c for c in ("opsd", "opsd_half", "pwopsd", "steep", "oracle") if any(r["cell"] == c for r in results)
    ]
    last = max((n for n in names if found(results, "opsd", n)), key=lambda n: world.REFERENCES[n][0])
    for colour, cell in zip(plots.COLOURS, shown, strict=False):
        there = [(k, n) for k, n in zip(ks, names, strict=True) if found(results, cell, n)]
        values = [list(seed_means(results, cell, n, "right").values()) for _, n in there]
        axes[0].plot([k for k, _ in there], [np.mean(v) for v in values], "o-", color=colour, markersize=4)
        for (k, _), points in zip(there, values, strict=True):
            axes[0].plot([k] * len(points), points, ".", color=colour, alpha=0.4)
        runs = [r for r in results if r["cell"] == cell and r["benchmark"] == last]
        for axis, name in ((axes[1], "rollouts_right"), (axes[2], "rollouts_leaps")):
            if runs:
                curve = np.mean([record[name] for record in runs], axis=0)
                smooth = [curve[max(0, n - 4) : n + 1].mean() for n in range(len(curve))]
                axis.plot(range(1, len(curve) + 1), smooth, color=colour, label=TITLES[cell])
    plots.label(axes[0], title="Right answers after training", x="k, leaps in the references", y="%")
    plots.label(axes[1], title=f"Right rollouts, {last} (mean of 5 steps)", x="step", y="%")
    plots.label(axes[2], title=f"Leaps in rollouts, {last}", x="step", y="% of plan symbols")
    axes[0].legend(fontsize=8, frameon=False)
    axes[1].legend(fontsize=8, frameon=False)
    plots.save(figure, RECORDS.parent / "accuracy.png")


def parts(results: Results) -> dict[str, str]:
    """Return the text of each generated part of the page."""
    trained = [record for record in results if record["cell"] != "base"]
    seconds = sum(record["seconds"] for record in trained)
    seeds = sorted({record["training_seed"] for record in trained})
    facts = (
        f"{len(trained)} runs, training seeds {', '.join(map(str, seeds))}, {seconds / 60:.0f} minutes of "
        f"wall clock in all; {len(trained[0]['num_correct'])} held-out problems × "
        f"{trained[0]['val_n']} samples."
    )
    return {
        "facts": facts,
        "right": value_table(results, "right"),
        "differences": difference_table(results),
        "crossing": crossing(results),
        "leaps": value_table(results, "leaps"),
        "end_leaps": value_table(results, "end_leaps"),
        "right_all_steps": value_table(results, "right_all_steps"),
    }


def report() -> int:
    """Write every table and the picture."""
    results = prepared(read_records())
    texts = parts(results)
    replace_parts(PAGE, texts)
    draw(results)
    print("\n\n".join(texts.values()))
    return 0
