"""Merge an adapter out of place: the base weights are never written.

PEFT's merge_adapter/unmerge_adapter adds and subtracts the delta in place; in bfloat16 that drifts the base,
which is the teacher. Here W + scale · B A is formed in float32, one matrix at a time, and cast to W's dtype
once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from opsd.errors import UsageError

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer


def adapted_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Yield (base model's weight name, LoRA layer) of every adapted linear layer, in module order.

    Raises:
        UsageError: a merge is more than W + scale · B A: several active adapters, DoRA, biases, other layers
            than nn.Linear (embeddings), fully trained modules.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    active, *others = model.active_adapters
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, LoraLayer | ModulesToSaveWrapper):
            continue
        if isinstance(module, ModulesToSaveWrapper):
            wrong = "is fully trained (modules_to_save)"
        elif others:
            wrong = f"has {1 + len(others)} active adapters"
        elif active not in module.lora_A or not isinstance(module.get_base_layer(), nn.Linear):
            wrong = f"is a {type(module.get_base_layer()).__name__}"
        elif active in module.lora_magnitude_vector or module.lora_bias.get(active):
            wrong = "uses DoRA or a LoRA bias"
        elif module.merged:
            wrong = "already holds a merged adapter"
        else:
            yield f"{name}.weight", module
            continue
        raise UsageError(f"{name} {wrong}; only one plain LoRA adapter on linear layers is merged")


@torch.no_grad()
def merged_matrix(layer: LoraLayer, adapter: str) -> Tensor:
    """Return W + scale · B A, formed in float32 and cast to W's dtype: a new [out, in] tensor beside W."""
    parts = (layer.get_base_layer(), layer.lora_A[adapter], layer.lora_B[adapter])
    weight, down, up = (cast(nn.Linear, part).weight for part in parts)
    down, up = (matrix.to(weight.device, torch.float32) for matrix in (down, up))
    return torch.addmm(weight.float(), up, down, alpha=float(layer.scaling[adapter])).to(weight.dtype)


def adapted_names(model: PeftModel) -> list[str]:
    """Return the names that `adapted_layers` yields."""
    return [name for name, _ in adapted_layers(model)]
