"""Weight pushes into the real engine: afterwards it samples from base + adapter, or says that it does not."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from opsd.errors import UsageError
from opsd.rollout import vllm_push
from opsd.rollout.engine import Request, Sampling
from opsd.rollout.vllm import VLLMEngine
from opsd.rollout.vllm_push import WeightPushError
from tests.rollout.vllm_models import (
    SEVEN,
    greedy,
    make_model,
    naive_merged,
    needs_vllm,
    prompts,
    randomise,
    with_adapter,
)

pytestmark = [pytest.mark.vllm, needs_vllm]

LENGTH = 12
GREEDY = Sampling(temperature=0, max_new_tokens=LENGTH)
SUBSETS = {
    "all seven": SEVEN,
    "one of a fused three": ["q_proj"],
    "one of each fused group": ["v_proj", "up_proj"],
    "unfused": ["o_proj", "down_proj"],
    "one layer": r"model\.layers\.1\.self_attn\.k_proj",
}


@dataclass
class World:
    kind: str
    tied: bool
    base: Any
    engine: VLLMEngine
    logits: torch.Tensor  # of the base for prompts()[2], from before the engine existed

    def adapted(self, targets, seed: int, **options):
        return with_adapter(copy.deepcopy(self.base), targets, seed, **options)

    def engine_tokens(self) -> list[list[int]]:
        return [c.token_ids for c in self.engine.generate([Request(p, 0) for p in prompts()], GREEDY)]

    def merged_tokens(self, adapted) -> list[list[int]]:
        return continuations(naive_merged(self.base, adapted))


def continuations(model) -> list[list[int]]:
    return [greedy(model, prompt, LENGTH, [1]) for prompt in prompts()]


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompts()[2]])).logits


@pytest.fixture(
    scope="module",
    params=[(kind, tied) for kind in ("qwen3", "llama", "olmo3") for tied in (True, False)],
    ids=lambda param: f"{param[0]}-{'tied' if param[1] else 'untied'}",
)
def world(request, tmp_path_factory):
    kind, tied = request.param
    folder = tmp_path_factory.mktemp(kind)
    base = make_model(kind, tied, folder)
    logits = logits_of(base)
    engine = VLLMEngine(str(folder), max_model_len=192)
    yield World(kind, tied, base, engine, logits)
    engine.close()


def test_the_models_class_still_works_for_the_trainer(world):
    """vLLM's Transformers backend decorates transformers' class in place (Olmo3), so that it needs vLLM."""
    assert torch.equal(logits_of(world.base), world.logits)
    fresh = type(world.base)(world.base.config)
    fresh.load_state_dict(world.base.state_dict())
    assert torch.equal(logits_of(fresh.eval()), world.logits)
    assert world.engine_tokens() == continuations(world.base), "before a push"


@pytest.mark.parametrize("subset", SUBSETS)
def test_greedy_completions_equal_the_merged_models(world, subset):
    """Each subset follows another, whose layers must be the base again where this one has no matrix."""
    adapted = world.adapted(SUBSETS[subset], seed=1)
    for seed in (1, 2):
        randomise(adapted, seed)
        world.engine.push_weights(adapted)
        assert world.engine_tokens() == world.merged_tokens(adapted)


def test_a_push_that_lacks_a_weight_is_an_error_until_a_complete_one(world, monkeypatch):
    """vLLM itself takes q_proj without k and v and says nothing; its own counts tell."""
    adapted = world.adapted(SEVEN, seed=4)
    complete = vllm_push.pushed_weights

    def push_without(*lost: str) -> None:
        def stream(model, report):
            return (item for item in complete(model, report) if not item[0].endswith(lost))

        monkeypatch.setattr(vllm_push, "pushed_weights", stream)
        world.engine.push_weights(adapted)

    with pytest.raises(WeightPushError, match=r"1 layers .* weights: model\.layers\.1\.mlp\.gate_up_proj"):
        push_without("layers.1.mlp.up_proj.weight")
    with pytest.raises(RuntimeError, match="last weight push did not succeed"):
        world.engine_tokens()
    with pytest.raises(
        WeightPushError, match=r"layers\.0\.self_attn\.qkv_proj .*layers\.1\.self_attn\.qkv_proj"
    ):
        push_without("k_proj.weight", "v_proj.weight")
    with pytest.raises(WeightPushError, match=r"model\.layers\.0\.\S*norm \(0 of 128 elements\)"):
        push_without("norm.weight")
    monkeypatch.undo()

    def breaks(layer, adapter):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(vllm_push, "merged_matrix", breaks)
    with pytest.raises(WeightPushError, match="could not be merged: out of memory"):
        world.engine.push_weights(adapted)
    monkeypatch.undo()
    world.engine.push_weights(adapted)
    assert world.engine_tokens() == world.merged_tokens(adapted)


def test_the_base_weights_are_bit_identical_after_many_pushes(world):
    """In bfloat16, where adding and subtracting the adapter in place would drift."""
    adapted = with_adapter(copy.deepcopy(world.base).to(torch.bfloat16), SEVEN, seed=6)
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    for _ in range(150 if (world.kind, world.tied) == ("qwen3", True) else 3):
        world.engine.push_weights(adapted)
    after = adapted.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # The engine computes in float32 from what was rounded to bfloat16 once: the base, and W + scale B A.
    rounded, merged = copy.deepcopy(world.base), copy.deepcopy(world.base).to(torch.bfloat16).float()
    state = naive_merged(merged, adapted).to(torch.bfloat16).state_dict()
    layers = {name: value for name, value in state.items() if ".layers." in name}
    rounded.load_state_dict(layers, strict=False)
    assert world.engine_tokens() == continuations(rounded)


def test_the_output_layer(world):
    """Last: later pushes of another adapter would leave the engine's output layer as it is here."""
    adapted = world.adapted(["lm_head", "k_proj"], seed=3)
    with pytest.raises(
        UsageError, match="ties to its embedding" if world.tied else "--rollout_weights merged"
    ):
        vllm_push.check_pushable(adapted, merged=False)
    if world.tied:
        with pytest.raises(UsageError, match="ties to its embedding"):
            vllm_push.check_pushable(adapted)
    else:
        world.engine.push_weights(adapted)
        assert world.engine_tokens() == world.merged_tokens(adapted)


@pytest.mark.parametrize("kind", ["qwen3", "llama", "olmo3"])
def test_greedy_completions_equal_the_adapters_after_each_push_of_it(kind, tmp_path, monkeypatch):
    base = make_model(kind, False, tmp_path)
    adapted = with_adapter(copy.deepcopy(base), SEVEN, seed=1)
    world = World(
        kind, False, base, VLLMEngine(str(tmp_path), max_model_len=192, pushed_rank=4), logits_of(base)
    )
    names = []
    for seed in range(1, 6):
        randomise(adapted, seed)
        assert world.engine.push_weights(adapted, measure=True) == {}, "nothing is merged"
        assert world.engine_tokens() == continuations(adapted)
        names.append((world.engine._lora.lora_name, world.engine._lora.lora_int_id))
    assert len(set(names)) == 5, "a name that is used again would find its predecessor's key-value blocks"
    assert not list(Path(tempfile.gettempdir()).glob("opsd-adapter-*"))

    # vLLM reads matrices of a layer that it does not have without a word.
    state = vllm_push.get_peft_model_state_dict
    monkeypatch.setattr(
        vllm_push,
        "get_peft_model_state_dict",
        lambda *args, **kwargs: {
            name.replace(".layers.1.", ".layers.7."): value for name, value in state(*args, **kwargs).items()
        },
    )
    with pytest.raises(WeightPushError, match=r"no layer for model\.layers\.7"):
        world.engine.push_weights(adapted)
    with pytest.raises(RuntimeError, match="last weight push did not succeed"):
        world.engine_tokens()
    world.engine.close()
