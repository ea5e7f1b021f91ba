"""Memory and time of the objectives with their LM head, chunked against dense, in one run.

    python bench/bench_loss.py [--tokens 512 4096] [--vocabulary 151936] [--hidden 256] [--device cpu|cuda]

Each measurement is a process of its own: forward and backward of one micro-batch, from hidden states. "Extra memory"
is the peak above the inputs (head, hidden states, ids): resident set size on a CPU, allocated bytes on a GPU. The time
is the best of --repeats. Prints a Markdown table with the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def inputs(tokens: int, vocabulary: int, hidden: int, device: str, dtype: str):
    """A head, two roles' hidden states and sampled tokens; the teacher is a perturbed student."""
    import torch

    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, dtype)
    weight = torch.empty(vocabulary, hidden)
    for start in range(0, vocabulary, 4096):  # no second buffer of the head's size in the baseline
        weight[start : start + 4096] = torch.randn(weight[start : start + 4096].shape, generator=generator) * 0.1
    weight = weight.to(device, kind)
    student = torch.randn(tokens, hidden, generator=generator)
    teacher = student + 0.3 * torch.randn(tokens, hidden, generator=generator)
    ids = torch.randint(vocabulary, (tokens,), generator=generator)
    lengths = torch.tensor([tokens // 4, tokens // 2, tokens - tokens // 4 - tokens // 2])
    return weight, student.to(device, kind).requires_grad_(), teacher.to(device, kind), ids.to(device), lengths.to(device)


class PeakMemory:
    """Peak bytes above the entry's level while the block runs."""

    def __init__(self, device: str):
        self.device = device

    def __enter__(self):
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        else:
            import psutil

            self.process = psutil.Process()
            self.base = self.peak = self.process.memory_info().rss
            self.stop = threading.Event()
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        return self

    def _watch(self):
        while not self.stop.is_set():
            self.peak = max(self.peak, self.process.memory_info().rss)
            time.sleep(0.001)

    def __exit__(self, *_):
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self.stop.set()
            self.thread.join()
        self.extra = self.peak - self.base


def step(form: str, method: str, data, hyper):
    """Loss and gradient of one micro-batch in one of the two forms."""
    from bench.dense import dense_loss
    from opsd.head import Head
    from opsd.objectives import METHODS
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
            config=row.statistics(hyper),
            term=lambda s: row.term(s, hyper),
            head=Head(weight),
        )
        loss = row.reduce(stats, lengths, hyper, step=60).loss()
    loss.backward()
    return loss.detach(), student.grad


def measure(args) -> dict:
    """One form and method in this process: memory of the first call, then the best time of the repeats."""
    import torch

    from opsd.objectives import Hyperparameters

    torch.set_num_threads(args.threads)
    hyper = Hyperparameters()
    warm = inputs(8, 1024, args.hidden, args.device, args.dtype)
    step(args.form, args.method, warm, hyper)  # libraries allocate their workspaces before the measurement
    data = inputs(args.tokens[0], args.vocabulary, args.hidden, args.device, args.dtype)
    with PeakMemory(args.device) as memory:
        loss, gradient = step(args.form, args.method, data, hyper)
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        step(args.form, args.method, data, hyper)
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {
        "megabytes": memory.extra / 1e6,
        "seconds": min(seconds),
        "loss": float(loss),
        "gradient": float(gradient.float().norm()),
    }


def run_one(args, form: str, method: str, tokens: int) -> dict:
    """`measure` in a fresh process, so that no allocator keeps what another form has taken."""
    command = [sys.executable, __file__, "--form", form, "--method", method, "--tokens", str(tokens)]
    for name in ("vocabulary", "hidden", "device", "dtype", "threads", "repeats"):
        command += [f"--{name}", str(getattr(args, name))]
    # Freed buffers go back to the system at once, so the resident set shows what is really in use.
    env = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout
    return json.loads(output.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=["opsd", "eopd", "reopold", "pwopsd"])
    parser.add_argument("--form", choices=["dense", "chunked"], help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.form:
        print(json.dumps(measure(args)))
        return 0
    print(f"V = {args.vocabulary}, H = {args.hidden}, {args.dtype}, {args.device}, {args.threads} threads\n")
    print("| method | tokens | dense MB | chunked MB | memory ratio | dense s | chunked s | time ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for method in args.methods:
        for number, tokens in enumerate(args.tokens):
            chunked = run_one(args, "chunked", method, tokens)
            if number:  # the dense form at the larger sizes does not fit every machine
                print(f"| {method} | {tokens} | | {chunked['megabytes']:.0f} | | | {chunked['seconds']:.2f} | |", flush=True)
                continue
            dense = run_one(args, "dense", method, tokens)
            if abs(dense["loss"] - chunked["loss"]) > 1e-3 * max(1, abs(dense["loss"])):
                raise SystemExit(f"{method}: dense loss {dense['loss']} and chunked loss {chunked['loss']} differ")
            memory = dense["megabytes"] / chunked["megabytes"]
            print(
                f"| {method} | {tokens} | {dense['megabytes']:.0f} | {chunked['megabytes']:.0f} | 1/{memory:.0f} | "
                f"{dense['seconds']:.2f} | {chunked['seconds']:.2f} | {chunked['seconds'] / dense['seconds']:.2f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
