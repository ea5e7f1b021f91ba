"""reproduce_paper.sh without a GPU: its order, what a failure leaves, a restart, the table and its picture.

The launcher is the real one in a copied tree; train.sh and run_eval.sh are stand-ins that note how they are
called, fail where a file says so, and leave what the real ones leave.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from opsd.results import write_result
from tests.test_launchers import SETTINGS
from tests.test_summarize import result, rows_of

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("qwen3_4b_base", "dsr1_l8b", "olmo3_7b_think")
METHODS = ("opsd", "eopd", "reopold", "pwopsd")
BENCHMARKS = ("math500", "aime24", "aime25", "hmmt25")
# What a caller's shell may hold and reproduce_paper.sh reads, beyond what every launcher reads.
OWN_SETTINGS = ("MODELS", "METHODS_TO_RUN", "BENCHMARKS", "SEEDS", "GPUS", "TENSOR_PARALLEL", "EVAL_ROOT",
                "HMMT25_PARQUET_PATH")  # fmt: skip
STUB = """#!/usr/bin/env bash
call="{name} $*"
echo "$call" >>"$CALLS"
while IFS= read -r line; do
  [[ "$call" == ${{line%%=*}}* ]] && exit "${{line##*=}}"
done <"$FAILURES"
{then}
exit 0
"""
# A finished evaluation leaves a result; the second call for it has nothing to do.
EVALUATE = 'stem="$1"; [[ "$2" == math500 ]] || stem+="_$2"; cp -n "$RESULTS/$2_$4.json" \
"$EVAL_ROOT/${stem}_38k_seed$4.json"'


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """One result for each benchmark and seed, which the stand-in hands out."""
    folder = tmp_path_factory.mktemp("results")
    for benchmark in BENCHMARKS:
        for seed in (1, 2, 3):
            write_result(folder / f"{benchmark}_{seed}.json", result(benchmark, seed, rows_of(3 + seed)))
    return folder


class Tree:
    """A copy of the launchers, with stand-ins for the two that need a GPU."""

    def __init__(self, root: Path, results: Path) -> None:
        self.root, self.calls, self.failures = root / "repo", root / "calls", root / "failures"
        self.results, self.evaluations = results, root / "repo" / "eval_results"
        shutil.copytree(ROOT / "launchers", self.root / "launchers")
        for name in ("opsd", "summarize_results.py"):
            (self.root / name).symlink_to(ROOT / name)
        self.evaluations.mkdir()
        self.failures.write_text("")
        (self.root / "launchers" / "install.py").write_text("")
        for name, then in (("train.sh", ""), ("run_eval.sh", EVALUATE)):
            (self.root / "launchers" / name).write_text(STUB.format(name=name, then=then))
        parquet = self.root / "data" / "hmmt25_clean" / "train.parquet"
        parquet.parent.mkdir(parents=True)
        parquet.write_bytes(b"")

    def run(self, *, cwd: Path | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
        """Start the launcher; the calls of this start alone are in `calls` afterwards."""
        self.calls.write_text("")
        kept = {k: v for k, v in os.environ.items() if k not in (*SETTINGS, *OWN_SETTINGS)}
        own = {
            "CALLS": str(self.calls),
            "FAILURES": str(self.failures),
            "RESULTS": str(self.results),
            "EVAL_ROOT": str(self.evaluations),
            "VENV": sys.prefix,
            "PYTHON": sys.executable,
        }
        return subprocess.run(
            ["bash", str(self.root / "launchers" / "reproduce_paper.sh")],
            env=kept | own | settings,
            cwd=cwd or self.root,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def called(self, name: str = "") -> list[list[str]]:
        """The words of every call of a stand-in, in order."""
        return [line.split() for line in self.calls.read_text().splitlines() if line.startswith(name)]


@pytest.fixture
def tree(tmp_path, results) -> Tree:
    return Tree(tmp_path, results)


def test_every_cell_is_trained_and_evaluated_under_the_seeds_of_the_paper(tree, tmp_path):
    done = tree.run(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert tree.called("train.sh") == [["train.sh", model, method] for model in MODELS for method in METHODS]
    assert tree.called("run_eval.sh") == [
        ["run_eval.sh", f"{model}_{method}", benchmark, "4", seed]
        for model in MODELS
        for method in METHODS
        for benchmark in BENCHMARKS
        for seed in ("1", "2", "3")
    ]
    # A cell is evaluated as soon as it is trained.
    assert [words[0] for words in tree.called()[:14]] == ["train.sh", *["run_eval.sh"] * 12, "train.sh"]
    table = (tree.evaluations / "paper_table.md").read_text("utf-8")
    assert table in done.stdout
    for title in ("PW-OPSD", "EOPD", "REOPOLD", "qwen3_4b_base", "dsr1_l8b", "olmo3_7b_think"):
        assert title in table
    # 4, 5 and 6 of 8 samples right: 62.50 ± 12.50 in every cell, and nothing is missing.
    assert "62.50 ± 12.50" in table
    assert "launchers/run_eval.sh" not in table
    assert (tree.evaluations / "paper_table.png").read_bytes().startswith(b"\x89PNG")


def test_a_failing_cell_stops_no_other(tree):
    tree.failures.write_text("train.sh dsr1_l8b opsd=1\nrun_eval.sh dsr1_l8b_eopd aime24 4 2=3\n")
    part = {"MODELS": "dsr1_l8b", "METHODS_TO_RUN": "opsd eopd", "BENCHMARKS": "math500 aime24"}
    done = tree.run(**part)
    assert done.returncode == 1
    # The cell that was not trained is not evaluated; the other one is, beyond its own failure.
    evaluated = tree.called("run_eval.sh")
    assert {words[1] for words in evaluated} == {"dsr1_l8b_eopd"}
    assert len(evaluated) == 6
    assert "dsr1_l8b_opsd: training or merge (exit code 1)" in done.stderr
    assert "dsr1_l8b_eopd: aime24, seed 2 (exit code 3)" in done.stderr
    assert "2 part(s) failed" in done.stderr
    # What is there is in the table, and what is missing is named in it.
    table = (tree.evaluations / "paper_table.md").read_text("utf-8")
    assert "62.50 ± 12.50" in table
    assert "bash launchers/run_eval.sh dsr1_l8b_eopd aime24 4 2" in table

    # The same command goes on from there: the stand-ins are asked again, what is done is left as it is.
    before = {path: path.stat().st_mtime_ns for path in tree.evaluations.glob("*.json")}
    tree.failures.write_text("")
    again = tree.run(**part)
    assert again.returncode == 0, again.stderr
    assert {words[1] for words in tree.called("run_eval.sh")} == {"dsr1_l8b_opsd", "dsr1_l8b_eopd"}
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert len(list(tree.evaluations.glob("*.json"))) == 12


def test_a_wrong_setting_stops_at_the_first_cell_only(tree):
    tree.failures.write_text("train.sh qwen3_4b_base=2\n")
    assert tree.run().returncode == 2
    assert len(tree.called()) == 1
    # Behind a cell that went well it is one cell's trouble.
    tree.failures.write_text("train.sh dsr1_l8b=2\n")
    done = tree.run(METHODS_TO_RUN="opsd", BENCHMARKS="aime24", SEEDS="1")
    assert done.returncode == 1
    assert [words[1] for words in tree.called("train.sh")] == list(MODELS)


def test_no_result_at_all_is_no_table(tree):
    tree.failures.write_text("train.sh=1\n")
    done = tree.run(MODELS="dsr1_l8b")
    assert done.returncode == 1
    assert "4 part(s) failed" in done.stderr
    assert "no result in" in done.stderr
    assert not list(tree.evaluations.iterdir())


def test_a_damaged_result_is_listed_beside_the_table(tree):
    (tree.evaluations / "dsr1_l8b_opsd_aime25_38k_seed1.json").write_text("{")
    done = tree.run(MODELS="dsr1_l8b", METHODS_TO_RUN="opsd", BENCHMARKS="aime24")
    assert done.returncode == 1
    assert "the table (exit code 1)" in done.stderr
    assert "62.50 ± 12.50" in done.stdout


def test_results_of_other_models_stay_out_of_the_table(tree):
    (tree.evaluations / "small_opsd_small_38k_seed1.json").write_text("{")
    done = tree.run(MODELS="dsr1_l8b", METHODS_TO_RUN="opsd", BENCHMARKS="aime24")
    assert done.returncode == 0, done.stderr


def test_the_missing_benchmark_is_told_before_the_first_step(tree, tmp_path):
    missing = str(tmp_path / "nowhere.parquet")
    done = tree.run(HMMT25_PARQUET_PATH=missing)
    assert done.returncode == 3
    assert missing in done.stderr
    assert not tree.called()
    assert tree.run(HMMT25_PARQUET_PATH=missing, BENCHMARKS="aime24", MODELS="dsr1_l8b").returncode == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"BASE_MODEL_PATH": "somewhere"}, "BASE_MODEL_PATH is one model's copy, but there are 3 models"),
        ({"TENSOR_PARALLEL": "0"}, "TENSOR_PARALLEL='0'"),
        ({"TOKENS_PER_SECOND_4B": "fast"}, "TOKENS_PER_SECOND_4B='fast'"),
        ({"RUN_NAME": "mine"}, "RUN_NAME is set"),
        ({"SEEDS": "1 two"}, "'two' is not a whole number"),
    ],
)
def test_wrong_settings(tree, settings, message):
    done = tree.run(**settings)
    assert done.returncode == 2
    assert message in done.stderr
    assert not tree.called()


def test_the_estimate_names_its_assumptions_before_anything_starts(tree):
    done = tree.run(MODELS="dsr1_l8b", METHODS_TO_RUN="opsd", BENCHMARKS="aime24", SECONDS_PER_STEP_8B="77")
    lines = done.stderr.splitlines()
    start = next(k for k, line in enumerate(lines) if "== dsr1_l8b_opsd" in line)
    estimate = "\n".join(lines[:start])
    assert "ASSUMED" in estimate
    assert "none of them measured here" in estimate
    assert "40 and 77 s a step" in estimate
    assert "GPU-hours" in estimate


def test_a_dry_run_prints_every_command_and_does_nothing(tmp_path):
    """The real train.sh and run_eval.sh here: 12 x (training, merge, 12 evaluations), then the table."""
    kept = {k: v for k, v in os.environ.items() if k not in (*SETTINGS, *OWN_SETTINGS)}
    done = subprocess.run(
        ["bash", str(ROOT / "launchers" / "reproduce_paper.sh")],
        env=kept | {"DRY_RUN": "1", "OUTPUT_ROOT": str(tmp_path / "o"), "EVAL_ROOT": str(tmp_path / "e"),
                    "METHODS_TO_RUN": "opsd pwopsd"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    counts = {
        script: sum(script in line for line in lines)
        for script in ("ea_opsd_train.py", "merge_lora.py", "evaluate_math.py", "summarize_results.py")
    }
    assert counts == {
        "ea_opsd_train.py": 6,
        "merge_lora.py": 6,
        "evaluate_math.py": 72,
        "summarize_results.py": 1,
    }
    assert "--seeds 1 2 3" in lines[-1]
    assert f"--plot {tmp_path / 'e' / 'paper_table.png'}" in lines[-1]
    assert not list(tmp_path.iterdir())
