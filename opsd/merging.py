"""Merge an adapter out of place: the base weights are never written.

PEFT's merge_adapter/unmerge_adapter adds and subtracts the delta in place; in bfloat16 that drifts the base,
which is the teacher. Here W + scale · B A is formed in float32, one matrix at a time, and cast to W's dtype
once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
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


def _parts(layer: LoraLayer, adapter: str) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return W as it is, A [r, in] and B [out, r] in float32 on W's device, and the scale."""
    parts = (layer.get_base_layer(), layer.lora_A[adapter], layer.lora_B[adapter])
    weight, down, up = (cast(nn.Linear, part).weight for part in parts)
    down, up = (matrix.to(weight.device, torch.float32) for matrix in (down, up))
    return weight, down, up, float(layer.scaling[adapter])


@torch.no_grad()
def merged_matrix(
    layer: LoraLayer,
    adapter: str,
    *,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return W + scale · B A, formed in float32 and cast to `dtype` (default W's): a new [out, in] tensor.

    With a generator (on the CPU, as W then is) it is rounded by `stochastic_bfloat16` instead.
    """
    weight, down, up, scale = _parts(layer, adapter)
    merged = torch.addmm(weight.float(), up, down, alpha=scale)
    return merged.to(dtype or weight.dtype) if generator is None else stochastic_bfloat16(merged, generator)


def stochastic_bfloat16(value: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to one of the two neighbours in bfloat16, so that the mean over draws is the value.

    bfloat16 is the upper half of float32's bits. A uniform number below 2^16, added to the lower half,
    carries into the upper one with the probability of the neighbour that is larger in magnitude.
    """
    noise = torch.randint(2**16, value.shape, dtype=torch.int32, generator=generator)
    bits = (value.contiguous().view(torch.int32) + noise) & -(2**16)
    return bits.view(torch.float32).to(torch.bfloat16)


@dataclass(frozen=True)
class UpdateKept:
    """How much of a LoRA update D = scale · B A is left in merged matrices M of a dtype coarser than D.

    An entry of D below half the spacing of W's dtype is lost. Sums over the entries of one or more matrices;
    `sum(each, UpdateKept())` gives those of all.
    """

    entries: int = 0
    moved: int = 0  # entries where M differs from W
    along: float = 0.0  # ⟨M − W, D⟩
    size: float = 0.0  # ⟨D, D⟩
    error: float = 0.0  # ⟨M − W − D, M − W − D⟩

    def __add__(self, other: UpdateKept) -> UpdateKept:
        return UpdateKept(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def shares(self) -> dict[str, float]:
        """Return entries changed, projection of D kept (1 = all) and relative error; NaN for D = 0."""
        size = self.size or math.nan
        return {
            "changed": self.moved / self.entries if self.entries else math.nan,
            "kept": self.along / size,
            "relative_error": math.sqrt(self.error / size) if self.size else math.nan,
        }


@torch.no_grad()
def update_kept(layer: LoraLayer, adapter: str, merged: Tensor) -> UpdateKept:
    """Compare `merged`, which `merged_matrix` made of `layer`, with its W and its update."""
    weight, down, up, scale = _parts(layer, adapter)
    delta, change = scale * (up @ down), merged.float() - weight.float()
    along, size, error = (
        float(product.sum(dtype=torch.float64))
        for product in (change * delta, delta.square(), (change - delta).square())
    )
    return UpdateKept(delta.numel(), int(change.count_nonzero()), along, size, error)


def adapted_names(model: PeftModel) -> list[str]:
    """Return the names that `adapted_layers` yields."""
    return [name for name, _ in adapted_layers(model)]
