"""The regime of a table in a line, and notes on the cells that are not the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opsd.evaluation.benchmarks import BENCHMARKS, PAPER_BENCHMARKS
from opsd.evaluation.config import EvalConfig
from opsd.report.summary import METHODS, Row, Run, Table, benchmark_title, method_stem

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


def _grading(run: Run) -> str:
    """Return version and limits of the grader as the result states them."""
    known = run.facts.get("grading") or {}
    limits = [f"{name} {value}" for name, value in known.items() if name not in ("killed", "killed_items")]
    return ", ".join(limits) or "a grader that the file does not state"


def regime_line(table: Table) -> str:
    """Return sampling, length, samples, problems and grading of a table in one line."""
    stated: dict[str, Any] = {}
    for run in table.runs:
        stated = {name: run.facts[name] for name in SAMPLING if run.facts.get(name) is not None} | stated
    settings = ", ".join(_setting(name, stated[name]) for name in SAMPLING if name in stated)
    sizes: dict[str, set[int]] = {}
    for run in table.runs:
        sizes.setdefault(run.dataset, set()).add(run.facts["num_problems"])
    problems = ", ".join(
        f"{benchmark_title(name)} {' or '.join(map(str, sorted(sizes[name])))}"
        for name in table.columns
        if name in sizes
    )
    gradings = "; ".join(dict.fromkeys(map(_grading, table.runs)))
    return f"Regime: {settings}; problems: {problems}; graded with {gradings}."


def cell_notes(row: Row, dataset: str, *, mixed_grading: bool) -> list[str]:
    """Return what a reader of this cell must know, a sentence each; empty for a cell like the paper's."""
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
    shares = [run.facts.get("truncation_share") or 0 for run in runs]
    if any(shares):
        percent = 100 * sum(shares) / len(shares)
        notes.append(f"{percent:.2g} % of the samples were cut off at {facts['max_new_tokens']:,} tokens")
    if mixed_grading:
        notes.append(f"graded with {'; '.join(dict.fromkeys(map(_grading, runs)))}")
    return list(dict.fromkeys(notes))


def _training_notes(run: Run) -> list[str]:
    """Compare the run that the file's name says with the one that the model's manifest says."""
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
    """Return the notes of every cell of `table` by row and column."""
    mixed = len(set(map(_grading, table.runs))) > 1
    return {
        (row, name): cell_notes(row, name, mixed_grading=mixed) for row in table.rows for name in row.cells
    }
