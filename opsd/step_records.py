"""What a run writes besides checkpoints: metrics.jsonl, one line per logged step, and sample completions."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback

from opsd.files import atomic_write_text
from opsd.run_plots import METRICS_NAME, read_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from opsd.data import Example
    from opsd.rollout import Completion


class MetricsFile(TrainerCallback):
    """Append each log to metrics.jsonl; on resuming, first drop what the resumed steps will log again."""

    def __init__(self, run_folder: Path):
        self.run_folder = run_folder

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        kept = [row for row in read_metrics(self.run_folder) if row["step"] <= state.global_step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        atomic_write_text(self.run_folder / METRICS_NAME, text)

    def on_log(self, args, state, control, logs=None, **kwargs):
        # The Trainer's closing summary is no step, and after a resume its mean loss covers a part of the run.
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        with open(self.run_folder / METRICS_NAME, "a", encoding="utf-8") as file:
            # JSON has no NaN: a step that was left out has null where a number is missing.
            row = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in logs.items()}
            file.write(json.dumps({"step": state.global_step, **row}) + "\n")
            file.flush()
            os.fsync(file.fileno())


class TensorBoardFolder(TensorBoardCallback):
    """TensorBoard's events in one folder, `runs/`, however often the run is resumed.

    transformers makes one folder a start, and the steps that were logged after the last checkpoint would then
    show twice. Here a start writes at which step it begins; TensorBoard hides what earlier ones have beyond.
    """

    def __init__(self, run_folder: Path):
        super().__init__()
        self.logging_dir = self.logging_dir or str(run_folder / "runs")

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.tb_writer = self._SummaryWriter(self.logging_dir, purge_step=state.global_step + 1)
            self.tb_writer.add_text("args", args.to_json_string(), state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "train_runtime" not in logs:
            super().on_log(args, state, control, logs=logs, **kwargs)


class ConciseProgress(ProgressCallback):
    """The Trainer's progress bar with one short line a log; metrics.jsonl has the rest."""

    SHOWN: ClassVar[dict[str, str]] = {
        "loss": "loss {:.4g}",
        "loss/divergence": "divergence {:.4g}",
        "grad_norm": "gradient {:.3g}",
        "rollout/completion_tokens": "tokens {:.0f}",
        "rollout/truncated_share": "truncated {:.0%}",
        "time/step_s": "{:.2f} s",
    }

    def close(self) -> None:
        """End the bar's line, so that an error begins on a line of its own."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None or not logs or "loss" not in logs:
            return
        shown = [form.format(float(logs[name])) for name, form in self.SHOWN.items() if name in logs]
        self.training_bar.write(f"step {state.global_step}/{state.max_steps}  " + "  ".join(shown))


def write_completions(
    run_folder: Path,
    step: int,
    examples: Sequence[Example],
    completions: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """`completions/step-000010.jsonl`: what the student wrote at that optimizer step, on this rank."""
    lines = [
        json.dumps(
            {
                "step": step,
                "row": example.index,
                "problem": example.problem,
                "completion": tokenizer.decode(completion.token_ids, skip_special_tokens=False),
                "tokens": len(completion.token_ids),
                "truncated": completion.truncated,
            },
            ensure_ascii=False,
        )
        for example, completion in zip(examples, completions, strict=True)
    ]
    atomic_write_text(run_folder / "completions" / f"step-{step:06d}.jsonl", "\n".join(lines) + "\n")
