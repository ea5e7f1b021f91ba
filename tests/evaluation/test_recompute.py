"""Voting again over stored answers: votes worked out by hand, files of both origins, what --apply writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import recompute_majn
from opsd import files
from opsd.errors import run_cli
from opsd.evaluation.grading import NO_ANSWER, ProblemGrade
from opsd.evaluation.results import load_result
from recompute_majn import BEFORE, PROBLEM_BEFORE, apply_recount

# (gold, answers with None for an unformatted one, the vote): the winner's first member is graded.
VOTES = [
    # 0.5, 1/2 and \frac12 are one cluster of three against two of 3.
    ("\\frac{1}{2}", ["0.5", "\\frac{1}{2}", "3", "3", "\\frac12"], True),
    # 8 and INVALID have two each; 8 came first, and is wrong.
    ("7", ["7", "8", "8", None, None], False),
    # INVALID and 4 have two each; INVALID came first.
    ("4", [None, "4", "4", None, "5"], False),
    # Three of 9 against two of 10.
    ("9", ["10", "9", "9", "10", "9"], True),
    # Two each of 2 and 1; 2 came first, and is right.
    ("2", ["2", "1", "1", "2", "3"], True),
]
PERCENT = 60.0


def stored(votes: list[bool], *, key: str = "ground_truth", formatted: bool = True) -> dict:
    """A result file whose problems are those of VOTES, with these votes in it."""
    records = []
    for index, ((gold, answers, _), vote) in enumerate(zip(VOTES, votes, strict=True)):
        generations = []
        for answer in answers:
            generation = {
                "predicted_answer": NO_ANSWER if answer is None else answer,
                "full_generation": f"so \\boxed{{{answer}}}",
                "correct": answer == gold or answer in ("0.5", "\\frac12"),
            }
            if formatted:
                generation["formatted"] = answer is not None
            generations.append(generation)
        records.append(
            {
                "problem_id": index,
                "problem": "?",
                key: gold,
                "val_n": 5,
                "generations": generations,
                "num_correct": sum(g["correct"] for g in generations),
                "pass_at_n": True,
                "majority_vote_correct": vote,
            }
        )
    return {
        "base_model": "m",
        "dataset": "math500",
        "temperature": 1.0,
        "top_p": 0.95,
        "max_new_tokens": 38912,
        "val_n": 5,
        "num_problems": len(VOTES),
        "majority_vote_at_n": sum(votes),
        "majority_vote_at_n_pct": 100 * sum(votes) / len(votes),
        "note": "kept as it is",
        "results": records,
    }


def write(path: Path, result: dict) -> Path:
    path.write_text(json.dumps(result), encoding="utf-8")
    return path


def recompute(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, list[list[str]], str]:
    """Exit code, the cells of each row of the table, standard error."""
    code = run_cli(lambda: recompute_majn.main([*map(str, argv), "--workers", "1"]))
    captured = capsys.readouterr()
    lines = captured.out.splitlines()[2:]
    return code, [[c.strip() for c in line.strip("|").split("|")] for line in lines], captured.err


def test_votes_by_hand_and_files_of_every_kind(tmp_path, capsys):
    correct = [vote for _, _, vote in VOTES]
    ours = write(tmp_path / "a.json", stored(correct))
    write(tmp_path / "b.json", stored([True] * 5, key="gt_answer", formatted=False))
    theirs = stored([True, True, False, False, True], key="answer", formatted=False)
    theirs["results"][3]["answer"] = 9  # a number, as some files have it
    theirs["results"][3]["generations"][1]["correct"] = False
    del theirs["majority_vote_at_n"], theirs["majority_vote_at_n_pct"]
    write(tmp_path / "c.json", theirs)
    (tmp_path / "d.json").write_text(ours.read_text()[:-20])
    write(tmp_path / "e.json", {"weather": "fine"})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    code, rows, error = recompute(capsys, f"{tmp_path}/*.json")

    assert code == 1
    # file, problems, old, new, votes changed, verdicts that differ, killed
    assert [[Path(row[0]).name, *row[1:]] for row in rows] == [
        ["a.json", "5", "60.00", "60.00", "0", "0", "0"],
        ["b.json", "5", "100.00", "60.00", "2", "0", "0"],
        ["c.json", "5", "—", "60.00", "2", "1", "0"],
    ]
    assert [line.split(": ")[0] for line in error.splitlines()] == ["skipped", "skipped"]
    assert "d.json is damaged" in error
    assert "e.json is not a result file" in error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before, "nothing is written"


def test_apply_keeps_what_was_there_and_is_idempotent(tmp_path, capsys):
    path = write(tmp_path / "a.json", stored([True] * 5, formatted=False))
    old = load_result(path)
    code, rows, _ = recompute(capsys, "--apply", path)
    assert (code, rows[0][2:5]) == (0, ["100.00", "60.00", "2"])
    new = load_result(path)
    assert [record["majority_vote_correct"] for record in new["results"]] == [vote for *_, vote in VOTES]
    assert (new["majority_vote_at_n"], new["majority_vote_at_n_pct"]) == (3, PERCENT)
    assert new.pop(BEFORE) == {"majority_vote_at_n": 5, "majority_vote_at_n_pct": 100.0}
    changed = [record.pop(PROBLEM_BEFORE, None) for record in new["results"]]
    assert changed == [None, True, True, None, None]
    # Nothing else is touched.
    for result in (old, new):
        del result["majority_vote_at_n"], result["majority_vote_at_n_pct"]
        for record in result["results"]:
            del record["majority_vote_correct"]
    assert new == old

    applied = (path.read_bytes(), path.stat().st_ino)
    code, rows, _ = recompute(capsys, "--apply", path)
    assert (code, rows[0][2:5]) == (0, ["60.00", "60.00", "0"])
    assert (path.read_bytes(), path.stat().st_ino) == applied, "a second time writes nothing"


def test_a_write_that_fails_leaves_the_old_file(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "a.json", stored([True] * 5))
    link = tmp_path / "link.json"
    link.symlink_to(path.name)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "replace", full)
        code, _, error = recompute(capsys, "--apply", path)
    assert code == 1
    assert "No space left" in error
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "link.json"]
    # A link stays one, and what it names is rewritten.
    recompute(capsys, "--apply", link)
    assert link.is_symlink()
    assert BEFORE in load_result(path)


def test_killed_comparisons_are_counted(tmp_path, capsys):
    result = stored([vote for *_, vote in VOTES])
    for generation in result["results"][1]["generations"][3:]:
        generation["predicted_answer"], generation["formatted"] = "100000000!", True
    path = write(tmp_path / "a.json", result)
    code, rows, _ = recompute(capsys, path, "--time_limit_s", 2)
    assert code == 0
    # 100000000! does not even equal itself when it is killed: two clusters of one, and 8 still wins.
    assert rows[0][2:5] == ["60.00", "60.00", "0"]
    assert int(rows[0][6]) > 0


def grades(votes: list[bool]) -> list[ProblemGrade]:
    return [ProblemGrade([vote], [[0]], 0, vote) for vote in votes]


def test_a_changed_vote_with_an_equal_share_keeps_the_problems_values():
    result = stored([True, True, False, False, True])
    assert apply_recount(result, grades([vote for *_, vote in VOTES]))
    assert BEFORE not in result
    assert [r.get(PROBLEM_BEFORE) for r in result["results"]] == [None, True, None, False, None]
    assert not apply_recount(result, grades([vote for *_, vote in VOTES]))


def test_the_first_value_is_the_one_that_is_kept():
    result = stored([True] * 5)
    apply_recount(result, grades([True, True, True, False, False]))
    # The fourth vote changes back: what is kept is still what the file held at first.
    apply_recount(result, grades([True, False, False, True, False]))
    assert result[BEFORE]["majority_vote_at_n"] == 5
    assert result["majority_vote_at_n"] == 2
    assert [r.get(PROBLEM_BEFORE) for r in result["results"]] == [None, True, True, True, True]


def test_a_missing_vote_is_filled_in():
    result = stored([True] * 5)
    for record in result["results"]:
        del record["majority_vote_correct"]
    assert apply_recount(result, grades([True] * 5))
    assert all(r["majority_vote_correct"] is True and r[PROBLEM_BEFORE] is None for r in result["results"])


def test_no_file_is_a_wrong_pattern(tmp_path, capsys):
    code, _, error = recompute(capsys, f"{tmp_path}/*.json")
    assert code == 2
    assert "no file matches" in error
