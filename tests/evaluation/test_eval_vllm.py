"""evaluate_math --engine vllm on the real engine: its figures, kills, adapters, and its death."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opsd.errors import ArtefactError
from opsd.evaluation import run as evaluation
from opsd.evaluation.results import load_result
from opsd.evaluation.run import evaluate
from tests.evaluation import eval_world, test_run_eval
from tests.evaluation.test_evaluate import command_of, config_of, lines_in, wait_until, without_timing
from tests.evaluation.test_run_eval import ROOT, run_eval
from tests.rollout.vllm_models import SEVEN, needs_vllm, with_adapter
from tests.test_merge_lora import train_nothing

checkout = test_run_eval.checkout
pytestmark = [pytest.mark.vllm, needs_vllm]

SAMPLES = 4 * eval_world.PROBLEMS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    eval_world.make_model(folder / "model", head_dim=32)
    eval_world.make_problems(folder / "problems.jsonl")
    return folder


def result_of(world: Path, output: Path, **changes: Any) -> dict[str, Any]:
    return evaluate(config_of(world, output, **{"engine": "vllm", **changes}), show=False)


@pytest.fixture(scope="module")
def reference(world: Path) -> dict[str, Any]:
    """One uninterrupted sampled run."""
    return result_of(world, world / "reference.json")


@pytest.mark.parametrize("thinking", [True, False])
def test_greedy_results_are_those_of_transformers(world: Path, tmp_path: Path, thinking: bool) -> None:
    """Prompts, the thinking flag among them, ends, truncation and grades, sample for sample."""
    greedy = {"temperature": 0.0, "val_n": 2, "enable_thinking": thinking, "max_new_tokens": 24}
    ours = result_of(world, tmp_path / "vllm.json", **greedy)
    theirs = result_of(world, tmp_path / "hf.json", engine="hf", **greedy)
    assert ours["results"] == theirs["results"]
    assert (ours["engine"], theirs["engine"]) == ("vllm", "hf")
    assert ours["truncation_share"] == theirs["truncation_share"]
    texts = {generation["full_generation"] for r in ours["results"] for generation in r["generations"]}
    assert len(texts) > 1, "the prompts matter"


def test_an_adapter_gives_what_its_merged_model_gives(world: Path, tmp_path: Path) -> None:
    """vLLM with the adapter, transformers with the adapter on, and the merged model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "model")
    adapted = with_adapter(model, SEVEN, seed=5)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    eval_world.make_tokenizer().save_pretrained(tmp_path / "merged")
    greedy = {"temperature": 0.0, "val_n": 1, "max_new_tokens": 24}
    by_request = result_of(world, tmp_path / "a.json", adapter=str(tmp_path / "adapter"), **greedy)
    merged = result_of(world, tmp_path / "m.json", engine="hf", base_model=str(tmp_path / "merged"), **greedy)
    base = result_of(world, tmp_path / "b.json", engine="hf", **greedy)
    adapted = result_of(world, tmp_path / "h.json", engine="hf", adapter=str(tmp_path / "adapter"), **greedy)
    assert by_request["results"] == adapted["results"] == merged["results"]
    assert by_request["results"] != base["results"]
    assert by_request["adapter"] == str(tmp_path / "adapter")


@pytest.mark.slow
def test_the_launcher_evaluates_an_adapter(checkout: Path, world: Path) -> None:
    """ADAPTER=1 end to end: vLLM gives what transformers gives with the adapter on."""
    (checkout / "evaluate_math.py").unlink()
    (checkout / "evaluate_math.py").symlink_to(ROOT / "evaluate_math.py")
    (checkout / "launchers" / "models" / "toy.sh").write_text(
        f'BASE_MODEL="{world}/model"\nDEVICE=cpu\nDEFAULT_ROLLOUT=vllm\nEVAL_FLAGS=(--max_new_tokens 12)\n'
    )
    adapter = train_nothing(world / "model", checkout / "outputs" / "toy_pwopsd")
    settings = {"DATASET_PATH": str(world / "problems.jsonl"), "VAL_N": "1", "OMP_NUM_THREADS": "1"}
    done = run_eval(
        checkout, "toy_pwopsd", "toy", "1", "1", "--", "--temperature", "0", ADAPTER="1", **settings
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    ours = load_result(checkout / "eval_results" / "toy_pwopsd_toy_12_adapter_seed1.json")
    greedy = {"engine": "hf", "temperature": 0.0, "val_n": 1}
    theirs = result_of(world, checkout / "h.json", adapter=str(adapter), **greedy)
    assert ours["results"] == theirs["results"] != result_of(world, checkout / "b.json", **greedy)["results"]
    assert (ours["engine"], ours["training_run"]["run_name"]) == ("vllm", "toy_pwopsd")


@pytest.mark.slow
def test_the_killed_command_continues(world: Path, tmp_path: Path) -> None:
    config = config_of(world, tmp_path / "out" / "r.json", engine="vllm", val_n=80, max_new_tokens=24)
    process = subprocess.Popen(
        command_of(config), env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: lines_in(config.journal_path) >= 10, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    kept = lines_in(config.journal_path) - 1
    assert not Path(config.output).exists()
    result = evaluate(config, show=False)
    assert 0 < kept <= result["timing"]["resumed_samples"] < 480
    assert load_result(config.output) == result
    whole = evaluate(replace(config, output=str(tmp_path / "whole.json")), show=False)
    assert without_timing(whole) == without_timing(result)


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each of two workers needs a core")
def test_two_tensor_parallel_workers_give_the_texts_of_one(
    world: Path, tmp_path: Path, reference: dict[str, Any]
) -> None:
    """The command with worker processes of vLLM ("mp"), as the paper evaluates on 4 GPUs; seeded samples."""
    config = config_of(world, tmp_path / "two.json", engine="vllm", tensor_parallel_size=2)
    # vLLM gives its workers ten minutes to load and five for a step, which a busy machine may need.
    patience = {"VLLM_ENGINE_READY_TIMEOUT_S": "3600", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3600"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **patience}
    done = subprocess.run(command_of(config), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert load_result(config.output)["results"] == reference["results"]


def test_an_engine_that_dies_loses_nothing_that_was_finished(
    world: Path, tmp_path: Path, reference: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """The model itself runs out of memory in the engine's eighth step."""
    build, steps = evaluation.build_engine, []

    def out_of_memory(*_: Any) -> None:
        steps.append(1)
        if len(steps) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def build_mortal(*arguments: Any) -> Any:
        engine = build(*arguments)
        engine._llm.apply_model(lambda model: model.register_forward_pre_hook(out_of_memory) and None)
        return engine

    monkeypatch.setattr(evaluation, "build_engine", build_mortal)
    output = tmp_path / "r.json"
    with pytest.raises(ArtefactError, match=r"died after \d+ of 24 completions .*out of memory") as death:
        result_of(world, output)
    for setting in ("VLLM_CPU_KVCACHE_SPACE (now 1 GiB", "new tokens", "max_model_len (now 512)"):
        assert setting in str(death.value)
    kept = lines_in(Path(f"{output}.journal.jsonl")) - 1
    assert 0 < kept < SAMPLES
    assert f"{kept} of {SAMPLES} samples are finished and kept" in capfd.readouterr().err
    monkeypatch.undo()
    result = result_of(world, output)
    assert result["timing"]["resumed_samples"] == kept
    assert without_timing(result) == without_timing(reference)
