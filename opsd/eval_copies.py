"""Data parallel evaluation: several copies of the model, one process each, that share the samples out.

The parent starts each copy as `python -m opsd.eval_copies` with its own slice of the GPUs (none on a CPU) and
writes its task as one JSON line to its standard input. A copy appends what it finishes to a journal of its
own, which the parent follows; the parent alone writes the run's journal. Standard input stays open as long as
the parent lives: at its end a copy stops, so that no orphan holds a GPU.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsd.errors import ArtefactError, UsageError, printable, run_cli
from opsd.eval_config import EvalConfig
from opsd.journal import Journal, LineReader

if TYPE_CHECKING:
    from opsd.evaluation import Plan

REPO_ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.2
# An orphan notices its parent's death at once, but may be in the middle of a long call.
ORPHAN_SECONDS = 60.0
LOG_LINES = 15


@dataclass
class Copy:
    """One running copy: its process, the journal that it writes, the log of its output."""

    number: int
    process: subprocess.Popen[bytes]
    journal: Path
    log: Path
    reader: LineReader = field(init=False)

    def __post_init__(self) -> None:
        self.reader = LineReader(self.journal)

    def fresh_records(self) -> list[dict[str, Any]]:
        """Samples that it finished since the last call."""
        if not self.journal.exists():
            return []
        return [data for data in self.reader.read() if "regime" not in data]


def copy_journal(config: EvalConfig, number: int) -> Path:
    """Where copy `number` writes what it finishes."""
    return Path(f"{config.output}.journal.copy{number}.jsonl")


def device_slices(copies: int, gpus_per_copy: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each copy; None for each where there is no GPU.

    Raises:
        UsageError: more GPUs are asked for than are visible.
    """
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        return [None] * copies
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",")[:count] if named else [str(index) for index in range(count)]
    if copies * gpus_per_copy > count:
        raise UsageError(
            f"--data_parallel_size {copies} x --tensor_parallel_size {gpus_per_copy} needs "
            f"{copies * gpus_per_copy} GPUs, but {count} are visible"
        )
    return [",".join(devices[n * gpus_per_copy : (n + 1) * gpus_per_copy]) for n in range(copies)]


def sample_in_copies(
    plan: Plan, pending: Sequence[tuple[int, int]], on_sample: Callable[[dict[str, Any]], None]
) -> None:
    """Draw the `pending` (problem, sample) pairs in copies; `on_sample` gets each record as it arrives.

    A copy that fails does not stop the others: they finish their share first.

    Raises:
        UsageError: fewer GPUs than needed.
        ArtefactError: a copy failed; the message names it and shows the end of its log.
    """
    count = min(plan.config.data_parallel_size, len(pending))
    slices = device_slices(count, plan.config.tensor_parallel_size)
    with _running(plan, pending, slices) as copies:
        alive = list(copies)
        while alive:
            time.sleep(POLL_SECONDS)
            # Asked before reading, so that what a copy wrote just before its end is read.
            ended = [copy for copy in alive if copy.process.poll() is not None]
            for copy in alive:
                for record in copy.fresh_records():
                    on_sample(record)
            for copy in ended:
                alive.remove(copy)
                if copy.process.returncode != 0:
                    print(f"\n{_describe(copy)}; {len(alive)} copies go on", file=sys.stderr)
        failed = [copy for copy in copies if copy.process.returncode != 0]
        for copy in copies:
            copy.journal.unlink(missing_ok=True)
            if copy not in failed:
                copy.log.unlink(missing_ok=True)
    if failed:
        raise ArtefactError(
            "; ".join(_describe(copy) for copy in failed)
            + f". The end of {failed[0].log}: "
            + " | ".join(_tail(failed[0].log))
        )


def absorb_leftovers(journal: Journal) -> None:
    """Move what the copies of a killed parent finished into the run's journal, and delete their journals.

    Raises:
        UsageError: a copy of the killed run is still at work.
    """
    base = str(journal.path).removesuffix(".jsonl")
    known = {(record["problem"], record["sample"]) for record in journal.records}
    for name in sorted(glob.glob(f"{glob.escape(base)}.copy*.jsonl")):
        _wait_for_orphan(Path(name))
        with Journal(name, journal.regime) as leftover:
            fresh = [r for r in leftover.records if (r["problem"], r["sample"]) not in known]
            journal.extend(fresh)
            journal.records.extend(fresh)
            known.update((record["problem"], record["sample"]) for record in fresh)
            leftover.remove()


def _wait_for_orphan(path: Path) -> None:
    deadline = time.monotonic() + ORPHAN_SECONDS
    with open(path, "rb") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UsageError(
                        f"a process of an earlier run still writes {path}; end it and run this command again"
                    ) from None
                time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _running(
    plan: Plan, pending: Sequence[tuple[int, int]], slices: Sequence[str | None]
) -> Iterator[list[Copy]]:
    copies: list[Copy] = []
    try:
        for number, devices in enumerate(slices):
            # Dealt out like cards: every copy gets samples of every problem, so all end at about one time.
            copies.append(_start(plan, number, list(pending[number :: len(slices)]), devices))
        yield copies
    finally:
        for copy in copies:
            with contextlib.suppress(BrokenPipeError):
                copy.process.stdin.close()
        for copy in copies:
            try:
                copy.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                copy.process.kill()
                copy.process.wait()


def _start(plan: Plan, number: int, pending: list[tuple[int, int]], devices: str | None) -> Copy:
    config = plan.config
    environment = dict(os.environ)
    inherited = os.environ.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO_ROOT), inherited]))
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    log = Path(f"{config.output}.copy{number}.log")
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "opsd.eval_copies"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    task = {
        "config": config.as_dict(),
        "number": number,
        "pending": pending,
        "facts": asdict(plan.facts),
        "regime": plan.regime,
    }
    with contextlib.suppress(BrokenPipeError):  # a copy that died at once is reported by its exit code
        process.stdin.write(json.dumps(task).encode("ascii") + b"\n")
        process.stdin.flush()
    return Copy(number, process, copy_journal(config, number), log)


def _describe(copy: Copy) -> str:
    code = copy.process.returncode
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"copy {copy.number} (process {copy.process.pid}) {how}"


def _tail(log: Path) -> list[str]:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [printable(line, 300) for line in lines if line.strip()][-LOG_LINES:]


# -- the copy's side -----------------------------------------------------------------------------------------


def main() -> int:
    """Read the task from standard input, draw its samples, journal them. Run by the parent, not by hand."""
    from opsd.eval_model import ModelFacts
    from opsd.evaluation import prepare, sample_here

    line = sys.stdin.buffer.readline()
    if not line:
        raise UsageError("this is started by evaluate_math.py --data_parallel_size N; run that")
    task = json.loads(line)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    config = EvalConfig(**task["config"])
    plan = prepare(config, facts=ModelFacts(**task["facts"]))
    if plan.regime != task["regime"]:
        raise ArtefactError("the benchmark changed while the copies were being started; run it again")
    pending = [(problem, number) for problem, number in task["pending"]]
    with Journal(copy_journal(config, task["number"]), plan.regime) as journal:
        sample_here(plan, pending, journal.append)
    return 0


def _end_with_parent() -> None:
    # The bare descriptor: a thread inside the buffered reader would hold its lock when the interpreter ends.
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)  # the parent closed it, or is no more


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
