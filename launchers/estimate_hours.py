"""Estimate the GPU-hours of the paper's table as a range:

    estimate_hours.py --model qwen3_4b_base 4.02e9 147456 --methods 4 --benchmarks math500 --seeds 3 --gpus 4

A step of training has three parts:
    rollout  new tokens of the longest completion x seconds of a decode step, which reads the weights once:
             2 bytes x parameters / (bandwidth x share of it reached)
    push     2 bytes x parameters / speed of the weight update
    compute  32 sequences x (6 x parameters x student's tokens + 2 x parameters x teacher's tokens)
             / (GPUs x matrix rate x share of it reached); 6 = forward, recomputed forward, gradient of the
             activations (the frozen weights have none)
Evaluation is decoding alone. A step reads the weights and the key-value cache of all sequences in flight, as
many as the memory holds and vLLM's scheduler takes, each with a whole sample as its context:
    seconds of a step  = (2 x parameters + sequences x tokens of a sample x cache bytes a token)
                         / (GPUs x bandwidth x share of it reached)
    seconds            = samples x problems x tokens of a sample x seconds of a step / sequences
Each assumption below has a flag, which takes its fast and its slow end. Needs only the standard library.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

STEPS = 150
BATCH = 32
NEW_TOKENS = 1024
SAMPLES = 12
CACHE_SHARE = 0.9  # evaluate_math.py's --gpu_memory_utilization
MOST_SEQUENCES = 1024  # max_num_seqs, vLLM's default on an H100

# name -> (fast end, slow end, unit and source)
ASSUMPTIONS: dict[str, tuple[float, float, str]] = {
    "bandwidth": (3.35e12, 3.35e12, "bytes/s a GPU: data sheet of the H100 SXM"),
    "matrix_rate": (989e12, 989e12, "bf16 FLOP/s a GPU: data sheet of the H100 SXM"),
    "memory": (80e9, 80e9, "bytes a GPU: data sheet of the H100 SXM"),
    "bandwidth_share": (0.73, 0.41, "of the bandwidth: 3.3 to 5.9 ms a decode step of Qwen3-4B, estimated"),
    "matrix_share": (0.5, 0.3, "of the matrix rate: usual for training at this size"),
    "push_speed": (4.2e9, 3.8e9, "bytes/s: 1.9 to 2.1 s for Qwen3-4B as others report"),
    "student_tokens": (1000, 1300, "prompt and completion: assumed"),
    "teacher_tokens": (2500, 3500, "prompt with the solution, and completion: assumed"),
    "math500_tokens": (3500, 6000, "of a sample on MATH-500: assumed"),
    "contest_tokens": (12000, 20000, "of a sample on the contests: assumed"),
}


def step_seconds(parameters: float, gpus: int, a: Mapping[str, float]) -> float:
    """Return the seconds of one optimizer step."""
    weights = 2 * parameters
    rollout = NEW_TOKENS * weights / (a["bandwidth"] * a["bandwidth_share"])
    operations = BATCH * parameters * (6 * a["student_tokens"] + 2 * a["teacher_tokens"])
    return rollout + weights / a["push_speed"] + operations / (gpus * a["matrix_rate"] * a["matrix_share"])


def evaluation_seconds(
    parameters: float, kv_bytes: float, benchmark: str, gpus: int, a: Mapping[str, float]
) -> float:
    """Return the seconds of one seed of a benchmark on all GPUs together."""
    problems, tokens = (500, a["math500_tokens"]) if benchmark == "math500" else (30, a["contest_tokens"])
    weights, cache = 2 * parameters, tokens * kv_bytes
    room = (CACHE_SHARE * a["memory"] * gpus - weights) / cache
    sequences = max(1.0, min(MOST_SEQUENCES, SAMPLES * problems, room))
    step = (weights + sequences * cache) / (gpus * a["bandwidth"] * a["bandwidth_share"])
    return SAMPLES * problems * tokens * step / sequences


def hours(args: argparse.Namespace, parameters: float, kv_bytes: float, end: int) -> tuple[float, ...]:
    """Return (seconds a step, GPU-hours of training, GPU-hours of evaluation); end 0 is the fast one."""
    a = {name: getattr(args, name)[end] for name in ASSUMPTIONS}
    step = step_seconds(parameters, args.gpus, a)
    tested = sum(evaluation_seconds(parameters, kv_bytes, name, args.gpus, a) for name in args.benchmarks)
    hour = args.gpus / 3600
    # The untrained model is evaluated as well.
    return step, args.methods * STEPS * step * hour, (args.methods + 1) * args.seeds * tested * hour


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    model = ("TAG", "PARAMETERS", "KV_BYTES")
    parser.add_argument("--model", nargs=3, action="append", metavar=model, required=True)
    parser.add_argument("--benchmarks", nargs="+", required=True)
    for name in ("methods", "seeds", "gpus"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name, (low, high, source) in ASSUMPTIONS.items():
        parser.add_argument(f"--{name}", nargs=2, type=float, default=(low, high), help=source)
    args = parser.parse_args()
    source = "measured on no machine (formula: launchers/estimate_hours.py)"
    print(f"estimate for {args.gpus} GPUs, {source}, from")
    for name, (_, _, source) in ASSUMPTIONS.items():
        low, high = getattr(args, name)
        print(f"  {name:16} {low:g}" + (f" to {high:g}" if high != low else "") + f"  {source}")
    sums = [0.0, 0.0]
    for tag, parameters, kv_bytes in args.model:
        ends = [hours(args, float(parameters), float(kv_bytes), end) for end in (0, 1)]
        step, train, test = (f"{fast:.0f} to {slow:.0f}" for fast, slow in zip(*ends, strict=True))
        print(f"  {tag}: {step} s a step, training {train}, evaluation {test} GPU-hours")
        sums = [total + end[1] + end[2] for total, end in zip(sums, ends, strict=True)]
    days = [total / args.gpus / 24 for total in sums]
    print(
        f"  together {sums[0]:.0f} to {sums[1]:.0f} GPU-hours, {days[0]:.1f} to {days[1]:.1f} days on "
        f"{args.gpus} GPUs, less what is already there"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
