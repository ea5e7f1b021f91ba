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
# name -> (model type, its own settings, expected scale, expected soft cap)
ARCHITECTURES = {
    "qwen3": ("qwen3", {}, 1.0, None),
    "llama": ("llama", {}, 1.0, None),
    "olmo3": ("olmo3", {"sliding_window": 3}, 1.0, None),
    "gemma2": ("gemma2", {"final_logit_softcapping": 1.5, "query_pre_attn_scalar": 16}, 1.0, 1.5),
    "cohere": ("cohere", {"logit_scale": 0.25}, 0.25, None),
    "granite": ("granite", {"logits_scaling": 4.0}, 0.25, None),
}


def tiny(kind: str, *, tied: bool, dtype=torch.float32, **settings):
    model_type, own, _, _ = ARCHITECTURES[kind]
    config = CONFIG_MAPPING[model_type](**{**COMMON, **own, **settings, "tie_word_embeddings": tied})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Logits of several units, so that a scale or a soft cap that is not applied shows.
            parameter.mul_(8.0) if parameter.ndim == 2 else parameter
    return model.to(dtype).eval().requires_grad_(False)


IDS = torch.arange(14).reshape(2, 7) % VOCABULARY
# Position 3 of both sequences and position 6 of the second, out of order.
POSITIONS = torch.tensor([13, 3, 10])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_are_the_models_own(kind, tied):
    model = tiny(kind, tied=tied)
    head = head_of(model)
    assert (head.scale, head.softcap) == ARCHITECTURES[kind][2:]
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


@pytest.mark.parametrize(
    "head",
    [
        Head(torch.randn(9, 4, dtype=torch.float64), None),
        Head(torch.randn(9, 4, dtype=torch.float64), torch.randn(9, dtype=torch.float64), 0.5, 2.0),
    ],
    ids=["plain", "bias_scale_softcap"],
)
def test_the_way_back_is_the_gradient(head):
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    logits = (hidden @ head.weight.T + (0 if head.bias is None else head.bias)) * head.scale
    logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    upstream = torch.randn(5, 9, dtype=torch.float64)
    (expected,) = torch.autograd.grad((logits * upstream).sum(), hidden)
    ours = head.logits(hidden.detach())
    torch.testing.assert_close(ours, logits.detach())
    slope = head.softcap_slope(ours)
    torch.testing.assert_close(head.back_project(upstream if slope is None else upstream * slope), expected)


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


@pytest.mark.parametrize("kind", ["cohere", "gemma2"])
def test_a_scale_or_soft_cap_that_the_head_does_not_have_is_noticed(kind):
    model = tiny(kind, tied=True)
    attach_hidden_forward(model)
    with pytest.raises(UsageError, match="ForCausalLM changes its logits after the LM head"):
        check_head(model, Head(head_of(model).weight))


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


def test_attaching_twice_is_refused():
    model = tiny("qwen3", tied=False)
    attach_hidden_forward(model)
    with pytest.raises(ValueError, match="already takes `positions`"):
        attach_hidden_forward(model)
