"""The small-world study: from run folders and result files to records, tables and pictures.

    python testbed/study.py rate METHOD    # the learning rate that the search chose for a method
    python testbed/study.py collect        # outputs/, eval_results/ -> docs/small_world/*.jsonl
    python testbed/study.py report         # docs/small_world/*.jsonl -> tables in README.md, docs; pictures

launchers/reproduce_small.sh makes the runs and calls the three. `report` reads the committed records alone,
so that the tables can be reproduced without a run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "docs" / "small_world"
METHODS = ("opsd", "eopd", "reopold", "pwopsd")
# The cells' names in run names, and their titles in tables.
CELLS = {
    "base": "Base model",
    "opsd": "OPSD",
    "eopd": "EOPD",
    "reopold": "REOPOLD",
    "pwopsd": "PW-OPSD",
    "pwopsd_global": "PW-OPSD, mean over all tokens",
    "pwopsd_flat": "PW-OPSD, every weight 1",
    "opsd_noclip": "OPSD, no clip",
    "pwopsd_noclip": "PW-OPSD, no clip",
    "opsd_tokenclip": "OPSD, cap on the token",
    "pwopsd_tokenclip": "PW-OPSD, cap on the token",
}
BENCHMARKS = ("small", "small_hard")
METRICS = ("average_at_n", "pass_at_n", "majority_vote_at_n")
# The search is judged by the rollouts of its last steps: fresh problems, that no step has trained on.
SEARCH_TAIL = 10
# The seed of the long runs, one a method; every other training seed is the study's.
LONG_SEED = 42
# From 3e-4 on every method nears the ceiling within 25 steps, where there is nothing left to compare.
HIGHEST_RATE = 1e-4
KEPT_METRICS = ("loss/divergence", "student/entropy", "teacher/entropy", "rollout/completion_tokens")
_RUN = re.compile(r"small_(?P<cell>[a-z_]+?)(?:_lr(?P<rate>[0-9.e-]+)|_t(?P<seed>\d+))?")
_RESULT = re.compile(
    r"(?P<run>.+?)_(?P<benchmark>small|small_hard)_(?:38k|160)(?:_first\d+)?_seed(?P<seed>\d+)\.json"
)


def output_root() -> Path:
    """Return the folder of the runs: OUTPUT_ROOT, as in the launchers."""
    return Path(os.environ.get("OUTPUT_ROOT") or ROOT / "outputs")


def eval_root() -> Path:
    """Return the folder of the result files: EVAL_ROOT, as in the launchers."""
    return Path(os.environ.get("EVAL_ROOT") or ROOT / "eval_results")


# --- records -----------------------------------------------------------------------------------------------


def rollout_accuracy(run: Path, answers: Sequence[str]) -> list[float]:
    """Return the share of right rollouts of each optimizer step, from the run's completions."""
    from opsd.evaluation.grading import extract_boxed

    shares = []
    for path in sorted((run / "completions").glob("step-*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        # An answer of this world is one number, so equal digits are equal answers.
        right = [extract_boxed(row["completion"]) == answers[row["row"]] for row in rows]
        shares.append(sum(right) / len(right))
    return shares


def kind_of(training_seed: int | None) -> str:
    """Return "long" or, the base model included, "study"."""
    return "long" if training_seed == LONG_SEED else "study"


def training_record(run: Path, answers: Sequence[str]) -> dict[str, Any] | None:
    """Return the study's record of a run; None for a folder that is no finished run of it."""
    from opsd.records import read_metrics
    from opsd.run_identity import read_manifest

    match = _RUN.fullmatch(run.name)
    if match is None or match["cell"] not in CELLS or not (match["rate"] or match["seed"]):
        return None
    manifest = read_manifest(run)
    rows = [row for row in read_metrics(run) if "loss" in row]
    steps = int(manifest["arguments"]["max_steps"])
    if len(rows) < steps:
        return None
    return {
        "run": run.name,
        "cell": match["cell"],
        "kind": "search" if match["rate"] else kind_of(int(match["seed"])),
        "seed": int(manifest["seeds"]["seed"]),
        "learning_rate": float(manifest["arguments"]["learning_rate"]),
        "steps": steps,
        "seconds": round(sum(row["time/step_s"] for row in rows), 1),
        "commit": manifest["git"]["commit"],
        "rollout_accuracy": [round(share, 4) for share in rollout_accuracy(run, answers)],
        "metrics": {name: [round(row[name], 4) for row in rows] for name in KEPT_METRICS if name in rows[0]},
    }


def training_records() -> list[dict[str, Any]]:
    """Return the records of every finished run of the study in `output_root`."""
    text = (ROOT / "testbed" / "data" / "train.jsonl").read_text(encoding="utf-8")
    answers = [json.loads(line)["answer"] for line in text.splitlines()]
    folders = sorted(path for path in output_root().glob("small_*") if (path / "manifest.json").is_file())
    records = [training_record(path, answers) for path in folders if not path.name.endswith("_merged")]
    return [record for record in records if record is not None]


def result_record(path: Path) -> dict[str, Any] | None:
    """Return the study's record of a result file; None for one that is not the study's."""
    from opsd.evaluation.results import load_result

    match = _RESULT.fullmatch(path.name)
    run = _RUN.fullmatch(match["run"]) if match else None
    if run is None or run["cell"] not in CELLS or (run["seed"] is None and run["cell"] != "base"):
        return None
    result = load_result(path)
    training = result.get("training_run") or {}
    training_seed = None if run["seed"] is None else int(run["seed"])
    return {
        "run": match["run"],
        "cell": run["cell"],
        "kind": kind_of(training_seed),
        "training_seed": training_seed,
        "benchmark": match["benchmark"],
        "seed": int(match["seed"]),
        "problems": result["num_problems"],
        "val_n": result["val_n"],
        "model_identity": result["model_identity"],
        "adapter_step": training.get("adapter_step"),
        **{name: round(result[f"{name}_pct"], 4) for name in METRICS},
        "truncated": round(100 * result["truncation_share"], 4),
        "tokens": round(result["mean_completion_tokens"], 2),
        "num_correct": [record["num_correct"] for record in result["results"]],
    }


def write_records(name: str, records: Iterable[dict[str, Any]]) -> None:
    """Write one record a line into docs/small_world/."""
    from opsd.files import atomic_write_text

    atomic_write_text(RECORDS / name, "".join(json.dumps(record) + "\n" for record in records))


def read_records(name: str) -> list[dict[str, Any]]:
    """Return the committed records. Raises ArtefactError where there are none."""
    from opsd.errors import ArtefactError

    path = RECORDS / name
    if not path.is_file():
        raise ArtefactError(f"there is no {path}; run launchers/reproduce_small.sh")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def search_scores(training: Iterable[dict[str, Any]]) -> dict[str, dict[float, float]]:
    """Return {method: {learning rate: percent of right rollouts in the search's last steps}}."""
    scores: dict[str, dict[float, float]] = {}
    for record in training:
        if record["kind"] == "search":
            tail = record["rollout_accuracy"][-SEARCH_TAIL:]
            scores.setdefault(record["cell"], {})[record["learning_rate"]] = 100 * sum(tail) / len(tail)
    return scores


def chosen_rate(scores: dict[float, float]) -> float:
    """Return the best rate of one method up to `HIGHEST_RATE`; the smaller one on a tie."""
    return max(sorted(rate for rate in scores if rate <= HIGHEST_RATE), key=lambda rate: scores[rate])


def collect() -> int:
    """Write both record files. ArtefactError where one evaluation has two result files."""
    from opsd.errors import ArtefactError

    training = training_records()
    results = [result_record(path) for path in sorted(eval_root().glob("small_*_seed*.json"))]
    results = [record for record in results if record is not None]
    keys = [(record["run"], record["benchmark"], record["seed"]) for record in results]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ArtefactError(f"{eval_root()} holds two results of {twice[0]}; move one of them away")
    write_records("training.jsonl", training)
    write_records("results.jsonl", results)
    print(f"{RECORDS}: {len(training)} runs, {len(results)} evaluations")
    return 0


def rate(method: str) -> int:
    """Print the learning rate that the search chose for `method`."""
    from opsd.errors import ArtefactError

    scores = search_scores(training_records()).get(method)
    if not scores:
        raise ArtefactError(f"no finished search run of {method} in {output_root()}")
    print(f"{chosen_rate(scores):g}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run a command; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("rate", help="print the chosen learning rate").add_argument("method", choices=METHODS)
    commands.add_parser("collect", help="write the record files")
    commands.add_parser("report", help="write tables and pictures from the record files")
    arguments = parser.parse_args(argv)
    if arguments.command == "rate":
        return rate(arguments.method)
    if arguments.command == "collect":
        return collect()
    from testbed.study_report import report

    return report()


def _run() -> int:
    sys.path.insert(0, str(ROOT))
    from opsd.errors import run_cli

    return run_cli(main)


if __name__ == "__main__":
    raise SystemExit(_run())
