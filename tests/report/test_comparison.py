"""`summarize_results.py --compare`, `--against`: figures by hand, verdicts, every format, what is refused."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from opsd.evaluation.names import result_path
from opsd.evaluation.results import write_result
from tests.report.test_summarize import result, section, summarize

PROBLEMS, SAMPLES = 30, 4
RANDOM = np.random.default_rng(2)


def put(folder: Path, name: str, dataset: str, chance: float, seed: int = 1, **more: object) -> np.ndarray:
    """Write a result whose samples are right with this chance; return the share of each problem."""
    correct = RANDOM.random((PROBLEMS, SAMPLES)) < chance
    stored = result(dataset, seed, correct.tolist(), model_identity=name) | more
    write_result(result_path(name, dataset, seed, folder=folder), stored)
    return correct.mean(1)


def compared(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> list[dict]:
    code, text, error = summarize(capsys, f"{folder}/*.json", "--format", "json", *flags)
    assert (code, error) == (0, "")
    return json.loads(text)[0]["comparisons"]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    for name, chance in (("small_pwopsd", 0.9), ("small_opsd", 0.4), ("small_base", 0.38)):
        for dataset in ("small", "small_hard"):
            put(tmp_path, name, dataset, chance)
    return tmp_path


def test_one_training_seed_is_a_paired_t_test_over_problems(tmp_path, capsys):
    ours = [put(tmp_path, "small_pwopsd", "small", 0.6, seed) for seed in (1, 2)]
    theirs = [put(tmp_path, "small_opsd", "small", 0.5, seed) for seed in (1, 2)]
    (found,) = compared(capsys, tmp_path, "--compare", "pwopsd", "opsd")
    expected = stats.ttest_rel(np.mean(ours, axis=0), np.mean(theirs, axis=0)).confidence_interval(0.95)
    assert found["interval"] == pytest.approx([100 * expected.low, 100 * expected.high], rel=1e-3)
    assert found["difference"] == pytest.approx(100 * (np.mean(ours) - np.mean(theirs)))
    assert found["detectable"] > found["interval"][1] - found["difference"]
    assert found["single_seed"] == ["PW-OPSD", "OPSD"]
    # The drawn samples are independent, so that they hold nearly all of the variance.
    assert found["variance_shares"]["samples"] > 0.6
    assert found["variance_shares"]["training seeds"] == 0


def test_verdicts_in_words_in_every_format(two, capsys):
    flags = [f"{two}/*.json", "--against", "opsd", "--profiles"]
    _, text, _ = summarize(capsys, *flags)
    lines = section(text, "small: differences in Avg@4")
    assert [line[0] for line in lines[1:]] == ["Base against OPSD"] * 3 + ["PW-OPSD against OPSD"] * 3
    assert [line[1] for line in lines[1:4]] == ["small", "small, hard", "mean of 2"]
    assert {line[3 + 1] for line in lines[1:4]} == {"not resolved"}
    assert {line[3 + 1] for line in lines[4:]} == {"PW-OPSD is better"}
    assert "samples a problem" in lines[3][6] or "problems" in lines[3][6]
    assert "OPSD, PW-OPSD: one training seed, so the intervals are about these checkpoints" in text
    assert section(text, "small: Pass@k, Maj@k and the samples")[0][2:8:3] == ["Pass@1", "Maj@1"]
    _, latex, _ = summarize(capsys, *flags, "--format", "latex")
    assert "PW-OPSD against OPSD & mean of 2 & +" in latex
    _, text, _ = summarize(capsys, *flags, "--format", "csv")
    rows = {
        (r["source"], r["method"], r["benchmark"], r["metric"]): r for r in csv.DictReader(io.StringIO(text))
    }
    row = rows["difference", "PW-OPSD against OPSD", "mean of 2", "average"]
    assert row["notes"] == "PW-OPSD is better"
    assert 0 < float(row["low95"]) < float(row["mean"]) < float(row["high95"])
    for metric in ("pass@1", "pass@4", "majority@2", "no box"):
        assert ("ours", "OPSD", "small_hard", metric) in rows


def test_training_seeds_widen_the_interval_unless_they_are_paired(tmp_path, capsys):
    """Seeds that are 20 points apart hide a difference of 10, which pairs of equal seeds show."""
    for name, chances in {"small_pwopsd": (0.4, 0.6, 0.8), "small_opsd": (0.3, 0.5, 0.7)}.items():
        for seed, chance in enumerate(chances, 42):
            for dataset in ("small", "small_hard"):
                put(tmp_path, f"{name}_t{seed}", dataset, chance)
    put(tmp_path, "small_pwopsd_t45", "small", 0.6)
    unpaired, _, mean = compared(capsys, tmp_path, "--compare", "pwopsd", "opsd")
    assert unpaired["verdict"] == "not resolved"
    assert unpaired["variance_shares"]["training seeds"] > 0.8
    assert (unpaired["samples_needed"], unpaired["problems_needed"], unpaired["single_seed"]) == (
        None,
        None,
        [],
    )
    # Seed 45 has no result on small_hard, so the mean leaves it out and pairs the other three.
    assert mean["verdict"] == "PW-OPSD (4 training seeds) is better"
    text = summarize(capsys, f"{tmp_path}/*.json", "--compare", "pwopsd", "opsd")[1]
    assert "more training seeds" in section(text, "small: differences")[1][6]


def test_names_that_fit_no_row_or_several(two, capsys):
    code, _, error = summarize(capsys, f"{two}/*.json", "--compare", "pwopsd", "eopd")
    assert code == 2
    assert "'pwopsd and eopd'; there are Base, OPSD, PW-OPSD, base, opsd, pwopsd" in error
    put(two, "small_opsd_t1", "small", 0.4)
    code, _, error = summarize(capsys, f"{two}/*.json", "--against", "opsd")
    assert code == 2
    assert "'opsd' fits several rows of small; give one of 'OPSD', 'OPSD (training seed 1)'" in error
    assert compared(capsys, two, "--compare", "PW-OPSD", "OPSD (training seed 1)")[0]["difference"] > 0


@pytest.mark.parametrize("stated", [True, False])
def test_other_problems_are_not_compared(two, capsys, stated):
    for path in two.glob("small_opsd_small_38k*"):
        file = json.loads(path.read_text())
        file["results"][3]["problem"] = "Another problem."
        file["dataset_fingerprint"] = "another"
        if not stated:
            del file["dataset_fingerprint"]
        path.write_text(json.dumps(file))
    code, text, error = summarize(capsys, f"{two}/*.json", "--compare", "pwopsd", "opsd", "--format", "json")
    assert code == 1
    assert "are not compared" in error
    assert ("dataset_fingerprint" if stated else "their problems differ") in error
    assert [one["benchmark"] for one in json.loads(text)[0]["comparisons"]] == ["small_hard"]
