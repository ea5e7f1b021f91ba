"""The small world: correct problems, reproducible files, a usable model."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsd.errors import ArtefactError, UsageError
from opsd.prompts import INSTRUCTION, encode_teacher, render_evaluation, render_student, render_teacher
from testbed import problems as world

BASE = Path(world.__file__).resolve().parent / "base_model"
SPLITS = {split.name: split for split in (world.TRAIN, world.HELDOUT, world.HELDOUT_HARD)}


def rows_of(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (world.DATA / f"{name}.jsonl").read_text("utf-8").splitlines()]


def running_totals(expression: str) -> list[int]:
    """Return the running totals of a chain of sums, its start first."""
    return list(itertools.accumulate(map(int, re.findall(r"[+-]?\d+", expression))))


@pytest.mark.parametrize("name", SPLITS)
def test_rows_state_right_problems_answers_and_solutions(name):
    split, rows = SPLITS[name], rows_of(name)
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


def test_no_problem_appears_twice_in_any_file():
    texts = [row["problem"] for name in SPLITS for row in rows_of(name)]
    assert len(texts) == len(set(texts)) == 4800 + 256 + 256
    assert SPLITS["heldout_hard"].fewest > SPLITS["heldout"].most


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


def test_mistakes_have_the_given_rates():
    rng = random.Random(5)
    counts = [0, 0, 0]
    for _ in range(4000):
        problem = world.Problem(40, (11, 11, 11))  # no carry, and far from the limits
        _, slips = world.slipped_totals(problem, rng, first=0.1, last=0.3)
        counts = [count + slip for count, slip in zip(counts, slips, strict=True)]
    # Rates 0.1, 0.2, 0.3; five standard deviations of a count of 4000 are at most 0.037 of it.
    assert [count / 4000 for count in counts] == pytest.approx([0.1, 0.2, 0.3], abs=0.037)
    assert world.slipped_totals(problem, rng, first=0, last=0) == (problem.totals, (False,) * 3)
    assert world.slipped_totals(problem, rng, first=1, last=1)[1] == (True,) * 3


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


def test_the_shipped_tokenizer_is_the_one_the_code_builds(tokenizer):
    from testbed.tokenizer import build_tokenizer

    built = build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab()
    row = ("Compute 1+2.", rows_of("train")[0]["solution"])
    text = render_teacher(tokenizer, *row)
    assert built(text)["input_ids"] == tokenizer(text)["input_ids"] == encode_teacher(tokenizer, *row)
    assert tokenizer.decode(encode_teacher(tokenizer, *row)) == text
    assert built.chat_template == tokenizer.chat_template
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") in tokenizer.all_special_ids


@given(text=st.text(max_size=60))
def test_any_text_is_encoded_without_loss(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_digits_and_signs_are_single_tokens(tokenizer):
    tokens = tokenizer.tokenize("First, 36+35=71. Then, 71-45=26.")
    arithmetic = [token for token in tokens if any(char in "0123456789+-=" for char in token)]
    assert arithmetic == list("36+35=7171-45=26")


def test_the_chat_template_follows_qwen3(tokenizer):
    message = f"Compute 1+2.\n\n{INSTRUCTION}"
    front = f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
    assert render_evaluation(tokenizer, "Compute 1+2.") == front
    off = render_evaluation(tokenizer, "Compute 1+2.", enable_thinking=False)
    assert off == f"{front}<think>\n\n</think>\n\n"
    chat = [{"role": "user", "content": message}, {"role": "assistant", "content": "3"}]
    assert tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True) == front
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert whole == f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"


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
    layer = 128 * (128 + 2 * 64 + 128) + 3 * 128 * 256 + 2 * 128 + 2 * 32
    assert sum(w.numel() for w in model.parameters()) == 4 * layer + 128 + 128 * len(tokenizer)
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 8 * 2**20


def test_the_base_is_fallible_alone_and_reliable_with_the_reference(model, tokenizer):
    from testbed.measure_base import measure, read_rows

    rows = read_rows("heldout")[:64]
    result = {
        prompt: measure(model, tokenizer, rows, prompt=prompt, samples=1, seed=0)
        for prompt in ("student", "evaluation", "teacher")
    }
    # Five standard deviations of 64 samples are 0.31 around the measured 0.5.
    assert 0.2 <= result["student"]["right"] <= 0.8
    assert 0.2 <= result["evaluation"]["right"] <= 0.8
    assert result["teacher"]["right"] >= 0.85
    assert max(prompt["truncated"] for prompt in result.values()) <= 0.05
    assert max(prompt["tokens"] for prompt in result.values()) <= 80


def learned_text(tokenizer, prompt: str, completion: str, **spans: list[tuple[int, int]]) -> str:
    """Return the text that is learned from an example, and check its complete text."""
    from testbed.pretrain_base import IGNORED, join

    example = join(tokenizer, prompt, completion, **spans)
    assert tokenizer.decode(example.ids) == f"{prompt}{completion}<|im_end|>"
    return tokenizer.decode([label for label in example.labels if label != IGNORED])


def test_forced_mistakes_are_masked_and_reference_totals_learned(tokenizer):
    prompt = render_student(tokenizer, "Compute 20+30.")
    learned = learned_text(tokenizer, prompt, "First, 20+30=50.", learned=[], masked=[])
    assert learned == "First, 20+30=50.<|im_end|>", "nothing of the student's prompt"
    spans = {"learned": [(17, 19)], "masked": [(9, 11)]}
    learned = learned_text(tokenizer, "Reference: 36+35=71.", "So 36+35=61. And 61-10=51.", **spans)
    assert learned == "71So 36+35=. And 61-10=51.<|im_end|>"


def mistakes(solution: str) -> int:
    """Count the wrong sums of a solution."""
    sums = re.findall(r"(\d+)([+-]\d+)=(\d+)\.", solution)
    return sum(int(before) + int(term) != int(after) for before, term, after in sums)


def test_teacher_examples_hold_a_correct_reference_and_only_masked_mistakes(tokenizer):
    from testbed.pretrain_base import IGNORED, Recipe, draw_example

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


@pytest.mark.parametrize("shape", [(12, 8), (8, 20)])
def test_muon_takes_torchs_steps(shape):
    import torch

    from testbed.muon import Muon

    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    gradients = [torch.randn(shape, generator=generator) for _ in range(3)]
    results = []
    for kind in (Muon, torch.optim.Muon):
        weight = torch.nn.Parameter(start.clone())
        optimizer = kind([weight], lr=0.02, momentum=0.9, weight_decay=0.1)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        results.append(weight.detach())
    # torch iterates in bfloat16; the two differ by its rounding.
    assert (results[0] - results[1]).norm() < 0.02 * (results[1] - start).norm()


def test_pretraining_is_seeded_and_lowers_the_loss(tokenizer):
    import torch

    from testbed.pretrain_base import Recipe, batch_loss, batches, build_model, train

    recipe = Recipe(seed=7, steps=3, examples=2)
    first, second = train(tokenizer, recipe), train(tokenizer, recipe)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    untrained = build_model(tokenizer, 7)
    for ids, labels in next(iter(batches(tokenizer, Recipe(seed=8, steps=1, examples=4)))):
        assert batch_loss(first, ids, labels)[0] < batch_loss(untrained, ids, labels)[0]


def test_steps_below_one_are_refused():
    from testbed.pretrain_base import main

    with pytest.raises(UsageError, match="--steps is 0"):
        main(["--steps", "0"])
