"""Models and problems of the step bench: the small world, and random ones in Qwen3-4B's shapes."""

from __future__ import annotations

import math
import random
from pathlib import Path

TESTBED = Path(__file__).resolve().parents[1] / "testbed"
# Qwen3-4B's config, and its shapes at a size that two CPU cores can step through.
QWEN3_4B = {
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
}
SCALED = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "intermediate_size": 976,
}
VOCABULARY = 151936


def spread(count: int, shortest: int, longest: int, seed: int = 0) -> list[int]:
    """Draw log-normal lengths whose central 99 % spans shortest..longest, cut to that range; tokens."""
    generator = random.Random(seed)
    low, high = math.log(shortest), math.log(longest)
    middle, width = (low + high) / 2, (high - low) / 2 / 2.576
    return [round(math.exp(min(max(generator.gauss(middle, width), low), high))) for _ in range(count)]


def problems_of(args, tokenizer, count: int):
    """Return the first `count` problems of the small world, or random ids with a spread of lengths."""
    from datasets import Dataset, load_dataset

    from opsd.data import Problems, encode_problems

    if args.world == "small":
        rows = load_dataset("json", data_files=str(TESTBED / "data" / "train.jsonl"), split="train")
        rows = rows.select(range(count))
        return encode_problems(rows, tokenizer, source="testbed", max_prompt_length=1024)
    generator = random.Random(0)

    def ids(length: int) -> list[int]:
        return [generator.randrange(VOCABULARY) for _ in range(length)]

    examples = []
    for index, solution in enumerate(spread(count, *args.solution_tokens)):
        problem = ids(generator.randint(30, 90) if not args.full else generator.randint(60, 240))
        teacher = problem + ids(solution)
        examples.append({"index": index, "problem": "", "student_ids": problem, "teacher_ids": teacher})
    return Problems(Dataset.from_list(examples))


def adapted_model(args, options, training):
    """Return the base of the chosen world with a fresh adapter, as in training."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen3Config

    from opsd.models import load_causal_lm

    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    if args.world == "small":
        base = load_causal_lm(options.model_name_or_path, dtype=dtype)
    else:
        shapes = QWEN3_4B if args.full else SCALED
        config = Qwen3Config(
            vocab_size=VOCABULARY,
            tie_word_embeddings=True,
            max_position_embeddings=40960,
            bos_token_id=None,
            eos_token_id=None,
            **shapes,
        )
        with torch.device(args.device):
            base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    lora = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        target_modules=list(options.lora_target_modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, lora).to(training.device)
