"""The world with a knob: right problems and plans, a usable base, and a study that sees what weights do."""

from __future__ import annotations

import json
import random
import re
import sys

import pytest
import torch

from opsd.objectives import Hyperparameters, position_weights
from testbed.plan_world import base, report, study, world
from testbed.pretrain_base import IGNORED
from tests.launchers.test_launchers import dry_run, launch

DATA = {name.removesuffix(".jsonl"): text for name, text in world.files().items()}
ROWS = {name: [json.loads(line) for line in text.splitlines()] for name, text in DATA.items()}


@pytest.mark.parametrize("name", DATA)
def test_rows_state_a_plan_and_carry_it_out(name):
    chances = world.REFERENCES.get(name, (0,) * 5)
    plans = []
    for row in ROWS[name]:
        plans.append(world.plan_of(row["solution"]))
        chain = re.fullmatch(r"Plan:\S+ (\S+)\. \\boxed\{(\d\d)\}\.", row["solution"])
        assert chain[2] == row["answer"]
        total = int(chain[1][:2])
        sums = re.findall(r"[A-F]([+-]\d)(=\d\d)?", chain[1])
        for symbol, (term, shown) in zip(plans[-1] + world.STEP, sums, strict=True):
            total += int(term)
            assert shown == (f"={total}" if symbol == world.STEP else "")
        assert total == int(row["answer"])
        assert re.sub(r"=\d\d", "", f"Compute {chain[1]}.") == row["problem"]
    rates = [sum(plan[n] == world.LEAP for plan in plans) / len(plans) for n in range(5)]
    assert rates == pytest.approx(chances, abs=5 * (0.25 / len(plans)) ** 0.5)
    assert [rate for rate, chance in zip(rates, chances, strict=True) if chance == 0 and rate] == []


def test_all_files_hold_the_same_problems_and_none_is_held_out():
    heldout, *training = ([row["problem"] for row in ROWS[name]] for name in ("heldout", *world.REFERENCES))
    assert all(problems == training[0] for problems in training)
    assert len(set(heldout + training[0])) == world.HELDOUT_ROWS + world.TRAIN_ROWS


@pytest.fixture(scope="module")
def tokenizer():
    from opsd.models import load_tokenizer

    return load_tokenizer(str(base.BASE))


def test_the_shipped_tokenizer_is_the_one_the_code_builds(tokenizer):
    built = base.build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab()
    assert tokenizer.tokenize("71A+8B-3=76A^B>") == [*"71", "A+", "8", "B-", *"3=76", "A^", "B>"]


def test_a_teachers_targets_follow_the_reference_and_hold_no_mistake(tokenizer):
    """The completion's own plan and its mistakes are read, but not learned."""
    rng, problem = random.Random(1), world.draw_problems("train", 1)[0]
    forced = 0
    for _ in range(60):
        example = base.teacher_example(tokenizer, problem, rng)
        reference, completion = tokenizer.decode(example.ids).split("=== Reference Solution End ===")
        reference = reference[reference.index("Plan:") :]
        completion = completion[completion.index("Plan:") :]
        targets = tokenizer.decode([label for label in example.labels if label != IGNORED])
        assert world.plan_of(targets) == world.plan_of(reference)
        forced += world.plan_of(completion) != world.plan_of(reference)
        totals = {"ABCDEF"[n]: total for n, total in enumerate(problem.totals)}
        written = re.findall(r"([A-F])[+-]\d=(\d\d)", targets)
        if re.findall(r"\\boxed\{(\d\d)", completion) == [str(problem.answer)] and "=" in targets:
            assert all(int(total) == totals[label] for label, total in written)
    assert forced > 10


def test_totals_after_a_leap_are_any_number():
    rng = random.Random(2)
    spoiled = [base.spoiled_totals(rng, "^>>>>", (40, 50, 60, 50, 40, 50)) for _ in range(300)]
    assert {first for first, *_ in spoiled} == {40}, "not written, so not spoiled"
    assert len({second for _, second, *_ in spoiled}) > 50
    assert all(min(totals) >= 10 and max(totals) <= 99 for totals in spoiled)
    assert all(third - second == 10 for _, second, third, *_ in spoiled), "later steps build on it"


def test_the_base_is_small_and_its_teacher_is_right_in_all_steps(tokenizer):
    from opsd.models import load_causal_lm
    from testbed.plan_world.measure_base import CASES, measure

    assert sum(file.stat().st_size for file in base.BASE.iterdir()) < 4 * 2**20
    model, problems = load_causal_lm(str(base.BASE), dtype="auto"), world.heldout()[:64]
    student, teacher = (
        measure(model, tokenizer, problems, CASES[title])
        for title in ("student", "teacher, k = 1, forced into all steps")
    )
    # Five standard deviations of 64 samples are 0.31 and 0.14 around 0.3 and 0.95.
    assert 3 <= student["right"] <= 61
    assert 2 <= student["leaps"] <= 16
    assert teacher["right"] >= 81


def test_behaviour_by_hand():
    plans = ("Plan:A>B>C>D>E>. …", "Plan:A>B>C>D>E>. …", "Plan:A^B>C>D>E^. …", "nothing")
    found = study.behaviour(zip(plans, (True, False, True, False), strict=True))
    assert found == {"right": 50, "leaps": pytest.approx(100 * 2 / 15, abs=0.01), "all_steps": 50,
                     "right_all_steps": 50}  # fmt: skip


def weights(cell: str) -> torch.Tensor:
    """Return a cell's position weights for a solution with all steps, [44]."""
    own = {name: value for name, value in study.CELLS[cell][1].items() if name.startswith("position_")}
    return position_weights(torch.tensor([44]), Hyperparameters(**own))


def test_cells_are_what_their_titles_say(tokenizer, tmp_path):
    solution = world.write_solution(world.draw_problems("train", 1)[0], world.STEP * 5).text
    assert len(tokenizer(solution)["input_ids"]) + 1 == 44
    assert weights("pwopsd").mean() == pytest.approx(study.MEAN_WEIGHT, abs=5e-4)
    torch.testing.assert_close(weights("flat"), torch.full((44,), study.MEAN_WEIGHT, dtype=torch.float64))
    assert weights("oracle")[:6].max() < 1e-3  # "Plan:" and the five symbols
    assert weights("oracle")[7:].min() > 0.95
    for cell, expected in {
        "opsd_half": ("15", "0.0004"), "opsd_slow": ("30", "0.0003084"), "reopold": ("30", "0.0004"),
    }.items():  # fmt: skip
        flags = study.training_flags(cell, tmp_path / "k0.jsonl", 1, tmp_path, steps=30)
        assert (str(flags["max_steps"]), f"{flags['learning_rate']:.7g}") == expected
    assert flags["reopold_t_switch"] == 10
    assert flags["save_steps"] == flags["merge_step"] == 30


@pytest.mark.slow
def test_weights_change_what_a_plan_learns(tmp_path, monkeypatch):
    """The study's short form: two knobs, 8 steps. A plan that weighs nothing does not follow the knob."""
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    words = "run --references k0 k0.5 --cells opsd oracle --seeds 1 --steps 8 --problems 48"
    assert study.main(words.split()) == 0
    folder = tmp_path / "plan_world"
    records = [json.loads(path.read_text()) for path in folder.glob("*/record.json")]
    leaps = {(record["cell"], record["benchmark"]): record["leaps"] for record in records}
    # Measured, % of plan symbols: OPSD 5.0 and 10.8, the oracle 9.0 and 9.0, like the base.
    assert leaps["opsd", "k0.5"] - leaps["opsd", "k0"] > 3
    assert abs(leaps["oracle", "k0.5"] - leaps["oracle", "k0"]) < 1.5
    # Finished cells are not repeated.
    (folder / "data" / "k0.jsonl").unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/record.json")}
    assert study.main(words.split()) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.fixture(scope="module")
def results() -> list[dict]:
    return report.prepared(study.read_records())


def test_the_pages_tables_are_what_the_committed_records_give(results):
    page = report.PAGE.read_text(encoding="utf-8")
    assert all(f"-->\n{text}\n<!--" in page for text in report.parts(results).values())
    for record in results:
        assert len(record["num_correct"]) == world.HELDOUT_ROWS
        share = 100 * sum(record["num_correct"]) / (record["val_n"] * world.HELDOUT_ROWS)
        assert record["right"] == pytest.approx(share, abs=1e-3)


def test_the_crossing_by_hand():
    """-2, -1, +3 points at k = 0, 0.1, 0.25: the difference turns at 0.1 + 0.15 / 4."""

    def record(cell: str, knob: str, right: int) -> dict:
        return {"cell": cell, "benchmark": knob, "training_seed": 1, "right": right, "val_n": 100,
                "num_correct": [right] * 8}  # fmt: skip

    gaps = {"k0": -2, "k0.1": -1, "k0.25": 3}
    records = [record(cell, knob, 50 + gap * (cell == "pwopsd")) for cell in ("pwopsd", "opsd")
               for knob, gap in gaps.items()]  # fmt: skip
    assert report.crossing(records).endswith("at k = 0.14 [0.14, 0.14].")
    assert report.crossing(records, "opsd", "pwopsd").endswith("at k = below 0 [below 0, below 0].")


def test_the_launcher_shares_the_cells_out_and_reports(tmp_path):
    commands = [words[1:] for _, words in dry_run("reproduce_mechanism.sh", "--seeds", "1", JOBS="2")]
    assert [words[1:] for words in commands] == [
        ["run", "--part", "1/2", "--seeds", "1"],
        ["run", "--part", "2/2", "--seeds", "1"],
        ["collect"],
        ["report"],
    ]
    assert {words[0] for words in commands} == {study.__file__}
    done = launch(
        "reproduce_mechanism.sh", "--cells", "sft", JOBS="1", VENV=sys.prefix, OUTPUT_ROOT=str(tmp_path)
    )
    assert done.returncode == 2
    assert "invalid choice: 'sft'" in done.stderr
