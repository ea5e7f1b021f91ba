"""The small world: correct problems, reproducible files, a usable model."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd.errors import ArtefactError
from opsd.prompts import INSTRUCTION, encode_teacher, render_evaluation, render_teacher
from testbed import problems as world
from testbed.measure_base import read_rows

BASE = Path(world.__file__).resolve().parent / "base_model"
SPLITS = {split.name: split for split in (world.TRAIN, world.HELDOUT, world.HELDOUT_HARD)}


def running_totals(expression: str) -> list[int]:
    """Return the running totals of a chain of sums, its start first."""
    return list(itertools.accumulate(map(int, re.findall(r"[+-]?\d+", expression))))


@pytest.mark.parametrize("name", SPLITS)
def test_rows_state_right_problems_answers_and_solutions(name):
    split, rows = SPLITS[name], read_rows(name)
    assert len(rows) == split.rows
    lengths = set()
    for row in rows:
        assert list(row) == ["problem", "answer", "solution"]
        expression = re.fullmatch(r"Compute ([\d+-]+)\.", row["problem"]).group(1)
        totals = running_totals(expression)
        lengths.add(len(totals) - 1)
        assert all(15 <= total <= 99 for total in totals)
        assert row["answer"] == str(totals[-1])
        steps = re.findall(r"(\d+)([+-]\d+)=(\d+)\.", row["solution"])
        assert [int(before) for before, _, _ in steps] == totals[:-1]
        assert [int(after) for _, _, after in steps] == totals[1:]
        assert expression == steps[0][0] + "".join(term for _, term, _ in steps)
        assert re.findall(r"\\boxed\{(.*?)\}", row["solution"]) == [row["answer"]]
        assert row["solution"].endswith(f"\\boxed{{{row['answer']}}}.")
    assert lengths == set(range(split.fewest, split.most + 1))


def test_the_files_regenerate_byte_for_byte(tmp_path):
    assert world.main(["--output", str(tmp_path)]) == 0
    for name in SPLITS:
        written = (tmp_path / f"{name}.jsonl").read_bytes()
        assert written == (world.DATA / f"{name}.jsonl").read_bytes()
    assert world.main(["--check", "--output", str(tmp_path)]) == 0
    path = tmp_path / "heldout.jsonl"
    path.write_bytes(path.read_bytes().replace(b"Compute", b"compute", 1))
    with pytest.raises(ArtefactError, match=r"heldout\.jsonl"):
        world.main(["--check", "--output", str(tmp_path)])
    texts = [row["problem"] for name in SPLITS for row in read_rows(name)]
    assert len(texts) == len(set(texts)) == 4800 + 256 + 256, "no problem appears twice"


@pytest.mark.parametrize(
    ("total", "term", "amounts"),
    [
        (36, 35, (-10,)),  # 6 + 5 carries: 71 becomes 61
        (71, -45, (10,)),  # 1 - 5 borrows: 26 becomes 36
        (42, 13, (-1, 1)),  # 55 becomes 54 or 56
        (42, 18, (-10,)),  # 2 + 8 = 10 carries
        (47, -17, (1,)),  # 30: one less would change the tens
        (26, 13, (-1,)),  # 39: one more would change the tens
    ],
)
def test_mistakes_are_forgotten_carries_or_units_off_by_one(total, term, amounts):
    assert world.slip_amounts(total, term) == amounts


def test_mistakes_have_the_given_rates():
    assert [world.slip_rate(n, 3, 0.1, 0.3) for n in range(3)] == pytest.approx([0.1, 0.2, 0.3])
    rng, problem = random.Random(5), world.Problem(40, (11, 11, 11))  # no carry, and far from the limits
    assert world.slipped_totals(problem, rng, first=0, last=0) == (problem.totals, (False,) * 3)
    slips = [world.slipped_totals(problem, rng, first=0.2, last=1)[1] for _ in range(1000)]
    assert 0.13 < sum(first for first, _, _ in slips) / 1000 < 0.27, "five standard deviations"
    assert all(last for _, _, last in slips)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), operations=st.integers(1, 12))
def test_a_mistake_changes_one_digit_and_later_totals_follow(seed, operations):
    rng = random.Random(seed)
    problem = world.draw_problem(rng, operations)
    totals, slips = world.slipped_totals(problem, rng, first=0.5, last=0.9)
    before = problem.start
    for term, total, slip in zip(problem.terms, totals, slips, strict=True):
        right = before + term
        assert 10 <= total <= 99
        assert sum(a != b for a, b in zip(str(total), str(right), strict=True)) == (1 if slip else 0)
        before = total


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


def test_the_shipped_tokenizer_is_the_one_the_code_builds(tokenizer):
    from testbed.tokenizer import build_tokenizer

    built = build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab()
    row = ("Compute 1+2.", read_rows("train")[0]["solution"])
    text = render_teacher(tokenizer, *row)
    assert built(text)["input_ids"] == tokenizer(text)["input_ids"] == encode_teacher(tokenizer, *row)
    assert tokenizer.decode(encode_teacher(tokenizer, *row)) == text
    assert built.chat_template == tokenizer.chat_template
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.tokenize("36+35=71") == list("36+35=71"), "digits and signs are single tokens"


@settings(deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_is_encoded_without_loss(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_chat_template_follows_qwen3(tokenizer):
    message = f"Compute 1+2.\n\n{INSTRUCTION}"
    front = f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
    assert render_evaluation(tokenizer, "Compute 1+2.") == front
    off = render_evaluation(tokenizer, "Compute 1+2.", enable_thinking=False)
    assert off == f"{front}<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def model():
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(BASE)


def test_the_model_is_a_small_qwen3_in_float32(model, tokenizer):
    import torch

    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert sum(weight.numel() for weight in model.parameters()) == 676_608
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 8 * 2**20


def test_the_base_is_fallible_alone_and_reliable_with_the_reference(model, tokenizer):
    from testbed.measure_base import measure

    rows = read_rows("heldout")[:64]
    # Five standard deviations of 64 samples are 0.31 around the measured 0.5.
    for prompt, low, high in (("student", 0.2, 0.8), ("evaluation", 0.2, 0.8), ("teacher", 0.85, 1)):
        result = measure(model, tokenizer, rows, prompt=prompt, samples=1, seed=0)
        assert low <= result["right"] <= high, prompt
        assert result["truncated"] <= 0.05
        assert result["tokens"] <= 80


def test_forced_mistakes_are_masked_and_reference_totals_learned(tokenizer):
    from testbed.pretrain_base import IGNORED, join

    prompt, completion = "Reference: 36+35=71.", "So 36+35=61. And 61-10=51."
    example = join(tokenizer, prompt, completion, learned=[(17, 19)], masked=[(9, 11)])
    assert tokenizer.decode(example.ids) == f"{prompt}{completion}<|im_end|>"
    learned = tokenizer.decode([label for label in example.labels if label != IGNORED])
    assert learned == "71So 36+35=. And 61-10=51.<|im_end|>"


def test_teacher_examples_hold_a_correct_reference_and_only_masked_mistakes(tokenizer):
    from testbed.pretrain_base import IGNORED, Recipe, draw_example

    def mistakes(solution: str) -> int:
        sums = re.findall(r"(\d+)([+-]\d+)=(\d+)\.", solution)
        return sum(int(before) + int(term) != int(after) for before, term, after in sums)

    recipe, rng = Recipe(forced_share=1.0, first_slip=0.5, last_slip=0.5), random.Random(3)
    wrong = []
    for _ in range(40):
        example = draw_example(tokenizer, "teacher", 5, rng, recipe, frozenset())
        text = tokenizer.decode(example.ids)
        reference, completion = text.split("=== Reference Solution End ===")
        assert mistakes(reference) == 0
        wrong.append(mistakes(completion))
        prompt, mark, _ = text.partition("<|im_start|>assistant\n")
        start = len(tokenizer(prompt + mark, add_special_tokens=False)["input_ids"])
        # A total has two digits, a token each.
        assert example.labels[start:].count(IGNORED) == 2 * wrong[-1]
    assert sum(wrong) > 40


def test_no_held_out_problem_is_pretrained_on(tokenizer):
    from testbed.pretrain_base import Recipe, draw_example

    wanted = world.draw_problem(random.Random(1), 4)
    for forbidden in (frozenset(), frozenset([wanted])):
        example = draw_example(tokenizer, "student", 4, random.Random(1), Recipe(), forbidden)
        assert (wanted.text in tokenizer.decode(example.ids)) == (not forbidden)


def test_pretraining_is_seeded_and_lowers_the_loss(tokenizer):
    import torch

    from testbed.pretrain_base import Recipe, batch_loss, batches, build_model, train

    recipe = Recipe(seed=7, steps=3, examples=2)
    first, second = train(tokenizer, recipe), train(tokenizer, recipe)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    untrained = build_model(tokenizer, 7)
    for ids, labels in next(iter(batches(tokenizer, Recipe(seed=8, steps=1, examples=4)))):
        assert batch_loss(first, ids, labels)[0] < batch_loss(untrained, ids, labels)[0]
