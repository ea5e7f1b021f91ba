"""Tiny random models of the three architectures, their adapters, and naive versions of what the engine does.

vLLM's CPU attention needs a head size that is a multiple of 32, and caches prefixes in blocks of 128 tokens.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

VOCABULARY = 160
END_IDS = [1, 11, 29, 47, 83]
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed (bash launchers/test.sh installs it)",
)


def config_of(kind: str, tied: bool):
    """A configuration of `kind` (qwen3, llama, olmo3) with 2 layers and grouped key-value heads."""
    from transformers import LlamaConfig, Olmo3Config, Qwen3Config

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": END_IDS[0],
        "pad_token_id": 0,
    }
    if kind == "olmo3":
        return Olmo3Config(sliding_window=8, **common)
    if kind == "llama":
        # Biases next to the weights of the fused layers, which llama-like checkpoints may have.
        return LlamaConfig(head_dim=32, attention_bias=True, mlp_bias=True, **common)
    return Qwen3Config(head_dim=32, **common)


def random_model(kind: str, tied: bool, end_ids: list[int] | None = None):
    """A random float32 model whose next token depends strongly on the context."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_config(config_of(kind, tied), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.12, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    model.generation_config = GenerationConfig(eos_token_id=end_ids or [END_IDS[0]], pad_token_id=0)
    return model


def make_model(kind: str, tied: bool, folder: Path, end_ids: list[int] | None = None):
    """A `random_model`, saved to `folder`."""
    model = random_model(kind, tied, end_ids)
    model.save_pretrained(folder)
    return model


def with_adapter(model, targets: list[str], seed: int, **options):
    """`model` under a random rank-4 LoRA of strong effect; the model itself is not copied."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, **options}
    adapted = get_peft_model(model, LoraConfig(**settings))
    randomise(adapted, seed)
    return adapted


def randomise(adapted, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.15, generator=generator)


def naive_merged(base, adapted):
    """A copy of `base` with scale · B A added to every adapted weight, from the adapter's state dict."""
    state = {name: value for name, value in adapted.state_dict().items() if "lora_A" in name}
    merged = copy.deepcopy(base)
    parameters = dict(merged.named_parameters())
    assert state
    for name, down in state.items():
        up = adapted.state_dict()[name.replace("lora_A", "lora_B")]
        weight = name.removeprefix("base_model.model.").replace("lora_A.default.", "")
        with torch.no_grad():
            parameters[weight] += 2.0 * (up.float() @ down.float())
    return merged


@torch.no_grad()
def greedy(model, prompt: list[int], length: int, end_ids: list[int], presence: float = 0.0) -> list[int]:
    """The likeliest continuation, one full forward pass a token."""
    tokens: list[int] = []
    while len(tokens) < length:
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1].float()
        logits[list(set(tokens))] -= presence
        tokens.append(int(logits.argmax()))
        if tokens[-1] in end_ids:
            break
    return tokens


def prompts() -> list[list[int]]:
    """Prompts of unequal length; the last is longer than a block of vLLM's prefix cache."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in (3, 1, 17, 140)]
