"""The LM head as the objectives use it: hidden states of a few positions -> logits, and back."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from opsd.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Head:
    """A frozen LM head: logits = h Wᵀ + b."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]

    @torch.no_grad()
    def logits(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        """Compute the model's own logits, [C, H] -> [C, V] in the head's dtype, in `out` if given."""
        hidden = hidden.to(self.weight.dtype)
        if out is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        if self.bias is None:
            return torch.mm(hidden, self.weight.T, out=out)
        return torch.addmm(self.bias, hidden, self.weight.T, out=out)

    @torch.no_grad()
    def back_project(self, grad_logits: Tensor) -> Tensor:
        """Turn a gradient with respect to the logits, [C, V], into one with respect to h, [C, H]."""
        return grad_logits.to(self.weight.dtype) @ self.weight


def head_of(model: PreTrainedModel) -> Head:
    """Return the LM head of a causal language model.

    Raises:
        UsageError: the head is not a plain linear layer without scale or soft cap, is trained, or is adapted.
    """
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:
        raise UsageError(
            f"the LM head of {type(model).__name__} is {type(layer).__name__}, not a plain linear layer; "
            "leave lm_head out of the adapter's targets (--lora_target_modules)"
        )
    if layer.weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad):
        raise UsageError(
            "the LM head is trainable; the chunked objectives form gradients for a frozen head only. "
            "Freeze lm_head (with tied embeddings, embed_tokens too)"
        )
    config = model.config.get_text_config()
    for name in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
        if getattr(config, name, None) not in (None, 1.0):
            value = getattr(config, name)
            raise UsageError(
                f"config.json sets {name} {value}, which is not supported; choose a model without it"
            )
    return Head(layer.weight, layer.bias)


def attach_hidden_forward(model: PreTrainedModel) -> None:
    """Add the keyword `positions` to a causal LM's forward, which then returns hidden states, not logits.

    `model(input_ids, positions=p)` returns the last hidden states [N, H] at p [N] of the flat [B·T] grid. It
    remains a forward, for adapters, gradient checkpointing, autocast and DistributedDataParallel.
    """
    original = model.forward

    @functools.wraps(original)
    def forward(*args, positions: Tensor | None = None, **kwargs):
        if positions is None:
            return original(*args, **kwargs)
        hidden = model.get_decoder()(input_ids=kwargs["input_ids"], use_cache=False).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, positions)

    model.forward = forward


@torch.no_grad()
def check_head(model: PreTrainedModel, head: Head) -> None:
    """Compare `head` with the model's own logits on a few tokens.

    Raises:
        UsageError: they differ, or the model is not causal, so that padding would change its hidden states.
    """
    device = head.weight.device
    ids = torch.arange(6, device=device).unsqueeze(0) % head.weight.shape[0]
    was_training = model.training
    model.eval()
    own = model(input_ids=ids[:, :4], use_cache=False).logits[0].float()
    hidden = model(input_ids=ids[:, :4], positions=torch.arange(4, device=device))
    longer = model(input_ids=ids, positions=torch.arange(4, device=device))
    ours = head.logits(hidden).float()
    model.train(was_training)
    tolerance = 1e-4 if head.weight.dtype == torch.float32 else 5e-2
    if not torch.allclose(own, ours, rtol=tolerance, atol=tolerance * float(own.abs().max().clamp(min=1.0))):
        raise UsageError(
            f"{type(model).__name__} changes its logits after the LM head (largest difference "
            f"{float((own - ours).abs().max()):.3g}); choose a model that does not"
        )
    if not torch.allclose(hidden.float(), longer.float(), rtol=tolerance, atol=10 * tolerance):
        raise UsageError(
            f"{type(model).__name__} is not causal: a token's hidden state changes with what follows it. "
            "Use a decoder-only language model"
        )
