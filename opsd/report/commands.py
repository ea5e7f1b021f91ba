"""Which evaluations a table still lacks, as the commands that run them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from opsd.evaluation.benchmarks import BENCHMARKS, PAPER_BENCHMARKS
from opsd.report.notes import unlike_paper
from opsd.report.summary import Row, Table

# Evaluation seeds of the paper's table in launchers/reproduce_paper.sh.
PAPER_SEEDS = (1, 2, 3)
# EVAL_FLAGS of launchers/models/small.sh.
SMALL_MAX_NEW_TOKENS = 160


def missing_commands(table: Table, seeds: Sequence[int] | None = None) -> list[str]:
    """Return the commands that would fill what is missing in `table`, quoted for a shell.

    Args:
        seeds: the evaluation seeds that each cell should have. None takes the paper's for a table with its
            benchmarks, and for any other the seeds that some cell of the table has.
    """
    if seeds is None:
        found = {run.seed for run in table.runs if run.seed is not None}
        seeds = PAPER_SEEDS if set(table.columns) & set(PAPER_BENCHMARKS) else sorted(found)
    # The bare tag of a paper model is its base model; the small world's is `small_base`.
    small = table.model == "small"
    commands = []
    for row in table.rows:
        name = table.model if row.method == "base" and not small else f"{table.model}_{row.method}"
        for training_seed in row.training_seeds or (None,):
            suffix = "" if training_seed is None else f"_t{training_seed}"
            for dataset in table.columns:
                runs = row.cells[dataset].runs if dataset in row.cells else []
                present = {run.seed for run in runs if run.training_seed == training_seed}
                variables, flags = _settings(table, row, dataset)
                words = ["bash", "launchers/run_eval.sh", name + suffix, dataset, "1" if small else "4"]
                commands += [
                    " ".join([*variables, shlex.join([*words, str(seed), *flags])])
                    for seed in seeds
                    if seed not in present
                ]
    return commands


def _settings(table: Table, row: Row, dataset: str) -> tuple[list[str], list[str]]:
    """Return variables and flags of run_eval.sh that give a new run the table's regime."""
    facts = table.runs[0].facts
    different = unlike_paper(facts)
    if table.model == "small":
        different["max_new_tokens"] = facts["max_new_tokens"]
        if facts["max_new_tokens"] == SMALL_MAX_NEW_TOKENS:
            del different["max_new_tokens"]
    names = [name for name in ("val_n", "max_new_tokens") if name in different]
    variables = {name.upper(): different.pop(name) for name in names}
    runs = [run for run in table.runs if (run.dataset, run.first) == (dataset, row.first)]
    sizes = {run.facts["num_problems"] for run in runs}
    if row.first or (dataset in BENCHMARKS and len(sizes) == 1 and sizes != {BENCHMARKS[dataset].size}):
        variables["NUM_SAMPLES"] = row.first or sizes.pop()
    if dataset not in BENCHMARKS:
        variables["DATASET_PATH"] = "FILE"
    flags = ["--no_thinking"] if different.pop("enable_thinking", True) is False else []
    flags += [word for name, value in different.items() for word in (f"--{name}", str(value))]
    return [f"{name}={value}" for name, value in variables.items()], ["--", *flags] if flags else []
