"""VLLMEngine on the real engine: what it samples, what it restores, and how it fails."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from opsd.errors import ArtefactError, UsageError
from opsd.rollout import vllm_setup
from opsd.rollout.engine import Completion, Request, Sampling
from opsd.rollout.vllm import VLLMEngine
from opsd.seeds import hashed_seed
from tests.rollout.vllm_models import (
    END_IDS,
    SEVEN,
    greedy,
    make_model,
    naive_merged,
    needs_vllm,
    prompts,
    with_adapter,
)

pytestmark = [pytest.mark.vllm, needs_vllm]

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 24
SAMPLED = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=LENGTH)
GREEDY = Sampling(temperature=0, max_new_tokens=LENGTH)


def process_state() -> dict[str, object]:
    """Everything about the process that training may depend on and an engine is known to change."""
    return {
        "torch rng": torch.get_rng_state().tolist(),
        "numpy rng": [str(part) for part in np.random.get_state()],
        "python rng": random.getstate(),
        "threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads,
        "synchronize": torch.accelerator.synchronize,
        "environment": dict(os.environ),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cores": os.sched_getaffinity(0),
        "log records": logging.getLogRecordFactory(),
        "log level": (logging.root.level, logging.getLogger("httpx").level, list(logging.root.handlers)),
        "frozen objects": gc.get_freeze_count(),
    }


def changed(before: dict[str, object]) -> list[str]:
    after = process_state()
    return [name for name in before if before[name] != after[name]]


class World:
    """A model, the engine over it, and what building the engine changed in the process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = make_model("qwen3", True, folder, END_IDS)
        torch.set_num_threads(1)  # the engine's too: its two would wait for each other on busy cores
        torch.manual_seed(11)
        before = process_state()
        self.engine = VLLMEngine(str(folder), max_model_len=192)
        self.changed_by_building = changed(before)

    def requests(self, count: int = 12) -> list[Request]:
        return [Request(prompts()[i % 4], hashed_seed("test", i)) for i in range(count)]

    def logits(self, request: Request, completion: Completion) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's own logits [T, V] of the completion's tokens, and the tokens as [T, 1]."""
        ids = torch.tensor([[*request.prompt_ids, *completion.token_ids]])
        with torch.no_grad():
            rows = self.model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1]
        return rows, torch.tensor(completion.token_ids)[:, None]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("model"))
    yield world
    world.engine.close()


def test_the_process_is_left_as_it_was(world):
    assert world.engine._llm.llm_engine.vllm_config.model_config.dtype == torch.float32, "the checkpoint's"
    assert world.changed_by_building == []
    adapted = with_adapter(make_model("qwen3", True, world.folder, END_IDS), ["q_proj"], seed=1)
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    torch.set_num_threads(2)
    before = process_state()
    world.engine.generate(world.requests(4), SAMPLED)
    assert changed(before) == []
    world.engine.push_weights(adapted)
    assert changed(before) == []
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    world.engine.push_weights(adapted)
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1, "torch.set_num_threads is no longer torch's own"


@pytest.mark.parametrize("presence", [0.0, 2.0])
def test_greedy_completions_keep_their_end_and_say_when_they_were_cut(world, presence):
    sampling = Sampling(temperature=0, presence_penalty=presence, max_new_tokens=LENGTH)
    completions = world.engine.generate([Request(p, 0) for p in prompts()], sampling)
    expected = [greedy(world.model, p, LENGTH, END_IDS, presence=presence) for p in prompts()]
    assert [c.token_ids for c in completions] == expected
    assert [c.truncated for c in completions] == [tokens[-1] not in END_IDS for tokens in expected]


def test_sampled_completions_end_with_any_of_the_ends_or_are_cut(world):
    """And each is delivered once, as it finishes."""
    delivered: list[tuple[int, Completion]] = []
    completions = world.engine.generate(
        world.requests(60), SAMPLED, on_finish=lambda index, c: delivered.append((index, c))
    )
    ended = [c for c in completions if not c.truncated]
    assert len({c.token_ids[-1] for c in ended}) > 1
    assert 10 < len(ended) < 60
    for c in completions:
        assert not set(c.token_ids[:-1]) & set(END_IDS)
        assert (c.token_ids[-1] in END_IDS) == (not c.truncated)
        assert len(c.token_ids) == LENGTH or not c.truncated
        assert c.logprobs is None
    assert sorted(index for index, _ in delivered) == list(range(60))
    assert all(completions[index] is c for index, c in delivered)
    lengths = [len(c.token_ids) for _, c in delivered]
    assert lengths == sorted(lengths), "all start together, so the shorter ones finish earlier"


def test_a_request_gives_the_same_text_alone_reversed_and_among_others(world):
    requests = world.requests()
    together = world.engine.generate(requests, SAMPLED)
    assert world.engine.generate(requests[::-1], SAMPLED)[::-1] == together
    assert world.engine.generate(requests[3:5], SAMPLED) == together[3:5]
    torch.manual_seed(99)
    assert world.engine.generate([requests[7]], SAMPLED) == [together[7]]


def test_seeds_alone_tell_samples_apart(world):
    seeds = [hashed_seed("apart", i) for i in range(8)]
    requests = [Request(prompts()[0], seed) for seed in [*seeds, seeds[0]]]
    texts = [tuple(c.token_ids) for c in world.engine.generate(requests, SAMPLED)]
    assert len(set(texts)) == 8
    assert texts[8] == texts[0]


def test_filters_reach_the_engine(world):
    def highest_rank(**filters: float) -> int:
        sampling = Sampling(temperature=2.0, max_new_tokens=LENGTH, **filters)
        completions = world.engine.generate(world.requests(), sampling)
        scored = (world.logits(*pair) for pair in zip(world.requests(), completions, strict=True))
        return max(int((rows > rows.gather(1, tokens)).sum(1).max()) for rows, tokens in scored)

    assert highest_rank(top_p=1e-6) == highest_rank(min_p=1.0) == 0
    assert highest_rank(top_k=3) == 2
    assert highest_rank(top_k=0) > 20


def test_logprobs_are_the_models_own_before_temperature_and_filters(world):
    sampling = Sampling(temperature=0.7, top_p=0.8, top_k=5, max_new_tokens=LENGTH)
    requests = world.requests(6)
    completions = world.engine.generate(requests, sampling, want_logprobs=True)
    for request, completion in zip(requests, completions, strict=True):
        rows, tokens = world.logits(request, completion)
        expected = rows.log_softmax(-1).gather(1, tokens)[:, 0]
        assert torch.tensor(completion.logprobs) == pytest.approx(expected, abs=1e-4)


def test_more_prompt_tokens_than_one_step_takes(world):
    """Seeded requests whose prompts do not all fit into the engine's first step (4,096 tokens)."""
    requests = [Request([2 + i, *prompts()[3][1:]], hashed_seed("many", i)) for i in range(40)]
    assert sum(len(request.prompt_ids) for request in requests) > 4096
    together = world.engine.generate(requests, SAMPLED)
    apart = [world.engine.generate(half, SAMPLED) for half in (requests[:20], requests[20:])]
    assert together == apart[0] + apart[1]


def test_after_an_error_of_the_callers_the_engine_forgets_what_was_running(world):
    def fails(index, completion):
        raise OSError("disk full")

    expected = world.engine.generate(world.requests(), SAMPLED)
    with pytest.raises(OSError, match="disk full"):
        world.engine.generate(world.requests(), SAMPLED, on_finish=fails)
    assert world.engine.generate(world.requests(), SAMPLED) == expected
    assert world.engine.generate([], SAMPLED) == []


def test_requests_are_checked_before_any_sampling(world):
    """By the check that test_rollout_hf.py covers, and for the engine's length."""
    with pytest.raises(UsageError, match=r"request 1 has .*169 prompt tokens .* 192; raise it to 193"):
        world.engine.generate([Request([5], 0), Request([5] * 169, 0)], SAMPLED)
    (longest,) = world.engine.generate([Request([5] * 168, 0)], SAMPLED)
    assert longest.token_ids


def test_an_adapter_folder_gives_what_the_merged_model_gives(world, tmp_path, monkeypatch):
    """Then the engine dies: the finished are delivered, the message says what to lower."""
    base = make_model("qwen3", True, tmp_path / "base", END_IDS)
    adapted = with_adapter(make_model("qwen3", True, tmp_path / "base", END_IDS), SEVEN, seed=8)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = [greedy(naive_merged(base, adapted), p, LENGTH, END_IDS) for p in prompts()]
    engine = VLLMEngine(
        str(tmp_path / "base"), max_model_len=192, adapter=str(tmp_path / "adapter"), max_num_seqs=3
    )
    requests = [Request(p, 0) for p in prompts()]
    try:
        assert [c.token_ids for c in engine.generate(requests, GREEDY)] == expected
        with pytest.raises(UsageError, match="without an adapter"):
            engine.push_weights(adapted)

        delivered = []
        step = engine._llm.llm_engine.step

        def dies():
            if delivered:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return step()

        monkeypatch.setattr(engine._llm.llm_engine, "step", dies)
        with pytest.raises(ArtefactError, match="died after 1 of 3") as failure:
            engine.generate(requests[:3], SAMPLED, on_finish=lambda *item: delivered.append(item))
        settings = ("VLLM_CPU_KVCACHE_SPACE", "max_num_seqs (now 3)", "max_model_len (now 192)")
        assert all(part in str(failure.value) for part in ("out of memory", *settings))
        assert len(delivered) == 1
        with pytest.raises(RuntimeError, match="it died"):
            engine.generate(requests, SAMPLED)
    finally:
        engine.close()
    with pytest.raises(RuntimeError, match="it was closed"):
        engine.generate(requests, SAMPLED)
    # The other engine in this process still works: the process groups are the last one's to take down.
    assert world.engine.generate(world.requests(2), GREEDY)


def test_adapters_that_vllm_would_apply_wrongly_are_refused(tmp_path):
    adapted = with_adapter(make_model("qwen3", True, tmp_path / "base"), ["q_proj"], seed=8, r=9)
    adapted.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text("utf-8"))
    assert vllm_setup.reserved_rank(vllm_setup.lora_rank(str(tmp_path))) == 16
    for key, value in (("rank_pattern", {"q_proj": 8}), ("use_dora", True), ("peft_type", "IA3")):
        path.write_text(json.dumps({**config, key: value}), encoding="utf-8")
        with pytest.raises(ArtefactError, match=key):
            vllm_setup.lora_rank(str(tmp_path))


def test_arguments_that_do_not_fit_are_refused(world, monkeypatch):
    from vllm.platforms import current_platform

    folder = str(world.folder)
    if current_platform.is_cpu():
        with pytest.raises(UsageError, match="sleep mode frees GPU memory"):
            VLLMEngine(folder, max_model_len=64, enable_sleep_mode=True)
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "many")
        with pytest.raises(UsageError, match="'many'"):
            VLLMEngine(folder, max_model_len=64)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    with pytest.raises(ArtefactError, match=r"max_model_len \(now 100000\)"):
        VLLMEngine(folder, max_model_len=100_000)
    assert world.engine.generate(world.requests(2), GREEDY)


def test_every_worker_has_cores_of_its_own(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 2, 7})
    assert vllm_setup.worker_cores(2) == "2,7|5"
    with pytest.raises(UsageError, match="size is 4, but this process may use only 3 CPU cores"):
        vllm_setup.worker_cores(4)


@pytest.mark.slow
def test_two_ranks_share_an_engine_or_have_one_each(tmp_path):
    """Pushes work, each rank gets its own completions alone, and the process group survives both engines."""
    make_model("qwen3", False, tmp_path / "model", END_IDS)
    (found := tmp_path / "found").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests/programs/vllm_two_ranks.py"), str(tmp_path / "model"), str(found)]
    result = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert {path.name: path.read_text() for path in found.iterdir()} == {
        rank: "; ".join(
            f"{engine} {right} right, group alive"
            for engine in ("shared engine", "own engine", "adapter in a shared engine")
        )
        for rank, right in (("0", 3), ("1", 2))
    }
