"""Benchmarks from local stand-ins: sizes, columns, answers as text, and errors with the remedy."""

from __future__ import annotations

import json

import pytest

from opsd.errors import ArtefactError, UsageError
from opsd.evaluation.benchmarks import BENCHMARKS, Problem, answer_text, fingerprint, load_benchmark


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(count: int) -> list[dict]:
    return [{"problem": f"Compute {n}+1.", "answer": n + 1} for n in range(count)]


def answers(path) -> list[str]:
    return [problem.answer for problem in load_benchmark("mine", dataset_path=path).problems]


def test_the_rows_are_the_protocols():
    table = {name: (row.hub_id, row.split, row.size) for name, row in BENCHMARKS.items()}
    assert table["math500"] == ("HuggingFaceH4/MATH-500", "test", 500)
    assert table["aime24"] == ("HuggingFaceH4/aime_2024", "train", 30)
    assert table["aime25"] == ("yentinglin/aime_2025", "train", 30)
    assert table["hmmt25"][2] == 30
    assert [len(load_benchmark(name).problems) for name in ("small", "small_hard")] == [256, 256]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_answers_keep_the_digits_they_are_written_with(tmp_path, suffix):
    written = ["0.10", "27.0", "033", "7", "1" * 40, "1,000", "NA", "1e5"]
    path = tmp_path / f"x.{suffix}"
    if suffix == "csv":
        path.write_text("problem,answer\n" + "".join(f'p,"{answer}"\n' for answer in written))
    else:
        text = ("033", "1,000", "NA")
        lines = [
            f'{{"problem": "p", "answer": {json.dumps(a) if a in text else a}, "extra": null}}'
            for a in written
        ]
        path.write_text("\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]")
    assert answers(path) == written


@pytest.mark.parametrize(
    ("value", "text"), [(5, "5"), (70.0, "70"), (0.5, "0.5"), (" 3 ", "3"), (None, ""), (float("nan"), "")]
)
def test_answer_text(value, text):
    assert answer_text(value) == text
    for wrong in (True, [1], {"a": 1}):
        with pytest.raises(ArtefactError, match="must be text or a number"):
            answer_text(wrong)


def test_the_last_box_of_the_solution_replaces_a_missing_answer(tmp_path):
    solution = "so \\boxed{1} or \\boxed{\\frac{1}{2}}."
    assert answers(write_jsonl(tmp_path / "x.jsonl", [{"problem": "p", "solution": solution}])) == [
        "\\frac{1}{2}"
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"problem": "p"}], "neither an `answer`"),
        ([{"question": "p", "answer": "1"}], r"columns: question, answer"),
        ([{"problem": "  ", "answer": "1"}], "no text"),
        ([], "holds no problem"),
        ([{"problem": "p", "answer": "1"}, 5], "row 1 is not an object with columns"),
        ([{"problem": "p", "answer": "1"}, {"problem": "p", "answer": ["1"]}], r"x\.jsonl cannot be read"),
    ],
)
def test_bad_rows_are_named(tmp_path, content, message):
    with pytest.raises(ArtefactError, match=message):
        answers(write_jsonl(tmp_path / "x.jsonl", content))


def test_a_benchmark_has_its_size(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", rows(30))
    assert [p.problem_id for p in load_benchmark("aime24", dataset_path=path).problems] == list(range(30))
    with pytest.raises(ArtefactError, match="29 problems, but aime24 has 30"):
        load_benchmark("aime24", dataset_path=write_jsonl(tmp_path / "x.jsonl", rows(29)))


def test_unknown_and_missing(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"aime27.*math500"):
        load_benchmark("aime27")
    with pytest.raises(ArtefactError, match="check --dataset_path"):
        load_benchmark("aime24", dataset_path="no/file")
    monkeypatch.setenv("HMMT25_PARQUET_PATH", str(tmp_path / "none.parquet"))
    with pytest.raises(ArtefactError, match=r"python data/prepare_hmmt25\.py"):
        load_benchmark("hmmt25")


def test_the_hub_that_cannot_be_reached(monkeypatch):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ArtefactError, match=r"HuggingFaceH4/aime_2024(.|\n)*HF_HUB_OFFLINE.*--dataset_path"):
        load_benchmark("aime24")


def test_the_fingerprint_sees_every_change():
    base = [Problem(n, f"Compute {n}+1.", str(n + 1)) for n in range(3)]
    changed = [base[0], Problem(1, base[1].problem, "99"), base[2]]
    swapped = [base[1], base[0], base[2]]
    assert len({fingerprint(p) for p in (base, changed, swapped, base[:2])}) == 4
    assert fingerprint(base) == "83b141aefae286ee"
