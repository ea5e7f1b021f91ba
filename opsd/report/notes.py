"""The regime of a table in a line, notes on cells unlike the paper's, commands for missing cells."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from opsd.evaluation.benchmarks import BENCHMARKS, PAPER_BENCHMARKS
from opsd.evaluation.config import EvalConfig
from opsd.evaluation.names import marks
from opsd.objectives import METHODS
from opsd.report.summary import BENCHMARK_TITLES, Row, Run, Table, method_stem

# Evaluation seeds of the paper's table in launchers/reproduce_paper.sh, and the checkpoint that it merges.
PAPER_SEEDS = (1, 2, 3)
PAPER_STEP = 100
# EVAL_FLAGS of launchers/models/small.sh.
SMALL_MAX_NEW_TOKENS = 160
# Settings of the sampling, whose defaults in `EvalConfig` are the paper's, in words.
SAMPLING = {name: f"{name} {{}}" for name in ("temperature", "top_p", "top_k", "min_p")} | {
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
    found, counts = [], ("killed", "killed_items")
    for run in runs:
        known = run.facts.get("grading") or {}
        limits = [f"{name} {value}" for name, value in known.items() if name not in counts]
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
    counts = {name: " or ".join(map(str, sorted(sizes[name]))) for name in table.columns if name in sizes}
    problems = ", ".join(f"{BENCHMARK_TITLES.get(name, name)} {count}" for name, count in counts.items())
    return f"Regime: {settings}; problems: {problems}; graded with {'; '.join(_gradings(table.runs))}."


def _cell_notes(row: Row, dataset: str) -> list[str]:
    runs, notes = row.cells[dataset].runs, []
    facts = runs[0].facts
    if dataset in PAPER_BENCHMARKS:
        for name, value in unlike_paper(facts).items():
            notes.append(f"{_setting(name, value)} (the paper: {_setting(name, getattr(EvalConfig, name))})")
        counts = [len(group) for group in row.cells[dataset].by_training_seed]
        wanted = len(PAPER_SEEDS)
        notes += [f"evaluation seeds: {count} (the paper: {wanted})" for count in counts if count != wanted]
    if dataset in BENCHMARKS and facts["num_problems"] != BENCHMARKS[dataset].size:
        notes.append(f"{facts['num_problems']} of {BENCHMARKS[dataset].size} problems")
    notes += ["base and adapter, not merged"] if facts.get("adapter") else []
    notes += [note for run in runs for note in _training_notes(run)]
    if killed := sum((run.facts.get("grading") or {}).get("killed", 0) for run in runs):
        notes.append(f"{killed} parses or comparisons were killed at their limit and count as not equal")
    if cut := sum(run.facts.get("truncation_share") or 0 for run in runs):
        percent = 100 * cut / len(runs)
        notes.append(f"{percent:.2g} % of the samples were cut off at {facts['max_new_tokens']:,} tokens")
    return notes


def _training_notes(run: Run) -> list[str]:
    """Compare the training run of the file's name with the one in the model's manifest."""
    stem, training, notes = method_stem(run.method), run.facts.get("training_run"), []
    if training is None:
        # The authors' files never state it, and an untrained model has none.
        ours = stem in METHODS and "schema_version" in run.facts
        return ["the file states no training run of its model"] if ours else []
    if training.get("method") != stem:
        notes.append(f"the model was trained with {training.get('method')} by its manifest")
    elif training.get("run_name") not in (None, run.name):
        notes.append(f"the model is of the run {training['run_name']} by its manifest")
    if training.get("adapter_step") != PAPER_STEP:
        notes.append(f"adapter of step {training.get('adapter_step')} (the paper: {PAPER_STEP})")
    return notes


class Notes:
    """What a reader must know of the cells of tables: `texts`, numbered by their first occurrence."""

    def __init__(self, *tables: Table) -> None:
        self._cells: dict[tuple[Row, str], list[str]] = {}
        for table in tables:
            mixed = len(_gradings(table.runs)) > 1
            for row in table.rows:
                for name, cell in row.cells.items():
                    graded = [f"graded with {'; '.join(_gradings(cell.runs))}"] if mixed else []
                    self._cells[row, name] = _cell_notes(row, name) + graded
        self.texts = list(dict.fromkeys(text for texts in self._cells.values() for text in texts))

    def of(self, row: Row, columns: Sequence[str]) -> list[str]:
        """Return the notes of the row's cells in `columns`."""
        found = {text for name in columns for text in self._cells.get((row, name), [])}
        return [text for text in self.texts if text in found]

    def mark(self, row: Row, columns: Sequence[str]) -> str:
        """Return ` [1, 3]`, nothing for cells without notes."""
        numbers = ", ".join(str(self.texts.index(text) + 1) for text in self.of(row, columns))
        return f" [{numbers}]" if numbers else ""

    def numbered(self) -> list[str]:
        """Return the texts, each behind its number."""
        return [f"[{number}] {text}" for number, text in enumerate(self.texts, 1)]


def missing_commands(table: Table, seeds: Sequence[int] | None = None) -> list[str]:
    """Return the commands that would give each cell these evaluation seeds, quoted for a shell.

    None takes the paper's seeds for a table with its benchmarks, else those that some cell has.
    """
    if seeds is None:
        found = {run.seed for run in table.runs if run.seed is not None}
        seeds = PAPER_SEEDS if set(table.columns) & set(PAPER_BENCHMARKS) else sorted(found)
    # The bare tag of a paper model is its base model; the small world's is `small_base`.
    small = table.model == "small"
    commands = []
    for row in table.rows:
        method = row.method
        for mark in reversed(marks(next((c.runs[0].facts for c in row.cells.values()), {}))):
            method = method.removesuffix(f"_{mark}")
        name = table.model if method == "base" and not small else f"{table.model}_{method}"
        for training_seed in row.training_seeds or (None,):
            suffix = "" if training_seed is None else f"_t{training_seed}"
            for dataset in table.columns:
                runs = row.cells[dataset].runs if dataset in row.cells else []
                missing = set(seeds) - {run.seed for run in runs if run.training_seed == training_seed}
                variables, flags = _settings(table, row, dataset)
                words = ["bash", "launchers/run_eval.sh", name + suffix, dataset, "1" if small else "4"]
                for seed in (seed for seed in seeds if seed in missing):
                    commands.append(" ".join([*variables, shlex.join([*words, str(seed), *flags])]))
    return commands


def _settings(table: Table, row: Row, dataset: str) -> tuple[list[str], list[str]]:
    """Return variables and flags of run_eval.sh that give a new run the table's regime."""
    facts = table.runs[0].facts
    default = SMALL_MAX_NEW_TOKENS if table.model == "small" else EvalConfig.max_new_tokens
    different = unlike_paper(facts) | {"max_new_tokens": facts["max_new_tokens"]}
    if facts["max_new_tokens"] == default:
        del different["max_new_tokens"]
    names = [name for name in ("val_n", "max_new_tokens") if name in different]
    variables = {name.upper(): different.pop(name) for name in names}
    runs = [run for run in table.runs if (run.dataset, run.first) == (dataset, row.first)]
    sizes = {run.facts["num_problems"] for run in runs}
    if row.first or (dataset in BENCHMARKS and len(sizes) == 1 and sizes != {BENCHMARKS[dataset].size}):
        variables["NUM_SAMPLES"] = row.first or sizes.pop()
    if dataset not in BENCHMARKS:
        variables["DATASET_PATH"] = "FILE"
    own = next((cell.runs[0].facts for cell in row.cells.values()), {})
    if own.get("adapter"):
        variables["ADAPTER"] = 1
    flags = ["--no_thinking"] if different.pop("enable_thinking", True) is False else []
    different |= {name: own[name] for name in ("dtype", "prompt") if own.get(name) in marks(own)}
    flags += [word for name, value in different.items() for word in (f"--{name}", str(value))]
    return [f"{name}={value}" for name, value in variables.items()], ["--", *flags] if flags else []
