"""Where training data may come from, what is refused, and which problems are left out."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opsd.arguments import DEFAULT_DATASET, ModelArguments, parse_arguments
from opsd.data import check_positions, check_rows, encode_problems
from opsd.errors import ArtefactError, UsageError
from opsd.prompts import encode_student, encode_teacher
from opsd.tables import load_table
from tests.test_prompts import QWEN3, tokenizer_with

ROWS = [
    {"problem": f"What is {n}+{n}?", "solution": f"It is {2 * n}: \\boxed{{{2 * n}}}", "source": "made"}
    for n in range(7)
]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows=ROWS) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, rows[0].keys())
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(table):
    return list(zip(table["problem"], table["solution"], strict=True))


EXPECTED = [(row["problem"], row["solution"]) for row in ROWS]


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.jsonl", "a.json", "a.csv", "folder with $(x) 'quotes'/a.jsonl"]
)
def test_one_file_of_each_kind(tmp_path, name):
    assert texts(load_table(write(tmp_path / name))) == EXPECTED


def test_a_file_is_read_as_it_is_now(tmp_path):
    path = tmp_path / "a.jsonl"
    load_table(write(path))
    write(path, ROWS[:2])
    assert texts(load_table(str(path))) == EXPECTED[:2]


def test_folders(tmp_path):
    write(tmp_path / "shards" / "part-0.parquet", ROWS[:3])
    write(tmp_path / "shards" / "deeper" / "part-1.parquet", ROWS[3:])
    (tmp_path / "shards" / "README.md").write_text("words")
    assert sorted(texts(load_table(str(tmp_path / "shards")))) == sorted(EXPECTED)
    write(tmp_path / "splits" / "train-0.jsonl", ROWS[:5])
    write(tmp_path / "splits" / "test-0.jsonl", ROWS[5:])
    assert texts(load_table(str(tmp_path / "splits"))) == EXPECTED[:5]
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "saved"))
    assert texts(load_table(str(tmp_path / "saved"))) == EXPECTED
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "dict"))
    assert texts(load_table(str(tmp_path / "dict"))) == EXPECTED


def test_what_cannot_be_read_is_refused_by_name(tmp_path):
    write(tmp_path / "mixed" / "a.jsonl")
    write(tmp_path / "mixed" / "b.parquet")
    with pytest.raises(ArtefactError, match=r"mixed holds \.jsonl, \.parquet; give files of one kind"):
        load_table(str(tmp_path / "mixed"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtefactError, match="holds no data file"):
        load_table(str(tmp_path / "empty"))
    with pytest.raises(ArtefactError, match=r"'.*nowhere\.jsonl' does not exist"):
        load_table(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(
        ArtefactError, match="'a/b/c' does not exist; give an existing file or folder, or a hub id"
    ):
        load_table("a/b/c")
    for name, content in (("torn.parquet", b"PAR1 and no more"), ("torn.jsonl", b'{"problem": "a", "sol')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtefactError, match=rf"{name} cannot be read as"):
            load_table(str(tmp_path / name))


def table_of(columns: dict) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"question": ["a"], "solution": ["b"]}, r"'d' has no column problem \(it has question, solution\)"),
        ({"question": ["a"], "answer": ["b"]}, "has no column problem, solution"),
        ({"problem": [], "solution": []}, "'d' has no rows"),
        ({"problem": ["a", None], "solution": ["b", "c"]}, "row 1 of 'd': problem is null, not text"),
        ({"problem": ["a", "b"], "solution": ["c", ""]}, "row 1 of 'd': solution is empty; remove the row"),
        ({"problem": [" \n\t"], "solution": ["c"]}, "row 0 of 'd': problem is empty"),
        ({"problem": ["a"], "solution": [3]}, "row 0 of 'd': solution is int, not text"),
        ({"problem": [["a"]], "solution": ["b"]}, "row 0 of 'd': problem is list, not text"),
    ],
)
def test_rows_that_cannot_be_trained_on(columns, match):
    with pytest.raises(ArtefactError, match=match):
        check_rows(table_of(columns), "d")
    with pytest.raises(ArtefactError, match=match):
        encode_problems(
            table_of(columns), tokenizer_with(QWEN3), source="d", max_prompt_length=99, show_progress=False
        )


def test_problems_are_encoded_behind_both_prompts():
    tokenizer = tokenizer_with(QWEN3)
    problems = encode_problems(
        table_of({"problem": [r["problem"] for r in ROWS], "solution": [r["solution"] for r in ROWS]}),
        tokenizer,
        source="d",
        max_prompt_length=2000,
        show_progress=False,
    )
    assert [example.index for example in problems.examples] == list(range(7))
    assert [problems[position] for position in range(len(problems))] == list(range(7))
    for example, row in zip(problems.examples, ROWS, strict=True):
        assert example.problem == row["problem"]
        assert example.student_ids == encode_student(tokenizer, row["problem"])
        assert example.teacher_ids == encode_teacher(tokenizer, row["problem"], row["solution"])
    assert problems.longest_student_prompt == max(len(e.student_ids) for e in problems.examples)
    assert problems.longest_prompt == max(len(e.teacher_ids) for e in problems.examples)


def test_long_prompts_are_left_out_whole_with_one_counted_warning(caplog):
    tokenizer = tokenizer_with(QWEN3)
    limit = len(encode_teacher(tokenizer, "p" * 10, "s" * 10))
    rows = table_of(
        {
            "problem": ["p" * 10, "p" * 11, "p" * 10, "p" * 200_000, "p" * 10],
            "solution": ["s" * 10, "s" * 10, "s" * 11, "s", "s" * 9],
        }
    )
    with caplog.at_level(logging.WARNING):
        problems = encode_problems(rows, tokenizer, source="d", max_prompt_length=limit, show_progress=False)
    assert [example.index for example in problems.examples] == [0, 4]
    assert len(problems.examples[0].teacher_ids) == limit, "exactly at the limit is within it"
    (record,) = caplog.records
    assert "3 of 5 problems are left out" in record.getMessage()
    assert f"more than {limit} tokens" in record.getMessage()
    shown = record.getMessage().split("(rows ")[1].rstrip(")").split(", ")
    assert sorted(map(int, shown)) == [1, 2, 3]


def test_no_usable_problem_is_an_error():
    rows = table_of({"problem": ["p" * 100], "solution": ["s" * 100]})
    with pytest.raises(
        ArtefactError, match="no problem of 'd' has prompts of at most 50 tokens; raise --max_length"
    ):
        encode_problems(rows, tokenizer_with(QWEN3), source="d", max_prompt_length=50, show_progress=False)


def test_positions_of_the_model():
    rows = table_of({"problem": ["p"], "solution": ["s"]})
    problems = encode_problems(
        rows, tokenizer_with(QWEN3), source="d", max_prompt_length=2000, show_progress=False
    )
    fits = problems.longest_prompt + 100
    check_positions(problems, max_completion_length=100, positions=fits)
    check_positions(problems, max_completion_length=100, positions=None)
    with pytest.raises(
        UsageError, match=rf"= {fits} exceeds the model's {fits - 1} positions; lower --max_length"
    ):
        check_positions(problems, max_completion_length=100, positions=fits - 1)


def test_the_environment_replaces_the_default_dataset(monkeypatch, tmp_path):
    monkeypatch.delenv("PWOPSD_TRAIN_DATASET", raising=False)
    assert (
        ModelArguments(model_name_or_path="m").train_dataset
        == DEFAULT_DATASET
        == "siyanzhao/Openthoughts_math_30k_opsd"
    )
    monkeypatch.setenv("PWOPSD_TRAIN_DATASET", "")
    assert ModelArguments(model_name_or_path="m").train_dataset == DEFAULT_DATASET, (
        "an empty variable is as good as none"
    )
    path = write(tmp_path / "mine.jsonl")
    monkeypatch.setenv("PWOPSD_TRAIN_DATASET", path)
    flags = [
        "--method",
        "opsd",
        "--model_name_or_path",
        "m",
        "--output_dir",
        str(tmp_path),
        "--bf16",
        "false",
    ]
    assert parse_arguments([*flags, "--use_cpu", "true"])[3].train_dataset == path
    given = parse_arguments([*flags, "--use_cpu", "true", "--train_dataset", "other/set"])[3]
    assert given.train_dataset == "other/set", "a flag beats the environment"
