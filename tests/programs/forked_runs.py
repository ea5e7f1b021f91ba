"""Run entry points in forked processes: `python -m tests.programs.forked_runs JOBS.json`.

The heavy imports happen once, in the parent. Each job then runs in a process group of its own, as from the
command line, and ends by itself, by a SIGKILL at a chosen moment, or by one after some seconds. JOBS.json is
a list of `Job`s as objects; the exit codes (-9 for a kill) are printed as a JSON list.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from opsd.errors import run_cli

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "testbed" / "base_model"
IMPORTS = (
    "ea_opsd_train", "merge_lora", "evaluate_math", "opsd.training", "opsd.trainer", "datasets",
    "opsd.evaluation.run", "opsd.rollout.hf", "opsd.evaluation.scoreboard", "peft", "tensorboard",
    "torch.utils.tensorboard", "transformers.models.qwen3.modeling_qwen3",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One run."""

    program: str  # ea_opsd_train, merge_lora or evaluate_math
    argv: list[str]
    log: str  # stdout and stderr are appended to this file
    moment: str | None = None  # where it kills itself (`arm`); None: nowhere


def import_everything() -> None:
    """Import what every entry point needs, so that a fork starts at its own work."""
    for name in IMPORTS:
        importlib.import_module(name)
    # A fork has the calling thread alone: another one would be lost in the middle of its work. pyarrow's
    # allocator has one that only returns memory.
    threads = {Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
    assert len(threads - {"jemalloc_bg_thd"}) == 1, threads


def arm(moment: str) -> None:
    """Make this process kill itself and every process that it started at `moment`, "WHAT N" in training.

    WHAT is `rollout` (N steps are done, the next one samples), `log` (step N is in metrics.jsonl, not yet
    saved), `save` (checkpoint-N lacks the optimizer), `mark` (checkpoint-N lacks its marker alone).
    """
    from opsd import trainer
    from opsd.step_metrics import MetricsFile

    def steps_done(self: trainer.OPSDTrainer, *_: object) -> int:
        return self.state.global_step

    what, number = moment.split()
    owner, name, step_of = {
        "rollout": (trainer.OPSDTrainer, "_roll_out", steps_done),
        "log": (MetricsFile, "on_log", lambda self, args, state, *_: state.global_step),
        "save": (trainer.OPSDTrainer, "_save_optimizer_and_scheduler", steps_done),
        "mark": (trainer, "mark_complete", lambda folder: int(folder.name.removeprefix("checkpoint-"))),
    }[what]
    original = getattr(owner, name)

    def armed(*arguments: object, **more: object) -> object:
        now = step_of(*arguments) == int(number)
        result = original(*arguments, **more) if what == "log" or not now else None
        if now:
            os.killpg(0, signal.SIGKILL)
        return result

    setattr(owner, name, armed)


def start(job: Job) -> int:
    """Fork `job` into a process group of its own and return its id."""
    child = os.fork()
    if child:
        return child
    try:
        os.setsid()
        log = os.open(job.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        # The manifest records the command line.
        sys.argv = [str(ROOT / f"{job.program}.py"), *job.argv]
        if job.moment is not None:
            arm(job.moment)
        code = run_cli(lambda: importlib.import_module(job.program).main(job.argv))
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(job: Job, *, kill_after: float | None = None) -> int:
    """Run `job` to its end, or kill its process group after so many seconds; return its exit code."""
    child = start(job)
    deadline = None if kill_after is None else time.monotonic() + kill_after
    done = status = 0
    while not done and deadline is not None and time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.002)
    if not done:
        if deadline is not None:
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def run_elsewhere(jobs: Iterable[Job], folder: Path) -> list[int]:
    """Run `jobs` one after the other from a new process, as this one may have threads; their exit codes."""
    listing = folder / "jobs.json"
    listing.write_text(json.dumps([asdict(job) for job in jobs]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.programs.forked_runs", str(listing)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def flags(values: dict[str, object]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def train_argv(base: Path | str, rows: Path, folder: Path, **more: object) -> list[str]:
    """Return the command line of the smallest run: two micro-batches of two problems a step."""
    values = {
        "method": "pwopsd", "model_name_or_path": base, "train_dataset": rows, "output_dir": folder,
        "rollout": "hf", "max_completion_length": 6, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "max_steps": 4, "save_steps": 1, "learning_rate": 0.001,
        "lora_r": 8, "bf16": False, "gradient_checkpointing": False, "use_cpu": True,
        "resume_from_checkpoint": "auto",
    }  # fmt: skip
    return flags(values | more)


def evaluate_argv(model: Path, rows: Path, output: Path, **more: object) -> list[str]:
    """Return the command line of the smallest evaluation: two samples of each problem."""
    values = {
        "base_model": model, "dataset": "sums", "dataset_path": rows, "output": output, "engine": "hf",
        "val_n": 2, "max_new_tokens": 24, "grading_workers": 1,
    }  # fmt: skip
    return flags(values | more)


def merge_argv(adapter: Path, output: Path) -> list[str]:
    return flags({"base_model": BASE, "adapter": adapter, "output": output})


def write_rows(path: Path, count: int) -> Path:
    """Write the small world's first `count` training problems."""
    with open(ROOT / "testbed" / "data" / "train.jsonl", encoding="utf-8") as file:
        path.write_text("".join(next(file) for _ in range(count)), encoding="utf-8")
    return path


if __name__ == "__main__":
    import_everything()
    print(json.dumps([run(Job(**job)) for job in json.loads(Path(sys.argv[1]).read_text())]))
