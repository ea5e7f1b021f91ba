"""Voting again over stored answers: votes worked out by hand, files of both origins, what --apply writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import recompute_majn
from opsd.errors import run_cli
from opsd.evaluation.grading import NO_ANSWER, ProblemGrade
from opsd.evaluation.results import load_result
from recompute_majn import BEFORE, PROBLEM_BEFORE, apply_votes

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
SLOW = "\\binom{1000000000}{500000000}"


def stored(votes: list[bool], *, key: str = "ground_truth", formatted: bool = True) -> dict:
    """A result file whose problems are those of VOTES, with these votes in it."""
    records = []
    for index, ((gold, answers, _), vote) in enumerate(zip(VOTES, votes, strict=True)):
        generations = []
        for answer in answers:
            generation = {
                "predicted_answer": NO_ANSWER if answer is None else answer,
                "full_generation": "so what" if answer is None else f"so \\boxed{{{answer}}}",
                "correct": answer == gold or answer in ("0.5", "\\frac12"),
            }
            if formatted:
                generation["formatted"] = answer is not None
            generations.append(generation)
        record = {"problem_id": index, "problem": "?", key: gold, "val_n": 5, "generations": generations}
        counts = {"num_correct": sum(g["correct"] for g in generations), "pass_at_n": True}
        records.append(record | counts | {"majority_vote_correct": vote})
    regime = {"base_model": "m", "dataset": "math500", "temperature": 1.0, "top_p": 0.95}
    counts = {"max_new_tokens": 38912, "val_n": 5, "num_problems": len(VOTES)}
    shares = {"majority_vote_at_n": sum(votes), "majority_vote_at_n_pct": 100 * sum(votes) / len(votes)}
    return regime | counts | shares | {"note": "kept as it is", "results": records}


def write(path: Path, result: dict) -> Path:
    path.write_text(json.dumps(result), encoding="utf-8")
    return path


def recompute(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, list[list[str]], str]:
    """Exit code, the cells of each row of the table, standard error."""
    code = run_cli(lambda: recompute_majn.main([*map(str, argv), "--workers", "1"]))
    captured = capsys.readouterr()
    lines = [line for line in captured.out.splitlines()[2:] if line.startswith("|")]
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


def test_a_link_stays_one_and_its_target_is_rewritten(tmp_path, capsys):
    path = write(tmp_path / "a.json", stored([True] * 5))
    link = tmp_path / "link.json"
    link.symlink_to(path.name)
    recompute(capsys, "--apply", link)
    assert link.is_symlink()
    assert BEFORE in load_result(path)


def test_killed_items_are_counted_and_shown(tmp_path, capsys):
    result = stored([vote for *_, vote in VOTES])
    for generation in result["results"][1]["generations"][3:]:
        generation["predicted_answer"], generation["formatted"] = SLOW, True
    path = write(tmp_path / "a.json", result)
    assert recompute_majn.main([str(path), "--time_limit_s", "1", "--workers", "1"]) == 0
    *_, row, closing = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # It does not even equal itself when it is killed: two clusters of one, and 8 still wins.
    assert cells[2:5] == ["60.00", "60.00", "0"]
    assert int(cells[6]) > 0
    assert closing.startswith(f"{cells[6]} killed at 1 s of CPU time")
    assert SLOW in closing


def test_the_first_value_is_the_one_that_is_kept():
    def grades(votes: list[bool]) -> list[ProblemGrade]:
        return [ProblemGrade([vote], [[0]], 0, vote) for vote in votes]

    result = stored([True] * 5)
    del result["results"][0]["majority_vote_correct"]
    apply_votes(result, grades([True, True, True, False, False]))
    # The fourth vote changes back: what is kept is still what the file held at first.
    assert apply_votes(result, grades([True, False, False, True, False]))
    assert result[BEFORE]["majority_vote_at_n"] == 5
    assert result["majority_vote_at_n"] == 2
    assert [r.get(PROBLEM_BEFORE) for r in result["results"]] == [None, True, True, True, True]
    # Other votes with an equal share change the problems alone.
    del result[BEFORE]
    assert apply_votes(result, grades([True, False, False, False, True]))
    assert BEFORE not in result
    assert not apply_votes(result, grades([True, False, False, False, True]))


# The grade of VOTES by hand: correct samples, problems passed, votes, formatted samples.
REGRADED = {"average_at_n": 11, "pass_at_n": 5, "majority_vote_at_n": 3, "formatted_count": 21}


@pytest.mark.parametrize("kind", ["schema 2", "authors", "shares"])
def test_regrade_corrects_verdicts_and_keeps_the_old_values(tmp_path, capsys, kind):
    result = stored([True] * 5, key="answer" if kind == "authors" else "ground_truth")
    result |= {"average_at_n": 1, "average_at_n_pct": 4.0, "pass_at_n": 4, "pass_at_n_pct": 80.0}
    result |= {"formatted_count": 20, "format_rate": 80.0}
    first, second = result["results"][:2]
    first["generations"][0] |= {"correct": False, "predicted_answer": NO_ANSWER, "formatted": False}
    second["generations"][3]["correct"] = True
    if kind == "schema 2":
        result |= {"schema_version": 2, "grading": {"math_verify": "0.1", "killed": 7}}
    if kind == "shares":
        result |= {"truncation_share": 0.0, "average_at_n": 0.04, "pass_at_n": 0.8}
        result |= {"majority_vote_at_n": 1.0, "format_rate": 0.8}
    path = write(tmp_path / "a.json", result)
    old = load_result(path)

    # Without --regrade the verdicts stay as they are; without --apply the file does.
    assert recompute(capsys, "--apply", path)[1][0][5] == "1"
    voted = path.read_bytes()
    kept = [g["correct"] for g in load_result(path)["results"][0]["generations"]]
    assert kept == [False, True, False, False, True]
    code, rows, _ = recompute(capsys, "--regrade", path)
    assert (code, rows[0][2:]) == (0, ["60.00", "60.00", "0", "2", "0", "4.00", "44.00"])
    assert path.read_bytes() == voted

    recompute(capsys, "--regrade", "--apply", path)
    new = load_result(path)
    assert {name: new[name] for name in REGRADED} == REGRADED
    percents = [new[f"{name}_at_n_pct"] for name in ("average", "pass", "majority_vote")]
    assert [*percents, new["format_rate"]] == [44.0, 100.0, 60.0, 84.0]
    samples = [g for record in new["results"] for g in record["generations"]]
    kept = [{k: v for k, v in g.items() if k.endswith("_before_regrade")} for g in samples]
    lost = {"predicted_answer": NO_ANSWER, "formatted": False, "correct": False}
    assert kept[0] == {f"{name}_before_regrade": value for name, value in lost.items()}
    assert samples[0]["predicted_answer"] == "0.5"
    assert samples[0]["correct"] is samples[0]["formatted"] is True
    assert kept[8] == {"correct_before_regrade": True}
    assert sum(map(bool, kept)) == 2
    assert [r["num_correct"] for r in new["results"]] == [3, 1, 2, 3, 2]
    assert new["regraded"]["before"]["average_at_n"] == old["average_at_n"]
    assert new["regraded"]["before"]["grading"] == old.get("grading")
    assert new["grading"].items() <= new["regraded"].items()
    assert new["grading"]["killed"] == 0

    applied = (path.read_bytes(), path.stat().st_ino)
    recompute(capsys, "--regrade", "--apply", path)
    assert (path.read_bytes(), path.stat().st_ino) == applied, "a second time writes nothing"


def test_regrade_refuses_a_file_without_generations(tmp_path, capsys):
    result = stored([True] * 5)
    del result["results"][2]["generations"][1]["full_generation"]
    path = write(tmp_path / "a.json", result)
    before = path.read_bytes()
    code, rows, error = recompute(capsys, "--regrade", "--apply", path)
    assert (code, rows) == (1, [])
    assert "problem 2 has a generation without `full_generation`" in error
    assert path.read_bytes() == before


def test_no_file_is_a_wrong_pattern(tmp_path, capsys):
    code, _, error = recompute(capsys, f"{tmp_path}/*.json")
    assert code == 2
    assert "no file matches" in error
