"""The student's, the teacher's and the evaluation prompt. The strings are part of the experiment.

Source: the protocol of "When Are Teacher Tokens Reliable?" (arXiv:2605.21606), which takes them from OPSD
(arXiv:2601.18734). Each is one user message that goes through the model's own chat template with a generation
prompt.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from opsd.errors import ArtefactError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

TRANSITION = (
    "\n\nAfter reading the reference solution above, make sure you truly understand the reasoning behind "
    "each step — do not copy or paraphrase it. Now, using your own words and independent reasoning, derive "
    "the same final answer to the problem above. Think step by step, explore different approaches, and "
    "don't be afraid to backtrack or reconsider if something doesn't work out:\n"
)

OPEN_THINK_AT_END = re.compile(r"<think\s*>\s*$")


def student_message(problem: str) -> str:
    """What the student reads while training: the problem alone."""
    return f"Problem: {problem}\n\n{INSTRUCTION}"


def teacher_message(problem: str, solution: str) -> str:
    """What the privileged teacher reads: the problem and its reference solution."""
    return (
        f"Problem: {problem}\n\nHere is a reference solution to this problem:\n"
        f"=== Reference Solution Begin ===\n{solution}\n=== Reference Solution End ===\n"
        f"{TRANSITION}\n{INSTRUCTION}"
    )


def evaluation_message(problem: str) -> str:
    """What a model under evaluation reads."""
    return f"{problem}\n\n{INSTRUCTION}"


def close_open_think(rendered: str) -> str:
    """Close a `<think>` that ends the rendered prompt, so that the student answers without a thinking block.

    The templates of DeepSeek-R1-Distill-Llama-8B and Olmo-3-7B-Think ignore `enable_thinking` and end the
    prompt with an open `<think>`. Only the very end is looked at: the problem's own text may contain the same
    characters, and Qwen3 already renders `<think>\\n\\n</think>\\n\\n`.
    """
    return f"{rendered}</think>\n\n" if OPEN_THINK_AT_END.search(rendered) else rendered


def _render(tokenizer: PreTrainedTokenizerBase, message: str, *, enable_thinking: bool) -> str:
    if not tokenizer.chat_template:
        raise ArtefactError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use an instruction-tuned "
            "model, or put a chat_template.jinja beside its tokenizer.json"
        )
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": message}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=enable_thinking,
    )


def encode_rendered(tokenizer: PreTrainedTokenizerBase, rendered: list[str]) -> list[list[int]]:
    """Token ids of rendered prompts, many at once.

    The template has written the special tokens already; a second beginning-of-sequence would shift the rest.
    """
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def _encode(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
    return encode_rendered(tokenizer, [rendered])[0]


def render_student(tokenizer: PreTrainedTokenizerBase, problem: str) -> str:
    """The student's rendered prompt, thinking off, with the think patch applied."""
    return close_open_think(_render(tokenizer, student_message(problem), enable_thinking=False))


def render_teacher(tokenizer: PreTrainedTokenizerBase, problem: str, solution: str) -> str:
    """The teacher's rendered prompt, thinking on."""
    return _render(tokenizer, teacher_message(problem, solution), enable_thinking=True)


def render_evaluation(
    tokenizer: PreTrainedTokenizerBase, problem: str, *, enable_thinking: bool = True
) -> str:
    """The evaluation prompt, thinking on unless asked otherwise."""
    return _render(tokenizer, evaluation_message(problem), enable_thinking=enable_thinking)


def encode_student(tokenizer: PreTrainedTokenizerBase, problem: str) -> list[int]:
    """Token ids of `render_student`."""
    return _encode(tokenizer, render_student(tokenizer, problem))


def encode_teacher(tokenizer: PreTrainedTokenizerBase, problem: str, solution: str) -> list[int]:
    """Token ids of `render_teacher`."""
    return _encode(tokenizer, render_teacher(tokenizer, problem, solution))


def encode_evaluation(
    tokenizer: PreTrainedTokenizerBase, problem: str, *, enable_thinking: bool = True
) -> list[int]:
    """Token ids of `render_evaluation`."""
    return _encode(tokenizer, render_evaluation(tokenizer, problem, enable_thinking=enable_thinking))
