"""Measure what a merge into bfloat16 keeps of a LoRA update, rounded to nearest and stochastically.

    python bench/bench_merge.py --base_model BASE --run outputs/RUN [--steps 10 20 50 100] [--seeds 0 1 2]

BASE is a bfloat16 model. For each checkpoint and way of rounding, over all adapted matrices: entries changed,
projection of the update kept and relative error (opsd/merging.py); and over held-out reference solutions
KL(student || merged) / KL(student || base), where the student is the base with the adapter on. All models
compute in float32, so that nothing but the merged weights differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from torch import Tensor


def log_probs(model, rows: list[tuple[list[int], int]]) -> list[Tensor]:
    """Return each row's log-probabilities [solution tokens, V]; a row: token ids, length of the prompt."""
    import torch

    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0, n - 1 : -1].float().log_softmax(-1) for ids, n in rows]


def kl(student: list[Tensor], other: list[Tensor]) -> float:
    """Return KL(student || other) in nats, the mean over tokens."""
    per_token = [(s.exp() * (s - o)).sum(-1) for s, o in zip(student, other, strict=True)]
    return sum(float(row.double().sum()) for row in per_token) / sum(len(row) for row in per_token)


def main(argv: list[str] | None = None) -> int:
    import torch

    from opsd.merging import UpdateKept, adapted_layers, merged_matrix, update_kept
    from opsd.models import load_adapter, load_causal_lm, load_tokenizer
    from opsd.prompts import encode_student

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base_model", required=True)
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50, 100])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of stochastic rounding")
    parser.add_argument("--problems", type=int, default=96, help="held-out reference solutions")
    parser.add_argument("--data", type=Path, default=ROOT / "testbed" / "data" / "heldout.jsonl")
    args = parser.parse_args(argv)
    tokenizer, rows = load_tokenizer(args.base_model), []
    for line in args.data.read_text(encoding="utf-8").splitlines()[: args.problems]:
        row = json.loads(line)
        prompt = encode_student(tokenizer, row["problem"])
        solution = tokenizer(row["solution"], add_special_tokens=False)["input_ids"]
        rows.append((prompt + solution, len(prompt)))
    base = load_causal_lm(args.base_model, dtype=torch.float32).eval()
    before = log_probs(base, rows)
    print("| step | rounding | entries changed | kept | relative error | KL to merged / KL to base |")
    print("| --- | --- | --- | --- | --- | --- |")
    for step in args.steps:
        copy = load_causal_lm(args.base_model, dtype=torch.float32)
        model = load_adapter(copy, args.run / f"checkpoint-{step}").eval()
        student, name = log_probs(model, rows), model.active_adapters[0]
        layers = dict(adapted_layers(model))
        whole = kl(student, before)
        for seed in (None, *args.seeds):
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            kept = UpdateKept()
            for place, layer in layers.items():
                merged = merged_matrix(layer, name, dtype=torch.bfloat16, generator=generator)
                kept += update_kept(layer, name, merged)
                base.get_parameter(place).data = merged.float()
            shares = kept.shares()
            ratio = kl(student, log_probs(base, rows)) / whole
            print(
                f"| {step} | {'nearest' if seed is None else f'stochastic, seed {seed}'} "
                f"| {100 * shares['changed']:.1f} % | {shares['kept']:.3f} | {shares['relative_error']:.2f} "
                f"| {ratio:.4f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
