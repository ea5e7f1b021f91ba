"""data/prepare_hmmt25.py: what it makes of MathArena's release, and what it refuses with the row stated."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet
import pytest
from datasets import Dataset

from opsd import files
from opsd.errors import ArtefactError, run_cli
from opsd.evaluation.benchmarks import HMMT25_VARIABLE, load_benchmark
from tests.bad_input_cases import entry_point

main = entry_point("prepare_hmmt25")
ANSWERS = ["103", "\\frac{1}{576}", "-984", "1-\\frac{2}{\\pi}", "2^{25} \\cdot 26!", "033"] * 5


def release(count: int = 30, *, row: int = 0, **changes: object) -> list[dict]:
    """Return rows shaped as MathArena publishes them, one of them changed."""
    rows = [
        {
            "problem_idx": n + 1,
            "problem": f" Compute ${n}$ of $\\triangle ABC$.\n",
            "problem_type": ["Geometry"],
        }
        for n in range(count)
    ]
    rows = [values | {"answer": ANSWERS[n % 30]} for n, values in enumerate(rows)]
    rows[row] |= changes
    return rows


def write_source(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        Dataset.from_list(rows).to_parquet(path)
    return path


def prepare(*argv: object) -> int:
    return run_cli(lambda: main([str(word) for word in argv]))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_the_benchmark_reads_what_is_made(tmp_path, monkeypatch, capsys, kind):
    # An empty image column is no image.
    source = write_source(tmp_path / f"hmmt.{kind}", [row | {"image": None} for row in release()])
    output = tmp_path / "clean" / "train.parquet"
    monkeypatch.setenv(HMMT25_VARIABLE, str(output))
    with pytest.raises(ArtefactError, match=r"train\.parquet.*python data/prepare_hmmt25\.py"):
        load_benchmark("hmmt25")
    assert prepare("--source", source, "--output", output) == 0
    assert f"{HMMT25_VARIABLE}={output}" in capsys.readouterr().out
    loaded = load_benchmark("hmmt25")
    assert [p.problem for p in loaded.problems] == [f"Compute ${n}$ of $\\triangle ABC$." for n in range(30)]
    assert [p.answer for p in loaded.problems] == ANSWERS


def test_both_columns_are_text_and_nothing_else_is_kept(tmp_path):
    rows = [row | {"answer": n} for n, row in enumerate(release())]
    output = tmp_path / "train.parquet"
    assert prepare("--source", write_source(tmp_path / "h.jsonl", rows), "--output", output) == 0
    table = pyarrow.parquet.read_table(output)
    assert [(f.name, str(f.type)) for f in table.schema] == [("problem", "string"), ("answer", "string")]
    assert table["answer"].to_pylist() == [str(n) for n in range(30)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (release(29), "29 problems; HMMT February 2025 has 30"),
        (release(31), "31 problems"),
        (release(row=4, problem="  "), "row 5 .* lacks `problem` or `answer`"),
        (release(row=4, answer=None), "row 5 .* lacks"),
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
        main.__globals__["clean_rows"](rows, "the file")


def test_a_refused_source_and_a_full_disk_leave_the_old_parquet(tmp_path, capsys, monkeypatch):
    output, good = tmp_path / "train.parquet", write_source(tmp_path / "h.jsonl", release())
    assert prepare("--source", good, "--output", output) == 0
    before = output.read_bytes()
    bad = write_source(tmp_path / "bad.jsonl", release(29))
    assert prepare("--source", bad, "--output", output) == 3
    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        assert prepare("--source", good, "--output", output) == 3
        assert "cannot be written: No space" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [bad, good, output]


def test_a_missing_source_is_named(tmp_path, capsys):
    assert prepare("--source", tmp_path / "absent.jsonl", "--output", tmp_path / "t.parquet") == 3
    assert "absent.jsonl' does not exist" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_names_the_local_way(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline"))
    )
    assert prepare("--output", tmp_path / "t.parquet") == 3
    assert "--source FILE" in capsys.readouterr().err
    assert not (tmp_path / "t.parquet").exists()
