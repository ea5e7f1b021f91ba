"""The bfloat16 study in the small world: from run folders to records, tables and a picture.

    python testbed/bf16_study.py base FOLDER    # the shipped base, rounded to bfloat16
    python testbed/bf16_study.py collect        # outputs/ -> docs/small_world/bf16.jsonl
    python testbed/bf16_study.py report         # docs/small_world/bf16.jsonl -> docs/merging.md, picture

launchers/reproduce_bf16.sh makes the runs and calls the three.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from opsd.errors import run_cli  # noqa: E402
from opsd.evaluation.results import load_result  # noqa: E402
from opsd.files import atomic_directory, atomic_write_text  # noqa: E402
from opsd.records import read_metrics  # noqa: E402
from opsd.report import plots  # noqa: E402
from testbed.compare import difference_interval  # noqa: E402
from testbed.study import CELLS, RECORDS, output_root, rollout_accuracy  # noqa: E402
from testbed.study_report import markdown, replace_parts, smoothed, spread  # noqa: E402

FORMS = {"merged": "merged, bfloat16", "float32": "merged, float32", "adapter": "base + adapter"}
WEIGHTS = ("merged", "adapter")
AUDITED = ("rollout/update_kept", "rollout/staleness", "rollout/logprob_difference")
TAIL = 10
# Audits at the default --rollout_audit_steps 10.
SHOWN_STEPS = (11, 21, 41)
STEPS_TEXT = ", ".join(map(str, SHOWN_STEPS))
RESAMPLES = 10_000
_RUN = re.compile(
    r"small_(?P<cell>[a-z]+)_bf16_(?P<weights>merged|adapter)_lr(?P<rate>[0-9.e-]+)_t(?P<seed>\d+)"
)
Record = Mapping[str, Any]


def save_base(folder: Path) -> int:
    """Save the small world's base in bfloat16, with its tokenizer and templates."""
    import torch

    from opsd.models import load_causal_lm

    source = ROOT / "testbed" / "base_model"
    if folder.is_dir():
        return 0
    model = load_causal_lm(str(source), dtype=torch.bfloat16)
    with atomic_directory(folder) as target:
        model.save_pretrained(target)
        for path in source.iterdir():
            if not (target / path.name).exists():
                shutil.copy(path, target)
    return 0


def record(run: Path, answers: Sequence[str]) -> dict[str, Any]:
    """Return the curves of a run and the number of right samples of each problem, by form of evaluation."""
    match = _RUN.fullmatch(run.name)
    assert match is not None, "the caller chose the folder by this pattern"
    rows = [row for row in read_metrics(run) if "loss" in row]
    results = {}
    for form in FORMS:
        path = output_root() / "bf16_results" / f"{run.name}.{form}.json"
        if path.is_file():
            result = load_result(path)
            correct = [problem["num_correct"] for problem in result["results"]]
            results[form] = {"val_n": result["val_n"], "num_correct": correct}
    sentinel = run.with_name(f"{run.name}_merged") / ".ready_for_eval"
    merge = json.loads(sentinel.read_text(encoding="utf-8"))["merge"]
    return {
        **match.groupdict(),
        "rollout_accuracy": [round(share, 4) for share in rollout_accuracy(run, answers)],
        "metrics": {name: [row.get(name) for row in rows] for name in AUDITED},
        "kept_by_merge": merge["kept"],
        "changed_by_merge": merge["changed"],
        "results": results,
    }


def collect() -> int:
    """Write the record file from the finished runs."""
    text = (ROOT / "testbed" / "data" / "train.jsonl").read_text(encoding="utf-8")
    answers = [json.loads(line)["answer"] for line in text.splitlines()]
    runs = [path for path in sorted(output_root().iterdir()) if _RUN.fullmatch(path.name)]
    finished = [path for path in runs if path.with_name(f"{path.name}_merged").is_dir()]
    records = [record(path, answers) for path in finished]
    atomic_write_text(RECORDS / "bf16.jsonl", "".join(json.dumps(found) + "\n" for found in records))
    print(f"{RECORDS / 'bf16.jsonl'}: {len(records)} runs")
    return 0


def difference(ours: Record, theirs: Record) -> str:
    """Return the difference of two results in points with its 95 % bootstrap interval over problems."""
    right, reference = (np.array(result["num_correct"]) / result["val_n"] for result in (ours, theirs))
    low, high = difference_interval(reference, right, RESAMPLES)
    return f"{100 * (right - reference).mean():+.1f} [{low:+.1f}, {high:+.1f}]"


def evaluation_table(records: Sequence[Record]) -> str:
    """Return Avg@4 of one training seed by method, rate and form, and differences to the bfloat16 merge."""
    rows = [["", "rate", "kept by the merge", *FORMS.values(), "float32 − bfloat16", "adapter − bfloat16"]]
    for found in records:
        results = found["results"]
        if len(results) < len(FORMS):
            continue
        means = [100 * np.mean(results[form]["num_correct"]) / results[form]["val_n"] for form in FORMS]
        gaps = [difference(results[form], results["merged"]) for form in ("float32", "adapter")]
        kept = f"{found['kept_by_merge']:.2f}"
        rows.append([CELLS[found["cell"]], found["rate"], kept, *(f"{mean:.1f}" for mean in means), *gaps])
    return markdown(rows)


def rollout_table(records: Sequence[Record]) -> str:
    """Return right rollouts and the audit by choice of rollout weights, over the training seeds."""
    rows = [["rate", "rollout weights", "seeds", "right rollouts, first 10 steps", "last 10 steps",
             f"kept by the push, steps {STEPS_TEXT}", "staleness, the same"]]  # fmt: skip
    for rate in sorted({found["rate"] for found in records}, key=float):
        for weights in WEIGHTS:
            runs = [r for r in records if (r["cell"], r["rate"], r["weights"]) == ("pwopsd", rate, weights)]
            shares = [100 * np.array(run["rollout_accuracy"]) for run in runs]
            shown = []
            for name in AUDITED[:2]:
                values = [[run["metrics"][name][step - 1] for run in runs] for step in SHOWN_STEPS]
                known = all(value is not None for found in values for value in found)
                shown.append(", ".join(f"{np.mean(found):.2f}" for found in values) if known else "—")
            ends = [
                spread([float(share[part].mean()) for share in shares])
                for part in (slice(TAIL), slice(-TAIL, None))
            ]
            rows.append([rate, weights, str(len(runs)), *ends, *shown])
    return markdown(rows)


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw right rollouts by step for both choices of rollout weights, a panel for each rate."""
    rates = sorted({found["rate"] for found in records}, key=float)
    figure, axes = plots.small_multiples(len(rates))
    for axis, rate in zip(axes, rates, strict=True):
        for colour, style, weights in zip(plots.COLOURS, ("-", "--"), WEIGHTS, strict=False):
            runs = [r for r in records if (r["cell"], r["rate"], r["weights"]) == ("pwopsd", rate, weights)]
            rows = np.array([100 * smoothed(np.array(run["rollout_accuracy"])) for run in runs])
            steps = np.arange(1, rows.shape[1] + 1)
            axis.plot(steps, rows.mean(0), style, color=colour, label=f"rollouts by {weights} weights")
            axis.fill_between(steps, rows.min(0), rows.max(0), color=colour, alpha=0.15, linewidth=0)
        plots.label(axis, title=f"PW-OPSD at learning rate {rate}", x="step", y="right rollouts, %")
        axis.legend(fontsize=8, frameon=False)
    plots.save(figure, path)


def report() -> int:
    """Write both tables into docs/merging.md, and the picture."""
    lines = (RECORDS / "bf16.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    tables = {"forms": evaluation_table(records), "rollouts": rollout_table(records)}
    replace_parts(ROOT / "docs" / "merging.md", tables)
    draw(records, RECORDS / "bf16_rollouts.png")
    print("\n\n".join(tables.values()))
    return 0


def main() -> int:
    """Run a command; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("base", help="save the base in bfloat16").add_argument("folder", type=Path)
    commands.add_parser("collect", help="write the record file")
    commands.add_parser("report", help="write tables and picture from the record file")
    arguments = parser.parse_args()
    if arguments.command == "base":
        return save_base(arguments.folder)
    return collect() if arguments.command == "collect" else report()


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
