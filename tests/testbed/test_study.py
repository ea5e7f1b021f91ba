"""The small-world study: records from runs, statistics by hand, and documents that agree with the records."""

from __future__ import annotations

import itertools
import json
import shutil
import sys

import numpy as np
import pytest

from opsd.errors import ArtefactError, UsageError
from testbed import bf16_study, compare, study, study_report
from tests.launchers.test_launchers import LAUNCHERS, ROOT, dry_run, flags, launch, program


def result(cell: str, training_seed: int, seed: int, correct: list[int]) -> dict:
    return {
        "cell": cell,
        "kind": study.kind_of(training_seed),
        "training_seed": training_seed,
        "seed": seed,
        "benchmark": "small",
        "val_n": 4,
        "average_at_n": 100 * sum(correct) / (4 * len(correct)),
        "num_correct": correct,
    }


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
    assert [study_report.spread(values) for values in ([62.5], [])] == ["62.5", "—"]
    assert study_report.smoothed(np.array([1.0, 3.0, 5.0, 7.0]), width=2).tolist() == [1, 2, 4, 6]


def test_differences_pair_training_seeds_and_problems():
    """Training seeds far apart do not hide a difference that each of them shows."""
    results = [
        result(cell, seed, 1, [min(4, start + more + gain) for more in (0, 1, 2, 1)])
        for cell, gain in (("opsd", 0), ("pwopsd", 1))
        for seed, start in ((1, 0), (2, 1), (3, 0))
    ]
    (found,) = study_report.study_comparisons(results, [("pwopsd", "opsd")])
    assert (found.first, found.second) == ("PW-OPSD (3 training seeds)", "OPSD (3 training seeds)")
    assert (found.difference, *found.interval) == pytest.approx((25, 25, 25))
    # Without the equal seeds, the seeds' own spread is in the interval.
    for record in results[:3]:
        record["training_seed"] += 10
    (found,) = study_report.study_comparisons(results, [("pwopsd", "opsd")])
    assert found.interval[0] < 0 < found.interval[1]


def test_the_search_takes_the_best_rate_and_the_smaller_on_a_tie():
    def run(rate: float, tail: float) -> dict:
        shares = [0.0] * 5 + [tail] * study.SEARCH_TAIL
        return {"kind": "search", "cell": "opsd", "learning_rate": rate, "rollout_accuracy": shares}

    scores = study.search_scores([run(1e-3, 1.0), run(1e-4, 0.75), run(3e-5, 0.5), {"kind": "study"}])
    assert scores == {"opsd": {1e-3: 100.0, 1e-4: 75.0, 3e-5: 50.0}}
    assert study.chosen_rate(scores["opsd"]) == 1e-4  # 1e-3 is at the ceiling
    assert study.chosen_rate({1e-4: 60.0, 3e-5: 60.0, 1e-5: 10.0}) == 3e-5


def test_rollouts_are_right_when_their_boxed_answer_is_the_rows(tmp_path):
    folder = tmp_path / "completions"
    folder.mkdir()
    texts = ["so \\boxed{7}.", "\\boxed{8}", "none", "\\boxed{5} no, \\boxed{6}"]
    rows = [{"row": row, "completion": text} for row, text in zip((1, 1, 0, 0), texts, strict=True)]
    (folder / "step-000000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "step-000001.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert study.rollout_accuracy(tmp_path, ["6", "7"]) == [0.5, 1.0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("small_opsd_lr3e-4", ("opsd", "3e-4", None)),
        ("small_pwopsd_global_t44", ("pwopsd_global", None, "44")),
        ("small_base", ("base", None, None)),
    ],
)
def test_run_names_are_parsed(name, expected):
    assert study._RUN.fullmatch(name).group("cell", "rate", "seed") == expected


def test_other_runs_are_not_the_studys(tmp_path):
    for name in ("small_pwopsd", "small_pwopsd_quickstart", "qwen3_4b_base_pwopsd_t42"):
        assert study.training_record(tmp_path / name, []) is None
    for name in ("small_pwopsd_small_38k_seed1.json", "small_pwopsd_t42_small_38k.json"):
        assert study.result_record(tmp_path / name) is None


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


@pytest.fixture(scope="module")
def records() -> tuple[list[dict], list[dict]]:
    return study.read_records("training.jsonl"), study.read_records("results.jsonl")


def test_the_documents_tables_are_what_the_committed_records_give(records):
    training, results = records
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "small_world.md").read_text(encoding="utf-8")
    assert study_report.main_table(results, training) in readme
    for table in (study_report.main_table, study_report.long_table, study_report.facts):
        assert table(results, training) in page
    for name in ("ablation_table", "differences_table", "other_metrics_table"):
        assert getattr(study_report, name)(results) in page
    assert study_report.search_table(training) in page


def test_the_bfloat16_tables_are_what_the_committed_records_give():
    lines = (study.RECORDS / "bf16.jsonl").read_text("utf-8").splitlines()
    records, page = [json.loads(line) for line in lines], (ROOT / "docs" / "merging.md").read_text("utf-8")
    for table in (bf16_study.evaluation_table(records), bf16_study.rollout_table(records)):
        assert f"-->\n{table}\n<!--" in page
    # 3 of 4 against 1 of 4 samples, on each of two problems: half of the points, whatever is resampled.
    better, worse = ({"val_n": 4, "num_correct": [right] * 2} for right in (3, 1))
    assert bf16_study.difference(better, worse) == "+50.0 [+50.0, +50.0]"


def test_the_committed_records_are_the_complete_study(records):
    training, results = records
    trained, seeds = [cell for cell in study.CELLS if cell != "base"], (1, 2, 3)
    main, long = (study_report.of_kind(training, kind) for kind in ("study", "long"))
    assert {(record["cell"], record["seed"]) for record in main} == set(itertools.product(trained, seeds))
    assert [(record["cell"], record["steps"]) for record in long] == [(m, 100) for m in sorted(study.METHODS)]
    names = ("cell", "training_seed", "benchmark", "seed")
    found = {tuple(map(record.get, names)) for record in study_report.of_kind(results, "study")}
    expected = itertools.product(trained, seeds, study.BENCHMARKS, seeds)
    assert {key for key in found if key[0] != "base"} == set(expected)
    for record in results:
        assert len(record["num_correct"]) == record["problems"]
        share = 100 * sum(record["num_correct"]) / (record["val_n"] * record["problems"])
        assert record["average_at_n"] == pytest.approx(share, abs=1e-3)
        steps = {"long": 100, "study": main[0]["steps"]}[record["kind"]]
        assert record["cell"] == "base" or record["adapter_step"] == steps


def test_pictures_are_drawn_from_the_records(tmp_path, records):
    training, results = records
    study_report.draw_curves(training, tmp_path / "curves.png")
    study_report.draw_weights(tmp_path / "weights.png")
    study_report.draw_accuracy(results, tmp_path / "accuracy.png")
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 3


def test_the_comparison_counts_points_and_pairs_problems():
    base = np.array([0.0, 0.5, 0.5, 1.0])
    assert compare.difference_interval(base, base + 0.25) == pytest.approx((25, 25))


def test_files_of_different_sampling_are_not_compared(tmp_path, monkeypatch):
    settings = {"a.json": {"temperature": 1.0}, "b.json": {"temperature": 0.7}}
    monkeypatch.setattr("opsd.evaluation.results.load_result", lambda path: settings[path.name])
    with pytest.raises(UsageError, match="temperature"):
        compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])


def test_the_quickstart_trains_merges_and_evaluates_both_models():
    commands = [words for _, words in dry_run("quickstart.sh", ROLLOUT="vllm")]
    base, train, merge, trained, _ = commands
    assert [program(words) for words in commands] == [
        *("evaluate_math.py", "ea_opsd_train.py", "merge_lora.py", "evaluate_math.py", "compare.py")
    ]
    given = flags(train)
    assert (given["method"], given["max_steps"], given["rollout"]) == ("pwopsd", "100", "vllm")
    assert merge[merge.index("--adapter") + 1].endswith("small_pwopsd_quickstart_vllm/checkpoint-100")
    model, output = base.index("--base_model") + 1, base.index("--output") + 1
    assert base[model] == "testbed/base_model"
    assert trained[model] == "outputs/small_pwopsd_quickstart_vllm_merged"
    assert base[base.index("--engine") + 1] == "vllm"
    base[model], base[output] = trained[model], trained[output]
    assert base == trained, "only model and output differ between the two evaluations"


def test_reproduce_small_runs_every_cell_with_every_seed():
    lists = {"TRAINING_SEEDS": "1", "SEEDS": "1 2", "LEARNING_RATES": "1e-4 3e-3"}
    commands = [words for _, words in dry_run("reproduce_small.sh", **lists)]
    trains = [flags(words) for words in commands if program(words) == "ea_opsd_train.py"]
    runs = {given["run_name"]: given for given in trains}
    searched = [given for name, given in runs.items() if "_lr" in name]
    long = [given for name, given in runs.items() if name.endswith("_t42")]
    assert (len(searched), len(long), len(runs), len(trains)) == (4 * 2, 4, 4 * 2 + 10 + 4, len(runs))
    assert {given["learning_rate"] for given in searched} == {"1e-4", "3e-3"}
    assert {given["max_steps"] for given in searched} == {"25"}
    assert {given["max_steps"] for given in long} == {"100"}
    assert runs["small_pwopsd_global_t1"]["position_global_reduction"] == "True"
    assert runs["small_pwopsd_flat_t1"]["position_w_min"] == "1"
    assert runs["small_opsd_noclip_t1"]["jsd_token_clip"] == "0"
    assert runs["small_pwopsd_tokenclip_t1"]["divergence_clip_scope"] == "token"
    assert runs["small_reopold_t1"]["reopold_t_switch"] == "16"  # a third of 50 steps
    assert runs["small_reopold_t42"]["reopold_t_switch"] == "50"
    seeds = {name.split("_t")[-1]: given["seed"] for name, given in runs.items() if "_t" in name}
    assert seeds == {"1": "1", "42": "42"}
    assert sum(program(words) == "evaluate_math.py" for words in commands) == (1 + 10 + 4) * 2 * 2
    assert list(map(program, commands[-2:])) == ["study.py", "study.py"]


def test_a_failed_run_of_the_study_is_named_and_the_others_run(tmp_path):
    """The launcher with stand-ins for train.sh and run_eval.sh, which record their calls."""
    launchers = shutil.copytree(LAUNCHERS, tmp_path / "tree" / "launchers")
    (launchers / "install.py").write_text("")
    note = f'echo "$(basename "$0") $RUN_NAME $*" >> "{tmp_path}/calls"\n'
    fail = '[[ "$RUN_NAME" == small_eopd_lr1e-3 ]] && exit 3\nexit 0\n'
    (launchers / "train.sh").write_text(note + fail)
    (launchers / "run_eval.sh").write_text('RUN_NAME=""\n' + note)
    done = launch("reproduce_small.sh", root=tmp_path / "tree", PYTHON=sys.executable, JOBS="2")
    assert done.returncode == 1
    assert "search eopd at 1e-3" in done.stderr.splitlines()[-2]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum(call.startswith("train.sh") for call in calls) == 20
    assert not any("_t42" in call for call in calls)
