"""A model small enough to evaluate in a second: random weights, and a token for each boxed digit.

Its samples are noise, but they hold boxed answers, right and wrong ones, unformatted and truncated ones, so
that every figure of a result has something to count.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

TEMPLATE = (
    "{% for message in messages %}<u>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>"
    "{% if enable_thinking is defined and not enable_thinking %}<n>{% endif %}{% endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<unk>", "<u>", "<a>", "<n>"]
PROBLEMS = 6


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every character is a token, and so is each of `\\boxed{0}` … `\\boxed{9}`."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789+-= .,\n\\{}PWC"
    vocabulary = [*SPECIAL, *characters, *(f"\\boxed{{{digit}}}" for digit in range(10))]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<u>", "<a>", "<n>"],
    )
    fast.chat_template = TEMPLATE
    return fast


def make_model(folder: Path, *, seed: int = 1, head_dim: int = 8, positions: int = 512) -> Path:
    """Write model and tokenizer into `folder` and return it. (vLLM's CPU attention takes multiples of 32.)"""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_problems(path: Path, *, count: int = PROBLEMS) -> Path:
    """A benchmark file of `count` one-digit sums."""
    rows = [{"problem": f"what is {n}+{n % 3}?", "answer": str(n + n % 3)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
