"""The small world's tokenizer: byte-level BPE trained on the prompts and solutions, digits and signs apart.

`build_tokenizer` gives a `PreTrainedTokenizerFast` that any `AutoTokenizer` (vLLM's too) loads, with a chat
template that follows Qwen3's: `enable_thinking=False` renders an empty thinking block behind the assistant's
header, anything else leaves the header as it is.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from opsd.prompts import evaluation_message, student_message, teacher_message
from testbed.problems import draw_problem, write_solution

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINK = ("<think>", "</think>")
VOCABULARY = 1280

# Each digit alone, and each sign behind a digit; everything else in runs up to the next digit, so that what a
# prompt repeats becomes one token ("assistant\n", ". Then, ", the request to reason step by step): the
# teacher's prompt has 120 tokens where one token per word takes 270.
PIECES = r"\d|(?<=\d)[+\-=]|[^\d]+"

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def corpus(rows: int = 1000) -> Iterator[str]:
    """Return the texts to learn merges from: the parts of prompts between special tokens."""
    rng = random.Random("tokenizer")
    for _ in range(rows):
        problem = draw_problem(rng, rng.randint(4, 9))
        solution = write_solution(problem, rng).text
        yield f"user\n{student_message(problem.text)}"
        yield f"user\n{evaluation_message(problem.text)}"
        yield f"user\n{teacher_message(problem.text, solution)}"
        yield from ("assistant\n", "\n", "\n\n", solution)


def build_tokenizer(pieces: str = PIECES, texts: Iterable[str] | None = None) -> PreTrainedTokenizerFast:
    """Train the tokenizer, deterministically, on `texts` split at `pieces`; by default this world's."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus() if texts is None else texts, trainer)
    # As in Qwen3 the thinking marks are single tokens, but not special ones: decoding keeps them.
    tokenizer.add_tokens(list(THINK))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
