"""What a merge into bfloat16 keeps of an adapter as small as one of the first steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opsd.merging import UpdateKept, adapted_layers, merged_matrix, update_kept
from tests.rollout.vllm_models import SEVEN, with_adapter

BASE = Path(__file__).parents[1] / "testbed" / "base_model"
RATE, STEPS = 5e-6, 10  # the paper's learning rate; AdamW moves an entry by about the rate in a step


def world_with_adapter(dtype: torch.dtype):
    """The small world's base under an adapter of the size that it has after STEPS steps."""
    from transformers import AutoModelForCausalLM

    model = with_adapter(
        AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype), SEVEN, seed=1, r=64, lora_alpha=128
    )
    generator = torch.Generator().manual_seed(0)
    for _, layer in adapted_layers(model):
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.nn.init.uniform_(down, -(down.shape[1] ** -0.5), down.shape[1] ** -0.5, generator=generator)
        torch.nn.init.uniform_(up, -RATE * STEPS, RATE * STEPS, generator=generator)
    return model


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_share_of_the_update_kept_is_a_float64_computations(dtype: torch.dtype) -> None:
    model = world_with_adapter(dtype)
    each, entries, moved, along, size, error = [], 0, 0, 0.0, 0.0, 0.0
    for _, layer in adapted_layers(model):
        merged = merged_matrix(layer, "default")
        each.append(update_kept(layer, "default", merged))
        base = layer.get_base_layer().weight.double()
        delta = 2.0 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        change = (base + delta).to(dtype).double() - base
        entries, moved = entries + base.numel(), moved + int((change != 0).sum())
        along, size = along + float((change * delta).sum()), size + float((delta * delta).sum())
        error += float(((change - delta) ** 2).sum())
    found = sum(each, UpdateKept()).shares()
    assert found["kept"] == pytest.approx(along / size, abs=0.02)
    assert found["changed"] == pytest.approx(moved / entries, abs=0.002)
    assert found["relative_error"] == pytest.approx((error / size) ** 0.5, abs=0.02)
    assert (found["kept"] < 0.5) == (dtype == torch.bfloat16), "the loss that is to be seen"
    assert len({one.shares()["kept"] for one in each}) == len(each) == 28
