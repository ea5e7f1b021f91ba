"""Memory and time of the objectives with their LM head, chunked against dense, in one run.

    python bench/bench_loss.py                                    # the four methods, 512 and 4,096 tokens
    python bench/bench_loss.py --tokens 512 1024 2048 4096 --vocabulary 32768 151936 --methods pwopsd

One measurement is forward and backward of one micro-batch, from hidden states to their gradient. "MB" is the
peak above the inputs (head, hidden states, ids): resident set on a CPU, allocated bytes on a GPU. Each form
runs in a process of its own, so that neither finds memory that the other left; the two take turns at each
repeat, so that a disturbance meets both, and the best repeat counts. "CPU s" is the processor time of that
process, which other jobs on the machine change less than the wall clock.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from opsd.objectives import METHODS, Hyperparameters, ReductionInput  # noqa: E402 - after the path

COLUMNS = (
    "method", "V", "tokens", "dense MB", "chunked MB", "memory ratio", "dense s", "chunked s", "time ratio",
    "dense CPU s", "chunked CPU s", "CPU ratio",
)  # fmt: skip


def inputs(tokens: int, vocabulary: int, hidden: int, device: str, dtype: str):
    """Return (head weight [V, H], student [N, H], teacher [N, H], ids [N], lengths [3]).

    The teacher is a perturbed student, so that no divergence is 0 by accident.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    weight = torch.empty(vocabulary, hidden, dtype=kind, device=device)
    for start in range(0, vocabulary, 4096):  # no second buffer of the head's size in the baseline
        rows = weight[start : start + 4096]
        rows.copy_(torch.randn(rows.shape, generator=generator) * 0.1)
    student = torch.randn(tokens, hidden, generator=generator)
    teacher = student + 0.3 * torch.randn(tokens, hidden, generator=generator)
    ids = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    lengths = torch.tensor([tokens // 4, tokens // 2, tokens - tokens // 4 - tokens // 2], device=device)
    return weight, student.to(device, kind).requires_grad_(), teacher.to(device, kind), ids, lengths


def step(form: str, method: str, data, hyper, chunk_positions: int | None = None):
    """Return (loss, gradient [N, H]) of a micro-batch in one form; REOPOLD in refinement."""
    import dataclasses

    from bench.dense import dense_loss
    from opsd.head import Head
    from opsd.token_stats import token_statistics

    weight, student, teacher, ids, lengths = data
    student.grad = None
    if form == "dense":
        loss = dense_loss(method, student, teacher, weight, ids, lengths, hyper=hyper, step=60)
    else:
        row = METHODS[method]
        stats = token_statistics(
            student,
            teacher,
            ids,
            config=dataclasses.replace(row.statistics(hyper), chunk_positions=chunk_positions),
            term=lambda s: row.term(s, hyper),
            head=Head(weight),
        )
        loss = row.reduce(ReductionInput(stats, lengths, step=60), hyper).loss()
    loss.backward()
    return loss.detach(), student.grad


def work(args) -> None:
    """Measure memory and time of a first step, then time one step for each line of input."""
    import torch

    from bench.memory import PeakMemory

    torch.set_num_threads(args.threads)
    hyper = Hyperparameters()
    warm = inputs(8, 1024, args.hidden, args.device, args.dtype)
    step(args.worker, args.method, warm, hyper)  # libraries allocate their workspaces before the measurement
    data = inputs(args.tokens[0], args.vocabulary[0], args.hidden, args.device, args.dtype)

    def timed():
        started, used = time.perf_counter(), time.process_time()
        result = step(args.worker, args.method, data, hyper, args.chunk_positions)
        if args.device == "cuda":
            torch.cuda.synchronize()
        return result, {"seconds": time.perf_counter() - started, "cpu": time.process_time() - used}

    with PeakMemory(args.device) as memory:
        (loss, gradient), times = timed()
    norm = float(gradient.double().norm())
    first = {"megabytes": memory.extra / 1e6, "loss": float(loss), "gradient": norm}
    print(json.dumps({**first, **times}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(timed()[1]), flush=True)


class Worker:
    """One form of one measurement in its own process."""

    def __init__(self, args, form: str, method: str, vocabulary: int, tokens: int):
        from bench.memory import EXACT_MALLOC

        options = {"worker": form, "method": method, "vocabulary": vocabulary, "tokens": tokens}
        options |= {
            name: getattr(args, name) for name in ("hidden", "device", "dtype", "threads", "chunk_positions")
        }
        flags = [
            text for name, value in options.items() if value is not None for text in (f"--{name}", str(value))
        ]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **EXACT_MALLOC},
        )
        self.first = self._read(f"{form} {method}, {tokens} tokens, V = {vocabulary}")
        self.best = {name: self.first[name] for name in ("seconds", "cpu")}

    def _read(self, what: str) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{what}: the process ended with status {self.process.wait()} (out of memory?)")
        return json.loads(line)

    def repeat(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        times = self._read("a timed repeat")
        self.best = {name: min(value, times[name]) for name, value in self.best.items()}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def workers(*made: Worker) -> Iterator[tuple[Worker, ...]]:
    try:
        yield made
    finally:
        for worker in made:
            worker.close()


def compare(args, method: str, vocabulary: int, tokens: int) -> dict:
    """Return one row of the table, {column: text}; empty cells where the dense form is not measured.

    Raises:
        SystemExit: the two forms' losses or gradient norms differ.
    """
    forms = ["chunked", "dense"] if tokens <= args.dense_up_to else ["chunked"]
    with workers(*(Worker(args, form, method, vocabulary, tokens) for form in forms)) as made:
        for _ in range(args.repeats):
            for worker in made:
                worker.repeat()
    row = {"method": method, "V": f"{vocabulary:,}", "tokens": f"{tokens:,}"}
    for form, worker in zip(forms, made, strict=True):
        row[f"{form} MB"] = f"{worker.first['megabytes']:,.0f}"
        row[f"{form} s"] = f"{worker.best['seconds']:.2f}"
        row[f"{form} CPU s"] = f"{worker.best['cpu']:.2f}"
    if len(made) == 2:
        chunked, dense = made
        tolerance = 1e-3 if args.dtype in ("float32", "float64") else 5e-2
        for name in ("loss", "gradient"):
            if abs(dense.first[name] - chunked.first[name]) > tolerance * abs(dense.first[name]):
                raise SystemExit(f"{method}: dense {name} {dense.first[name]}, chunked {chunked.first[name]}")
        row["memory ratio"] = f"1/{dense.first['megabytes'] / chunked.first['megabytes']:.0f}"
        row["time ratio"] = f"{chunked.best['seconds'] / dense.best['seconds']:.2f}"
        row["CPU ratio"] = f"{chunked.best['cpu'] / dense.best['cpu']:.2f}"
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096], help="completion tokens")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[151936])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", help="of head and hidden states")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3, help="timed steps after the first")
    parser.add_argument("--methods", nargs="+", default=tuple(METHODS), choices=tuple(METHODS))
    parser.add_argument(
        "--dense_up_to", type=int, default=512, help="most tokens for which the dense form is measured too"
    )
    parser.add_argument("--chunk_positions", type=int, help="positions per chunk; default: by memory")
    parser.add_argument("--worker", choices=["dense", "chunked"], help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        work(args)
        return 0
    load = os.getloadavg()[0]
    print(f"H = {args.hidden}, {args.dtype}, {args.device}, {args.threads} threads, load {load:.1f}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    for method in args.methods:
        for vocabulary in args.vocabulary:
            for tokens in args.tokens:
                row = compare(args, method, vocabulary, tokens)
                print(f"| {' | '.join(row.get(column, '') for column in COLUMNS)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
