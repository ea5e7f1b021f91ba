"""Training with vLLM's real engine: what it samples from, what it leaves untouched, one rank and two."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import ea_opsd_train
from opsd import training
from opsd.arguments import RolloutArguments
from opsd.errors import UsageError, run_cli
from opsd.records import read_metrics
from opsd.rollout import vllm_setup
from tests.programs.train_recorder import recording, records
from tests.rollout.vllm_models import needs_vllm

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "testbed" / "base_model"
NEW_TOKENS = 20
STEPS = 3
# Rounding may put one of a step's 80 tokens on the other side of the nucleus' edge.
AT_MOST_ONE = 1.5 / (4 * NEW_TOKENS)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small world's first 24 problems."""
    lines = (ROOT / "testbed" / "data" / "train.jsonl").read_text("utf-8").splitlines(keepends=True)
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(lines[:24]), encoding="utf-8")
    return path


def flags(dataset: Path, output: Path, rollout: str, **changes: Any) -> list[str]:
    """A run of STEPS steps of 4 problems, at a rate at which every step moves the policy visibly."""
    settings = {
        "method": "pwopsd",
        "model_name_or_path": BASE,
        "train_dataset": dataset,
        "output_dir": output,
        "rollout": rollout,
        "rollout_audit_steps": 1,
        "max_completion_length": NEW_TOKENS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-2,
        "max_grad_norm": 10,
        "lora_r": 8,
        "max_steps": STEPS,
        "save_steps": 2,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


@dataclass
class Run:
    """One training in this process."""

    output: Path
    rows: list[dict[str, Any]]  # of train_recorder
    metrics: list[dict[str, Any]]
    base: dict[str, torch.Tensor]  # base weights after the last step
    weights: str  # its --rollout_weights

    def audits(self) -> tuple[list[float], list[float]]:
        """Each step's share of tokens outside the trainer's support and difference of log-probabilities."""
        names = ("rollout/outside_support_share", "rollout/logprob_difference")
        outside, difference = ([row[name] for row in self.metrics] for name in names)
        assert len(outside) == len(difference) == STEPS
        return outside, difference


def run(output: Path, arguments: list[str], weights: str = "merged") -> Run:
    threads = torch.get_num_threads()
    with recording(output.parent / f"{output.name}_records") as trainers:
        assert run_cli(lambda: ea_opsd_train.main(arguments)) == 0
    torch.set_num_threads(threads)
    base = {
        name.replace(".base_layer.", "."): value.detach().clone()
        for name, value in trainers[0].model.get_base_model().state_dict().items()
        if "lora_" not in name
    }
    rows = records(output.parent / f"{output.name}_records")
    return Run(output, rows, read_metrics(output), base, weights)


@pytest.fixture(scope="module", params=["merged", "adapter"])
def vllm_run(request: pytest.FixtureRequest, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with each of the two --rollout_weights."""
    output = tmp_path_factory.mktemp("vllm") / "run"
    return run(output, flags(dataset, output, "vllm", rollout_weights=request.param), request.param)


def check_on_policy(found: Run) -> None:
    """Check that each step's tokens lie in the trainer's own support, at its own log-probabilities."""
    outside, difference = found.audits()
    assert max(outside) < AT_MOST_ONE
    assert max(difference) < 1e-4
    assert max(abs(row["rollout/staleness"]) for row in found.metrics) < 1e-3
    assert len({row["adapter"] for row in found.rows}) == STEPS + 1, "every step moves the weights"


@needs_vllm
def test_the_engine_samples_from_the_student_of_the_moment(vllm_run: Run) -> None:
    check_on_policy(vllm_run)
    kept = [row.get("rollout/update_kept") for row in vllm_run.metrics]
    # The first adapter is 0, and only a merge can lose something; in float32 it loses nothing.
    assert kept == [
        None,
        *[pytest.approx(1, abs=1e-5) if vllm_run.weights == "merged" else None] * (STEPS - 1),
    ]


def test_so_does_transformers(dataset: Path, tmp_path: Path) -> None:
    check_on_policy(run(tmp_path / "hf", flags(dataset, tmp_path / "hf", "hf")))


@needs_vllm
def test_an_engine_that_missed_a_push_shows(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opsd.rollout.vllm import VLLMEngine

    monkeypatch.setattr(VLLMEngine, "push_weights", lambda self, model, measure: {})
    found = run(tmp_path / "stale", flags(dataset, tmp_path / "stale", "vllm"))
    outside, difference = found.audits()
    # The adapter starts at zero: at the first step the engine's weights are the student's anyway.
    assert difference[0] < 1e-4
    assert outside[0] < AT_MOST_ONE
    assert min(difference[1:]) > 0.1
    assert min(outside[1:]) > 0.1
    # It samples from the base, so that it is as far from the student as the base is.
    base = [row["rollout/logprob_difference_base"] for row in found.metrics]
    assert difference[1:] == pytest.approx(base[1:], rel=1e-3)
    assert [row["rollout/staleness"] for row in found.metrics] == pytest.approx([0, 1, 1], abs=1e-3)


@needs_vllm
def test_the_base_is_bit_identical_after_a_whole_training_run(vllm_run: Run) -> None:
    from transformers import AutoModelForCausalLM

    assert len({row["base"] for row in vllm_run.rows}) == 1
    loaded = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).state_dict()
    assert loaded.keys() == vllm_run.base.keys()
    assert [name for name in loaded if not torch.equal(loaded[name], vllm_run.base[name])] == []


@needs_vllm
def test_a_resumed_run_ends_bit_for_bit_like_the_uninterrupted_one(
    vllm_run: Run, dataset: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(vllm_run.output, output)
    shutil.rmtree(output / f"checkpoint-{STEPS}")
    changes = {"rollout_weights": vllm_run.weights, "resume_from_checkpoint": "auto"}
    resumed = run(output, flags(dataset, output, "vllm", **changes))
    assert resumed.rows == vllm_run.rows[2:]
    name = f"checkpoint-{STEPS}/adapter_model.safetensors"
    assert (output / name).read_bytes() == (vllm_run.output / name).read_bytes()


@pytest.mark.slow
@needs_vllm
def test_two_ranks_with_an_engine_each(dataset: Path, tmp_path: Path) -> None:
    """Different problems, equal weights after every step, and the effective batch that was asked for."""
    command = [sys.executable, ROOT / "launchers" / "accelerate_launch.py", "--num_processes", "2"]
    command += ["--config_file", ROOT / "launchers" / "accelerate_cpu.yaml"]
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([[flags(dataset, tmp_path / "run", "vllm", max_steps=2), None]]), "utf-8")
    command += [ROOT / "tests" / "programs" / "rank_runs.py", plan]
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (records(tmp_path / "run_records", rank) for rank in (0, 1))
    assert [row["step"] for row in first] == [row["step"] for row in second] == [0, 1, 2]
    assert [row["adapter"] for row in first] == [row["adapter"] for row in second]
    assert len({row["adapter"] for row in first}) == 3
    assert len({row["base"] for row in first + second}) == 1
    taken = [problem for row in first + second for problem in row["problems"]]
    assert len(taken) == len(set(taken)) == 2 * 2 * 2 * 2, "ranks x sequences x micro-batches x steps"
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text("utf-8"))
    assert manifest["effective_batch"] == 8
    metrics = read_metrics(tmp_path / "run")
    assert max(row["rollout/outside_support_share"] for row in metrics) < AT_MOST_ONE
    assert max(row["rollout/logprob_difference"] for row in metrics) < 1e-4


@needs_vllm
def test_an_engine_needs_as_many_ranks_as_it_is_split_over(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = flags(dataset, tmp_path / "run", "vllm", vllm_tensor_parallel_size=2)
    assert run_cli(lambda: ea_opsd_train.main(arguments)) == 2
    assert "--vllm_tensor_parallel_size 2 does not divide the 1 processes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    training._check_engine(RolloutArguments(vllm_tensor_parallel_size=3), 6)
    with pytest.raises(UsageError, match="transformers never merges the adapter"):
        training._check_engine(RolloutArguments(rollout="hf", rollout_weights="adapter"), 1)


def test_a_hub_revision_reaches_the_engine_as_its_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would load the main branch for everything that no push reaches, the embedding above all."""
    import huggingface_hub

    def download(name: str, *, revision: str, **_: Any) -> str:
        return f"/cache/{name}@{revision}"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert vllm_setup.local_model("org/model", None) == "org/model"
    assert vllm_setup.local_model("org/model", "v2") == "/cache/org/model@v2"
