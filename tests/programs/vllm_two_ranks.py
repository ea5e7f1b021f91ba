"""Run by test_rollout_vllm.py: torchrun --nproc_per_node 2 tests/programs/vllm_two_ranks.py MODEL FOLDER

Each rank writes what it found to FOLDER/<rank>: two ranks that print may share a line.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from opsd.rollout.engine import Request, Sampling
from opsd.rollout.vllm import VLLMEngine
from tests.rollout.vllm_models import END_IDS, SEVEN, greedy, naive_merged, prompts, with_adapter

LENGTH = 16


def sample(folder: str, tensor_parallel: int, pushed_rank: int | None = None) -> str:
    """Compare the completions of this rank's requests after two pushes with the merged model's."""
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    adapted = with_adapter(copy.deepcopy(base), SEVEN, seed=2)
    merged = naive_merged(base, adapted)
    engine = VLLMEngine(
        folder, max_model_len=192, tensor_parallel_size=tensor_parallel, pushed_rank=pushed_rank
    )
    engine.push_weights(with_adapter(copy.deepcopy(base), SEVEN, seed=1))
    engine.push_weights(adapted)
    mine = [*prompts(), [9, 9]][dist.get_rank() :: 2]
    delivered = []
    completions = engine.generate(
        [Request(prompt, 0) for prompt in mine],
        Sampling(temperature=0, max_new_tokens=LENGTH),
        on_finish=lambda index, completion: delivered.append(index),
    )
    right = sum(
        c.token_ids == greedy(merged, prompt, LENGTH, END_IDS)
        for c, prompt in zip(completions, mine, strict=True)
    )
    assert sorted(delivered) == list(range(len(mine)))
    engine.close()
    count = torch.ones(1)
    dist.all_reduce(count)
    return f"{right} right, group {'alive' if count == 2 else 'dead'}"


def main(folder: str, found: str) -> None:
    dist.init_process_group("gloo")
    shared, own, adapter = sample(folder, 2), sample(folder, 1), sample(folder, 2, pushed_rank=4)
    text = f"shared engine {shared}; own engine {own}; adapter in a shared engine {adapter}"
    (Path(found) / str(dist.get_rank())).write_text(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
