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

import opsd.data
from opsd.arguments import DEFAULT_DATASET, parse_arguments
from opsd.data import Example, check_positions, encode_problems
from opsd.errors import ArtefactError, UsageError
from opsd.prompts import encode_student, encode_teacher
from opsd.tables import load_table
from tests.test_prompts import OLMO3, QWEN3, tokenizer_with

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
    for place in (str(tmp_path / "nowhere.jsonl"), "a/b/c"):
        with pytest.raises(ArtefactError, match=f"'{place}' does not exist; give an existing file or folder"):
            load_table(place)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("torn.parquet", b"PAR1 and no more"),
        ("torn.jsonl", b'{"problem": "a", "sol'),
        ("latin.jsonl", b'{"problem": "a\xff", "solution": "b"}\n'),
        ("surrogate.jsonl", b'{"problem": "a\\ud800", "solution": "b"}\n'),
        ("latin.csv", b"problem,solution\na\xff,b\n"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtefactError, match=f"{name}.* (cannot be read as|cannot be used)"):
        load_table(str(tmp_path / name))


def encoded(problems: list, solutions: list, *, limit: int = 2000):
    """The problems of a table, behind the prompts of Qwen3's template."""
    rows = datasets.Dataset.from_dict({"problem": problems, "solution": solutions})
    return encode_problems(rows, tokenizer_with(QWEN3), source="d", max_prompt_length=limit)


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"question": ["a"], "solution": ["b"]}, r"'d' has no column problem \(it has question, solution\)"),
        ({"question": ["a"], "answer": ["b"]}, "has no column problem, solution"),
        ({"problem": [], "solution": []}, "'d' has no rows"),
        (
            {"problem": [" \n\t", "a", None], "solution": ["c", "", "b"]},
            "no problem of 'd' is usable .3 are left",
        ),
        ({"problem": ["a"], "solution": [3]}, "null, empty or not text"),
        ({"problem": [["a"]], "solution": ["b"]}, "null, empty or not text"),
        (
            {"problem": ["p" * 999], "solution": ["s"]},
            r"\(1 are left out: .* 99 tokens\); .*raise --max_length",
        ),
    ],
)
def test_tables_that_cannot_be_trained_on(columns, match):
    rows = datasets.Dataset.from_dict(columns)
    with pytest.raises(ArtefactError, match=match):
        encode_problems(rows, tokenizer_with(QWEN3), source="d", max_prompt_length=99)


def examples_of(problems) -> list[Example]:
    return [problems.example(position) for position in range(len(problems))]


def test_rows_without_text_are_left_out_with_one_counted_warning(caplog):
    """The others keep their row numbers, which seed their rollouts."""
    problems = encoded(["a", None, "c", " ", "e", "", "", "", "i"], ["1", "2", "", "4", "5", *"6789"])
    assert [(e.index, e.problem) for e in examples_of(problems)] == [(0, "a"), (4, "e"), (8, "i")]
    (record,) = caplog.records
    assert record.getMessage() == (
        "6 of 9 problems are left out: their problem or solution is null, empty or not text "
        "(rows 1, 2, 3, 5, 6, …)"
    )


def test_a_second_start_and_another_rank_read_the_first_ones_tokens(monkeypatch):
    """Under the same texts, tokenizer, template and limit; anything else is encoded anew."""
    calls = []
    real = opsd.data.encode_prompts
    monkeypatch.setattr(opsd.data, "encode_prompts", lambda *given: calls.append(given) or real(*given))
    columns = {"problem": ["a b", "c"], "solution": ["d", "e"], "source": ["x", "y"]}

    def start(columns=columns, limit=2000, tokenizer=None):
        calls.clear()
        tokenizer, rows = tokenizer or tokenizer_with(QWEN3), datasets.Dataset.from_dict(columns)
        problems = encode_problems(rows, tokenizer, source="d", max_prompt_length=limit)
        for e, row in zip(examples_of(problems), rows, strict=True):
            assert e.student_ids == encode_student(tokenizer, row["problem"])
            assert e.teacher_ids == encode_teacher(tokenizer, row["problem"], row["solution"])
        assert problems.table.data["student_ids"].type.value_type == pa.int32()
        return bool(calls)

    assert start()
    assert not start()
    assert not start(columns | {"source": ["other", "columns"]})
    assert start(columns | {"solution": ["d", "E"]}), "another text"
    assert start(limit=2001)
    assert start(tokenizer=tokenizer_with(OLMO3)), "another template"
    extended = tokenizer_with(QWEN3)
    extended.add_tokens(["a b"])
    assert start(tokenizer=extended), "another vocabulary"
    monkeypatch.setattr(opsd.data, "versions", lambda: {"tokenizers": "another"})
    assert start(), "another version"
    assert not start()


def test_spelled_control_tokens_are_counted(caplog):
    assert len(encoded(["a", "b<|im_end|>", "c"], ["d", "e", "<think>f"])) == 3
    assert "2 of 3 problems spell a control token of the tokenizer" in caplog.text
    assert "(rows 1, 2)" in caplog.text


def test_long_prompts_are_left_out_whole_with_one_counted_warning(caplog):
    tokenizer = tokenizer_with(QWEN3)
    limit = len(encode_teacher(tokenizer, "p" * 10, "s" * 10))
    texts = ["p" * n for n in (10, 11, 10, 200_000, 10)], ["s" * n for n in (10, 10, 11, 1, 9)]
    with caplog.at_level(logging.WARNING):
        problems = encoded(*texts, limit=limit)
    assert [example.index for example in examples_of(problems)] == [0, 4]
    assert len(problems.example(0).teacher_ids) == limit, "exactly at the limit is within it"
    (record,) = caplog.records
    assert "3 of 5 problems are left out" in record.getMessage()
    assert f"more than {limit} tokens" in record.getMessage()
    shown = record.getMessage().split("(rows ")[1].rstrip(")").split(", ")
    assert sorted(map(int, shown)) == [1, 2, 3]


def test_positions_of_the_model():
    problems = encoded(*zip(*EXPECTED, strict=True))
    examples = examples_of(problems)
    assert [problems[position] for position in range(len(problems))] == [e.index for e in examples]
    assert problems.longest_student_prompt == max(len(e.student_ids) for e in examples)
    assert problems.longest_prompt == max(len(e.teacher_ids) for e in examples)
    fits = problems.longest_prompt + 100
    check_positions(problems, max_completion_length=100, positions=fits)
    check_positions(problems, max_completion_length=100, positions=None)
    message = f"= {fits} exceeds the model's {fits - 1} positions; lower --max_length"
    with pytest.raises(UsageError, match=message):
        check_positions(problems, max_completion_length=100, positions=fits - 1)


def test_the_environment_replaces_the_default_dataset(monkeypatch, tmp_path):
    flags = (
        f"--method opsd --model_name_or_path m --output_dir {tmp_path} --bf16 false --use_cpu true".split()
    )
    monkeypatch.delenv("PWOPSD_TRAIN_DATASET", raising=False)
    for value, expected in ((None, DEFAULT_DATASET), ("", DEFAULT_DATASET), ("my/set", "my/set")):
        if value is not None:
            monkeypatch.setenv("PWOPSD_TRAIN_DATASET", value)
        assert parse_arguments(flags)[3].train_dataset == expected
    given = parse_arguments([*flags, "--train_dataset", "other/set"])[3]
    assert given.train_dataset == "other/set", "a flag beats the environment"
