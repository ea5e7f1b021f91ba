"""HFEngine: seeded draws, exact distribution, end-of-sequence, log-probabilities, state left untouched."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from opsd.errors import UsageError
from opsd.rollout.engine import Completion, Request, Sampling
from opsd.rollout.hf import HFEngine
from opsd.rollout.seeded_sampling import inverse_transform
from tests.rollout.vllm_models import END_IDS, VOCABULARY, random_model, with_adapter

EOS = END_IDS[0]


def tiny_model() -> torch.nn.Module:
    return random_model("qwen3", tied=False)


def engine_of(model: torch.nn.Module, *, pad: int | None = 0, batch_size: int = 32) -> HFEngine:
    return HFEngine(model, SimpleNamespace(eos_token_id=EOS, pad_token_id=pad), batch_size=batch_size)


def requests_of(count: int, *, seed: int = 100) -> list[Request]:
    lengths = [3, 7, 5, 1, 9, 4]
    return [
        Request([(7 * index + 5 * place) % 40 + 4 for place in range(lengths[index % 6])], seed + index)
        for index in range(count)
    ]


def naive_filtered(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities [V] after temperature, min_p, top_k, top_p, by plain loops over a sorted list."""
    probabilities = torch.softmax(logits.double() / sampling.temperature, -1).tolist()
    ranked = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    kept = [t for t in ranked if probabilities[t] >= sampling.min_p * probabilities[ranked[0]]]
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    total = sum(probabilities[t] for t in kept)
    nucleus, mass = [], 0.0
    for token in kept:
        nucleus.append(token)
        mass += probabilities[token] / total
        if mass >= sampling.top_p:
            break
    total = sum(probabilities[t] for t in nucleus)
    result = torch.zeros(len(probabilities), dtype=torch.float64)
    for token in nucleus:
        result[token] = probabilities[token] / total
    return result


def naive_completion(
    model: torch.nn.Module, request: Request, sampling: Sampling, ends: set[int]
) -> tuple[list[int], list[float]]:
    """One sequence, no cache, no padding, cumulative sums by a loop; token ids and raw log-probabilities."""
    uniforms = torch.empty(sampling.max_new_tokens, dtype=torch.float64)
    uniforms.uniform_(generator=torch.Generator().manual_seed(request.seed))
    tokens, logprobs = [], []
    for step in range(sampling.max_new_tokens):
        with torch.no_grad():
            raw = model(torch.tensor([[*request.prompt_ids, *tokens]])).logits[0, -1]
        logits = raw.clone()
        for token in set(tokens):
            logits[token] -= sampling.presence_penalty
        if sampling.temperature == 0:
            chosen = int(logits.argmax())
        else:
            mass = 0.0
            for token, probability in enumerate(naive_filtered(logits, sampling).tolist()):
                mass += probability
                if mass > float(uniforms[step]):
                    chosen = token
                    break
        tokens.append(chosen)
        logprobs.append(float(raw.log_softmax(-1)[chosen]))
        if chosen in ends:
            break
    return tokens, logprobs


SETTINGS = {
    "plain": Sampling(temperature=1.0, max_new_tokens=12),
    "greedy": Sampling(temperature=0.0, max_new_tokens=12),
    "greedy_penalty": Sampling(temperature=0.0, presence_penalty=2.0, max_new_tokens=12),
    "training": Sampling(temperature=1.1, top_p=0.95, top_k=20, max_new_tokens=12),
    "evaluation": Sampling(temperature=1.0, top_p=0.95, max_new_tokens=12),
    "everything": Sampling(
        temperature=1.3, top_p=0.9, top_k=10, min_p=0.05, presence_penalty=1.5, max_new_tokens=12
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_equals_the_naive_sampler(name: str) -> None:
    """And each completion is reported once."""
    model, seen = tiny_model(), {}
    completions = engine_of(model, batch_size=4).generate(
        requests_of(9), SETTINGS[name], want_logprobs=True, on_finish=lambda i, c: seen.setdefault(i, c)
    )
    assert [seen[index] for index in range(9)] == completions
    for request, completion in zip(requests_of(9), completions, strict=True):
        tokens, logprobs = naive_completion(model, request, SETTINGS[name], {EOS})
        assert completion.token_ids == tokens
        assert completion.logprobs == pytest.approx(logprobs, abs=2e-4)
        assert completion.truncated == (tokens[-1] != EOS)


def test_a_completion_depends_on_prompt_and_seed_alone() -> None:
    """And neither reads nor changes the global random state."""
    engine = engine_of(tiny_model(), batch_size=4)
    sampling = SETTINGS["training"]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    together = engine.generate(requests_of(10), sampling)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert engine.generate(requests_of(10), sampling) == together
    assert engine.generate(list(reversed(requests_of(10))), sampling) == list(reversed(together))
    alone = [engine_of(tiny_model()).generate([request], sampling)[0] for request in requests_of(10)]
    assert alone == together
    other = engine.generate(requests_of(10, seed=500), sampling)
    assert all(a.token_ids != b.token_ids for a, b in zip(together, other, strict=True))


def test_a_longer_limit_continues_the_same_completion() -> None:
    """And one that ends at its very limit is not truncated."""
    engine = engine_of(tiny_model(), batch_size=64)
    long = engine.generate(requests_of(60), Sampling(temperature=1.5, max_new_tokens=20))
    short = engine.generate(requests_of(60), Sampling(temperature=1.5, max_new_tokens=9))
    assert [c.token_ids for c in short] == [c.token_ids[:9] for c in long]
    assert [c.truncated for c in short] == [c.truncated or len(c.token_ids) > 9 for c in long]
    index = next(i for i, c in enumerate(long) if not c.truncated and len(c.token_ids) > 1)
    exact = Sampling(temperature=1.5, max_new_tokens=len(long[index].token_ids))
    assert engine.generate([requests_of(60)[index]], exact) == [long[index]]
    assert engine.generate([], exact) == []


@pytest.mark.parametrize("pad", [EOS, 0, None])
def test_the_end_token_stays_and_nothing_follows_it(pad: int | None) -> None:
    model = tiny_model()
    # Several ends from the generation configuration and one more from the tokenizer.
    model.generation_config.eos_token_id = [10, 11]
    engine = engine_of(model, pad=pad, batch_size=64)
    assert engine.end_ids == [EOS, 10, 11]
    sampling = Sampling(temperature=1.5, max_new_tokens=20)
    completions = engine.generate(requests_of(60), sampling)
    ended = [c for c in completions if not c.truncated]
    assert {c.token_ids[-1] for c in ended} == {EOS, 10, 11}, "the seeds give every kind of end"
    assert any(c.truncated for c in completions)
    for completion in completions:
        assert not set(completion.token_ids[:-1]) & {EOS, 10, 11}
        if completion.truncated:
            assert len(completion.token_ids) == 20
            assert completion.token_ids[-1] not in {EOS, 10, 11}


def test_the_models_own_generation_defaults_do_not_take_part() -> None:
    plain = engine_of(tiny_model()).generate(requests_of(5), SETTINGS["plain"])
    model = tiny_model()
    model.generation_config = GenerationConfig(
        eos_token_id=EOS, do_sample=True, top_k=1, repetition_penalty=5.0, min_new_tokens=9, temperature=0.1
    )
    assert engine_of(model).generate(requests_of(5), SETTINGS["plain"]) == plain
    assert model.generation_config.repetition_penalty == 5.0


def test_training_state_is_as_before_and_generation_uses_the_cache() -> None:
    """After an error as well; without dropout and gradient checkpointing, which turns the cache off."""
    model = with_adapter(tiny_model(), ["q_proj", "down_proj"], seed=3, lora_dropout=0.5)
    plain = engine_of(model.eval()).generate(requests_of(6), SETTINGS["training"])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.Dropout))
    frozen.eval()  # a single module in another mode than the rest
    base = model.get_base_model()
    base.config.use_cache = False
    modes, widths = [module.training for module in model.modules()], []
    handle = base.model.layers[0].register_forward_hook(
        lambda _, inputs, __: widths.append(inputs[0].shape[1])
    )
    engine = engine_of(model)

    def stop(index: int, completion: Completion) -> None:
        raise KeyError(index)

    with pytest.raises(KeyError):
        engine.generate(requests_of(2), SETTINGS["training"], on_finish=stop)
    widths.clear()
    assert engine.generate(requests_of(6), SETTINGS["training"]) == plain
    handle.remove()
    assert widths[0] == 9
    assert set(widths[1:]) == {1}, "after the prompt every step feeds one token: the cache is in use"
    assert [module.training for module in model.modules()] == modes
    assert base.generation_config.eos_token_id == [EOS]
    assert base.config.use_cache is False
    loss = model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss
    loss.backward()  # nothing that generation left behind is an inference tensor
    assert any(p.grad is not None for p in model.parameters())


def test_inverse_transform_never_leaves_the_support() -> None:
    scores = torch.full((4, 6), float("-inf"))
    scores[:, [1, 4]] = 0.0
    uniforms = torch.tensor([0.0, 0.499999, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert inverse_transform(scores, uniforms).tolist() == [1, 1, 4, 4]


@pytest.mark.parametrize(
    ("prompt", "sampling", "match"),
    [
        ([], SETTINGS["plain"], "empty prompt"),
        ([5, VOCABULARY], SETTINGS["plain"], "outside 0..159"),
        ([5, -1], SETTINGS["plain"], "outside 0..159"),
        ([5], Sampling(temperature=-0.1, max_new_tokens=4), "temperature is -0.1"),
        ([5], Sampling(temperature=1.0, top_p=0.0, max_new_tokens=4), "top_p is 0.0"),
        ([5], Sampling(temperature=1.0, max_new_tokens=0), "max_new_tokens is 0"),
        ([5], Sampling(temperature=float("nan"), max_new_tokens=4), "temperature is nan"),
    ],
)
def test_bad_input_is_refused_by_name(prompt: list[int], sampling: Sampling, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        engine_of(tiny_model()).generate([Request([5], 0), Request(prompt, 0)], sampling)
