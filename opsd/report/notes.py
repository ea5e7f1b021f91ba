"""The regime of a table in a line, and notes on the cells that are not the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opsd.evaluation.benchmarks import BENCHMARKS, PAPER_BENCHMARKS
from opsd.evaluation.config import EvalConfig
from opsd.objectives import METHODS
from opsd.report.summary import Row, Run, Table, benchmark_title, method_stem

# The paper's evaluation seeds and the checkpoint that it merges.
PAPER_SEED_COUNT, PAPER_STEP = 3, 100
# Settings of the sampling, whose defaults in `EvalConfig` are the paper's, in words.
SAMPLING = {
    "temperature": "temperature {}",
    "top_p": "top_p {}",
    "top_k": "top_k {}",
    "min_p": "min_p {}",
    "presence_penalty": "presence penalty {}",
    "enable_thinking": "thinking {}",
    "max_new_tokens": "at most {} new tokens",
    "val_n": "{} samples a problem",
}


def unlike_paper(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of SAMPLING that `facts` states and the paper has otherwise."""
    stated = {name: facts[name] for name in SAMPLING if facts.get(name) is not None}
    if stated.get("top_k") == -1:
        stated["top_k"] = 0
    return {name: value for name, value in stated.items() if value != getattr(EvalConfig, name)}


def _setting(name: str, value: Any) -> str:
    off = value is False or (name in ("top_k", "min_p") and value <= 0)
    return SAMPLING[name].format("off" if off else "on" if value is True else f"{value:,g}")


def _gradings(runs: list[Run]) -> list[str]:
    """Return the different versions and limits of the grader that the results state."""
    found = []
    for run in runs:
        known = run.facts.get("grading") or {}
        limits = [
            f"{name} {value}" for name, value in known.items() if name not in ("killed", "killed_items")
        ]
        found.append(", ".join(limits) or "a grader that the file does not state")
    return list(dict.fromkeys(found))


def regime_line(table: Table) -> str:
    """Return sampling, length, samples, problems and grading of a table in one line."""
    stated: dict[str, Any] = {}
    sizes: dict[str, set[int]] = {}
    for run in table.runs:
        stated = {name: run.facts[name] for name in SAMPLING if run.facts.get(name) is not None} | stated
        sizes.setdefault(run.dataset, set()).add(run.facts["num_problems"])
    settings = ", ".join(_setting(name, stated[name]) for name in SAMPLING if name in stated)
    problems = ", ".join(
        f"{benchmark_title(name)} {' or '.join(map(str, sorted(sizes[name])))}"
        for name in table.columns
        if name in sizes
    )
    return f"Regime: {settings}; problems: {problems}; graded with {'; '.join(_gradings(table.runs))}."


def _cell_notes(row: Row, dataset: str) -> list[str]:
    runs = row.cells[dataset].runs
    facts = runs[0].facts
    notes = []
    if dataset in PAPER_BENCHMARKS:
        for name, value in unlike_paper(facts).items():
            notes.append(f"{_setting(name, value)} (the paper: {_setting(name, getattr(EvalConfig, name))})")
        for group in row.cells[dataset].by_training_seed:
            if len(group) != PAPER_SEED_COUNT:
                notes.append(f"evaluation seeds: {len(group)} (the paper: {PAPER_SEED_COUNT})")
    if dataset in BENCHMARKS and facts["num_problems"] != BENCHMARKS[dataset].size:
        notes.append(f"{facts['num_problems']} of {BENCHMARKS[dataset].size} problems")
    notes += [note for run in runs for note in _training_notes(run)]
    killed = sum((run.facts.get("grading") or {}).get("killed", 0) for run in runs)
    if killed:
        notes.append(f"{killed} parses or comparisons were killed at their limit and count as not equal")
    cut = sum(run.facts.get("truncation_share") or 0 for run in runs)
    if cut:
        percent = 100 * cut / len(runs)
        notes.append(f"{percent:.2g} % of the samples were cut off at {facts['max_new_tokens']:,} tokens")
    return notes


def _training_notes(run: Run) -> list[str]:
    """Compare the training run of the file's name with the one in the model's manifest."""
    stem, training = method_stem(run.method), run.facts.get("training_run")
    if training is None:
        # The authors' files never state it, and an untrained model has none.
        ours = stem in METHODS and "schema_version" in run.facts
        return ["the file states no training run of its model"] if ours else []
    notes = []
    if training.get("method") != stem:
        notes.append(f"the model was trained with {training.get('method')} by its manifest")
    elif training.get("run_name") not in (None, run.name):
        notes.append(f"the model is of the run {training['run_name']} by its manifest")
    if training.get("adapter_step") != PAPER_STEP:
        notes.append(f"adapter of step {training.get('adapter_step')} (the paper: {PAPER_STEP})")
    return notes


def table_notes(table: Table) -> dict[tuple[Row, str], list[str]]:
    """Return what a reader must know of each cell, a sentence each, by row and column."""
    mixed = len(_gradings(table.runs)) > 1
    notes = {}
    for row in table.rows:
        for name, cell in row.cells.items():
            graded = [f"graded with {'; '.join(_gradings(cell.runs))}"] if mixed else []
            notes[row, name] = list(dict.fromkeys(_cell_notes(row, name) + graded))
    return notes
