"""data/prepare_hmmt25.py: what it makes of MathArena's release, and what it refuses with the row stated."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pyarrow.parquet
import pytest

from data import prepare_hmmt25
from opsd import files
from opsd.errors import ArtefactError, run_cli
from opsd.evaluation.benchmarks import load_benchmark

ANSWERS = ["103", "\\frac{1}{576}", "-984", "1-\\frac{2}{\\pi}", "2^{25} \\cdot 26!", "033"] * 5


def release(count: int = 30, *, row: int = 0, **changes: object) -> list[dict]:
    """Return rows shaped as MathArena publishes them, one of them changed."""
    rows = [
        {"problem_idx": n + 1, "problem": f" Compute ${n}$ of $\\triangle ABC$.\n", "answer": ANSWERS[n % 30]}
        for n in range(count)
    ]
    rows[row] |= changes
    return rows


def write_source(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare(*argv: object) -> int:
    return run_cli(lambda: prepare_hmmt25.main([str(word) for word in argv]))


@pytest.mark.parametrize(("benchmark", "size"), [("hmmt25", 30), ("hmmt_feb26", 33)])
def test_the_benchmark_reads_what_is_made(tmp_path, monkeypatch, capsys, benchmark, size):
    # An empty image column is no image, and an answer may be a number.
    rows = [row | {"image": None} for row in release(size, row=0, answer=103)]
    source = write_source(tmp_path / "hmmt.jsonl", rows)
    output = tmp_path / "clean" / "train.parquet"
    variable = f"{benchmark.upper()}_PARQUET_PATH"
    monkeypatch.setenv(variable, str(output))
    with pytest.raises(ArtefactError, match=rf"train\.parquet.*prepare_hmmt25\.py --benchmark {benchmark}"):
        load_benchmark(benchmark)
    assert prepare("--benchmark", benchmark, "--source", source, "--output", output) == 0
    assert f"{variable}={output}" in capsys.readouterr().out
    loaded = load_benchmark(benchmark)
    assert [p.problem for p in loaded.problems] == [
        f"Compute ${n}$ of $\\triangle ABC$." for n in range(size)
    ]
    assert [p.answer for p in loaded.problems] == (ANSWERS + ANSWERS)[:size]
    columns = pyarrow.parquet.read_schema(output)
    assert [(f.name, str(f.type)) for f in columns] == [("problem", "string"), ("answer", "string")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (release(31), "31 problems"),
        (release(row=4, problem="  "), "row 5 .* lacks `problem` or `answer`"),
        (release(row=4, answer=""), "row 5 .* lacks"),
        (release(row=29, problem=release()[0]["problem"]), "a problem twice"),
        (release(row=2, problem="See ![](a.png)."), "row 3 .* has an image"),
        (release(row=2, problem="\\includegraphics{a}"), "row 3 .* has an image"),
        (release(row=2, problem="<img src='a.png'>"), "row 3 .* has an image"),
        (release(row=2, image="iVBORw0"), "row 3 .* has an image .image"),
        (release(row=2, answer=["1", "2"]), "must be text or a number"),
    ],
)
def test_what_is_no_clean_release_is_refused(rows, message):
    with pytest.raises(ArtefactError, match=message):
        prepare_hmmt25.clean_rows(rows, "the file")


def test_a_refused_source_and_a_full_disk_leave_the_old_parquet(tmp_path, capsys, monkeypatch):
    output, good = tmp_path / "train.parquet", write_source(tmp_path / "h.jsonl", release())
    assert prepare("--source", good, "--output", output) == 0
    before = output.read_bytes()
    bad = write_source(tmp_path / "bad.jsonl", release(29))
    assert prepare("--source", bad, "--output", output) == 3
    assert "29 problems; hmmt25 has 30" in capsys.readouterr().err
    assert prepare("--source", tmp_path / "absent.jsonl", "--output", output) == 3
    assert "absent.jsonl' does not exist" in capsys.readouterr().err
    monkeypatch.setattr(files.os, "replace", Mock(side_effect=OSError(28, "No space left")))
    assert prepare("--source", good, "--output", output) == 3
    assert "cannot be written: No space" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [bad, good, output]


def test_a_hub_that_cannot_be_reached_names_the_local_way(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", Mock(side_effect=ConnectionError("offline")))
    assert prepare("--output", tmp_path / "t.parquet") == 3
    assert "--source FILE" in capsys.readouterr().err
    assert not (tmp_path / "t.parquet").exists()
