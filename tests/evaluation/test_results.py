"""The result file: aggregates by hand, damage refused, names, regimes, and files set aside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opsd.errors import ArtefactError, UsageError
from opsd.evaluation.grading import NO_ANSWER, ProblemGrade
from opsd.evaluation.names import marks, parse_name, result_path
from opsd.evaluation.results import (
    build_result,
    ground_truth,
    load_result,
    predicted_answer,
    problem_record,
    regime_differences,
    write_result,
)

REGIME = {"base_model": "outputs/small_pwopsd_merged", "model_identity": "abc", "dataset": "small"}
REGIME |= {"dataset_fingerprint": "0123", "prompt_style": "thinking", "enable_thinking": True}
REGIME |= {"temperature": 1.0, "top_p": 0.95, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0}
REGIME |= {"max_new_tokens": 128, "val_n": 3, "seed": 1}


def record(problem_id: int, correct: list[bool], answers: list[str | None], vote: bool) -> dict:
    return problem_record(
        problem_id=problem_id,
        problem="Compute 2+3.",
        ground_truth="5",
        texts=[f"text {answer}" for answer in answers],
        predicted=answers,
        truncated=[answer is None for answer in answers],
        tokens=[3] * len(answers),
        grade=ProblemGrade(correct, [[0]], 0, vote),
    )


@pytest.fixture
def result() -> dict:
    records = [
        record(0, [True, True, False], ["5", "5", None], True),
        record(1, [False, False, False], ["6", "7", "6"], False),
        record(2, [False, True, False], ["6", "5", None], False),
        record(3, [True, True, True], ["5", "5.0", "5"], True),
    ]
    return build_result(regime=REGIME, results=records, engine="hf")


def test_aggregates_by_hand(result):
    # 6 of 12 samples, 3 of 4 problems, 2 of 4 votes, 10 of 12 formatted.
    assert (result["average_at_n"], result["average_at_n_pct"]) == (6, 50.0)
    assert (result["pass_at_n"], result["pass_at_n_pct"]) == (3, 75.0)
    assert (result["majority_vote_at_n"], result["majority_vote_at_n_pct"]) == (2, 50.0)
    assert (result["formatted_count"], result["total_solutions"], result["num_problems"]) == (10, 12, 4)
    assert result["format_rate"] == pytest.approx(1000 / 12)
    assert result["truncation_share"] == pytest.approx(2 / 12)
    assert result["schema_version"] == 2


def as_shares(result: dict, votes: int) -> dict:
    """The same result as this project's first files held it, with `votes` correct votes."""
    for index, entry in enumerate(result["results"]):
        entry["majority_vote_correct"] = index < votes
    shares = {
        "average_at_n": 0.5,
        "pass_at_n": 0.75,
        "majority_vote_at_n": votes / 4,
        "majority_vote_at_n_pct": 25.0 * votes,
        "format_rate": 10 / 12,
        "majority_vote_before_recompute": {"majority_vote_at_n": 0.25, "majority_vote_at_n_pct": 25.0},
    }
    return {name: value for name, value in result.items() if name != "schema_version"} | shares


@pytest.mark.parametrize("votes", [0, 1, 4])
@pytest.mark.parametrize("origin", ["first files", "authors"])
def test_units_go_by_schema_and_not_by_magnitude(tmp_path, result, votes, origin):
    """0 of 4 is 0 as a share and as a count, and 1 may be one problem or all of them."""
    old = as_shares(result, votes)
    if origin == "authors":
        old |= {"majority_vote_at_n": votes, "average_at_n": 6, "pass_at_n": 3, "format_rate": 1000 / 12}
        for name in ("truncation_share", "date", "model_identity", "majority_vote_before_recompute"):
            del old[name]
    (tmp_path / "x.json").write_text(json.dumps(old))
    loaded = load_result(tmp_path / "x.json")
    assert (loaded["average_at_n"], loaded["pass_at_n"], loaded["majority_vote_at_n"]) == (6, 3, votes)
    assert loaded["format_rate"] == pytest.approx(1000 / 12)
    assert loaded["majority_vote_at_n_pct"] == 25.0 * votes
    if origin == "authors":
        assert loaded == old
    else:
        assert loaded["majority_vote_before_recompute"]["majority_vote_at_n"] == 1
    # Written and read again, nothing changes.
    write_result(tmp_path / "y.json", loaded)
    assert load_result(tmp_path / "y.json") == loaded


def test_the_schema_of_the_protocol(result):
    top = (
        "base_model dataset enable_thinking temperature top_p top_k min_p presence_penalty max_new_tokens "
        "val_n seed num_problems total_solutions pass_at_n pass_at_n_pct average_at_n average_at_n_pct "
        "majority_vote_at_n majority_vote_at_n_pct formatted_count format_rate results"
    )
    assert set(top.split()) <= set(result)
    entry = "problem_id problem ground_truth val_n generations num_correct pass_at_n majority_vote_correct"
    assert set(entry.split()) <= set(result["results"][0])
    last = result["results"][0]["generations"][2]
    assert {"predicted_answer", "full_generation", "correct", "formatted"} <= set(last)
    assert last["predicted_answer"] == "[No boxed answer found]"
    assert last["formatted"] is False


def test_written_and_read_back(tmp_path, result):
    path = tmp_path / "a" / "x_small_38k.json"
    result["results"][0]["generations"][0]["full_generation"] = "\ud800 a lone surrogate"
    write_result(path, result)
    assert load_result(path) == result
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def cut_generations(text: str) -> str:
    stored = json.loads(text)
    del stored["results"][2]["generations"][1:]
    return json.dumps(stored)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: text.replace('"average_at_n": 6', '"average_at_n": NaN'), "NaN"),
        (lambda text: text.replace('"average_at_n": 6', '"average_at_n": -Infinity'), "Infinity"),
        (lambda text: "", "damaged"),
        (lambda text: "[1, 2]", "top level"),
        (lambda text: "[" * 200_000, "damaged"),
        (lambda text: '{"model": "x", "scores": []}', "lacks base_model"),
        (lambda text: text.replace('"num_problems": 4', '"num_problems": 5'), "num_problems is 5"),
        (lambda text: text.replace('"ground_truth": "5"', '"gold": "5"'), "entry 0"),
        (lambda text: text.replace('"correct": true', '"correct": "yes"', 1), "entry 0"),
        (lambda text: text.replace('"generations": [', '"gens": [', 1), "entry 0"),
        (lambda text: text.replace("1.0", "1" * 6000, 1), "damaged"),
        (lambda text: text.replace("1.0", "1e999", 1), "1e999 is not a JSON value"),
        (
            lambda text: text.replace("1.0", '"hot"', 1),
            r"temperature is 'hot', but must be of type int \| float",
        ),
        (lambda text: text.replace('"val_n": 3', '"val_n": true', 1), "val_n is 'True'"),
        (lambda text: text.replace('"val_n": 3', '"val_n": [3]', 1), "val_n is "),
        (lambda text: text.replace('"seed": 1', '"seed": {}'), "seed is "),
        (lambda text: text.replace('"abc"', "5"), "model_identity is '5'"),
        (lambda text: text.replace('"schema_version": 2', '"schema_version": 3'), "2 is the newest"),
        (lambda text: text.replace('"generations": [{', '"generations": [[', 1), "damaged"),
        (
            lambda text: text.replace('"majority_vote_correct": true', '"majority_vote_correct": 1', 1),
            "entry 0",
        ),
        (lambda text: text.replace('"engine": "hf"', '"grading": {"killed": "x"}'), "grading.killed is 'x'"),
        (lambda text: text.replace('"engine": "hf"', '"grading": [1]'), "grading is "),
        (cut_generations, r"entry 2 of `results` \(problem 2\) has 1 of 3 generations"),
    ],
)
def test_damage_is_refused_with_the_file_named(tmp_path, result, damage, message):
    path = tmp_path / "x.json"
    path.write_text(damage(json.dumps(result)))
    with pytest.raises(ArtefactError, match=message) as caught:
        load_result(path)
    assert str(path) in str(caught.value)


def test_not_utf8_and_missing(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b"\xff\xfe{}\x00")
    with pytest.raises(ArtefactError, match="damaged"):
        load_result(path)
    with pytest.raises(ArtefactError, match="cannot be read"):
        load_result(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("key", "value"), [("answer", "5"), ("gt_answer", "5"), ("answer", 5), ("gt_answer", 5.0)]
)
def test_files_of_the_authors_release(tmp_path, result, key, value):
    for entry in result["results"]:
        del entry["ground_truth"]
        entry[key] = value
        for generation in entry["generations"]:
            del generation["formatted"]
    for name in ("model_identity", "dataset_fingerprint", "prompt_style"):
        del result[name]
    (tmp_path / "x.json").write_text(json.dumps(result))
    loaded = load_result(tmp_path / "x.json")
    assert ground_truth(loaded["results"][0]) == str(value)
    assert [predicted_answer(g) for g in loaded["results"][0]["generations"]] == ["5", "5", None]
    assert regime_differences(REGIME, loaded) == []


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"predicted_answer": "5", "formatted": True}, "5"),
        ({"predicted_answer": "5"}, "5"),
        ({"predicted_answer": NO_ANSWER}, None),
        ({"predicted_answer": None}, None),
        ({"predicted_answer": " "}, None),
        ({"predicted_answer": "5", "formatted": False}, None),
    ],
)
def test_predicted_answer(generation, expected):
    assert predicted_answer(generation) == expected


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("qwen3_4b_base_pwopsd", "math500"), "qwen3_4b_base_pwopsd_38k.json"),
        (("qwen3_4b_base_pwopsd", "math500", 2), "qwen3_4b_base_pwopsd_38k_seed2.json"),
        (("qwen3_4b_base_pwopsd", "aime25"), "qwen3_4b_base_pwopsd_aime25_38k.json"),
        (("dsr1_l8b_opsd", "hmmt25", 0), "dsr1_l8b_opsd_hmmt25_38k_seed0.json"),
        (("small_pwopsd_t1", "small_hard", 1), "small_pwopsd_t1_small_hard_38k_seed1.json"),
    ],
)
def test_result_names(arguments, name):
    path = result_path(*arguments)
    assert path == Path("eval_results") / name
    assert parse_name(path, arguments[1]) == (arguments[0], None)


@pytest.mark.parametrize(
    ("tokens", "tag"), [(38912, "38k"), (2048, "2k"), (160, "160"), (38911, "38911"), (40960, "40k")]
)
def test_a_name_says_its_own_length(tokens, tag):
    assert result_path("a", "math500", max_new_tokens=tokens).name == f"a_{tag}.json"
    path = result_path("a", "aime24", 3, max_new_tokens=tokens, num_samples=5)
    assert path.name == f"a_aime24_{tag}_first5_seed3.json"
    assert parse_name(path, "aime24") == ("a", 5)
    marked = marks({"adapter": "x", "dtype": "float32", "prompt": "teacher"})
    path = result_path("a", "aime24", 3, max_new_tokens=tokens, marked=marked)
    assert path.name == f"a_aime24_{tag}_adapter_float32_teacher_seed3.json"
    assert parse_name(path, "aime24") == ("a", None)
    assert parse_name("notes.json", "aime24") is None


@pytest.mark.parametrize("bad", [("../x", "aime24"), ("x", "a/b"), ("", "aime24"), ("x", "aime24", -1)])
def test_result_names_are_plain(bad):
    with pytest.raises(UsageError):
        result_path(*bad)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"temperature": 0.6}, ["temperature"]),
        ({"seed": 2}, ["seed"]),
        ({"model_identity": "other"}, ["model_identity"]),
        ({"enable_thinking": False}, ["enable_thinking"]),
        # Other spellings of the same regime.
        ({"top_k": -1, "temperature": 1, "min_p": 0}, []),
        # A seed that is absent is no seed.
        ({"seed": ...}, ["seed"]),
        # The path of a model counts only where its identity is unknown.
        ({"base_model": "elsewhere/small_pwopsd_merged"}, []),
        ({"base_model": "elsewhere/small_pwopsd_merged", "model_identity": ...}, ["base_model"]),
    ],
)
def test_every_difference_of_two_regimes_is_named(changes, named):
    other = {key: value for key, value in (REGIME | changes).items() if value is not ...}
    assert [line.split(":")[0] for line in regime_differences(REGIME, other)] == named
    assert regime_differences(REGIME, other, ignore=named) == []
