"""The mechanism study: when does weighting positions help, and when does it cost?

    python testbed/plan_world/study.py run [--references k0 k0.35] [--cells opsd pwopsd] [--seeds 1]
    python testbed/plan_world/study.py collect     # outputs/plan_world/ -> docs/mechanism/runs.jsonl
    python testbed/plan_world/study.py report      # docs/mechanism/runs.jsonl -> tables and picture

A cell is a command line of ea_opsd_train.py; its last checkpoint is evaluated by evaluate_math.py on held-out
problems. A finished cell is not repeated, an interrupted one continues. `report` reads the committed records
alone. launchers/reproduce_mechanism.sh calls the three.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from testbed.plan_world import world  # noqa: E402 - after the path
from testbed.study import output_root  # noqa: E402

BASE = Path(__file__).resolve().parent / "base_model"
RECORDS = ROOT / "docs" / "mechanism" / "runs.jsonl"
STEPS, RATE = 30, 4e-4
# The mean of Moderate's weights over the 44 tokens of a solution with all steps (tests compute it).
MEAN_WEIGHT = 0.771
# A plan's last symbol ends before f = 0.16, the first number begins behind it.
CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "opsd": ("OPSD", {"method": "opsd"}),
    "opsd_half": ("OPSD, half the steps", {"method": "opsd", "max_steps": 0.5}),
    "opsd_slow": ("OPSD, rate × Moderate's mean weight", {"method": "opsd", "learning_rate": MEAN_WEIGHT}),
    "eopd": ("EOPD", {"method": "eopd"}),
    "reopold": ("REOPOLD", {"method": "reopold", "reopold_t_switch": 1 / 3}),
    "pwopsd": ("PW-OPSD, Moderate", {"method": "pwopsd"}),
    "steep": (
        "PW-OPSD, steep (0, 0.30, 0.05)",
        {"method": "pwopsd", "position_w_min": 0, "position_s": 0.05},
    ),
    "flat": (
        "PW-OPSD, every weight Moderate's mean",
        {"method": "pwopsd", "position_w_min": MEAN_WEIGHT, "position_tau": 1e6},
    ),
    "oracle": (
        "PW-OPSD, plan tokens weigh 0",
        {"method": "pwopsd", "position_w_min": 0, "position_tau": 0.16, "position_s": 0.003},
    ),
}
TITLES = {"base": "Base model"} | {name: title for name, (title, _) in CELLS.items()}
# These are given as shares of the study's own.
SCALED = {"max_steps": int, "reopold_t_switch": int, "learning_rate": float}
# Rollouts of the last steps, whose mean is the figure of a run.
TAIL = 10


def command_line(values: Mapping[str, Any]) -> list[str]:
    """Return `--name value` for each item."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def training_flags(cell: str, references: Path, seed: int, run: Path, *, steps: int) -> dict[str, Any]:
    """Return the flags of ea_opsd_train.py; what is not among them has the paper's value."""
    own = dict(CELLS[cell][1])
    totals = {"max_steps": steps, "reopold_t_switch": steps, "learning_rate": RATE}
    own |= {name: kind(totals[name] * own[name]) for name, kind in SCALED.items() if name in own}
    common = {
        "model_name_or_path": BASE, "train_dataset": references, "output_dir": run, "run_name": run.name,
        "seed": seed, "max_steps": steps, "learning_rate": RATE, "jsd_token_clip": 0, "rollout": "hf",
        "max_completion_length": 64, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1,
        "bf16": False, "gradient_checkpointing": False, "use_cpu": True, "log_completions_steps": 1,
        "rollout_audit_steps": 0, "save_total_limit": 1, "resume_from_checkpoint": "auto",
    }  # fmt: skip
    flags = common | own
    return flags | {"save_steps": flags["max_steps"], "merge_step": flags["max_steps"]}


def evaluation_flags(data: Path, output: Path, *, problems: int, adapter: Path | None) -> dict[str, Any]:
    """Return the flags of evaluate_math.py; sampling is the paper's, with two samples a problem."""
    flags = {
        "base_model": BASE, "dataset": "plan_world", "dataset_path": data, "output": output, "engine": "hf",
        "val_n": 2, "num_samples": problems, "max_new_tokens": 64, "seed": 1, "hf_batch_size": 128,
        "grading_workers": 1,
    }  # fmt: skip
    return flags | ({} if adapter is None else {"adapter": adapter})


def behaviour(completions: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """Return shares in percent of (text, right) pairs.

    `right` of all, `leaps` of the plans' symbols, `all_steps` of the completions, and `right_all_steps` of
    those with a plan of steps alone. A completion without a plan counts as wrong and is in no other figure.
    """
    found = [(world.plan_of(text), right) for text, right in completions]
    plans = [plan for plan, _ in found if plan is not None]
    stepped = [right for plan, right in found if plan == world.STEP * 5]
    return {
        "right": round(100 * sum(right for _, right in found) / len(found), 3),
        "leaps": round(20 * sum(plan.count(world.LEAP) for plan in plans) / max(len(plans), 1), 3),
        "all_steps": round(100 * len(stepped) / len(found), 3),
        "right_all_steps": round(100 * sum(stepped) / max(len(stepped), 1), 3),
    }


def rollout_behaviour(run: Path, answers: Sequence[str]) -> dict[str, list[float]]:
    """Return the behaviour of each optimizer step's rollouts, of problems that no step has trained on."""
    from opsd.evaluation.grading import extract_boxed

    steps = []
    for path in sorted((run / "completions").glob("step-*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        steps.append(
            behaviour((r["completion"], extract_boxed(r["completion"]) == answers[r["row"]]) for r in rows)
        )
    return {f"rollouts_{name}": [step[name] for step in steps] for name in (steps or [{}])[0]}


def evaluate(data: Path, folder: Path, *, problems: int, adapter: Path | None) -> dict[str, Any]:
    """Evaluate the base model or a checkpoint; return its part of a record."""
    import evaluate_math
    from opsd.evaluation.results import load_result

    output = folder / "evaluation.json"
    flags = evaluation_flags(data / "heldout.jsonl", output, problems=problems, adapter=adapter)
    evaluate_math.main(command_line(flags))
    result = load_result(output)
    samples = [(g["full_generation"], g["correct"]) for r in result["results"] for g in r["generations"]]
    return {
        **behaviour(samples),
        "val_n": result["val_n"],
        "num_correct": [record["num_correct"] for record in result["results"]],
    }


def run_cell(cell: str, references: str, seed: int, *, data: Path, steps: int, problems: int) -> None:
    """Train and evaluate one cell and write its record."""
    import ea_opsd_train
    from opsd.files import atomic_write_text
    from opsd.run_identity import read_manifest

    folder = output_root() / "plan_world" / (cell if cell == "base" else f"{references}_{cell}_t{seed}")
    if (folder / "record.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"cell": cell, "benchmark": references, "training_seed": seed}
    started, adapter = time.monotonic(), None
    if cell != "base":
        path = data / f"{references}.jsonl"
        flags = training_flags(cell, path, seed, folder, steps=steps)
        if code := ea_opsd_train.main(command_line(flags)):
            raise SystemExit(code)
        adapter = folder / f"checkpoint-{flags['max_steps']}"
        answers = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
        record |= {name: flags[name] for name in ("max_steps", "learning_rate")}
        record |= {"commit": read_manifest(folder)["git"]["commit"], **rollout_behaviour(folder, answers)}
    record |= evaluate(data, folder, problems=problems, adapter=adapter)
    record["seconds"] = round(time.monotonic() - started, 1)
    atomic_write_text(folder / "record.json", json.dumps(record) + "\n")
    print(
        f"{folder.name}: right {record['right']:.1f} %, leaps {record['leaps']:.1f} % of plan symbols, "
        f"right with all steps {record['right_all_steps']:.1f} %, {record['seconds']:.0f} s",
        flush=True,
    )


def collect() -> int:
    """Write the records of all finished cells into the docs, one a line."""
    from opsd.files import atomic_write_text

    paths = sorted((output_root() / "plan_world").glob("*/record.json"))
    atomic_write_text(RECORDS, "".join(path.read_text(encoding="utf-8") for path in paths))
    print(f"{RECORDS}: {len(paths)} cells")
    return 0


def read_records() -> list[dict[str, Any]]:
    """Return the committed records."""
    return [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()]


def main(argv: list[str] | None = None) -> int:
    """Run a command; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train and evaluate cells")
    run.add_argument("--references", nargs="+", choices=world.REFERENCES, default=["k0", "k0.35"])
    run.add_argument("--cells", nargs="+", choices=TITLES, default=list(TITLES))
    run.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    run.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)")
    run.add_argument("--problems", type=int, default=256, help="held-out problems (default: %(default)s)")
    run.add_argument("--part", default="1/1", help="I/N: only every N-th cell, from the I-th")
    commands.add_parser("collect", help="write the record file")
    commands.add_parser("report", help="write tables and picture from the record file")
    arguments = parser.parse_args(argv)
    if arguments.command == "collect":
        return collect()
    if arguments.command == "report":
        from testbed.plan_world.report import report

        return report()
    data = output_root() / "plan_world" / "data"
    world.main([str(data)])
    part, parts = map(int, arguments.part.split("/"))
    # The base model's one cell comes first; seeds vary slowest, so that every cell has one result early.
    cells = [("base", "heldout", 1)] if "base" in arguments.cells else []
    cells += [
        (cell, references, seed)
        for seed in arguments.seeds
        for references in arguments.references
        for cell in arguments.cells
        if cell != "base"
    ]
    for cell, references, seed in cells[part - 1 :: parts]:
        run_cell(cell, references, seed, data=data, steps=arguments.steps, problems=arguments.problems)
    return 0


if __name__ == "__main__":
    from opsd.errors import run_cli

    raise SystemExit(run_cli(main))
