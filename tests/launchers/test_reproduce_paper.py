"""reproduce_paper.sh without a GPU: its order, failures, a restart, the table and its picture."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from opsd.evaluation.results import write_result
from tests.launchers.test_launchers import METHODS, ROOT, launch
from tests.report.test_summarize import result, rows_of

MODELS = ("qwen3_4b_base", "dsr1_l8b", "olmo3_7b_think")
BENCHMARKS = ("math500", "aime24", "aime25", "hmmt25")
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
    """One result for each benchmark and seed, which the stand-in copies."""
    folder = tmp_path_factory.mktemp("results")
    for benchmark in BENCHMARKS:
        for seed in (1, 2, 3):
            write_result(folder / f"{benchmark}_{seed}.json", result(benchmark, seed, rows_of(3 + seed)))
    return folder


class Tree:
    """A copy of the launchers. The stand-ins record their calls and fail where a file says so."""

    def __init__(self, root: Path, results: Path) -> None:
        self.root, self.calls, self.failures = root / "repo", root / "calls", root / "failures"
        self.results, self.evaluations = results, root / "repo" / "eval_results"
        launchers = shutil.copytree(ROOT / "launchers", self.root / "launchers")
        for name in ("opsd", "summarize_results.py"):
            (self.root / name).symlink_to(ROOT / name)
        self.evaluations.mkdir()
        self.failures.write_text("")
        (launchers / "install.py").write_text("")
        for name, then in (("train.sh", ""), ("run_eval.sh", EVALUATE)):
            (launchers / name).write_text(STUB.format(name=name, then=then))
        parquet = self.root / "data" / "hmmt25_clean" / "train.parquet"
        parquet.parent.mkdir(parents=True)
        parquet.touch()

    def run(self, *, cwd: Path | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run the launcher; `calls` then holds the calls of this run alone."""
        self.calls.write_text("")
        paths = {"CALLS": self.calls, "FAILURES": self.failures, "RESULTS": self.results}
        own = {name: str(path) for name, path in (paths | {"EVAL_ROOT": self.evaluations}).items()}
        own |= {"CUDA_VISIBLE_DEVICES": "", "VENV": sys.prefix, "PYTHON": sys.executable}
        return launch("reproduce_paper.sh", root=self.root, cwd=cwd or self.root, **own | settings)

    def called(self, name: str = "") -> list[list[str]]:
        """Return the words of every call of a stand-in, in order."""
        return [line.split() for line in self.calls.read_text().splitlines() if line.startswith(name)]


@pytest.fixture
def tree(tmp_path, results) -> Tree:
    return Tree(tmp_path, results)


def test_every_cell_is_trained_and_evaluated_under_the_seeds_of_the_paper(tree, tmp_path):
    done = tree.run(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert tree.called("train.sh") == [
        ["train.sh", model, method] for model in MODELS for method in sorted(METHODS)
    ]
    assert tree.called("run_eval.sh") == [
        ["run_eval.sh", cell, benchmark, "4", seed]
        for model in MODELS
        for cell in (*(f"{model}_{method}" for method in sorted(METHODS)), model)
        for benchmark in BENCHMARKS
        for seed in ("1", "2", "3")
    ]
    estimate = done.stderr[: done.stderr.index("== qwen3_4b_base_eopd")]
    assert "estimate for 4 GPUs, measured on no machine (formula: launchers/estimate_hours.py)" in estimate
    assert "qwen3_4b_base: 6 to 10 s a step" in estimate
    order = [words[0] for words in tree.called()[:14]]
    assert order == ["train.sh", *["run_eval.sh"] * 12, "train.sh"], "a cell is evaluated once it is trained"
    table = (tree.evaluations / "paper_table.md").read_text("utf-8")
    assert table in done.stdout
    assert all(title in table for title in ("Base", "PW-OPSD", "EOPD", "REOPOLD", *MODELS))
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
    assert [words[1] for words in tree.called("run_eval.sh")] == ["dsr1_l8b_eopd"] * 6 + ["dsr1_l8b"] * 6
    for words in (
        "dsr1_l8b_opsd: training or merge (exit code 1)",
        "dsr1_l8b_eopd aime24 seed 2: exit code 3",
        "2 part(s) failed",
    ):
        assert words in done.stderr
    # What is there is in the table, and what is missing is named in it.
    table = (tree.evaluations / "paper_table.md").read_text("utf-8")
    assert "62.50 ± 12.50" in table
    assert "bash launchers/run_eval.sh dsr1_l8b_eopd aime24 4 2" in table

    # The same command continues from there and leaves finished results unchanged.
    before = {path: path.stat().st_mtime_ns for path in tree.evaluations.glob("*.json")}
    tree.failures.write_text("")
    again = tree.run(**part)
    assert again.returncode == 0, again.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert len(list(tree.evaluations.glob("*.json"))) == 18


def test_a_wrong_setting_stops_at_the_first_cell_only(tree):
    tree.failures.write_text("train.sh qwen3_4b_base=2\n")
    assert tree.run().returncode == 2
    assert len(tree.called()) == 1
    # After a successful cell it is the failure of one cell.
    tree.failures.write_text("train.sh dsr1_l8b=2\n")
    done = tree.run(METHODS_TO_RUN="opsd", BENCHMARKS="aime24", SEEDS="1")
    assert done.returncode == 1
    assert [words[1] for words in tree.called("train.sh")] == list(MODELS)


def test_a_damaged_result_is_listed_beside_the_table(tree):
    one = {"MODELS": "dsr1_l8b", "METHODS_TO_RUN": "opsd", "BENCHMARKS": "aime24"}
    (tree.evaluations / "small_opsd_small_38k_seed1.json").write_text("{")
    assert tree.run(**one).returncode == 0, "results of other models are left out"
    (tree.evaluations / "dsr1_l8b_opsd_aime25_38k_seed1.json").write_text("{")
    done = tree.run(**one)
    assert done.returncode == 1
    assert "the table (exit code 1)" in done.stderr
    assert "62.50 ± 12.50" in done.stdout


def test_the_missing_benchmark_stops_before_the_first_step(tree, tmp_path):
    missing = str(tmp_path / "nowhere.parquet")
    done = tree.run(HMMT25_PARQUET_PATH=missing)
    assert done.returncode == 3
    assert missing in done.stderr
    assert not tree.called()


def test_the_estimate_is_its_formula():
    """Round numbers: 1e9 parameters on 2 GPUs, each end of the range by hand."""
    words = "--model tiny 1e9 1e5 --methods 2 --benchmarks math500 aime24 --seeds 3 --gpus 2"
    words += " --bandwidth 1e12 1e12 --bandwidth_share 1 0.5 --push_speed 2e9 1e9 --matrix_rate 1e14 1e14"
    words += " --matrix_share 0.4 0.2 --student_tokens 1000 1000 --teacher_tokens 2000 2000"
    words += " --math500_tokens 4000 4000 --contest_tokens 20000 20000 --memory 21e9 21e9"
    command = [sys.executable, str(ROOT / "launchers" / "estimate_hours.py"), *words.split()]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Rollout 1024 x 2e9 / 1e12 = 2.05 s, push 1 s, computing 32 x 1e9 x (6,000 + 4,000) / (2 x 0.4e14) = 4 s;
    # 2 methods x 150 steps x 7.05 s x 2 GPUs / 3600 = 1.2. The slow end is twice that.
    # MATH-500: 6,000 samples of 4,000 tokens; (0.9 x 42e9 - 2e9) / (4,000 x 1e5) = 89.5 at once, in
    # 37.8e9 / 2e12 = 18.9 ms a step: 5,068 s. AIME: 360 of 20,000, 17.9 at once: 7,602 s. x 3 seeds
    # x (2 methods + 1 untrained) x 2 GPUs / 3600 = 63.4.
    assert "tiny: 7 to 14 s a step, training 1 to 2, evaluation 63 to 127 GPU-hours" in said
    assert "together 65 to 129 GPU-hours, 1.3 to 2.7 days on 2 GPUs" in said
