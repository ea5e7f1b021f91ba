"""A killed and resumed run equals the run that was never killed; its manifest follows it to the result."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ea_opsd_train
import merge_lora
from opsd import checkpoints
from opsd.checkpoints import read_adapter
from opsd.errors import ArtefactError, UsageError
from opsd.evaluation.results import load_result
from opsd.files import atomic_write_json
from opsd.records import read_metrics
from opsd.run_identity import (
    check_merged,
    dataset_fingerprint,
    git_state,
    read_manifest,
    versions,
)
from tests.launchers.test_launchers import LAUNCHERS, SETTINGS, load_install
from tests.programs import forked_runs
from tests.programs.forked_runs import BASE, ROOT, Job, run_elsewhere, train_argv, write_rows
from tests.rollout.vllm_models import needs_vllm
from tests.test_merge_lora import scale_weights
from tests.test_run_identity import a_manifest

STEPS = 4
# A method's run: where its first process, its second, … is killed (`forked_runs.arm`; one more finishes), the
# checkpoint that each but the first resumes from (None = from the start), its flags. Twelve problems, four a
# step: an epoch ends with step 3.
STORIES = {
    # Dropout draws from the process's random state, which must continue where it was.
    "opsd": (("rollout 3",), (3,), {"lora_dropout": 0.2}),
    # Of one checkpoint to keep, the old one must not go before the new one is complete.
    "eopd": (("save 2", "mark 3"), (1, 2), {"save_total_limit": 1}),
    # The killed process had refined already; the resumed one has one step of exploration before it.
    "reopold": (
        ("log 4",),
        (2,),
        {"reopold_t_switch": 3, "loss_scope": "global", "save_steps": 2, "lora_dropout": 0.2},
    ),
    # Killed in every step.
    "pwopsd": (
        ("rollout 0", "mark 1", "rollout 1", "log 3", "mark 4"),
        (None, None, 1, 2, 3),
        {"report_to": "tensorboard"},
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `METHOD` (killed and resumed), `METHOD_whole` (never killed) and a log beside each; then
    pwopsd's merged folder and its evaluation."""
    folder = tmp_path_factory.mktemp("resume")
    rows = write_rows(folder / "rows.jsonl", 12)
    jobs = []

    def plan(run: str, log: str, moment: str | None, flags: dict) -> None:
        argv = train_argv(BASE, rows, folder / run, **flags)
        jobs.append(Job("ea_opsd_train", argv, str(folder / log), moment))

    for method, (moments, _, flags) in STORIES.items():
        plan(f"{method}_whole", f"{method}_whole.log", None, flags | {"method": method})
        for number, moment in enumerate((*moments, None)):
            plan(method, f"{method}-{number}.log", moment, flags | {"method": method})
    merged, last = folder / "pwopsd_merged", folder / "pwopsd" / f"checkpoint-{STEPS}"
    jobs.append(Job("merge_lora", forked_runs.merge_argv(last, merged), str(folder / "merge.log")))
    argv = forked_runs.evaluate_argv(merged, rows, folder / "result.json", num_samples=2)
    jobs.append(Job("evaluate_math", argv, str(folder / "evaluation.log")))
    for job, code in zip(jobs, run_elsewhere(jobs, folder), strict=True):
        assert code == (-signal.SIGKILL if job.moment else 0), Path(job.log).read_text()[-3000:]
    return folder


def final_adapter(run: Path) -> bytes:
    return (run / f"checkpoint-{STEPS}" / "adapter_model.safetensors").read_bytes()


def without_times(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(run)]


@pytest.mark.slow
@pytest.mark.parametrize("method", STORIES)
def test_the_resumed_run_is_the_uninterrupted_one(world: Path, method: str) -> None:
    whole, resumed = world / f"{method}_whole", world / method
    assert final_adapter(resumed) == final_adapter(whole), "bit for bit"
    assert len(final_adapter(whole)) > 10_000
    rows = without_times(resumed)
    assert rows == without_times(whole)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "each step once"
    assert all(row["grad_norm"] > 0 for row in rows), "steps that change nothing would show nothing"
    names = [path.relative_to(resumed) for path in sorted(resumed.rglob("*")) if "runs" not in path.parts]
    assert names == [p.relative_to(whole) for p in sorted(whole.rglob("*")) if "runs" not in p.parts]
    moments, resumed_from, _ = STORIES[method]
    for number, step in enumerate((None, *resumed_from)):
        log = (world / f"{method}-{number}.log").read_text()
        wanted = "starting afresh" if step is None else f"resuming from {resumed}/checkpoint-{step}\n"
        assert wanted in log
        if number and moments[number - 1].startswith(("save", "mark")):
            half = resumed / f"checkpoint-{moments[number - 1].split()[1]}"
            assert f"{half} is left out: it has no .complete marker: saving it was interrupted" in log
            assert f"{half} was incomplete when a run was killed; deleted" in log
    if method == "reopold":
        refined = [row["method/refinement"] for row in rows]
        assert refined == [0, 0, 0, 1], "optimizer steps are counted over the complete run"


@pytest.mark.slow
def test_tensorboard_shows_each_step_once(world: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = read_metrics(world / "pwopsd")
    assert len(list((world / "pwopsd" / "runs").iterdir())) == 6, "an event file for each process"
    events = EventAccumulator(str(world / "pwopsd" / "runs")).Reload()
    shown = {event.step: event.value for event in events.Scalars("train/loss/objective")}
    assert [event.step for event in events.Scalars("train/loss/objective")] == [1, 2, 3, 4]
    assert shown == pytest.approx({row["step"]: row["loss/objective"] for row in metrics})


@pytest.mark.slow
def test_a_runs_manifest_says_what_it_was_and_follows_it_to_the_result(world: Path) -> None:
    manifest = read_manifest(world / "pwopsd")
    argv = train_argv(BASE, world / "rows.jsonl", world / "pwopsd", **STORIES["pwopsd"][2])
    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text().splitlines()]
    assert manifest["command"][1:] == [str(ROOT / "ea_opsd_train.py"), *argv]
    stated = {
        "git": git_state(),
        "versions": versions(),
        "dataset": {"name": str(world / "rows.jsonl"), "rows": 12, "sha256": dataset_fingerprint(rows)},
        "base_model": str(BASE),
        "base_revision": None,
        "world_size": 1,
        "effective_batch": 4,
        "seeds": {"seed": 42, "data_seed": 42},
    }
    assert {name: manifest[name] for name in stated} == stated
    assert {"torch", "transformers", "peft", "accelerate", "datasets"} <= manifest["versions"].keys()
    assert {"position_w_min": 0.25, "lora_r": 8}.items() <= manifest["arguments"].items()
    assert [start["checkpoint"] for start in manifest["resumed"]] == [f"checkpoint-{n}" for n in (1, 2, 3)]
    for name in ("git", "versions"):
        assert [start[name] for start in manifest["resumed"]] == [manifest[name]] * 3
    assert "resumed" not in read_manifest(world / "pwopsd_whole")

    folder = world / "pwopsd_merged"
    merged = check_merged(folder, expected_run_name="pwopsd", expected_step=STEPS, hashes=True)
    assert merged["manifest"] == manifest
    card = (folder / "README.md").read_text()
    for said in ("| Method | pwopsd |", f"| Optimizer steps | {STEPS} |", manifest["dataset"]["sha256"]):
        assert said in card
    result = load_result(world / "result.json")
    assert result["model_identity"] == merged["identity"]
    kept = ("run_name", "method", "base_model", "base_revision", "git", "dataset", "seeds")
    expected = {name: manifest[name] for name in kept}
    assert result["training_run"] == expected | {"adapter_step": STEPS, "merged": merged["merged"]}


def a_run(folder: Path, *steps: int) -> Path:
    """Make a run folder with a complete checkpoint at each of `steps`, their contents made up."""
    folder.mkdir()
    atomic_write_json(folder / "manifest.json", a_manifest())
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir()
        for name in checkpoints.REQUIRED:
            (checkpoint / name).write_bytes(b"x" * 100)
        checkpoints.mark_complete(checkpoint)
    return folder


DAMAGE = {
    "no marker": (lambda c: (c / ".complete").unlink(), "saving it was interrupted"),
    "torn marker": (lambda c: os.truncate(c / ".complete", 9), "marker is damaged"),
    "marker of another kind": (lambda c: (c / ".complete").write_text("[]"), "marker is damaged"),
    "no optimizer": (lambda c: (c / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "a flipped bit": (
        lambda c: (c / "scheduler.pt").write_bytes(b"x" * 99 + b"y"),
        "the SHA-256 of scheduler.pt is not the one that was saved",
    ),
    "a copy of an earlier one": (
        lambda c: (shutil.rmtree(c), shutil.copytree(c.with_name("checkpoint-2"), c)),
        "it was saved as checkpoint-2",
    ),
    "a link to nothing": (lambda c: (shutil.rmtree(c), c.symlink_to("gone")), "saving it was interrupted"),
    "cut adapter": (lambda c: os.truncate(c / "adapter_model.safetensors", 99), "99 bytes instead of 100"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_left_out_with_a_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    run = a_run(tmp_path / "run", 1, 2, 10)
    damage, said = DAMAGE[kind]
    damage(run / "checkpoint-10")
    newest = checkpoints.resolve_resume(run, "auto")
    assert newest == run / "checkpoint-2", "the newest by number, not by name"
    assert f"{run / 'checkpoint-10'} is left out: " in caplog.text
    assert said in caplog.text
    with pytest.raises(ArtefactError, match=f"{said}|it does not exist"):
        checkpoints.resolve_resume(run, str(run / "checkpoint-10"))
    once_complete = (run / "checkpoint-10" / checkpoints.MARKER).is_file()
    assert checkpoints.remove_incomplete(run) == [run / "checkpoint-10"]
    assert checkpoints.remove_incomplete(run) == []
    assert len(list(run.glob("damaged-checkpoint-10-*"))) == once_complete, "nothing computed is deleted"


def test_rotation_counts_complete_checkpoints_and_spares_the_one_to_merge(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 1, 2, 3, 4, 10)
    (run / "checkpoint-10" / ".complete").unlink()
    assert checkpoints.rotate(run, None) == checkpoints.rotate(run, 0) == checkpoints.rotate(run, 4) == []
    assert checkpoints.rotate(run, 1, keep=2) == [run / "checkpoint-1", run / "checkpoint-3"]
    assert checkpoints.newest_complete(run) == run / "checkpoint-4"
    assert [step for step, _ in checkpoints.checkpoints(run)] == [2, 4, 10]


def test_of_a_linked_checkpoint_the_link_is_removed(tmp_path: Path) -> None:
    """One on another disk stopped the rotation and every resume."""
    run = a_run(tmp_path / "run", 1, 2, 3)
    for name in ("checkpoint-1", "checkpoint-3"):
        (run / name).rename(tmp_path / f"disk-{name}")
        (run / name).symlink_to(tmp_path / f"disk-{name}")
    (run / "checkpoint-3" / ".complete").unlink()
    assert checkpoints.remove_incomplete(run) == [run / "checkpoint-3"]
    assert checkpoints.rotate(run, 1) == [run / "checkpoint-1"]
    assert [path.name for _, path in checkpoints.checkpoints(run)] == ["checkpoint-2"]
    assert (tmp_path / "disk-checkpoint-3" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "disk-checkpoint-1" / checkpoints.MARKER).exists()


def resume(world: Path, folder: Path, **flags: object) -> int:
    """Resume a run of pwopsd in `folder` in this process."""
    values = STORIES["pwopsd"][2] | flags
    return ea_opsd_train.main(train_argv(BASE, world / "rows.jsonl", folder, **values))


def interrupted(world: Path, folder: Path) -> Path:
    """Return a copy of pwopsd's run as it was after step 3."""
    shutil.copytree(world / "pwopsd_whole", folder)
    shutil.rmtree(folder / "checkpoint-4")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"max_steps": 8}, "max_steps: 4 before, 8 now"),
        ({"lora_target_modules": "q_proj"}, r"lora_target_modules: \['q_proj', .* before, \['q_proj'\] now"),
        ({"adam_beta1": 0.8}, "adam_beta1: 0.9 before, 0.8 now"),
        ({"dtype": "bfloat16"}, "dtype: 'auto' before, 'bfloat16' now"),
        ({"dataset_revision": "v2"}, "dataset_revision: None before, 'v2' now"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type: 'linear' before, 'cosine' now"),
        ({"train_dataset": ROOT / "testbed/data/heldout_hard.jsonl"}, "the dataset's content: "),
    ],
)
def test_another_command_line_is_another_run(world: Path, tmp_path: Path, flags: dict, words: str) -> None:
    run = interrupted(world, tmp_path / "run")
    before = (run / "manifest.json").read_bytes()
    with pytest.raises(UsageError, match=words):
        resume(world, run, **flags)
    assert (run / "manifest.json").read_bytes() == before


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_refused(world: Path, tmp_path: Path) -> None:
    run, other = interrupted(world, tmp_path / "run"), world / "opsd" / "checkpoint-3"
    shutil.rmtree(run / "checkpoint-3")
    shutil.copytree(other, run / "checkpoint-3")
    words = "lora_dropout: 0.2 before, 0.0 now; method: 'opsd' before, 'pwopsd' now"
    with pytest.raises(ArtefactError, match=f"checkpoint-3 is a checkpoint of another run .*{words}"):
        resume(world, run)
    with pytest.raises(ArtefactError, match=words):
        resume(world, tmp_path / "fresh", resume_from_checkpoint=other)
    with pytest.raises(ArtefactError, match=words):
        read_adapter(run / "checkpoint-3")
    assert (run / "checkpoint-3" / "optimizer.pt").exists(), "what is not this run's is not deleted"


@pytest.mark.slow
def test_a_run_without_its_manifest_is_not_resumed(world: Path, tmp_path: Path) -> None:
    run = interrupted(world, tmp_path / "run")
    (run / "manifest.json").unlink()
    with pytest.raises(ArtefactError, match=r"run has no manifest\.json, so nothing says how .* began"):
        resume(world, run)
    assert checkpoints.newest_complete(run) == run / "checkpoint-3"


@pytest.mark.slow
def test_the_base_weights_decide_and_folders_may_be_links(world: Path, tmp_path: Path) -> None:
    base = shutil.copytree(BASE, tmp_path / "moved base")
    run = interrupted(world, tmp_path / "big disk" / "run")
    newest = shutil.move(run / "checkpoint-3", tmp_path / "big disk" / "newest")
    (run / "checkpoint-3").symlink_to(newest)
    (tmp_path / "run").symlink_to(run)
    kept = (base / "model.safetensors").read_bytes()
    scale_weights(base)
    with pytest.raises(UsageError, match=r"the base model's files: '.*' before, '.*' now"):
        resume(world, tmp_path / "run", model_name_or_path=base)
    (base / "model.safetensors").write_bytes(kept)
    assert resume(world, tmp_path / "run", model_name_or_path=base) == 0
    assert final_adapter(run) == final_adapter(world / "pwopsd_whole")
    out = tmp_path / "run_merged"
    for step in (3, 4):
        merge_lora.merge(str(base), tmp_path / "run" / f"checkpoint-{step}", out)
        check_merged(out, expected_step=step, expected_base_model=str(BASE), hashes=True)


@pytest.mark.vllm
@pytest.mark.slow
@needs_vllm
def test_with_vllm_the_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    flags = {"rollout": "vllm", "max_steps": STEPS, "vllm_enforce_eager": True}
    whole, killed = (train_argv(BASE, rows, tmp_path / name, **flags) for name in ("whole", "killed"))
    jobs = [
        Job("ea_opsd_train", whole, str(tmp_path / "whole.log")),
        Job("ea_opsd_train", killed, str(tmp_path / "killed.log"), "rollout 2"),
        Job("ea_opsd_train", killed, str(tmp_path / "resumed.log")),
    ]
    assert run_elsewhere(jobs, tmp_path) == [0, -signal.SIGKILL, 0], (tmp_path / "resumed.log").read_text()
    assert f"resuming from {tmp_path / 'killed'}/checkpoint-2\n" in (tmp_path / "resumed.log").read_text()
    assert final_adapter(tmp_path / "killed") == final_adapter(tmp_path / "whole")
    assert without_times(tmp_path / "killed") == without_times(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_launcher_started_again_resumes_and_merges(tmp_path: Path) -> None:
    python, install = tmp_path / "venv" / "bin" / "python", load_install()
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    stamp = {"stack": "cpu", "requirements": install.requirements_hash(ROOT), "vllm": True}
    (tmp_path / "venv" / install.STAMP).write_text(json.dumps(stamp))
    rows = write_rows(tmp_path / "rows.jsonl", 40)
    flags = {"train_dataset": rows, "max_steps": 3, "save_steps": 1, "max_completion_length": 6, "lora_r": 8}
    command = ["bash", str(LAUNCHERS / "train.sh"), "small", "pwopsd", *forked_runs.flags(flags)]
    settings = {
        "VENV": str(tmp_path / "venv"), "STACK": "cpu", "OUTPUT_ROOT": str(tmp_path / "outputs"),
        "MERGE_STEP": "3", "RUN_NAME": "small_pwopsd_short", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS} | settings
    run, merged = (tmp_path / "outputs" / f"small_pwopsd_short{suffix}" for suffix in ("", "_merged"))
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    while checkpoints.newest_complete(run) is None:
        assert first.poll() is None, "the launcher ended before its first checkpoint"
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    left = checkpoints.newest_complete(run).name
    assert not merged.exists()
    again = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"resuming from {run}/{left}" in again.stderr or left == "checkpoint-3"
    check_merged(merged, expected_step=3, hashes=True)
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3]


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing() -> None:
    """The short form of tests/programs/kill_runs.py: one kill each of training, merging and evaluation."""
    command = [sys.executable, str(ROOT / "tests/programs/kill_runs.py"), "--kills", "1", "--seed", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "3 kills, 0 differences" in done.stdout
