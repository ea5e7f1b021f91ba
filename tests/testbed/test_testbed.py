"""The small world: its problems are right, its files are what the generator writes, its model is usable."""

from __future__ import annotations

import ast
import json
import operator
import random
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsd.prompts import (
    INSTRUCTION,
    encode_evaluation,
    encode_student,
    encode_teacher,
    render_evaluation,
    render_student,
    render_teacher,
)
from testbed import problems as world

BASE = Path(world.__file__).resolve().parent / "base_model"
SPLITS = {split.name: split for split in (world.TRAIN, world.HELDOUT, world.HELDOUT_HARD)}
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub}


def rows_of(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (world.DATA / f"{name}.jsonl").read_text("utf-8").splitlines()]


def evaluated(expression: str) -> list[int]:
    """The running totals of a chain of sums, worked out from Python's own parse of it: start first."""

    def walk(node: ast.expr) -> list[int]:
        if isinstance(node, ast.Constant):
            return [node.value]
        totals = walk(node.left)
        return [*totals, OPERATIONS[type(node.op)](totals[-1], node.right.value)]

    return walk(ast.parse(expression, mode="eval").body)


@pytest.mark.parametrize("name", SPLITS)
def test_rows_state_right_problems_answers_and_solutions(name):
    split, rows = SPLITS[name], rows_of(name)
    assert len(rows) == split.rows
    lengths = set()
    for row in rows:
        assert list(row) == ["problem", "answer", "solution"]
        expression = re.fullmatch(r"Compute ([\d+-]+)\.", row["problem"]).group(1)
        totals = evaluated(expression)
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


def test_check_refuses_a_changed_file(tmp_path):
    from opsd.errors import ArtefactError

    world.main(["--output", str(tmp_path)])
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
def test_slips_are_forgotten_carries_or_units_off_by_one(total, term, amounts):
    assert world.slip_amounts(total, term) == amounts


@given(seed=st.integers(0, 10**6), operations=st.integers(1, 12))
def test_a_slip_changes_one_digit_and_is_built_upon(seed, operations):
    rng = random.Random(seed)
    problem = world.draw_problem(rng, operations)
    totals, slips = world.slipped_totals(problem, rng, first=0.5, last=0.9)
    before = problem.start
    for term, total, slip in zip(problem.terms, totals, slips, strict=True):
        right = before + term
        assert 10 <= total <= 99
        assert sum(a != b for a, b in zip(str(total), str(right), strict=True)) == (1 if slip else 0)
        before = total


def test_slips_come_at_the_rates_asked_for():
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


@given(seed=st.integers(0, 10**6), operations=st.integers(1, 12))
def test_spans_point_at_the_totals(seed, operations):
    rng = random.Random(seed)
    problem = world.draw_problem(rng, operations)
    totals = tuple(total + 100 for total in problem.totals)
    solution = world.write_solution(problem, rng, totals)
    assert [solution.text[start:end] for start, end in solution.total_spans] == [str(t) for t in totals]
    assert all(solution.text[start - 1] == "=" for start, _ in solution.total_spans)


def test_connectives_vary():
    openings = {row["solution"].split("=")[0].rstrip("0123456789+-") for row in rows_of("heldout")}
    assert openings == set(world.FIRST)


# --- tokenizer and chat template ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


def test_the_shipped_tokenizer_is_the_one_the_code_builds(tokenizer):
    from testbed.tokenizer import build_tokenizer

    built = build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab()
    text = render_teacher(tokenizer, "Compute 1+2.", rows_of("train")[0]["solution"])
    assert built(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert built.chat_template == tokenizer.chat_template


def test_pad_and_end_of_sequence_differ(tokenizer):
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") in tokenizer.all_special_ids


@given(text=st.text(max_size=60))
def test_any_text_survives_the_tokenizer(text):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_prompts_survive_the_tokenizer(tokenizer):
    for row in rows_of("heldout")[:20]:
        problem, solution = row["problem"], row["solution"]
        for ids, text in (
            (encode_student(tokenizer, problem), render_student(tokenizer, problem)),
            (encode_teacher(tokenizer, problem, solution), render_teacher(tokenizer, problem, solution)),
            (encode_evaluation(tokenizer, problem), render_evaluation(tokenizer, problem)),
        ):
            assert tokenizer.decode(ids) == text


def test_digits_and_signs_stand_alone(tokenizer):
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


def test_the_three_prompts_end_as_the_protocol_has_them(tokenizer):
    problem, solution = "Compute 20+30.", "First, 20+30=50. The answer is \\boxed{50}."
    assert render_student(tokenizer, problem).endswith("assistant\n<think>\n\n</think>\n\n")
    teacher = render_teacher(tokenizer, problem, solution)
    assert f"Begin ===\n{solution}\n=== Reference" in teacher
    assert teacher.endswith("<|im_start|>assistant\n")
    assert solution in tokenizer.decode(encode_teacher(tokenizer, problem, solution))


# --- base model --------------------------------------------------------------------------------------------


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


# --- pretraining -------------------------------------------------------------------------------------------


def learned_text(tokenizer, example) -> str:
    from testbed.pretrain_base import IGNORED

    return tokenizer.decode([label for label in example.labels if label != IGNORED])


def test_the_student_learns_its_completion_and_nothing_of_the_prompt(tokenizer):
    from testbed.pretrain_base import join

    prompt = render_student(tokenizer, "Compute 20+30.")
    example = join(tokenizer, prompt, "First, 20+30=50.", learned=[], masked=[])
    assert tokenizer.decode(example.ids) == f"{prompt}First, 20+30=50.<|im_end|>"
    assert learned_text(tokenizer, example) == "First, 20+30=50.<|im_end|>"


def test_forced_slips_are_masked_and_reference_totals_learned(tokenizer):
    from testbed.pretrain_base import join

    prompt = "Reference: 36+35=71."
    example = join(tokenizer, prompt, "So 36+35=61. And 61-10=51.", learned=[(17, 19)], masked=[(9, 11)])
    assert learned_text(tokenizer, example) == "71So 36+35=. And 61-10=51.<|im_end|>"


def test_teacher_examples_hold_a_right_reference_and_only_masked_slips(tokenizer):
    from testbed.pretrain_base import IGNORED, Recipe, draw_example

    recipe, rng = Recipe(forced_share=1.0, first_slip=0.5, last_slip=0.5), random.Random(3)
    masked = 0
    for _ in range(40):
        example = draw_example(tokenizer, "teacher", 5, rng, recipe, frozenset())
        text = tokenizer.decode(example.ids)
        reference, completion = text.split("=== Reference Solution End ===")
        for before, term, after in re.findall(r"(\d+)([+-]\d+)=(\d+)\.", reference):
            assert int(before) + int(term) == int(after)
        wrong = sum(
            int(before) + int(term) != int(after)
            for before, term, after in re.findall(r"(\d+)([+-]\d+)=(\d+)\.", completion)
        )
        answer = text.index("<|im_start|>assistant\n") + len("<|im_start|>assistant\n")
        start = len(tokenizer(text[:answer], add_special_tokens=False)["input_ids"])
        hidden = sum(label == IGNORED for label in example.labels[start:])
        assert hidden == 2 * wrong
        masked += wrong
    assert masked > 40


def test_no_held_out_problem_is_pretrained_on(tokenizer):
    from testbed.pretrain_base import Recipe, draw_example

    rng, recipe = random.Random(1), Recipe()
    wanted = world.draw_problem(random.Random(1), 4)
    assert wanted.text in tokenizer.decode(
        draw_example(tokenizer, "student", 4, random.Random(1), recipe, frozenset()).ids
    )
    example = draw_example(tokenizer, "student", 4, rng, recipe, frozenset([wanted]))
    assert wanted.text not in tokenizer.decode(example.ids)


def test_muon_orthogonalises():
    import torch

    from testbed.muon import orthogonalised

    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 16, 40), (3, 40, 16), (2, 24, 60)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape, generator=generator)))
        assert values.min() > 0.3
        assert values.max() < 1.3


def test_muon_takes_torchs_steps():
    import torch

    from testbed.muon import Muon

    generator = torch.Generator().manual_seed(1)
    start = torch.randn(12, 8, generator=generator)
    gradients = [torch.randn(12, 8, generator=generator) for _ in range(3)]
    results = []
    for kind in (Muon, torch.optim.Muon):
        weight = torch.nn.Parameter(start.clone())
        optimizer = kind([weight], lr=0.02, momentum=0.9, weight_decay=0.1)
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
        results.append(weight.detach())
    # torch iterates in bfloat16, whose rounding is all that sets the two apart.
    moved = (results[1] - start).norm()
    assert (results[0] - results[1]).norm() < 0.02 * moved


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
    from opsd.errors import UsageError
    from testbed.pretrain_base import main

    with pytest.raises(UsageError, match="--steps is 0"):
        main(["--steps", "0"])
