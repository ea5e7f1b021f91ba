"""The head of real architectures: their own logits and gradients, and what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from opsd.errors import UsageError
from opsd.head import Head, attach_hidden_forward, check_head, head_of

VOCABULARY = 48
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
ARCHITECTURES = {"qwen3": {}, "llama": {}, "olmo3": {"sliding_window": 3}}
REFUSED = {
    "gemma2": {"final_logit_softcapping": 30.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
}


def tiny(kind: str, *, tied: bool, dtype=torch.float32):
    own = (ARCHITECTURES | REFUSED)[kind]
    config = CONFIG_MAPPING[kind](**COMMON, **own, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0) if parameter.ndim == 2 else parameter  # logits of several units
    return model.to(dtype).eval().requires_grad_(False)


IDS = torch.arange(14).reshape(2, 7) % VOCABULARY
# Position 3 of both sequences and position 6 of the second, out of order.
POSITIONS = torch.tensor([13, 3, 10])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_are_the_models_own(kind, tied):
    model = tiny(kind, tied=tied)
    head = head_of(model)
    assert (head.weight is model.get_input_embeddings().weight) == tied
    own = model(input_ids=IDS).logits
    attach_hidden_forward(model)
    hidden = model(input_ids=IDS, positions=POSITIONS)
    assert hidden.shape == (3, 32)
    torch.testing.assert_close(head.logits(hidden), own.flatten(0, 1)[POSITIONS], rtol=1e-5, atol=1e-5)
    assert torch.equal(model(input_ids=IDS).logits, own), "an ordinary call is as before"
    check_head(model, head)
    model = tiny(kind, tied=tied, dtype=torch.bfloat16)
    attach_hidden_forward(model)
    check_head(model, head_of(model))


@pytest.mark.parametrize("bias", [None, torch.randn(9, dtype=torch.float64)], ids=["plain", "bias"])
def test_the_way_back_is_the_gradient(bias):
    head = Head(torch.randn(9, 4, dtype=torch.float64), bias)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    logits = nn.functional.linear(hidden, head.weight, bias)
    upstream = torch.randn(5, 9, dtype=torch.float64)
    (expected,) = torch.autograd.grad((logits * upstream).sum(), hidden)
    for out in (None, torch.empty_like(upstream)):
        torch.testing.assert_close(head.logits(hidden.detach(), out=out), logits.detach())
    torch.testing.assert_close(head.back_project(upstream), expected)


def test_a_model_that_sees_the_future_is_refused():
    model = tiny("llama", tied=False)
    attach_hidden_forward(model)
    backbone = model.model.forward

    def bidirectional(input_ids, **kwargs):
        tokens = input_ids.shape[1]
        mask = torch.zeros(1, 1, tokens, tokens)
        return backbone(**{**kwargs, "attention_mask": mask}, input_ids=input_ids)

    model.model.forward = bidirectional
    with pytest.raises(UsageError, match="LlamaForCausalLM is not causal"):
        check_head(model, head_of(model))


def test_a_head_with_a_bias_is_taken_with_it():
    model = tiny("llama", tied=False)
    model.lm_head = nn.Linear(32, VOCABULARY, bias=True).requires_grad_(False)
    attach_hidden_forward(model)
    head = head_of(model)
    assert head.bias is model.lm_head.bias
    check_head(model, head)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_scale_or_soft_cap_is_refused(kind):
    """By the configuration's field; one of an unknown name by comparing logits."""
    model = tiny(kind, tied=True)
    ((field, value),) = REFUSED[kind].items()
    with pytest.raises(
        UsageError, match=rf"config\.json sets {field} {value}, .*; choose a model without it"
    ):
        head_of(model)
    attach_hidden_forward(model)
    with pytest.raises(UsageError, match="ForCausalLM changes its logits after the LM head"):
        check_head(model, Head(model.get_output_embeddings().weight * 1.1))


def test_a_head_that_is_trainable_adapted_or_missing_is_refused():
    model = tiny("qwen3", tied=False)
    model.lm_head.weight.requires_grad_()
    with pytest.raises(UsageError, match=r"the LM head is trainable.*Freeze lm_head"):
        head_of(model)
    with pytest.raises(UsageError, match="NoneType, not a plain linear layer"):
        head_of(model.model)
    adapted = get_peft_model(tiny("qwen3", tied=False), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(UsageError, match="leave lm_head out of the adapter's targets"):
        head_of(adapted.get_base_model())
