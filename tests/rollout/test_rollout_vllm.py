"""VLLMEngine on the real engine: what goes in, what comes out, what stays as it was, and how it fails."""

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
import torch.distributed as dist

from opsd import models
from opsd.errors import ArtefactError, UsageError
from opsd.rollout import vllm_setup
from opsd.rollout.engine import Completion, Request, Sampling
from opsd.rollout.vllm import VLLMEngine
from opsd.seeds import hashed_seed
from tests.rollout.vllm_models import (
    END_IDS,
    SEVEN,
    VOCABULARY,
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
    """Everything about the process that training may depend on and an engine is known to touch."""
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


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("model"))
    yield world
    world.engine.close()


def test_the_process_is_left_as_it_was(world):
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


def test_greedy_completions_keep_their_end_and_say_when_they_were_cut(world):
    completions = world.engine.generate([Request(p, 0) for p in prompts()], GREEDY)
    expected = [greedy(world.model, p, LENGTH, END_IDS) for p in prompts()]
    assert [c.token_ids for c in completions] == expected
    assert [c.truncated for c in completions] == [tokens[-1] not in END_IDS for tokens in expected]


def test_sampled_completions_end_with_any_of_the_ends_or_are_cut(world):
    completions = world.engine.generate(world.requests(60), SAMPLED)
    ended = [c for c in completions if not c.truncated]
    assert len({c.token_ids[-1] for c in ended}) > 1
    assert 10 < len(ended) < 60
    for c in completions:
        assert not set(c.token_ids[:-1]) & set(END_IDS)
        assert (c.token_ids[-1] in END_IDS) == (not c.truncated)
        assert len(c.token_ids) == LENGTH or not c.truncated
        assert c.logprobs is None


def test_a_request_gives_the_same_text_alone_reversed_and_among_others(world):
    requests = world.requests()
    together = world.engine.generate(requests, SAMPLED)
    assert world.engine.generate(requests[::-1], SAMPLED)[::-1] == together
    assert world.engine.generate(requests[3:5], SAMPLED) == together[3:5]
    torch.manual_seed(99)
    assert world.engine.generate([requests[7]], SAMPLED) == [together[7]]


def test_seeds_alone_tell_samples_apart(world):
    prompt = prompts()[0]
    seeds = [hashed_seed("apart", i) for i in range(8)]
    texts = [tuple(c.token_ids) for c in world.engine.generate([Request(prompt, s) for s in seeds], SAMPLED)]
    assert len(set(texts)) == 8
    twice = world.engine.generate([Request(prompt, seeds[0])] * 2, SAMPLED)
    assert [tuple(c.token_ids) for c in twice] == [texts[0]] * 2


@pytest.mark.parametrize(
    "filters", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=lambda filters: next(iter(filters))
)
def test_each_filter_at_its_tightest_is_greedy(world, filters):
    tight = Sampling(temperature=1.5, max_new_tokens=LENGTH, **filters)
    assert world.engine.generate(world.requests(8), tight) == world.engine.generate(world.requests(8), GREEDY)


def test_top_k_0_is_off_and_top_k_3_keeps_three(world):
    def ranks(top_k: int) -> list[int]:
        sampling = Sampling(temperature=2.0, top_k=top_k, max_new_tokens=LENGTH)
        found = []
        for request, c in zip(
            world.requests(), world.engine.generate(world.requests(), sampling), strict=True
        ):
            ids = torch.tensor([[*request.prompt_ids, *c.token_ids]])
            with torch.no_grad():
                rows = world.model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1]
            chosen = rows.gather(1, torch.tensor(c.token_ids)[:, None])
            found += (rows > chosen).sum(1).tolist()
        return found

    assert max(ranks(3)) == 2
    assert max(ranks(0)) > 20


def test_presence_penalty_and_temperature_reach_the_sampler(world):
    sampling = Sampling(temperature=0, presence_penalty=2.0, max_new_tokens=LENGTH)
    completions = world.engine.generate([Request(p, 0) for p in prompts()], sampling)
    expected = [greedy(world.model, p, LENGTH, END_IDS, presence=2.0) for p in prompts()]
    assert [c.token_ids for c in completions] == expected
    assert expected != [greedy(world.model, p, LENGTH, END_IDS) for p in prompts()]
    with pytest.raises(UsageError, match="presence_penalty"):
        world.engine.generate(
            world.requests(1), Sampling(temperature=1, presence_penalty=9, max_new_tokens=4)
        )


def test_logprobs_are_the_models_own_before_temperature_and_filters(world):
    sampling = Sampling(temperature=0.7, top_p=0.8, top_k=5, max_new_tokens=LENGTH)
    requests = world.requests(6)
    for request, c in zip(
        requests, world.engine.generate(requests, sampling, want_logprobs=True), strict=True
    ):
        ids = torch.tensor([[*request.prompt_ids, *c.token_ids]])
        with torch.no_grad():
            rows = world.model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1].log_softmax(-1)
        expected = rows.gather(1, torch.tensor(c.token_ids)[:, None])[:, 0]
        assert torch.tensor(c.logprobs) == pytest.approx(expected, abs=1e-4)


def test_every_completion_is_delivered_once_as_it_finishes(world):
    delivered: list[tuple[int, Completion]] = []
    requests = world.requests(30)
    completions = world.engine.generate(
        requests, SAMPLED, on_finish=lambda index, c: delivered.append((index, c))
    )
    assert sorted(index for index, _ in delivered) == list(range(30))
    assert all(completions[index] is c for index, c in delivered)
    lengths = [len(c.token_ids) for _, c in delivered]
    assert lengths == sorted(lengths), "all start together, so the shorter ones finish earlier"


def test_more_prompt_tokens_than_one_step_takes(world):
    """Seeded requests whose prompts do not all fit into the engine's first step (4,096 tokens)."""
    prompt = prompts()[3]
    requests = [Request([2 + i, *prompt[1:]], hashed_seed("many", i)) for i in range(40)]
    assert sum(len(request.prompt_ids) for request in requests) > 4096
    together = world.engine.generate(requests, SAMPLED)
    assert together == world.engine.generate(requests[:20], SAMPLED) + world.engine.generate(
        requests[20:], SAMPLED
    )


def test_after_an_error_of_the_callers_the_engine_forgets_what_was_running(world):
    def fails(index, completion):
        raise OSError("disk full")

    expected = world.engine.generate(world.requests(), SAMPLED)
    with pytest.raises(OSError, match="disk full"):
        world.engine.generate(world.requests(), SAMPLED, on_finish=fails)
    assert world.engine.generate(world.requests(), SAMPLED) == expected
    assert world.engine.generate([], SAMPLED) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "request 1: the prompt has no tokens"),
        (
            [5] * 169,
            f"request 1: 169 prompt tokens and up to {LENGTH} new ones do not fit .* 192; raise it to 193",
        ),
        (
            [5, VOCABULARY],
            f"request 1: token id {VOCABULARY} of its 2 prompt tokens is outside the vocabulary",
        ),
        ([-1, 5], "request 1: token id -1"),
    ],
)
def test_impossible_prompts_are_named_before_any_sampling(world, prompt, message):
    delivered = []
    with pytest.raises(UsageError, match=message):
        world.engine.generate(
            [Request([5], 0), Request(prompt, 0)], SAMPLED, on_finish=lambda *item: delivered.append(item)
        )
    assert delivered == []
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
    try:
        requests = [Request(p, 0) for p in prompts()]
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
        short = [Request(p, 0) for p in prompts()[:3]]
        with pytest.raises(ArtefactError, match="died after 1 of 3") as failure:
            engine.generate(short, SAMPLED, on_finish=lambda *item: delivered.append(item))
        for part in (
            "out of memory",
            "VLLM_CPU_KVCACHE_SPACE",
            "max_num_seqs (now 3)",
            "max_model_len (now 192)",
        ):
            assert part in str(failure.value)
        assert len(delivered) == 1
        with pytest.raises(RuntimeError, match="it died"):
            engine.generate(short, SAMPLED)
    finally:
        engine.close()
    # The other engine in this process still works: the process groups are the last one's to take down.
    assert world.engine.generate(world.requests(2), GREEDY)


def test_a_closed_engine_says_so(tmp_path, world):
    engine = object.__new__(VLLMEngine)
    engine._unusable = "it was closed"
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate(world.requests(1), SAMPLED)


def write_adapter(folder: Path, **config) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 64, **config}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return str(folder)


def test_adapters_that_vllm_would_apply_wrongly_are_refused(tmp_path):
    plain = write_adapter(tmp_path / "plain")
    assert vllm_setup.read_adapter(plain, None).max_rank == 64
    assert vllm_setup.read_adapter(plain, 100).max_rank == 128
    assert vllm_setup.read_adapter(write_adapter(tmp_path / "odd", r=9), None).max_rank == 16
    with pytest.raises(UsageError, match=r"max_lora_rank is 32, but the adapter .* has rank 64"):
        vllm_setup.read_adapter(plain, 32)
    for key, value in (("rank_pattern", {"q_proj": 8}), ("use_dora", True), ("modules_to_save", ["lm_head"])):
        with pytest.raises(ArtefactError, match=key):
            vllm_setup.read_adapter(write_adapter(tmp_path / key, **{key: value}), None)
    with pytest.raises(ArtefactError, match="IA3"):
        vllm_setup.read_adapter(write_adapter(tmp_path / "ia3", peft_type="IA3"), None)
    with pytest.raises(ArtefactError, match="no readable adapter_config"):
        vllm_setup.read_adapter(str(tmp_path / "none"), None)
    Path(plain, "adapter_model.safetensors").unlink()
    with pytest.raises(ArtefactError, match="no adapter weights"):
        vllm_setup.read_adapter(plain, None)


def test_arguments_that_do_not_fit_are_refused(world, tmp_path, monkeypatch):
    folder = str(world.folder)
    with pytest.raises(UsageError, match="gpu_memory_utilization is 40"):
        VLLMEngine(folder, max_model_len=64, gpu_memory_utilization=40)
    with pytest.raises(UsageError, match="tensor parallel size is 0"):
        VLLMEngine(folder, max_model_len=64, tensor_parallel_size=0)
    with pytest.raises(ArtefactError, match=r"no config\.json"):
        VLLMEngine(str(tmp_path), max_model_len=64)
    if vllm_setup.on_cpu():
        with pytest.raises(UsageError, match="sleep mode frees GPU memory"):
            VLLMEngine(folder, max_model_len=64, enable_sleep_mode=True)
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "many")
        with pytest.raises(UsageError, match="'many'"):
            VLLMEngine(folder, max_model_len=64)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    with pytest.raises(ArtefactError, match=r"max_model_len \(now 100000\)"):
        VLLMEngine(folder, max_model_len=100_000)
    assert world.engine.generate(world.requests(2), GREEDY)
    monkeypatch.setattr(vllm_setup.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"requirements\.txt.*--rollout hf"):
        VLLMEngine(folder, max_model_len=64)


def test_ranks_share_engines_in_equal_groups_or_not_at_all(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    assert (
        vllm_setup.placement(1) == vllm_setup.placement(2) == vllm_setup.placement(4) == "external_launcher"
    )
    with pytest.raises(UsageError, match="4 ranks cannot be divided into groups of 3"):
        vllm_setup.placement(3)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    assert (vllm_setup.placement(1), vllm_setup.placement(2)) == ("uni", "mp")


def test_every_worker_has_cores_of_its_own(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 2, 7})
    assert vllm_setup.worker_cores(2) == "2,7|5"
    with pytest.raises(
        UsageError, match="tensor parallel size is 4, but this process may use only 3 CPU cores"
    ):
        vllm_setup.worker_cores(4)


def test_the_checkpoints_dtype_is_kept(world):
    config = models.load_config(str(world.folder))
    assert vllm_setup.model_dtype("auto", config) == "float32"
    assert vllm_setup.model_dtype("bfloat16", config) == "bfloat16"
    assert models.end_token_ids(str(world.folder), config) == END_IDS


@pytest.mark.slow
def test_two_ranks_share_an_engine_or_have_one_each(tmp_path):
    """Pushes work, each rank gets its own completions alone, and the process group survives both engines."""
    make_model("qwen3", False, tmp_path / "model", END_IDS)
    (found := tmp_path / "found").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [
            *command,
            str(ROOT / "tests" / "programs" / "vllm_two_ranks.py"),
            str(tmp_path / "model"),
            str(found),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert {path.name: path.read_text() for path in found.iterdir()} == {
        "0": "shared engine 3 right, group alive; own engine 3 right, group alive",
        "1": "shared engine 2 right, group alive; own engine 2 right, group alive",
    }
