"""Benchmarks from local stand-ins: sizes, columns, answers as text, and errors that name the remedy."""

from __future__ import annotations

import csv
import json

import pytest

from opsd.errors import ArtefactError, UsageError
from opsd.evaluation import benchmarks
from opsd.evaluation.benchmarks import BENCHMARKS, answer_text, fingerprint, load_benchmark, read_rows


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(count: int) -> list[dict]:
    return [{"problem": f"Compute {n}+1.", "answer": n + 1} for n in range(count)]


def test_the_rows_are_the_protocols():
    table = {name: (row.hub_id, row.split, row.size) for name, row in BENCHMARKS.items()}
    assert table["math500"] == ("HuggingFaceH4/MATH-500", "test", 500)
    assert table["aime24"] == ("HuggingFaceH4/aime_2024", "train", 30)
    assert table["aime25"] == ("yentinglin/aime_2025", "train", 30)
    assert table["hmmt25"][2] == 30
    assert (table["small"][2], table["small_hard"][2]) == (256, 256)


@pytest.mark.parametrize("name", ["small", "small_hard"])
def test_the_small_world_is_part_of_the_repository(name):
    loaded = load_benchmark(name)
    assert len(loaded.problems) == 256
    assert loaded.problems[0].problem.startswith("Compute ")
    assert loaded.problems[0].answer.lstrip("-").isdigit()


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder", "saved"])
def test_every_kind_of_file_gives_the_same_problems(tmp_path, kind):
    data = rows(30)
    path = tmp_path / f"x.{kind}"
    if kind == "jsonl":
        write_jsonl(path, data)
    elif kind == "json":
        path.write_text(json.dumps(data))
    elif kind == "csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["problem", "answer"])
            writer.writeheader()
            writer.writerows(data)
    elif kind == "folder":
        path.mkdir()
        write_jsonl(path / "train.jsonl", data)
    else:
        from datasets import Dataset

        dataset = Dataset.from_list(data)
        _ = dataset.to_parquet(path) if kind == "parquet" else dataset.save_to_disk(path)
    loaded = load_benchmark("aime24", dataset_path=path)
    assert [problem.answer for problem in loaded.problems] == [str(n + 1) for n in range(30)]
    assert [problem.problem_id for problem in loaded.problems] == list(range(30))
    assert (
        loaded.fingerprint
        == load_benchmark("aime24", dataset_path=write_jsonl(tmp_path / "y.jsonl", data)).fingerprint
    )


def test_answers_keep_the_digits_they_are_written_with(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"problem": "p", "answer": 0.10}\n{"problem": "p", "answer": "033"}\n{"problem": "p", "answer": 7}'
    )
    assert [p.answer for p in load_benchmark("mine", dataset_path=path).problems] == ["0.10", "033", "7"]
    path = tmp_path / "x.csv"
    path.write_text('problem,answer\np,007\np,"1,000"\np,NA\n')
    assert [p.answer for p in load_benchmark("mine", dataset_path=path).problems] == ["007", "1,000", "NA"]


@pytest.mark.parametrize(
    ("value", "text"), [(5, "5"), (70.0, "70"), (0.5, "0.5"), (" 3 ", "3"), (None, ""), (float("nan"), "")]
)
def test_answer_text(value, text):
    assert answer_text(value) == text


@pytest.mark.parametrize("value", [True, [1], {"a": 1}])
def test_answers_of_another_kind_are_refused(value):
    with pytest.raises(ArtefactError, match="must be text or a number"):
        answer_text(value)


def test_the_last_box_of_the_solution_stands_in_for_an_answer(tmp_path):
    path = write_jsonl(
        tmp_path / "x.jsonl", [{"problem": "p", "solution": "so \\boxed{1} or \\boxed{\\frac{1}{2}}."}]
    )
    assert load_benchmark("mine", dataset_path=path).problems[0].answer == "\\frac{1}{2}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"problem": "p"}], "neither an `answer`"),
        ([{"question": "p", "answer": "1"}], r"columns: question, answer"),
        ([{"problem": "  ", "answer": "1"}], "no text"),
        ([], "no problem"),
        ([5], "something else than objects"),
    ],
)
def test_bad_rows_are_named(tmp_path, content, message):
    with pytest.raises(ArtefactError, match=message):
        load_benchmark("mine", dataset_path=write_jsonl(tmp_path / "x.jsonl", content))


def test_damaged_files_are_named(tmp_path):
    torn = tmp_path / "x.jsonl"
    torn.write_text('{"problem": "p", "answer": "1"}\n{"problem": "p", "ans')
    with pytest.raises(ArtefactError, match=r"x\.jsonl is damaged: line 2"):
        read_rows(torn)
    fake = tmp_path / "x.parquet"
    fake.write_bytes(b"no parquet")
    with pytest.raises(ArtefactError, match="damaged"):
        read_rows(fake)
    with pytest.raises(ArtefactError, match=r"\.jsonl, \.json, \.csv, \.parquet"):
        read_rows(tmp_path / "x.pkl")


def test_a_named_benchmark_has_its_size(tmp_path):
    with pytest.raises(ArtefactError, match="29 problems, but aime24 has 30"):
        load_benchmark("aime24", dataset_path=write_jsonl(tmp_path / "x.jsonl", rows(29)))


def test_unknown_and_missing(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"aime26.*math500"):
        load_benchmark("aime26")
    with pytest.raises(ArtefactError, match="check --dataset_path"):
        load_benchmark("aime24", dataset_path=tmp_path / "none.jsonl")
    monkeypatch.setenv("HMMT25_PARQUET_PATH", str(tmp_path / "none.parquet"))
    with pytest.raises(ArtefactError, match=r"python data/prepare_hmmt25\.py"):
        load_benchmark("hmmt25")


def test_the_hub_that_cannot_be_reached(monkeypatch):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ArtefactError, match=r"HuggingFaceH4/aime_2024.*HF_HOME.*--dataset_path"):
        load_benchmark("aime24")


def test_the_fingerprint_sees_every_change(tmp_path):
    base = load_benchmark("mine", dataset_path=write_jsonl(tmp_path / "x.jsonl", rows(3))).problems
    changed = [base[0], benchmarks.Problem(1, base[1].problem, "99"), base[2]]
    swapped = [base[1], base[0], base[2]]
    assert len({fingerprint(p) for p in (base, changed, swapped, base[:2])}) == 4
