"""Two ranks make the update that one makes, and a rank that fails ends the launch with its own message."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opsd.records import read_metrics
from tests.launchers.test_launchers import LAUNCHERS, ROOT
from tests.programs.forked_runs import BASE, train_argv, write_rows
from tests.programs.rank_runs import carry_out
from tests.programs.train_recorder import records

# |two ranks' update - one rank's| / |one rank's update| over all adapter weights, two AdamW steps in float32.
# Both sum the same terms in another order, and AdamW divides small gradients, noise included, by their size.
# eopd and reopold have entries that cancel nearly; docs/reliability.md has the measured values.
TOLERANCE = 2e-3
# The same for the norm of each step's gradient, which no optimizer has touched.
GRADIENT_TOLERANCE = 5e-5
STEPS = 2
RUNS = {
    "opsd": {"method": "opsd", "loss_scope": "global"},
    "eopd": {"method": "eopd", "loss_scope": "global"},
    # The second step refines: its threshold is over both ranks' tokens.
    "reopold": {"method": "reopold", "loss_scope": "global", "reopold_t_switch": 1},
    "pwopsd": {"method": "pwopsd", "loss_scope": "global"},
    # The mean per sequence, then over sequences, is the same however the sequences are shared out.
    "pwopsd, default scope": {"method": "pwopsd"},
}


def entry(rows: Path, run: Path, flags: dict, *, world_size: int, fault: str | None = None) -> list:
    """Return a run of the plan with eight sequences a step, in two micro-batches on each rank."""
    layout = {"per_device_train_batch_size": 4 // world_size, "max_steps": STEPS, "max_completion_length": 12}
    return [train_argv(BASE, rows, run, **layout | flags), fault]


def write_plan(path: Path, entries: list[list]) -> Path:
    path.write_text(json.dumps(entries))
    return path


def launch(path: Path, entries: list[list]) -> subprocess.CompletedProcess[str]:
    """Carry out a plan on two ranks."""
    command = [sys.executable, str(LAUNCHERS / "accelerate_launch.py")]
    command += ["--config_file", str(LAUNCHERS / "accelerate_cpu.yaml"), "--num_processes", "2"]
    command += [str(ROOT / "tests" / "programs" / "rank_runs.py"), str(write_plan(path, entries))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    # The limit is for a rank that waits for ever for one that ended.
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, subprocess.CompletedProcess[str]]:
    """(one rank's folder, two ranks' folder, the launch, which ends with rank 1 out of memory)."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    rows = write_rows(one / "rows.jsonl", 24)
    alone = [entry(rows, one / name, flags, world_size=1) for name, flags in RUNS.items()]
    assert carry_out(write_plan(one / "plan.json", alone)) == 0
    shared = [entry(rows, two / name, flags, world_size=2) for name, flags in RUNS.items()]
    shared.append(entry(rows, two / "broken", {}, world_size=2, fault="memory"))
    return one, two, launch(two / "plan.json", shared)


def update(run: Path) -> torch.Tensor:
    """Return what training added to the adapter, [number of weights].

    B starts at zero, and A does not move in the first step: its gradient is a multiple of B.
    """
    weights = load_file(run / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    start = load_file(run / "checkpoint-1" / "adapter_model.safetensors")
    parts = [w if "lora_B" in name else w - start[name] for name, w in sorted(weights.items())]
    return torch.cat([part.flatten().double() for part in parts])


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_make_one_ranks_update(runs, name: str) -> None:
    one, two, done = runs
    assert (two / name / f"checkpoint-{STEPS}").exists(), done.stderr[-3000:]
    norms = [[row["grad_norm"] for row in read_metrics(folder / name)] for folder in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=GRADIENT_TOLERANCE)
    alone, shared = update(one / name), update(two / name)
    assert alone.norm() > 1e-2, "an update of nothing would equal anything"
    gradient = max(abs(b / a - 1) for a, b in zip(*norms, strict=True))
    difference = float((shared - alone).norm() / alone.norm())
    print(f"{name}: gradient norm {gradient:.1e}, update {difference:.1e}")  # for docs/reliability.md
    assert difference < TOLERANCE
    # Both ranks hold equal weights after each step and see their halves of one rank's problems.
    whole = records(one / f"{name}_records")
    assert len(whole) == STEPS + 1
    for mine, theirs, both in zip(*(records(two / f"{name}_records", r) for r in (0, 1)), whole, strict=True):
        assert mine["adapter"] == theirs["adapter"]
        assert len(mine["problems"]) == len(theirs["problems"])
        assert sorted(mine["problems"] + theirs["problems"]) == sorted(both["problems"])
        assert len(set(both["problems"])) == len(both["problems"])


@pytest.mark.slow
def test_memory_that_runs_out_on_one_rank_ends_the_launch(runs) -> None:
    _, two, done = runs
    assert done.returncode == 3
    assert "error: out of memory (CUDA out of memory. Tried to allocate 20.00 GiB)" in done.stderr
    assert "--per_device_train_batch_size 1" in done.stderr
    assert "error: rank 1 ended with exit code 3; its own message is above" in done.stderr
    assert not (two / "broken" / "checkpoint-2").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("exception", 1, r"RuntimeError: the planned defect of rank 1[\s\S]*rank 1 ended with exit code 1"),
        ("kill", 137, "rank 1 was killed by signal 9"),
    ],
)
def test_a_rank_that_fails_ends_the_launch(tmp_path: Path, fault: str, code: int, said: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 24)
    done = launch(tmp_path / "plan.json", [entry(rows, tmp_path / "run", {}, world_size=2, fault=fault)])
    assert done.returncode == code, done.stderr[-3000:]
    assert re.search(said, done.stderr), done.stderr[-3000:]
    assert not (tmp_path / "run" / "checkpoint-2").exists()


@pytest.mark.slow
def test_two_killed_ranks_resume_bit_for_bit(tmp_path: Path) -> None:
    """Each method is left in its second step of three, the last by SIGKILL, and resumed by new processes."""
    rows = write_rows(tmp_path / "rows.jsonl", 24)
    # Dropout draws from each rank's random state. The resumed reopold explores one more step, then refines.
    methods = RUNS | {"opsd": {"method": "opsd", "lora_dropout": 0.2}}
    methods["reopold"] = methods.pop("reopold") | {"reopold_t_switch": 2}
    del methods["pwopsd, default scope"]

    def entries(suffix: str, faults: dict[str, str]) -> list[list]:
        runs = (
            (name, tmp_path / f"{name}{suffix}", flags | {"max_steps": 3}) for name, flags in methods.items()
        )
        return [entry(rows, run, flags, world_size=2, fault=faults.get(name)) for name, run, flags in runs]

    faults = dict.fromkeys(methods, "stop") | {"reopold": "kill"}
    for plan, code in ((entries("_whole", {}) + entries("", faults), 137), (entries("", {}), 0)):
        done = launch(tmp_path / "plan.json", plan)
        assert done.returncode == code, done.stderr[-3000:]
    for name in methods:
        assert f"resuming from {tmp_path / name}/checkpoint-1" in done.stderr
        whole, resumed = (
            (tmp_path / run / "checkpoint-3" / "adapter_model.safetensors").read_bytes()
            for run in (f"{name}_whole", name)
        )
        assert resumed == whole, name
        assert records(tmp_path / f"{name}_records", 1) == records(tmp_path / f"{name}_whole_records", 1)
    assert [row["method/refinement"] for row in read_metrics(tmp_path / "reopold")] == [0, 0, 1]
