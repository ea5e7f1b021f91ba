"""Which evaluations a table still lacks, as the commands that run them."""

from __future__ import annotations

from collections.abc import Sequence

from opsd.benchmarks import BENCHMARKS, PAPER_BENCHMARKS
from opsd.eval_config import EvalConfig
from opsd.summary import Table

# Evaluation seeds of the paper's table in launchers/reproduce_paper.sh.
PAPER_SEEDS = (1, 2, 3)
# EVAL_FLAGS of launchers/models/small.sh.
SMALL_MAX_NEW_TOKENS = 160


def missing_commands(table: Table, seeds: Sequence[int] | None = None) -> list[str]:
    """The commands that would fill what is missing in `table`.

    Args:
        seeds: the evaluation seeds that each cell should have. None takes the paper's for a table with its
            benchmarks, and for any other the seeds that some cell of the table has.
    """
    if seeds is None:
        found = {run.seed for run in table.runs if run.seed is not None}
        seeds = PAPER_SEEDS if set(table.columns) & set(PAPER_BENCHMARKS) else sorted(found)
    parallel = 1 if table.model == "small" else 4
    commands = []
    for row in table.rows:
        for training_seed in row.training_seeds or (None,):
            for dataset in table.columns:
                runs = row.cells[dataset].runs if dataset in row.cells else []
                present = {run.seed for run in runs if run.training_seed == training_seed}
                suffix = "" if training_seed is None else f"_t{training_seed}"
                name = _run_name(table.model, row.method) + suffix
                command = f"{_settings(table, dataset)}bash launchers/run_eval.sh {name} {dataset} {parallel}"
                commands += [f"{command} {seed}" for seed in seeds if seed not in present]
    return commands


def _settings(table: Table, dataset: str) -> str:
    """Settings of run_eval.sh that make a new run one of the table's regime, where its defaults do not."""
    regime = table.runs[0].regime
    max_new_tokens = SMALL_MAX_NEW_TOKENS if table.model == "small" else EvalConfig.max_new_tokens
    settings = {}
    if regime["val_n"] != EvalConfig.val_n:
        settings["VAL_N"] = regime["val_n"]
    if regime["max_new_tokens"] != max_new_tokens:
        settings["MAX_NEW_TOKENS"] = regime["max_new_tokens"]
    sizes = {run.regime["num_problems"] for run in table.runs if run.dataset == dataset}
    if dataset in BENCHMARKS and len(sizes) == 1 and sizes != {BENCHMARKS[dataset].size}:
        settings["NUM_SAMPLES"] = sizes.pop()
    if dataset not in BENCHMARKS:
        settings["DATASET_PATH"] = "FILE"
    return "".join(f"{name}={value} " for name, value in settings.items())


def _run_name(model: str, method: str) -> str:
    # The bare tag of a paper model is its base model; the small world's is `small_base`.
    if method == "base":
        return model if model != "small" else "small_base"
    return f"{model}_{method}"
