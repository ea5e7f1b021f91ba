"""Run entry points in forked processes: `python -m tests.programs.forked_runs JOBS.json [IMPORTS]`.

The heavy imports happen once, in the parent. Each job then runs in a process group of its own, as from the
command line, and ends by itself, by a SIGKILL at a named moment, or by one after some seconds. JOBS.json is
a list of `Job`s as objects; the exit codes (-9 for a kill) are printed as a JSON list.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        program: ea_opsd_train, merge_lora or evaluate_math.
        argv: its command line.
        log: file that stdout and stderr are appended to.
        moment: where it kills itself (see `arm`), None = nowhere.
    """

    program: str
    argv: list[str]
    log: str
    moment: str | None = None


def import_everything(*more: str) -> None:
    """What every entry point needs, and `more`, so that a fork starts at its own work."""
    for name in ("ea_opsd_train", "merge_lora", "evaluate_math", "opsd.training", "opsd.trainer", "datasets"):
        importlib.import_module(name)
    for name in (
        "opsd.evaluation.run",
        "opsd.rollout.hf",
        "opsd.evaluation.scoreboard",
        "peft",
        "tensorboard",
        *more,
    ):
        importlib.import_module(name)
    importlib.import_module("torch.utils.tensorboard")
    importlib.import_module("transformers.models.qwen3.modeling_qwen3")
    # A fork has the calling thread alone: another one would be lost in the middle of its work. pyarrow's
    # allocator has one that only returns memory.
    threads = {Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
    assert len(threads - {"jemalloc_bg_thd"}) == 1, threads


def die() -> None:
    """End this process, and every process that it started, as the kernel does when memory runs out."""
    os.killpg(0, signal.SIGKILL)


def arm(moment: str) -> None:
    """Make this process kill itself at `moment`, "WHAT N" in training.

    WHAT is `rollout` (N steps are done, the next one samples), `log` (step N is in metrics.jsonl, not yet
    saved), `save` (checkpoint-N lacks the optimizer), `mark` (checkpoint-N lacks its marker alone).
    """
    from opsd import trainer
    from opsd.step_metrics import MetricsFile

    what, number = moment.split()
    here = int(number)
    kind = trainer.OPSDTrainer

    def before(owner: object, name: str, is_now: Callable[..., bool]) -> None:
        original = getattr(owner, name)

        def armed(*arguments, **more):
            if is_now(*arguments):
                die()
            return original(*arguments, **more)

        setattr(owner, name, armed)

    if what == "rollout":
        before(kind, "_roll_out", lambda self, *_: self.state.global_step == here)
    elif what == "log":
        log = MetricsFile.on_log

        def logged(self, args, state, control, **more):
            log(self, args, state, control, **more)
            if state.global_step == here:
                die()

        MetricsFile.on_log = logged
    elif what == "save":
        before(kind, "_save_optimizer_and_scheduler", lambda self, *_: self.state.global_step == here)
    elif what == "mark":
        before(trainer, "mark_complete", lambda folder: folder.name == f"checkpoint-{here}")
    else:
        raise ValueError(moment)


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
        from opsd.errors import run_cli

        if job.moment is not None:
            arm(job.moment)
        code = run_cli(lambda: importlib.import_module(job.program).main(job.argv))
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(child: int) -> int:
    """The exit code of a started job; minus the signal where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(job: Job, *, kill_after: float | None = None) -> int:
    """Run `job` to its end, or kill its whole process group after so many seconds. Returns its exit code."""
    child = start(job)
    if kill_after is None:
        return wait(child)
    deadline = time.monotonic() + kill_after
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(child, signal.SIGKILL)
    return wait(child)


def run_elsewhere(jobs: Iterable[Job], folder: Path, *more_imports: str) -> list[int]:
    """Run `jobs` one after the other from a fresh process, as this one may have threads; their exit codes."""
    import subprocess

    jobs = list(jobs)
    listing = folder / "jobs.json"
    listing.write_text(json.dumps([asdict(job) for job in jobs]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "tests.programs.forked_runs", str(listing), *more_imports]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def train_argv(base: Path | str, rows: Path, folder: Path, **flags: object) -> list[str]:
    """The command line of a run of the smallest kind: two micro-batches of two problems a step."""
    values: dict[str, object] = {
        "method": "pwopsd",
        "model_name_or_path": base,
        "train_dataset": rows,
        "output_dir": folder,
        "rollout": "hf",
        "max_completion_length": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "save_steps": 1,
        "learning_rate": 0.001,
        "lora_r": 8,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "resume_from_checkpoint": "auto",
    } | flags
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


if __name__ == "__main__":
    import_everything(*sys.argv[2:])
    given = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps([run(Job(**job)) for job in given]))
