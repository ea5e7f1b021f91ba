"""The three prompts letter for letter, the think patch, and chat templates of the three families."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import opsd.prompts as prompts_module
from opsd.errors import ArtefactError
from opsd.models import load_tokenizer
from opsd.prompts import (
    close_open_think,
    encode_evaluation,
    encode_student,
    encode_teacher,
    evaluation_message,
    render_evaluation,
    render_student,
    render_teacher,
    spells_control_token,
)

PROBLEM, SOLUTION = "What is {x} if 2x = 6?\n(a) <b>", "Half of 6 is 3.\n\\boxed{3}"

EVALUATION = (
    "What is {x} if 2x = 6?\n(a) <b>\n\n"
    "Please reason step by step, and put your final answer within \\boxed{}."
)
STUDENT = f"Problem: {EVALUATION}"
TEACHER = (
    "Problem: What is {x} if 2x = 6?\n(a) <b>\n\n"
    "Here is a reference solution to this problem:\n"
    "=== Reference Solution Begin ===\n"
    "Half of 6 is 3.\n\\boxed{3}\n"
    "=== Reference Solution End ===\n"
    "\n\nAfter reading the reference solution above, make sure you truly understand the reasoning behind "
    "each step \u2014 do not copy or paraphrase it. Now, using your own words and independent reasoning, "
    "derive the same final answer to the problem above. Think step by step, explore different approaches, "
    "and don't be afraid to backtrack or reconsider if something doesn't work out:\n\n"
    "Please reason step by step, and put your final answer within \\boxed{}."
)

# What the three families' templates do with one user message and a generation prompt, in their own words.
QWEN3 = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
DEEPSEEK = (
    "{{- bos_token }}"
    "{%- for message in messages %}{{- '<\uff5cUser\uff5c>' + message['content'] }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<\uff5cAssistant\uff5c><think>\n' }}{%- endif %}"
)
OLMO3 = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>' }}{%- endif %}"
)


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    """One token a byte, plus the families' special tokens; like Llama's it prepends a BOS of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<BOS>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(
        single="<BOS> $A", special_tokens=[("<BOS>", backend.token_to_id("<BOS>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<BOS>", eos_token="<|im_end|>")
    tokenizer.chat_template = template
    return tokenizer


# (template, end of the student's prompt, end of the teacher's and the evaluation's)
TURN, DEEPSEEK_TURN = "<|im_end|>\n<|im_start|>assistant\n", "<\uff5cAssistant\uff5c>"
FAMILIES = {
    "qwen3": (QWEN3, f"{TURN}<think>\n\n</think>\n\n", TURN),
    "deepseek": (DEEPSEEK, f"{DEEPSEEK_TURN}<think>\n</think>\n\n", f"{DEEPSEEK_TURN}<think>\n"),
    "olmo3": (OLMO3, f"{TURN}<think></think>\n\n", f"{TURN}<think>"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_rendered_prompts_of_the_three_families(family):
    template, student_end, thinking_end = FAMILIES[family]
    tokenizer = tokenizer_with(template)
    begin = "<BOS><\uff5cUser\uff5c>" if family == "deepseek" else "<|im_start|>user\n"
    assert render_student(tokenizer, PROBLEM) == begin + STUDENT + student_end
    assert render_teacher(tokenizer, PROBLEM, SOLUTION) == begin + TEACHER + thinking_end
    assert render_evaluation(tokenizer, PROBLEM) == begin + EVALUATION + thinking_end
    off = render_evaluation(tokenizer, PROBLEM, enable_thinking=False)
    # The patch is the training student's alone: an evaluation without thinking is as the template has it.
    assert off == begin + EVALUATION + (student_end if family == "qwen3" else thinking_end)


def prompts_of(tokenizer, problem: str, solution: str) -> tuple[tuple[list[int], str], ...]:
    """(ids, rendered) of student, teacher, evaluation."""
    return (
        (encode_student(tokenizer, problem), render_student(tokenizer, problem)),
        (encode_teacher(tokenizer, problem, solution), render_teacher(tokenizer, problem, solution)),
        (encode_evaluation(tokenizer, problem), render_evaluation(tokenizer, problem)),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_no_second_beginning_of_sequence_and_nothing_lost(family):
    tokenizer = tokenizer_with(FAMILIES[family][0])
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id, "the tokenizer would add one"
    for ids, text in prompts_of(tokenizer, PROBLEM, SOLUTION):
        assert ids.count(tokenizer.bos_token_id) == (family == "deepseek")
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "end", ["<think>", "<think>\n", "<think>\n\n", "<think> ", "<think >", "<think\n>\n", "<think>\t\n "]
)
def test_an_open_think_at_the_end_is_closed(end):
    assert close_open_think(f"prompt{end}") == f"prompt{end}</think>\n\n"


@pytest.mark.parametrize(
    "rendered",
    [
        "",
        "<think> mean?<|Assistant|>",
        "<think>\n\n</think>\n\n",
        "<thinking>",
        "</think>",
        "<think>\nFirst,",
    ],
)
def test_everything_else_is_left_as_it_is(rendered):
    assert close_open_think(rendered) == rendered


def test_a_think_in_the_problem_does_not_trigger_the_patch():
    problem = "Explain <think>"
    for template, student_end, _ in FAMILIES.values():
        rendered = render_student(tokenizer_with(template), problem)
        assert rendered.endswith(student_end)
        assert rendered.count("</think>") == 1
    bare = "{%- for message in messages %}{{- message.content }}{%- endfor %}"
    # The message ends with the instruction, so even a template without a generation prompt is safe.
    assert "</think>" not in render_student(tokenizer_with(bare), problem)


TEXTS = {
    "qwen3": ("<|im_end|>\n<|im_start|>assistant", "<think>", "</think>", "a<|endoftext|>b", " <|im_end|> "),
    "deepseek": (
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        f"{DEEPSEEK_TURN}<think>\n",
        "<\uff5cUser\uff5c>",
    ),
    "olmo3": ("<|im_end|>", "<think>", "</think>", "<|im_<|im_end|>end|>"),
}


def tokenizer_on_disk(folder: Path, family: str):
    """The small world's tokenizer with a family's template and control tokens, saved and loaded again."""
    base = Path(__file__).resolve().parents[1] / "testbed" / "base_model"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "chat_template.jinja").write_text(FAMILIES[family][0], encoding="utf-8")
    if family == "deepseek":
        tokenizer = load_tokenizer(str(folder))
        names = ("begin\u2581of\u2581sentence", "end\u2581of\u2581sentence", "User", "Assistant")
        begin, *rest = (f"<\uff5c{name}\uff5c>" for name in names)
        tokenizer.add_special_tokens({"bos_token": begin, "eos_token": rest[0]})
        tokenizer.add_tokens(rest[1:])  # not special, as in DeepSeek-R1-Distill-Llama-8B
        tokenizer.save_pretrained(folder)
    return load_tokenizer(str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_that_a_text_spells_stay_text(tmp_path, family):
    """In the three prompts of the three templates: nothing lost, and no control token but the template's."""
    tokenizer = tokenizer_on_disk(tmp_path / "base", family)
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if not token.content.isspace()}

    clean = prompts_of(tokenizer, PROBLEM, SOLUTION)
    for ids, rendered in clean:
        assert ids == tokenizer(rendered, add_special_tokens=False)["input_ids"], "as it always was"
    for problem in (PROBLEM, " 12+30", "x\n"):
        # The path of texts with control tokens gives clean texts the ids of the ordinary path.
        rendered = render_evaluation(tokenizer, problem)
        ids = prompts_module._encode_as_text(tokenizer, evaluation_message(problem), rendered)
        assert ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    of_templates = [[token for token in ids if token in control] for ids, _ in clean]
    assert all(of_templates)
    for text in TEXTS[family]:
        where = ((PROBLEM + text, SOLUTION), (text + PROBLEM, text), (PROBLEM, f"Half {text} of 6"))
        for problem, solution in where:
            prompts = prompts_of(tokenizer, problem, solution)
            for (ids, rendered), expected in zip(prompts, of_templates, strict=True):
                assert tokenizer.decode(ids) == rendered
                assert [token for token in ids if token in control] == expected


def test_runs_of_spaces_and_added_words_are_no_control_tokens():
    tokenizer = tokenizer_with(QWEN3)
    tokenizer.add_tokens(["    ", "Lemma", "<tool_call>"])
    assert not spells_control_token(tokenizer, "Lemma    1")
    assert spells_control_token(tokenizer, "Lemma <tool_call>")


def test_a_template_that_changes_such_a_text_is_refused():
    tokenizer = tokenizer_with("{{ messages[0].content | upper }}")
    encode_student(tokenizer, "a")
    with pytest.raises(ArtefactError, match="does not insert a message as it is"):
        encode_student(tokenizer, "a<|im_end|>")
    with pytest.raises(ArtefactError, match="has no chat template; use an instruction-tuned model"):
        encode_student(tokenizer_with(None), PROBLEM)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('a\\x1b[2J') }}", "{{ 1 / 0 }}", "{% if %}", "{{ a.b.c }}"]
)
def test_a_template_that_fails_is_named(template):
    message = r"chat template of .* fails .* repair its chat_template\.jinja"
    with pytest.raises(ArtefactError, match=message) as error:
        render_student(tokenizer_with(template), PROBLEM)
    assert "\x1b" not in str(error.value)


def test_braces_and_template_syntax_in_the_data_are_text():
    tokenizer = tokenizer_with(QWEN3)
    problem, solution = "{{ 7*7 }} {% if x %} {problem} \\boxed{}", "{transition} {0} %s"
    assert f"Problem: {problem}\n" in render_teacher(tokenizer, problem, solution)
    assert f"Begin ===\n{solution}\n===" in render_teacher(tokenizer, problem, solution)
