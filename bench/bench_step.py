"""Time the phases of an optimizer step and of its dense form, in one run.

    python bench/bench_step.py                    # the small arithmetic world of testbed/
    python bench/bench_step.py --world qwen3      # Qwen3-4B's shapes scaled down, its complete vocabulary
    python bench/bench_step.py --world qwen3 --full --device cuda --dtype bfloat16    # its full shapes

Both forms run in the real Trainer loop (bench/step_forms.py); they take turns, each round starts from the
same weights, and the first step of a round warms up. On a CPU the round with the least processor time counts
and ratios are of processor time, which other jobs on the machine change less than the wall clock; on a GPU
the wall clock decides. "tokens/s" are completion tokens trained on per second of the step. "share of
matmul rate" is the useful work of the two passes, the objective and the backward pass (valid tokens only, no
recomputation counted) over the time of those phases, divided by what a large matrix product reaches on the
same device in the same dtype. The baseline: one rollout call per micro-batch, prompts padded to the longest
and completions to the maximum, logits of complete sequences.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from opsd.objectives import METHODS  # noqa: E402 - the repository's folder comes first


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--world", choices=["small", "qwen3"], default="small")
    parser.add_argument("--full", action="store_true", help="qwen3: the full shapes; needs a large GPU")
    parser.add_argument("--method", choices=tuple(METHODS), default="pwopsd")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rollout", choices=["hf", "vllm"], default="hf", help="vllm: small world only")
    parser.add_argument("--forms", nargs="+", choices=["real", "dense"], default=["real", "dense"])
    parser.add_argument(
        "--per_device_batch", type=int, help="sequences of a micro-batch; default 8, qwen3: 4"
    )
    parser.add_argument("--accumulation", type=int, help="micro-batches of a step; default 4, qwen3: 2")
    parser.add_argument(
        "--completion_tokens", type=int, help="the maximum; default 160, qwen3: 64, --full: 1024"
    )
    parser.add_argument(
        "--solution_tokens",
        type=int,
        nargs=2,
        help="qwen3: shortest and longest; default 25 1000, --full: 200 8000",
    )
    parser.add_argument("--max_padding_ratio", type=float, default=1.15)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=2, help="measured steps of a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    small = args.world == "small"
    args.per_device_batch = args.per_device_batch or (8 if small else 4)
    args.accumulation = args.accumulation or (4 if small else 2)
    args.completion_tokens = args.completion_tokens or (160 if small else 1024 if args.full else 64)
    args.solution_tokens = args.solution_tokens or ([200, 8000] if args.full else [25, 1000])
    if args.rollout == "vllm" and not small:
        parser.error("--rollout vllm needs a model on disk: use --world small")
    return args


def trainer_arguments(args, folder: str):
    """Return the four argument groups as ea_opsd_train.py parses them."""
    from bench.step_worlds import TESTBED
    from opsd.arguments import parse_arguments

    flags = {
        "method": args.method,
        "model_name_or_path": TESTBED / "base_model",
        "train_dataset": TESTBED / "data" / "train.jsonl",
        "output_dir": folder,
        "rollout": args.rollout,
        "max_completion_length": args.completion_tokens,
        "max_padding_ratio": args.max_padding_ratio,
        "per_device_train_batch_size": args.per_device_batch,
        "gradient_accumulation_steps": args.accumulation,
        "max_steps": 1 + args.steps,
        "learning_rate": 1e-3,
        "bf16": args.dtype == "bfloat16",
        "gradient_checkpointing": args.gradient_checkpointing,
        "use_cpu": args.device == "cpu",
        "save_strategy": "no",
        "rollout_audit_steps": 0,
        "log_completions_steps": 0,
        "disable_tqdm": True,
    }
    return parse_arguments([text for name, value in flags.items() for text in (f"--{name}", str(value))])


def run_round(args, form: str):
    """Train 1 + steps optimizer steps, always with the same seed and weights; return the trainer."""
    import torch

    from bench.step_forms import DenseTrainer, TimedTrainer
    from bench.step_worlds import adapted_model, problems_of
    from opsd.head import attach_hidden_forward, head_of
    from opsd.models import load_tokenizer
    from opsd.training import _build_engine

    with tempfile.TemporaryDirectory() as folder:
        training, method, rollout, options = trainer_arguments(args, folder)
        tokenizer = load_tokenizer(options.model_name_or_path)
        sequences = args.per_device_batch * args.accumulation * (1 + args.steps)
        problems = problems_of(args, tokenizer, sequences)
        torch.set_num_threads(args.threads)
        model = adapted_model(args, options, training)
        attach_hidden_forward(model.get_base_model())
        engine = _build_engine(model, tokenizer, problems, rollout, options, training)
        trainer = {"real": TimedTrainer, "dense": DenseTrainer}[form](
            model=model,
            args=training,
            processing_class=tokenizer,
            train_dataset=problems,
            method=method,
            engine=engine,
            head=head_of(model.get_base_model()),
            rollout=rollout,
            options=options,
        )
        trainer.log = lambda *_: None  # the table is the output
        try:
            trainer.train()
        finally:
            engine.close()
    return trainer


def useful_flops(model, record) -> float:
    """Return the operations that a step needs without the rollout: valid tokens, no recomputation.

    A frozen matrix costs 2 operations per weight and token forward and 2 backward (no weight gradient), an
    adapter's 2 and 4; causal attention 2·t²·d a layer forward, twice that backward; the head three products
    over the completion.
    """
    from torch import nn

    frozen = adapter = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            if "lora_" in name:
                adapter += module.weight.numel()
            else:
                frozen += module.weight.numel()
    config = model.config
    width = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    student, teacher = sum(record.student), sum(record.teacher)
    linear = (4 * frozen + 6 * adapter) * student + 2 * frozen * teacher
    attention = 2 * width * (3 * sum(t * t for t in record.student) + sum(t * t for t in record.teacher))
    head = 6 * config.vocab_size * config.hidden_size * record.completion_tokens
    return float(linear + attention + head)


def matmul_rate(device: str, dtype: str) -> float:
    """Return operations a second (on a CPU: a processor second) of a large product, best of several."""
    import torch

    size, clock = (8192, time.perf_counter) if device == "cuda" else (1536, time.process_time)
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    best = math.inf
    for _ in range(20 if device == "cuda" else 5):
        started = clock()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, clock() - started)
    return 2 * size**3 / best


def summary(trainer) -> dict:
    """Return the means over the measured steps of one round."""
    from bench.step_forms import PHASES

    steps, records = trainer.clock.steps[1:], trainer.records[1:]
    # An exhausted iterator asks once more for a batch and gets none: no step, no record.
    steps, records = steps[: trainer.args.max_steps - 1], records[: trainer.args.max_steps - 1]
    mean = {
        phase: [sum(step.get(phase, [0.0, 0.0])[kind] for step in steps) / len(steps) for kind in (0, 1)]
        for phase in PHASES
    }
    count, model = len(records), trainer.accelerator.unwrap_model(trainer.model)
    return {
        "phases": mean,
        "seconds": sum(value[0] for value in mean.values()),
        "cpu": sum(value[1] for value in mean.values()),
        "tokens": sum(r.completion_tokens for r in records) / count,
        "valid": sum(sum(r.student) + sum(r.teacher) for r in records) / count,
        "processed": sum(r.processed for r in records) / count,
        "flops": sum(useful_flops(model, record) for record in records) / count,
        "loss": [float(loss) for loss in trainer.records[0].losses],
        "calls": trainer.engine.calls / (1 + count),
    }


def measure(args) -> dict[str, dict]:
    """Return {form: summary of its best round} without forms that do not fit in memory."""
    import torch

    best: dict[str, dict] = {}
    for _ in range(args.rounds):
        for form in args.forms:
            try:
                found = summary(run_round(args, form))
            except torch.OutOfMemoryError as error:
                print(f"{form}: out of memory ({str(error).splitlines()[0]})\n", file=sys.stderr)
                continue
            finally:
                gc.collect()
                if args.device == "cuda":
                    torch.cuda.empty_cache()  # between measurements, so that the next starts from nothing
            unit = "seconds" if args.device == "cuda" else "cpu"
            if form not in best or found[unit] < best[form][unit]:
                best[form] = found
    return best


def print_table(best: dict[str, dict], rate: float, *, decisive: int) -> None:
    """Print each form's phases and their sum in seconds and processor seconds, then its other figures.

    `decisive` is 0 where the wall clock gives the ratios, 1 where processor seconds do.
    """
    from bench.step_forms import PHASES

    forms = list(best)
    both = set(forms) == {"real", "dense"}
    heads = [f"{form} {unit}" for form in forms for unit in ("s", "CPU s")] + ["dense / real"] * both
    print(f"| phase | {' | '.join(heads)} |\n|{' --- |' * (len(heads) + 1)}")
    totals = {"whole step": {form: [best[form]["seconds"], best[form]["cpu"]] for form in forms}}
    for phase, times in [(p, {f: best[f]["phases"][p] for f in forms}) for p in PHASES] + [*totals.items()]:
        cells = [f"{seconds:.3f}" for form in forms for seconds in times[form]]
        if both:
            real, dense = times["real"][decisive], times["dense"][decisive]
            cells.append(f"{dense / real:.2f}" if real >= 0.0005 else "")
        print(f"| {phase} | {' | '.join(cells)} |")
    heads = (
        "rollout calls a step",
        "completion tokens",
        "tokens/s",
        "processed / valid",
        "share of matmul rate",
    )
    print(f"\n| form | {' | '.join(heads)} |\n|{' --- |' * (len(heads) + 1)}")
    passes = ("student forward", "teacher forward", "objective", "backward")
    for form, found in best.items():
        busy = sum(found["phases"][phase][decisive] for phase in passes)
        cells = (
            f"{found['calls']:.1f}",
            f"{found['tokens']:.0f}",
            f"{found['tokens'] / found['seconds']:.1f}",
            f"{found['processed'] / found['valid']:.2f}",
            f"{found['flops'] / busy / rate:.0%}",
        )
        print(f"| {form} | {' | '.join(cells)} |")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here")
    torch.set_num_threads(args.threads)
    machine = f"cpu, {args.threads} threads, load {os.getloadavg()[0]:.1f}"
    if args.device == "cuda":
        machine = torch.cuda.get_device_name()
    best = measure(args)
    rate = matmul_rate(args.device, args.dtype)
    print(
        f"{args.world}{' full' if args.full else ''}, {args.method}, {args.dtype}, {machine}; "
        f"{args.accumulation} micro-batches of {args.per_device_batch}; matmul {rate / 1e9:,.0f} GFLOP/s\n"
    )
    print_table(best, rate, decisive=0 if args.device == "cuda" else 1)
    losses = [f"{form} {sum(found['loss']) / len(found['loss']):.6f}" for form, found in best.items()]
    print(f"\nfirst step's mean loss: {', '.join(losses)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
