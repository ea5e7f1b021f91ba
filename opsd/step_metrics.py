"""What a run logs: the figures of an optimizer step, and the callbacks that write and show them."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from transformers import ProgressCallback, TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback

from opsd.files import atomic_write_text
from opsd.head import Head
from opsd.objectives import Reduction, TokenStats
from opsd.records import METRICS_NAME, read_metrics
from opsd.rollout.engine import Sampling
from opsd.token_stats import sampling_audit

if TYPE_CHECKING:
    from opsd.trainer import MicroBatch


class StepMetrics(defaultdict[str, list[Tensor | float]]):
    """Values by name since the last log, one per micro-batch or step; values on the device stay there."""

    def __init__(self):
        super().__init__(list)

    def record_rollout(self, batches: Sequence[MicroBatch]) -> None:
        """Record lengths and padding of an optimizer step's micro-batches."""
        completions = [completion for batch in batches for completion in batch.completions]
        lengths = [len(completion.token_ids) for completion in completions]
        self["rollout/completion_tokens"].append(sum(lengths) / len(lengths))
        self["rollout/completion_tokens_max"].append(float(max(lengths)))
        self["rollout/truncated_share"].append(sum(c.truncated for c in completions) / len(completions))
        for role in ("student", "teacher"):
            layouts = [getattr(batch, role) for batch in batches]
            valid = sum(layout.valid_tokens for layout in layouts)
            self[f"{role}/padded_over_valid"].append(sum(x.padded_tokens for x in layouts) / valid)

    @torch.no_grad()
    def record_objective(
        self, loss: Tensor, reduction: Reduction, stats: TokenStats, vocabulary: int
    ) -> None:
        """Record the loss of a micro-batch and the means of its [N] statistics."""
        tokens = max(len(stats.student_logprob), 1)
        self["loss/objective"].append(loss.detach().float())
        self["student/entropy"].append(stats.student_entropy.sum() / tokens)
        self["teacher/entropy"].append(stats.teacher_entropy.sum() / tokens)
        self["loss/sampled_divergence"].append((stats.student_logprob - stats.teacher_logprob).sum() / tokens)
        if hasattr(stats, "divergence"):
            self["loss/divergence"].append(stats.divergence.sum() / tokens)
            self["loss/clip_fraction"].append(stats.clipped_entries.sum() / (tokens * vocabulary))
            self["loss/clipped_token_share"].append((stats.clipped_entries > 0).sum() / tokens)
            self["loss/clipped_teacher_mass"].append(stats.clipped_teacher_mass.sum() / tokens)
        for name, value in reduction.metrics.items():
            self[name].append(value)

    def record_audit(
        self, batch: MicroBatch, hidden: Tensor, base_hidden: Tensor, *, head: Head, sampling: Sampling
    ) -> None:
        """Record how far the sampler is from the trainer and, for scale, how far the base is.

        With the log-probabilities e of the sampler, s of the student and b of the base, in nats,
        `rollout/logprob_difference` is the mean of |e − s|, `rollout/logprob_difference_base` of |b − s|, and
        `rollout/staleness` is ⟨e − s, b − s⟩ / ⟨b − s, b − s⟩: how far the sampler is on the way from the
        student (0) to the base (1). A merge that keeps the share k of a small update gives 1 − k. Rounding
        noise in s and b, as in bfloat16, pulls it towards 1/2, which says nothing; noise in e does not.

        Args:
            hidden, base_hidden: [N, H] of the student's prompts, with the adapter on and off.
        """
        outside, logprob = sampling_audit(hidden.detach(), batch.token_ids, head=head, sampling=sampling)
        self["rollout/outside_support_share"].append(outside.float().mean())
        if all(completion.logprobs is not None for completion in batch.completions):
            theirs = [value for completion in batch.completions for value in completion.logprobs or ()]
            difference = torch.tensor(theirs, device=logprob.device) - logprob
            base = sampling_audit(base_hidden, batch.token_ids, head=head, sampling=sampling)[1] - logprob
            self["rollout/logprob_difference"].append(difference.abs().mean())
            self["rollout/logprob_difference_base"].append(base.abs().mean())
            # Of a new adapter, whose update is 0, it is 0 / 0.
            tiny = torch.finfo(base.dtype).tiny
            self["rollout/staleness"].append((difference * base).sum() / base.square().sum().clamp_min(tiny))

    def means(self, gather: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Return each name's mean over what was recorded and over ranks; of a name with _max, the maximum.

        `gather` turns [1, M] of this rank into [ranks, M] and is called once.
        """

        def over(name: str, values: Tensor) -> Tensor:
            return values.amax(0) if name.endswith("_max") else values.mean(0)

        names = sorted(self)
        recorded = [[torch.as_tensor(v, dtype=torch.float32, device=device) for v in self[n]] for n in names]
        mine = [over(name, torch.stack(values)) for name, values in zip(names, recorded, strict=True)]
        ranks = gather(torch.stack(mine).unsqueeze(0)).unbind(1)
        return {name: float(over(name, values)) for name, values in zip(names, ranks, strict=True)}


class MetricsFile(TrainerCallback):
    """Append each log to metrics.jsonl; on resuming, first drop what the resumed steps will log again."""

    def __init__(self, run_folder: Path):
        self.run_folder = run_folder

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        kept = [row for row in read_metrics(self.run_folder) if (row["step"] or 0) <= state.global_step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        atomic_write_text(self.run_folder / METRICS_NAME, text)

    def on_log(self, args, state, control, logs=None, **kwargs):
        # The Trainer's last log is a summary, whose mean loss in a resumed run is that of a part.
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        with open(self.run_folder / METRICS_NAME, "a", encoding="utf-8") as file:
            # JSON has no NaN: a step that was left out has null.
            row = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in logs.items()}
            file.write(json.dumps({"step": state.global_step, **row}) + "\n")
            file.flush()
            os.fsync(file.fileno())


class TensorBoardFolder(TensorBoardCallback):
    """Write TensorBoard's events of all starts of a run to one folder, `runs/`.

    Each start writes its first step, from which on TensorBoard hides the events of earlier starts.
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
