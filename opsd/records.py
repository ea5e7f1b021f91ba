"""Files of a run besides checkpoints: metrics.jsonl, TensorBoard's events, completions; the progress bar."""

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
from opsd.report.run_plots import METRICS_NAME, read_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from opsd.data import Example
    from opsd.rollout.engine import Completion


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
        # The Trainer's last log is a summary, not a step; in a resumed run its mean loss is that of a part.
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        with open(self.run_folder / METRICS_NAME, "a", encoding="utf-8") as file:
            # JSON has no NaN: a step that was left out has null.
            row = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in logs.items()}
            file.write(json.dumps({"step": state.global_step, **row}) + "\n")
            file.flush()
            os.fsync(file.fileno())


class TensorBoardFolder(TensorBoardCallback):
    """Write TensorBoard's events of a run and of its resumptions to one folder, `runs/`.

    transformers creates a folder at each start, so that steps logged after the last checkpoint would show
    twice. Here each start writes its first step, from which on TensorBoard hides the events of earlier ones.
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
    """Show the Trainer's progress bar and one short line per log."""

    SHOWN: ClassVar[dict[str, str]] = {
        "loss": "loss {:.4g}",
        "loss/divergence": "divergence {:.4g}",
        "grad_norm": "gradient {:.3g}",
        "rollout/completion_tokens": "tokens {:.0f}",
        "rollout/truncated_share": "truncated {:.0%}",
        "time/step_s": "{:.2f} s",
    }

    def close(self) -> None:
        """End the bar's line, so that an error message starts on its own line."""
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
    """Write the completions of an optimizer step of this rank to `completions/step-000010.jsonl`."""
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
