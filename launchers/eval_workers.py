"""The workers of launchers/eval_workers.sh, which says what they do. Needs only Python's standard library."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from plan_command import WrongSettingError, count, say, shown, visible_gpus

RUN_EVAL = Path(__file__).resolve().parent / "run_eval.sh"
REFRESH_S = 0.5
# Seconds from SIGTERM to SIGKILL.
GRACE_S = 10.0


@dataclass
class Cell:
    """One line of the list; `wait` is set once a worker of another start was found on it."""

    name: str
    dataset: str
    seed: str = ""
    wait: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.dataset}" + (f" seed {self.seed}" if self.seed else "")


@dataclass
class Worker:
    """A slot for one run_eval.sh at a time.

    Attributes:
        label: its HOSTLABEL.
        devices: its CUDA_VISIBLE_DEVICES; empty where there is no GPU.
        status: its cell and that cell's latest line of output.
    """

    label: str
    devices: str
    process: subprocess.Popen[bytes] | None = None
    status: str = "idle"


@dataclass
class Pool:
    """The cells that are left, the workers, and the results so far."""

    workers: list[Worker]
    cells: collections.deque[Cell]
    tensor_parallel: str
    flags: Sequence[str]
    total: int
    done: int = 0
    news: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    stopping: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def command(self, cell: Cell) -> list[str]:
        words = ["bash", str(RUN_EVAL), cell.name, cell.dataset, self.tensor_parallel]
        return [*words, *([cell.seed] if cell.seed else []), *(["--", *self.flags] if self.flags else [])]

    def environment(self, worker: Worker, cell: Cell) -> dict[str, str]:
        own = {"HOSTLABEL": worker.label} | ({"WAIT": "1"} if cell.wait else {})
        return os.environ | own | ({"CUDA_VISIBLE_DEVICES": worker.devices} if worker.devices else {})

    def work(self, worker: Worker) -> None:
        """Evaluate cells until none is left; the body of a worker's thread."""
        while True:
            with self.lock:
                worker.status, worker.process = "idle", None
                if self.stopping or not self.cells:
                    return
                cell = self.cells.popleft()
                process = worker.process = subprocess.Popen(
                    self.command(cell),
                    env=self.environment(worker, cell),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            error, busy = "", False
            for line in output_lines(process):
                worker.status = f"{cell}: {line}"
                error = line if line.startswith("error: ") else error
                busy = busy or ("another worker is on" in line and not cell.wait)
            code = process.wait()
            with self.lock:
                if code == 0 and busy:
                    cell.wait = True
                    self.cells.append(cell)
                else:
                    self.finish(worker, cell, code, error)

    def finish(self, worker: Worker, cell: Cell, code: int, error: str = "") -> None:
        """Record how a cell ended."""
        self.done += 1
        how = "done" if code == 0 else f"exit code {code}" + (f" ({error[7:]})" if error else "")
        self.news.append(f"{self.done} of {self.total} cells, {worker.label}: {cell}: {how}")
        if code != 0:
            self.failures.append(f"{cell}: {how}")

    def stop(self) -> None:
        """End every running evaluation with its child processes; finished samples stay in its journal."""
        with self.lock:
            self.stopping = True
            running = [worker.process for worker in self.workers if worker.process is not None]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in running:
                signal_group(process, number)
            limit = time.monotonic() + GRACE_S
            while time.monotonic() < limit and any(signal_group(process, 0) for process in running):
                time.sleep(0.05)


def signal_group(process: subprocess.Popen[bytes], number: int) -> bool:
    """Signal the session that `process` leads; False when none of its processes is left."""
    process.poll()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
        return True
    return False


def output_lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Yield each line of output, and each state of a progress bar, as it comes."""
    rest = b""
    with process.stdout as stream:
        while chunk := stream.read1(65536):
            *lines, rest = re.split(rb"[\r\n]", rest + chunk)
            yield from filter(None, (line.decode(errors="replace").strip() for line in lines))


def watch(pool: Pool, threads: Sequence[threading.Thread]) -> None:
    """Show a line per worker on a terminal and a line per finished cell until all threads have ended."""
    terminal, drawn = sys.stderr.isatty(), 0
    while True:
        working = any(thread.is_alive() for thread in threads)
        if drawn:
            sys.stderr.write(f"\x1b[{drawn}A\x1b[J")
        while pool.news:
            say(pool.news.pop(0))
        if not working:
            return
        if terminal:
            width = shutil.get_terminal_size().columns - 1
            for worker in pool.workers:
                place = f" [GPU {worker.devices}]" if worker.devices else ""
                print(shown(f"{worker.label}{place} {worker.status}")[:width], file=sys.stderr)
            drawn = len(pool.workers)
        time.sleep(REFRESH_S)


def dry_run(pool: Pool) -> None:
    """Print every command in the order of the list."""
    for number, cell in enumerate(pool.cells):
        worker = pool.workers[number % len(pool.workers)]
        done = subprocess.run(
            pool.command(cell),
            env=pool.environment(worker, cell),
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        place = f"CUDA_VISIBLE_DEVICES={worker.devices} " if worker.devices else ""
        print("".join(f"{place}{line}\n" for line in done.stdout.splitlines()), end="", flush=True)
        pool.finish(worker, cell, done.returncode)


def make_workers(tensor_parallel: int) -> list[Worker]:
    """Return the workers, each with its own `tensor_parallel` GPUs. Raises WrongSettingError."""
    gpus = visible_gpus()
    fitting = len(gpus) // tensor_parallel if gpus else 1
    number = count("WORKERS", os.environ.get("WORKERS") or str(fitting or 1), "a number of workers")
    if gpus and number > fitting:
        raise WrongSettingError(
            f"WORKERS={number} x TENSOR_PARALLEL={tensor_parallel} takes more than the {len(gpus)} visible "
            "GPUs; lower one of them"
        )
    label = os.environ.get("HOSTLABEL") or "worker"
    slices = [",".join(gpus[k * tensor_parallel : (k + 1) * tensor_parallel]) for k in range(number)]
    return [Worker(f"{label}{k + 1}", devices) for k, devices in enumerate(slices)]


def read_cells(path: str | None) -> list[Cell]:
    """Return the cells of a file, or of standard input. Raises WrongSettingError."""
    source, usage = path or "standard input", "write METHOD_NAME DATASET [SEED]"
    try:
        text = sys.stdin.read() if path is None else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WrongSettingError(f"{source} cannot be read ({error}); give a text file") from None
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in lines:
        if len(line.split()) not in (2, 3):
            raise WrongSettingError(f"'{line}' is not a cell: {usage}")
    if not lines:
        raise WrongSettingError(f"{source} has no cell: {usage} a line")
    return [Cell(*line.split()) for line in lines]


def evaluate(pool: Pool) -> None:
    """Run all cells; on SIGINT or SIGTERM, end the workers too."""
    threads = [threading.Thread(target=pool.work, args=(worker,), daemon=True) for worker in pool.workers]
    try:
        for thread in threads:
            thread.start()
        watch(pool, threads)
    except KeyboardInterrupt:
        say("ending the workers; the same command continues from here")
        pool.stop()
        raise


def main() -> int:
    """Return 0, 1 where a cell failed, 2 for a wrong call, 130 after SIGINT or SIGTERM."""
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    try:
        if cut > 1:
            raise WrongSettingError(
                f"'{words[1]}' is one argument too many: eval_workers.sh [FILE] [-- flags]"
            )
        cells = read_cells(words[0] if cut else None)
        parallel = os.environ.get("TENSOR_PARALLEL") or "1"
        workers = make_workers(count("TENSOR_PARALLEL", parallel, "the number of GPUs that share a model"))
    except WrongSettingError as error:
        print(f"error: {shown(str(error))}", file=sys.stderr)
        return 2
    pool = Pool(workers, collections.deque(cells), parallel, words[cut + 1 :], len(cells))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        dry_run(pool) if os.environ.get("DRY_RUN") == "1" else evaluate(pool)
    except KeyboardInterrupt:
        return 130
    if pool.done < pool.total:
        pool.failures.append(f"{pool.total - pool.done} cells were not started")
    for failure in pool.failures:
        print(f"  {shown(failure)}", file=sys.stderr)
    if pool.failures:
        print(f"error: {len(pool.failures)} of {pool.total} cells failed (listed above)", file=sys.stderr)
    return 1 if pool.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
