"""The small-world study: records from runs, statistics by hand, and documents that agree with the records."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from opsd.errors import ArtefactError, UsageError
from testbed import compare, study, study_report
from tests.launchers.test_launchers import LAUNCHERS, dry_run, launch

ROOT = Path(__file__).resolve().parents[2]


def result(
    cell: str, training_seed: int | None, seed: int, correct: list[int], benchmark: str = "small"
) -> dict:
    share = 100 * sum(correct) / (4 * len(correct))
    return {
        "cell": cell,
        "kind": study.kind_of(training_seed),
        "training_seed": training_seed,
        "seed": seed,
        "benchmark": benchmark,
        "problems": len(correct),
        "val_n": 4,
        "average_at_n": share,
        "num_correct": correct,
    }


# --- statistics --------------------------------------------------------------------------------------------


def test_a_cell_is_the_mean_and_deviation_of_its_training_seeds():
    results = [
        result("opsd", 1, 1, [4, 0]),  # 50
        result("opsd", 1, 2, [4, 4]),  # 100 -> seed 1: 75
        result("opsd", 2, 1, [2, 2]),  # 50
        result("opsd", 2, 2, [2, 2]),  # 50 -> seed 2: 50
    ]
    means = study_report.seed_means(results, "opsd", "small", "average_at_n")
    assert means == {1: 75.0, 2: 50.0}
    # mean 62.5; (12.5² + 12.5²) / 1 = 312.5, its root 17.68
    assert study_report.spread(list(means.values())) == "62.5 ± 17.7"
    assert study_report.spread([62.5]) == "62.5"
    assert study_report.spread([]) == "—"


def test_differences_pair_training_seeds_and_problems():
    results = [
        *(result("opsd", seed, 1, [0, 2, 4, 2]) for seed in (42, 43)),
        *(result("pwopsd", seed, 1, [1, 3, 4, 4]) for seed in (42, 43)),
    ]
    mean, low, high = study_report.difference(results, "pwopsd", "opsd", "small")
    assert mean == pytest.approx(100 * (1 + 1 + 0 + 2) / 16)
    assert 0 <= low < mean < high <= 50
    shifted = [
        *(result("opsd", seed, 1, [0, 1, 2, 3]) for seed in (42, 43)),
        *(result("pwopsd", seed, 1, [1, 2, 3, 4]) for seed in (42, 43)),
    ]
    # Every pair differs by the same quarter: nothing is left to vary.
    assert study_report.difference(shifted, "pwopsd", "opsd", "small") == pytest.approx((25, 25, 25))


def test_smoothing_is_a_trailing_mean():
    assert study_report.smoothed(np.array([1.0, 3.0, 5.0, 7.0]), width=2).tolist() == [1, 2, 4, 6]


def test_the_search_takes_the_best_rate_and_the_smaller_on_a_tie():
    def run(rate: float, tail: float) -> dict:
        shares = [0.0] * 5 + [tail] * study.SEARCH_TAIL
        return {"kind": "search", "cell": "opsd", "learning_rate": rate, "rollout_accuracy": shares}

    scores = study.search_scores([run(1e-3, 1.0), run(1e-4, 0.75), run(3e-5, 0.5), {"kind": "study"}])
    assert scores == {"opsd": {1e-3: 100.0, 1e-4: 75.0, 3e-5: 50.0}}
    assert study.chosen_rate(scores["opsd"]) == 1e-4  # 1e-3 is at the ceiling
    assert study.chosen_rate({1e-4: 60.0, 3e-5: 60.0, 1e-5: 10.0}) == 3e-5


# --- records -----------------------------------------------------------------------------------------------


def test_rollouts_are_right_when_their_boxed_answer_is_the_rows(tmp_path):
    folder = tmp_path / "completions"
    folder.mkdir()
    texts = ["so \\boxed{7}.", "\\boxed{8}", "none", "\\boxed{5} no, \\boxed{6}"]
    rows = [{"row": row, "completion": text} for row, text in zip((1, 1, 0, 0), texts, strict=True)]
    (folder / "step-000000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "step-000001.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert study.rollout_accuracy(tmp_path, ["6", "7"]) == [0.5, 1.0]


@pytest.mark.parametrize(
    ("name", "cell", "rate", "seed"),
    [
        ("small_opsd_lr3e-4", "opsd", "3e-4", None),
        ("small_pwopsd_t42", "pwopsd", None, "42"),
        ("small_pwopsd_global_t44", "pwopsd_global", None, "44"),
        ("small_base", "base", None, None),
    ],
)
def test_run_names_say_what_they_are(name, cell, rate, seed):
    match = study._RUN.fullmatch(name)
    assert (match["cell"], match["rate"], match["seed"]) == (cell, rate, seed)


def test_other_runs_are_not_the_studys(tmp_path):
    for name in ("small_pwopsd", "small_pwopsd_quickstart", "qwen3_4b_base_pwopsd_t42"):
        assert study.training_record(tmp_path / name, []) is None
    assert study.result_record(tmp_path / "small_pwopsd_small_38k_seed1.json") is None
    assert study.result_record(tmp_path / "small_pwopsd_t42_small_38k.json") is None


# --- documents ---------------------------------------------------------------------------------------------


def test_parts_of_a_document_are_replaced_and_nothing_else(tmp_path):
    path = tmp_path / "a.md"
    path.write_text(
        "top\n<!-- study:one -->\nold\n<!-- study:end -->\nmiddle\n<!-- study:two -->\n<!-- study:end -->\n"
    )
    study_report.replace_parts(path, {"one": "new \\1", "two": "second"})
    assert path.read_text() == (
        "top\n<!-- study:one -->\nnew \\1\n<!-- study:end -->\nmiddle\n"
        "<!-- study:two -->\nsecond\n<!-- study:end -->\n"
    )
    with pytest.raises(ArtefactError, match="no place for the study's three"):
        study_report.replace_parts(path, {"three": ""})


def test_the_documents_tables_are_what_the_committed_records_give():
    training, results = study.read_records("training.jsonl"), study.read_records("results.jsonl")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "small_world.md").read_text(encoding="utf-8")
    assert study_report.main_table(results, training) in readme
    for text in (
        study_report.main_table(results, training),
        study_report.long_table(results, training),
        study_report.ablation_table(results),
        study_report.search_table(training),
        study_report.differences_table(results),
        study_report.other_metrics_table(results),
        study_report.facts(results, training),
    ):
        assert text in page


def test_the_committed_records_are_the_whole_study():
    training, results = study.read_records("training.jsonl"), study.read_records("results.jsonl")
    main = [record for record in training if record["kind"] == "study"]
    long = [record for record in training if record["kind"] == "long"]
    assert sorted(record["cell"] for record in long) == sorted(study.METHODS)
    assert {record["steps"] for record in long} == {100}
    trained = [cell for cell in study.CELLS if cell != "base"]
    assert sorted({record["cell"] for record in main}) == sorted(trained)
    for cell in trained:
        seeds = {record["seed"] for record in main if record["cell"] == cell}
        assert len(seeds) >= 3
        for benchmark in study.BENCHMARKS:
            found = {
                (record["training_seed"], record["seed"])
                for record in results
                if record["kind"] == "study" and record["cell"] == cell and record["benchmark"] == benchmark
            }
            assert {training_seed for training_seed, _ in found} == seeds
            assert len(found) >= 9
    # Every result's figure is the mean of its own problems.
    for record in results:
        share = 100 * sum(record["num_correct"]) / (record["val_n"] * record["problems"])
        assert record["average_at_n"] == pytest.approx(share, abs=1e-3)
        assert len(record["num_correct"]) == record["problems"]
        steps = {"long": 100, "study": main[0]["steps"]}[record["kind"]]
        assert record["cell"] == "base" or record["adapter_step"] == steps


def test_pictures_are_drawn_from_the_records(tmp_path):
    training, results = study.read_records("training.jsonl"), study.read_records("results.jsonl")
    study_report.draw_curves(training, tmp_path / "curves.png")
    study_report.draw_weights(tmp_path / "weights.png")
    study_report.draw_accuracy(results, tmp_path / "accuracy.png")
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 3


# --- compare.py --------------------------------------------------------------------------------------------


def test_the_comparison_counts_points_and_pairs_problems():
    base = np.array([0.0, 0.5, 0.5, 1.0])
    assert compare.difference_interval(base, base + 0.25) == pytest.approx((25, 25))
    low, high = compare.difference_interval(base, np.array([1.0, 0.5, 0.5, 1.0]))
    assert low == 0
    assert 25 < high <= 100


def test_files_of_different_sampling_are_not_compared(tmp_path, monkeypatch):
    from opsd.evaluation import results as module

    monkeypatch.setattr(module, "load_result", lambda path: {"temperature": 1.0 if "a" in path.name else 0.7})
    with pytest.raises(UsageError, match="temperature"):
        compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])


# --- launchers ---------------------------------------------------------------------------------------------


def test_the_quickstart_trains_merges_and_evaluates_both_models():
    commands = [words for _, words in dry_run("quickstart.sh")]
    scripts = [next(Path(word).name for word in words if word.endswith(".py")) for words in commands]
    assert scripts == [
        "evaluate_math.py",
        "ea_opsd_train.py",
        "merge_lora.py",
        "evaluate_math.py",
        "compare.py",
    ]
    base, train, merge, trained, _ = commands
    assert train[train.index("--method") + 1] == "pwopsd"
    assert train[train.index("--max_steps") + 1] == "100"
    assert merge[merge.index("--adapter") + 1].endswith("small_pwopsd_quickstart/checkpoint-100")
    model = base.index("--base_model") + 1
    assert base[model] == "testbed/base_model"
    assert trained[model] == "outputs/small_pwopsd_quickstart_merged"
    # But for model and output, the two are measured alike.
    output = base.index("--output") + 1
    same = [i for i in range(len(base)) if i not in (model, output)]
    assert [base[i] for i in same] == [trained[i] for i in same]


def test_the_quickstart_takes_the_vllm_engine_for_both():
    commands = [words for _, words in dry_run("quickstart.sh", ROLLOUT="vllm")]
    assert [w[w.index("--engine") + 1] for w in commands if "--engine" in w] == ["vllm", "vllm"]
    assert [w[w.index("--rollout") + 1] for w in commands if "--rollout" in w] == ["vllm"]


@pytest.mark.parametrize("settings", [{"METHOD": "sft"}, {"ROLLOUT": "tgi"}])
def test_the_quickstart_refuses_what_it_does_not_know(settings):
    done = launch("quickstart.sh", DRY_RUN="1", **settings)
    assert done.returncode == 2
    assert next(iter(settings.values())) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_reproduce_small_runs_every_cell_with_every_seed():
    commands = [words for _, words in dry_run("reproduce_small.sh", TRAINING_SEEDS="1 2", SEEDS="1 2")]
    trains = [words for words in commands if any(word.endswith("ea_opsd_train.py") for word in words)]

    def flag(words: list[str], name: str) -> str:
        return words[words.index(f"--{name}") + 1]

    named = {Path(flag(words, "output_dir")).name: words for words in trains}
    searched = [name for name in named if "_lr" in name]
    assert len(searched) == 4 * 5
    long = [name for name in named if name.endswith("_t42")]
    assert len(long) == 4
    assert {flag(named[name], "max_steps") for name in long} == {"100"}
    assert len(named) == len(trains) == 4 * 5 + 6 * 2 + 4
    rates = {flag(named[name], "learning_rate") for name in searched}
    assert rates == {"3e-5", "1e-4", "3e-4", "1e-3", "3e-3"}
    assert {flag(named[name], "max_steps") for name in searched} == {"25"}
    assert flag(named["small_pwopsd_global_t2"], "position_global_reduction") == "True"
    assert flag(named["small_pwopsd_flat_t1"], "position_w_min") == "1"
    assert flag(named["small_reopold_t1"], "reopold_t_switch") == "16"  # a third of 50 steps
    assert flag(named["small_reopold_t42"], "reopold_t_switch") == "50"
    seeds = {name.split("_t")[-1]: flag(words, "seed") for name, words in named.items() if "_t" in name}
    assert seeds == {"1": "1", "2": "2", "42": "42"}
    evaluations = [words for words in commands if any(word.endswith("evaluate_math.py") for word in words)]
    assert len(evaluations) == (1 + 6 * 2 + 4) * 2 * 2
    assert [Path(words[1]).name for words in commands[-2:]] == ["study.py", "study.py"]


@pytest.mark.parametrize(
    "settings",
    [
        {"JOBS": "0"},
        {"STEPS": "x"},
        {"SEEDS": "1 -2"},
        {"LEARNING_RATES": "1e-3 $(id)"},
        {"RUN_NAME": "mine"},
    ],
)
def test_reproduce_small_refuses_wrong_settings(settings):
    done = launch("reproduce_small.sh", DRY_RUN="1", **settings)
    assert done.returncode == 2
    assert next(iter(settings)) in done.stderr


def test_a_failed_run_of_the_study_is_named_and_the_others_go_on(tmp_path):
    """The launcher's own job control, with a train.sh and run_eval.sh that only note their calls."""
    tree = tmp_path / "tree"
    for folder in ("methods", "models"):
        shutil.copytree(LAUNCHERS / folder, tree / "launchers" / folder)
    for name in ("common.sh", "reproduce_small.sh", "ablation.sh"):
        (tree / "launchers" / name).write_bytes((LAUNCHERS / name).read_bytes())
    (tree / "launchers" / "install.py").write_text("")
    note = 'echo "$(basename "$0") $RUN_NAME $*" >> "$(dirname "$0")/../calls"\n'
    fail = '[[ "$RUN_NAME" == small_eopd_lr1e-3 ]] && exit 3\nexit 0\n'
    (tree / "launchers" / "train.sh").write_text(note + fail)
    (tree / "launchers" / "run_eval.sh").write_text('RUN_NAME=""\n' + note)
    done = subprocess.run(
        ["bash", str(tree / "launchers" / "reproduce_small.sh")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PATH": "/usr/bin:/bin:/usr/local/bin", "PYTHON": shlex.split(_python())[0], "JOBS": "2"},
    )
    assert done.returncode == 1
    assert "search eopd at 1e-3" in done.stderr.splitlines()[-2]
    calls = (tree / "calls").read_text().splitlines()
    assert sum(call.startswith("train.sh") for call in calls) == 20
    assert not any("_t42" in call for call in calls)


def _python() -> str:
    import sys

    return shlex.quote(sys.executable)
