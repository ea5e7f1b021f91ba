"""Two ranks make the update that one makes, and a rank that fails ends the whole launch with its words."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opsd.records import read_metrics
from opsd.trainer import OPSDTrainer
from tests.launchers.test_launchers import LAUNCHERS, ROOT
from tests.programs.forked_runs import train_argv
from tests.programs.rank_runs import carry_out
from tests.test_resume import BASE, write_rows

# |two ranks' update - one rank's| / |one rank's update| over all adapter weights, two AdamW steps in float32.
# Both sum the same terms in another order, and AdamW divides small gradients, noise included, by their size.
# eopd and reopold have entries that cancel nearly; docs/reliability.md has what was measured.
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


def plan(folder: Path, rows: Path, world_size: int, fault: str | None = None) -> Path:
    """Eight sequences a step: four a micro-batch on one rank, two on each of two."""
    entries = []
    for name, flags in RUNS.items():
        layout = {"per_device_train_batch_size": 4 // world_size, "gradient_accumulation_steps": 2}
        argv = train_argv(
            BASE, rows, folder / name, **(layout | flags), max_steps=STEPS, max_completion_length=12
        )
        entries.append([argv, None])
    if fault is not None:
        broken = [word.replace("pwopsd, default scope", "broken") for word in entries[-1][0]]
        entries = [*(entries if fault == "memory" else []), [broken, fault]]
    path = folder / "plan.json"
    path.write_text(json.dumps(entries))
    return path


def launch(folder: Path, rows: Path, fault: str | None = None) -> subprocess.CompletedProcess[str]:
    return launch_plan(plan(folder, rows, 2, fault))


def launch_plan(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(LAUNCHERS / "accelerate_launch.py")]
    command += ["--config_file", str(LAUNCHERS / "accelerate_cpu.yaml"), "--num_processes", "2"]
    command += [str(ROOT / "tests" / "programs" / "rank_runs.py"), str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    # The limit is for a hang; what is waited for takes a fraction of it.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    if struck := re.search(r"rank 1 breaks at ([\d.]+)", done.stderr):
        # For docs/reliability.md: pytest -s shows it.
        print(
            f"{path.parent.name}: the launch ended {time.time() - float(struck[1]):.1f} s after rank 1 broke"
        )
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, subprocess.CompletedProcess[str]]:
    """(one rank's folder, two ranks' folder, the launch, which ends with rank 1 out of memory)."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    rows = write_rows(one / "rows.jsonl", 24)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_roll_out", "train"):
            patch.setattr(OPSDTrainer, name, getattr(OPSDTrainer, name))  # as it was, afterwards
        assert carry_out(plan(one, rows, 1)) == 0
    return one, two, launch(two, rows, "memory")


def update(run: Path) -> torch.Tensor:
    """What training added to the adapter, [number of weights]. B starts at zero, and A does not move in the
    first step: its gradient is a multiple of B."""
    weights = load_file(run / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    start = load_file(run / "checkpoint-1" / "adapter_model.safetensors")
    parts = [w if "lora_B" in name else w - start[name] for name, w in sorted(weights.items())]
    return torch.cat([part.flatten().double() for part in parts])


def difference(one: Path, two: Path) -> float:
    """Relative, in the Euclidean norm."""
    return float((update(two) - update(one)).norm() / update(one).norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_make_one_ranks_update(runs, name: str) -> None:
    one, two, done = runs
    assert (two / name / f"checkpoint-{STEPS}").exists(), done.stderr[-3000:]
    norms = [[row["grad_norm"] for row in read_metrics(folder / name)] for folder in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=GRADIENT_TOLERANCE)
    assert update(one / name).norm() > 1e-2, "an update of nothing would equal anything"
    assert difference(one / name, two / name) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_ranks_hold_equal_weights_and_see_different_problems(runs, name: str) -> None:
    one, two, _ = runs
    alone = json.loads((one / name / "rank-0.json").read_text())
    first, second = (json.loads((two / name / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first["adapter"] == second["adapter"]
    for mine, theirs, whole in zip(first["seen"], second["seen"], alone["seen"], strict=True):
        assert len(mine) == len(theirs) == 4
        assert not set(mine) & set(theirs)
        assert sorted(mine + theirs) == sorted(whole), "a step's problems are those of one rank's step"


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
        ("exception", 1, ("RuntimeError: the planned defect of rank 1", "rank 1 ended with exit code 1")),
        ("kill", 137, ("rank 1 was killed by signal 9",)),
    ],
)
def test_a_rank_that_fails_ends_the_launch(
    tmp_path: Path, fault: str, code: int, said: tuple[str, ...]
) -> None:
    done = launch(tmp_path, write_rows(tmp_path / "rows.jsonl", 24), fault)
    assert done.returncode == code, done.stderr[-3000:]
    for words in said:
        assert words in done.stderr, done.stderr[-3000:]
    assert not (tmp_path / "broken" / "checkpoint-2").exists()


@pytest.mark.slow
def test_two_killed_ranks_resume_bit_for_bit(tmp_path: Path) -> None:
    """Each method is left in its second step of three, the last by SIGKILL, and resumed by new processes."""
    rows = write_rows(tmp_path / "rows.jsonl", 24)
    # Dropout draws from each rank's random state. The resumed reopold explores one more step, then refines.
    methods = {
        "opsd": {"lora_dropout": 0.2},
        "eopd": {},
        "pwopsd": {"loss_scope": "global"},
        "reopold": {"reopold_t_switch": 2, "loss_scope": "global"},
    }

    def entry(name: str, method: str, fault: str | None) -> list:
        layout = {"per_device_train_batch_size": 2, "max_steps": 3, "method": method}
        return [train_argv(BASE, rows, tmp_path / name, **layout, **methods[method]), fault]

    first = [entry(f"{name}_whole", name, None) for name in methods]
    first += [entry(name, name, "kill" if name == "reopold" else "stop") for name in methods]
    again = [entry(name, name, None) for name in methods]
    for number, (entries, code) in enumerate(((first, 137), (again, 0))):
        path = tmp_path / f"plan-{number}.json"
        path.write_text(json.dumps(entries))
        done = launch_plan(path)
        assert done.returncode == code, done.stderr[-3000:]
    for name in methods:
        assert f"resuming from {tmp_path / name}/checkpoint-1" in done.stderr
        whole, resumed = (
            (tmp_path / folder / "checkpoint-3" / "adapter_model.safetensors").read_bytes()
            for folder in (f"{name}_whole", name)
        )
        assert resumed == whole, name
        assert len(json.loads((tmp_path / name / "rank-1.json").read_text())["seen"]) == 2, "two were left"
    assert [row["method/refinement"] for row in read_metrics(tmp_path / "reopold")] == [0, 0, 1]
