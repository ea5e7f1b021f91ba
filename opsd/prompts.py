"""The student's, the teacher's and the evaluation prompt. The strings are part of the experiment.

Source: the protocol of "When Are Teacher Tokens Reliable?" (arXiv:2605.21606), which takes them from OPSD
(arXiv:2601.18734). Each is one user message that goes through the model's own chat template with a generation
prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError
from tokenizers import Tokenizer

from opsd.errors import MALFORMED, ArtefactError, printable

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
    """Return what the student reads while training: the problem alone."""
    return f"Problem: {problem}\n\n{INSTRUCTION}"


def teacher_message(problem: str, solution: str) -> str:
    """Return what the privileged teacher reads: the problem and its reference solution."""
    return (
        f"Problem: {problem}\n\nHere is a reference solution to this problem:\n"
        f"=== Reference Solution Begin ===\n{solution}\n=== Reference Solution End ===\n"
        f"{TRANSITION}\n{INSTRUCTION}"
    )


def evaluation_message(problem: str) -> str:
    """Return what a model under evaluation reads."""
    return f"{problem}\n\n{INSTRUCTION}"


def close_open_think(rendered: str) -> str:
    """Close a `<think>` that ends the rendered prompt, so that the student answers without a thinking block.

    The templates of DeepSeek-R1-Distill-Llama-8B and Olmo-3-7B-Think ignore `enable_thinking` and end the
    prompt with an open `<think>`. Qwen3 already closes its own, and a problem's text may hold one.
    """
    return f"{rendered}</think>\n\n" if OPEN_THINK_AT_END.search(rendered) else rendered


def _render(tokenizer: PreTrainedTokenizerBase, message: str, *, enable_thinking: bool) -> str:
    if not tokenizer.chat_template:
        raise ArtefactError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; use an instruction-tuned "
            "model, or put a chat_template.jinja beside its tokenizer.json"
        )
    try:
        messages = [{"role": "user", "content": message}]
        settings: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": enable_thinking}
        return cast("str", tokenizer.apply_chat_template(messages, tokenize=False, **settings))
    except (TemplateError, *MALFORMED) as error:
        raise ArtefactError(
            f"the chat template of {tokenizer.name_or_path!r} fails on a user's message "
            f"({type(error).__name__}: {printable(error, 200)}); repair its chat_template.jinja"
        ) from error


@lru_cache(maxsize=4)
def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[re.Pattern[str], Tokenizer]:
    """Return what spells a control token, and a copy of the tokenizer that encodes it as text.

    Control tokens are the special ones and every other added token with punctuation: `<think>` and
    `<tool_call>` are not special in Qwen3, but a model acts on them. Added words and runs of spaces are text.
    """
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special or re.search(r"[^\w\s]", token.content)}
    backend = json.loads(cast("Tokenizer", tokenizer.backend_tokenizer).to_str())
    backend["added_tokens"] = [t for t in backend["added_tokens"] if t["content"] not in names]
    spelled = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.compile(spelled or "(?!)"), Tokenizer.from_str(json.dumps(backend))


def spells_control_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Return whether `text` spells a control token, such as `<|im_end|>` or `<think>`."""
    return _control_tokens(tokenizer)[0].search(text) is not None


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[tuple[str, str]]) -> list[list[int]]:
    """Encode (message, rendered prompt) pairs. A control token that a message spells is encoded as text.

    Raises:
        ArtefactError: such a message is not in its rendered prompt exactly once.
    """
    if not prompts:
        return []
    # The template writes its own control tokens, a beginning-of-sequence among them.
    rendered = [text for _, text in prompts]
    ids = tokenizer(rendered, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    for row, (message, text) in enumerate(prompts):
        if spells_control_token(tokenizer, message):
            ids[row] = _encode_as_text(tokenizer, message.strip(), text)
    return ids


def _encode_as_text(tokenizer: PreTrainedTokenizerBase, message: str, rendered: str) -> list[int]:
    # A tokenizer splits at its control tokens and encodes each part between them alone. So the part with the
    # message extends from the template's last control token before it to the first one after it.
    before, found, after = rendered.partition(message)
    if not found or message in after:
        raise ArtefactError(
            f"the chat template of {tokenizer.name_or_path!r} does not insert a message as it is, but the "
            f"message spells a control token ({message[:80]!r}); remove the row"
        )
    control, plain = _control_tokens(tokenizer)
    head, tail = control.split(before)[-1], control.split(after, maxsplit=1)[0]
    outer = [before.removesuffix(head), after.removeprefix(tail)]
    left, right = tokenizer(outer, add_special_tokens=False)["input_ids"]
    return [*left, *plain.encode(head + message + tail, add_special_tokens=False).ids, *right]


def render_student(tokenizer: PreTrainedTokenizerBase, problem: str) -> str:
    """Render the student's prompt: thinking off, an open `<think>` closed."""
    return close_open_think(_render(tokenizer, student_message(problem), enable_thinking=False))


def render_teacher(tokenizer: PreTrainedTokenizerBase, problem: str, solution: str) -> str:
    """Render the teacher's prompt: thinking on."""
    return _render(tokenizer, teacher_message(problem, solution), enable_thinking=True)


def render_evaluation(
    tokenizer: PreTrainedTokenizerBase, problem: str, *, enable_thinking: bool = True
) -> str:
    """Render the evaluation prompt."""
    return _render(tokenizer, evaluation_message(problem), enable_thinking=enable_thinking)


def encode_student(tokenizer: PreTrainedTokenizerBase, problem: str) -> list[int]:
    """Return the tokens of `render_student`."""
    return encode_prompts(tokenizer, [(student_message(problem), render_student(tokenizer, problem))])[0]


def encode_teacher(tokenizer: PreTrainedTokenizerBase, problem: str, solution: str) -> list[int]:
    """Return the tokens of `render_teacher`."""
    message, rendered = teacher_message(problem, solution), render_teacher(tokenizer, problem, solution)
    return encode_prompts(tokenizer, [(message, rendered)])[0]


def encode_evaluation(
    tokenizer: PreTrainedTokenizerBase, problem: str, *, enable_thinking: bool = True
) -> list[int]:
    """Return the tokens of `render_evaluation`."""
    rendered = render_evaluation(tokenizer, problem, enable_thinking=enable_thinking)
    return encode_prompts(tokenizer, [(evaluation_message(problem), rendered)])[0]
