"""Compare the gradient with the clip of the forward KL to the one without, by method and optimizer step.

    python bench/clip_gradient.py                              # opsd and pwopsd, 4 steps of 16 sequences
    python bench/clip_gradient.py --learning_rate 5e-6 --steps 8

Trains the small world (testbed/) in float32 with the published clip. On each step's batch the gradient of all
LoRA parameters is also formed without a clip and with the cap on the token's total term
(`--divergence_clip_scope token`), from the same rollouts and weights. Prints a Markdown table: the cosine to
and the norm over the gradient without a clip, the share of tokens with a cut entry, the teacher's mass in cut
entries, and the divergence in nats.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from transformers import PrinterCallback

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import opsd.trainer  # noqa: E402 - the repository's folder comes first
from opsd.arguments import parse_arguments  # noqa: E402
from opsd.objectives import ReductionInput  # noqa: E402
from opsd.training import train  # noqa: E402

CLIPS = {
    "entry": {"divergence_clip_scope": "entry"},
    "token": {"divergence_clip_scope": "token"},
    "none": {"jsd_token_clip": 0.0},
}
LOGGED = ("loss/clipped_token_share", "loss/clipped_teacher_mass", "loss/divergence")


class ClipTrainer(opsd.trainer.OPSDTrainer):
    """A trainer that forms each step's gradient with every clip of `CLIPS` and trains with its own.

    Attributes:
        rows: per optimizer step the figures of the table, by name.
    """

    rows: list[dict[str, float]]

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback)  # the table is the output
        type(self).rows = []
        self._gradients: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))

    def compute_loss(self, model, inputs, *args, **kwargs):
        parameters = [p for p in model.parameters() if p.requires_grad]
        hidden, own = inputs.student.hidden_states(model), self.hyper
        for name, changes in CLIPS.items():
            self.hyper = replace(own, **changes)
            batch = ReductionInput(self._statistics(hidden, inputs), inputs.lengths, self.state.global_step)
            loss = self.method.reduce(batch, self.hyper).loss()
            gradient = torch.autograd.grad(loss, parameters, retain_graph=True)
            self._gradients[name] = self._gradients[name] + torch.cat([g.flatten() for g in gradient])
        self.hyper = own
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        if self._gradients:  # not in the summary at the end
            plain, logged = self._gradients["none"], self.state.log_history[-1]
            row = {"step": self.state.global_step}
            for name in ("entry", "token"):
                gradient = self._gradients[name]
                row[f"cosine {name}"] = float(torch.cosine_similarity(gradient, plain, dim=0))
                row[f"norm {name}"] = float(gradient.norm() / plain.norm())
            self.rows.append(row | {name: logged[name] for name in LOGGED})
            self._gradients.clear()


def measure(method: str, args: argparse.Namespace) -> list[dict[str, float]]:
    """Train `args.steps` steps and return the figures of each."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {
            "method": method, "model_name_or_path": ROOT / "testbed" / "base_model",
            "train_dataset": ROOT / "testbed" / "data" / "train.jsonl", "output_dir": folder, "rollout": "hf",
            "max_length": 1000, "max_completion_length": 160, "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2, "max_steps": args.steps, "learning_rate": args.learning_rate,
            "jsd_token_clip": args.jsd_token_clip, "seed": args.seed, "bf16": False, "use_cpu": True,
            "gradient_checkpointing": False, "save_strategy": "no", "rollout_audit_steps": 0,
            "log_completions_steps": 0, "disable_tqdm": True,
        }  # fmt: skip
        arguments = parse_arguments(
            [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        )
        with mock.patch.object(opsd.trainer, "OPSDTrainer", ClipTrainer):
            train(*arguments)
    return ClipTrainer.rows


def main(argv: list[str] | None = None) -> int:
    """Measure and print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=("opsd", "pwopsd"), default=("opsd", "pwopsd"))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--jsd_token_clip", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    for number, method in enumerate(args.methods):
        for row in measure(method, args):
            if number == 0 and row["step"] == 1:
                print(
                    "| method |", " | ".join(row), "|\n|", " | ".join("---" for _ in range(len(row) + 1)), "|"
                )
            figures = [f"{value:.3g}" for value in row.values()]
            print(f"| {method} |", " | ".join(figures), "|", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
