"""Base + adapter as merged matrices, out of place: the base weights are never written.

PEFT's merge_adapter/unmerge_adapter adds and subtracts the delta in place; in bf16 that drifts the base,
which is the teacher. Here W + scale · B A is formed in float32, one matrix at a time, and cast to W's dtype
once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from opsd.errors import UsageError

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer


def adapted_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """(base model's weight name, LoRA layer) of every adapted linear layer, in module order.

    Raises:
        UsageError: the adapter is of a kind whose merge is more than W + scale · B A (DoRA, biases,
        embeddings,
            several active adapters, fully trained modules).
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    base = model.get_base_model()
    if len(model.active_adapters) != 1:
        raise UsageError(
            f"{len(model.active_adapters)} adapters are active; activate exactly one to merge it"
        )
    for name, module in base.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            raise UsageError(
                f"{name} is fully trained (modules_to_save); only LoRA on linear layers is merged"
            )
        if not isinstance(module, LoraLayer):
            continue
        active = model.active_adapters[0]
        if active not in module.lora_A:
            raise UsageError(
                f"{name} is adapted, but not a linear layer; leave embeddings out of the targets"
            )
        if not isinstance(module.get_base_layer(), nn.Linear):
            kind = type(module.get_base_layer()).__name__
            raise UsageError(f"{name} is a {kind}; only LoRA on nn.Linear is merged")
        if active in getattr(module, "lora_magnitude_vector", {}) or getattr(module, "lora_bias", {}).get(
            active
        ):
            raise UsageError(
                f"{name} uses DoRA or a LoRA bias; train with use_dora=False and lora_bias=False"
            )
        if module.merged:
            raise UsageError(f"{name} already holds a merged adapter; load the base and the adapter afresh")
        yield f"{name}.weight", module


@torch.no_grad()
def merged_matrix(layer: LoraLayer, adapter: str) -> Tensor:
    """W + scale · B A in float32, cast to W's dtype: a new [out, in] tensor on W's device."""
    weight = layer.get_base_layer().weight
    down = layer.lora_A[adapter].weight.to(weight.device, torch.float32)
    up = layer.lora_B[adapter].weight.to(weight.device, torch.float32)
    return torch.addmm(weight.float(), up, down, alpha=float(layer.scaling[adapter])).to(weight.dtype)


def merged_weights(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face weight name, merged matrix) of every adapted layer, formed one at a time.

    Raises:
        UsageError: as `adapted_layers`.
    """
    for name, layer in adapted_layers(model):
        yield name, merged_matrix(layer, model.active_adapters[0])


def adapted_names(model: PeftModel) -> list[str]:
    """The names that `merged_weights` yields."""
    return [name for name, _ in adapted_layers(model)]
