"""The training loop: roll out, align, teacher pass, student pass, objective. One class for all four methods.

An optimizer step of a rank: fetch all its micro-batches, sample their completions in one engine call, score
them with the teacher (the same network, adapter off) under inference mode; then per micro-batch a student
pass with gradients and the method's objective.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import Trainer

from opsd.arguments import ModelArguments, RolloutArguments
from opsd.batch import RoleBatch, role_batch
from opsd.checkpoints import mark_complete, rotate
from opsd.data import Example, Problems
from opsd.files import disk_errors
from opsd.head import Head
from opsd.nonfinite import NonFiniteGuard
from opsd.objectives import Hyperparameters, Method, Reduction, entropy_threshold, reopold_mask
from opsd.rollout import Completion, Engine, Request, Sampling
from opsd.seeds import rollout_seed
from opsd.step_records import write_completions
from opsd.token_stats import TokenStats, sampling_audit, token_statistics


@dataclass
class MicroBatch:
    """One micro-batch after rollout and teacher pass.

    Attributes:
        examples: its B problems.
        completions: one each.
        lengths: [B] completion tokens.
        token_ids: [N] the completions, flat.
        student, teacher: the two roles' layouts.
        teacher_hidden: [N, H], no gradient.
    """

    examples: list[Example]
    completions: list[Completion]
    lengths: Tensor
    token_ids: Tensor
    student: RoleBatch
    teacher: RoleBatch
    teacher_hidden: Tensor


@dataclass(frozen=True)
class Normalisation:
    """What `--loss_scope global` takes over the whole optimizer step, all ranks: the count and REOPOLD's
    threshold."""

    count: Tensor
    threshold: Tensor | None = None


class OPSDTrainer(Trainer):
    """transformers.Trainer whose batches are problems and whose loss is a method's objective on fresh
    rollouts."""

    def __init__(
        self,
        *,
        method: Method,
        hyper: Hyperparameters,
        loss_scope: str,
        engine: Engine,
        head: Head,
        rollout: RolloutArguments,
        options: ModelArguments,
        train_dataset: Problems,
        **kwargs,
    ):
        super().__init__(train_dataset=train_dataset, data_collator=_positions, **kwargs)
        # The objective is normalised here; the Trainer divides by the number of micro-batches and no more.
        self.model_accepts_loss_kwargs = False
        self.method, self.hyper, self.loss_scope = method, hyper, loss_scope
        self.engine, self.head, self.rollout, self.options = engine, head, rollout, options
        self.sampling = Sampling(
            temperature=rollout.rollout_temperature,
            top_p=rollout.rollout_top_p,
            top_k=rollout.rollout_top_k,
            max_new_tokens=rollout.max_completion_length,
        )
        self.guard = NonFiniteGuard(Path(self.args.output_dir), tolerated=options.skip_nonfinite)
        self._normalisation: Normalisation | None = None
        self._metrics: dict[str, list[Tensor | float]] = defaultdict(list)
        self._step_started: float | None = None
        self._loss_before_step: Tensor | None = None

    # --- one optimizer step's data
    # -----------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetch the step's micro-batches, sample all their completions in one call, score them with the
        teacher."""
        positions, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not positions:
            return [], None
        self._step_started = time.perf_counter()
        groups = [[self.train_dataset.example(p) for p in batch["positions"].tolist()] for batch in positions]
        completions = self._roll_out([example for group in groups for example in group])
        batches, taken = [], 0
        for group in groups:
            batches.append(self._align(group, completions[taken : taken + len(group)]))
            taken += len(group)
        self._record_rollout(batches)
        self._normalisation = self._step_normalisation(batches) if self.loss_scope == "global" else None
        return batches, None

    def _roll_out(self, examples: Sequence[Example]) -> list[Completion]:
        model = self.accelerator.unwrap_model(self.model)
        started = time.perf_counter()
        self.engine.push_weights(model)
        pushed = time.perf_counter()
        step = self.state.global_step
        requests = [
            Request(e.student_ids, rollout_seed(seed=self.args.seed, step=step, problem=e.index))
            for e in examples
        ]
        completions = self.engine.generate(requests, self.sampling, want_logprobs=self._audits())
        self._metrics["time/push_s"].append(pushed - started)
        self._metrics["time/rollout_s"].append(time.perf_counter() - pushed)
        return completions

    def _audits(self) -> bool:
        every = self.rollout.rollout_audit_steps
        return every > 0 and self.state.global_step % every == 0

    def _align(self, examples: list[Example], completions: list[Completion]) -> MicroBatch:
        layout = {
            "pad_id": self.processing_class.pad_token_id or 0,
            "max_padding_ratio": self.options.max_padding_ratio,
            "device": self.args.device,
        }
        ids = [completion.token_ids for completion in completions]
        student = role_batch([e.student_ids for e in examples], ids, **layout)
        teacher = role_batch([e.teacher_ids for e in examples], ids, **layout)
        started = time.perf_counter()
        hidden = self._teacher_hidden(teacher)
        self._metrics["time/teacher_s"].append(time.perf_counter() - started)
        return MicroBatch(
            examples,
            completions,
            torch.tensor([len(row) for row in ids], device=self.args.device),
            torch.tensor([token for row in ids for token in row], dtype=torch.long, device=self.args.device),
            student,
            teacher,
            hidden,
        )

    def _teacher_hidden(self, batch: RoleBatch) -> Tensor:
        """[N, H] of the privileged teacher: the same weights, adapter off, no graph. No second model
        exists."""
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        with torch.inference_mode(), model.disable_adapter(), self.accelerator.autocast():
            hidden = batch.hidden_states(model)
        model.train(was_training)
        return hidden

    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:
        """Nothing to move: `_align` has put everything on the device."""
        return inputs

    # --- the objective
    # -----------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs: MicroBatch, return_outputs=False, num_items_in_batch=None):
        """The method's loss on one micro-batch; see opsd/objectives.py."""
        with self.accelerator.autocast():
            hidden = inputs.student.hidden_states(model)
        stats = self._statistics(hidden, inputs)
        normalisation = self._normalisation
        reduction = self.method.reduce(
            stats,
            inputs.lengths,
            self.hyper,
            step=self.state.global_step,
            threshold=None if normalisation is None else normalisation.threshold,
        )
        if normalisation is None:
            loss = reduction.loss()
        else:
            # DistributedDataParallel averages over ranks and the Trainer over micro-batches; undo both.
            parts = self.args.world_size * self.current_gradient_accumulation_steps
            loss = reduction.loss(normalisation.count) * parts
        self.guard.see_loss(loss, [example.index for example in inputs.examples], stats)
        self._record_objective(loss, reduction, stats, inputs, hidden)
        return loss

    def _statistics(self, hidden: Tensor, batch: MicroBatch, *, with_term: bool = True) -> TokenStats:
        return token_statistics(
            hidden,
            batch.teacher_hidden.to(hidden.dtype),
            batch.token_ids,
            config=self.method.statistics(self.hyper),
            term=(lambda stats: self.method.term(stats, self.hyper)) if with_term else None,
            head=self.head,
        )

    def _step_normalisation(self, batches: Sequence[MicroBatch]) -> Normalisation:
        """Counts over all micro-batches and ranks of this optimizer step.

        REOPOLD's mask depends on the statistics, so it costs one more student pass without gradients; with
        dropout off, since a resumed run restores the random state only after this.
        """
        if self.method.count is not None:
            sequences = torch.cat([batch.lengths for batch in batches])
            count = self.method.count(sequences, self.hyper)
            return Normalisation(self.accelerator.reduce(count.double(), "sum"))
        model = self.accelerator.unwrap_model(self.model)
        step, every = self.state.global_step, []
        was_training = model.training
        model.eval()
        for batch in batches:
            with torch.no_grad(), self.accelerator.autocast():
                hidden = batch.student.hidden_states(model)
            every.append(self._statistics(hidden, batch, with_term=False))
        model.train(was_training)
        threshold = None
        if step >= self.hyper.reopold_t_switch:
            mine = torch.cat([stats.student_entropy for stats in every])
            padded = self.accelerator.pad_across_processes(mine, pad_index=float("inf"))
            gathered = self.accelerator.gather(padded)
            threshold = entropy_threshold(gathered[gathered.isfinite()], self.hyper)
        kept = sum(reopold_mask(s, self.hyper, step=step, threshold=threshold).sum() for s in every)
        return Normalisation(self.accelerator.reduce(kept.double(), "sum"), threshold)

    # --- non-finite steps
    # --------------------------------------------------------------------------------------

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        self._check_finite(model, norm)
        return norm

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.args.max_grad_norm <= 0:
            self._check_finite(model, norm)
        return norm

    def _check_finite(self, model, norm) -> None:
        """Stop, or drop this step's gradients, before the optimizer can see a NaN. The verdict is every
        rank's."""
        verdict = torch.as_tensor(self.guard.bad(norm), dtype=torch.float32, device=self.args.device)
        if self.accelerator.reduce(verdict, "sum") > 0:
            self.guard.handle(self.state.global_step, norm, is_main=self.is_world_process_zero())
            # AdamW passes over parameters without a gradient: neither weights nor moments move.
            model.zero_grad(set_to_none=True)
            # The Trainer sums losses up to the next log; a NaN in that sum would stay in every later one.
            self._tr_loss.copy_(torch.zeros(()) if self._loss_before_step is None else self._loss_before_step)
        self.guard.reset()

    # --- records
    # -----------------------------------------------------------------------------------------------

    def _record_rollout(self, batches: Sequence[MicroBatch]) -> None:
        completions = [completion for batch in batches for completion in batch.completions]
        lengths = [len(completion.token_ids) for completion in completions]
        record = self._metrics
        record["rollout/completion_tokens"].append(sum(lengths) / len(lengths))
        record["rollout/completion_tokens_max"].append(float(max(lengths)))
        record["rollout/truncated_share"].append(sum(c.truncated for c in completions) / len(completions))
        for role in ("student", "teacher"):
            layouts = [getattr(batch, role) for batch in batches]
            valid = sum(layout.valid_tokens for layout in layouts)
            record[f"{role}/padded_over_valid"].append(sum(x.padded_tokens for x in layouts) / valid)
        every = self.rollout.log_completions_steps
        if every and self.state.global_step % every == 0 and self.is_world_process_zero():
            examples = [example for batch in batches for example in batch.examples]
            write_completions(
                Path(self.args.output_dir),
                self.state.global_step,
                examples,
                completions,
                self.processing_class,
            )

    @torch.no_grad()
    def _record_objective(
        self, loss: Tensor, reduction: Reduction, stats: TokenStats, batch: MicroBatch, hidden: Tensor
    ) -> None:
        tokens = max(len(batch.token_ids), 1)
        record = self._metrics
        record["loss/objective"].append(loss.detach().float())
        record["student/entropy"].append(stats.student_entropy.sum() / tokens)
        record["teacher/entropy"].append(stats.teacher_entropy.sum() / tokens)
        record["loss/sampled_divergence"].append(
            (stats.student_logprob - stats.teacher_logprob).sum() / tokens
        )
        if stats.divergence is not None:
            record["loss/divergence"].append(stats.divergence.sum() / tokens)
            vocabulary = self.head.weight.shape[0]
            record["loss/clip_fraction"].append(stats.clipped_entries.sum() / (tokens * vocabulary))
            record["loss/clipped_token_share"].append((stats.clipped_entries > 0).sum() / tokens)
        for name, value in reduction.metrics.items():
            record[name].append(value)
        if self._audits():
            self._record_audit(batch, hidden)

    def _record_audit(self, batch: MicroBatch, hidden: Tensor) -> None:
        """How far the sampler is from the trainer's own distribution; an engine mismatch shows here first."""
        outside, logprob = sampling_audit(
            hidden.detach(),
            batch.token_ids,
            head=self.head,
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
        )
        self._metrics["rollout/outside_support_share"].append(outside.float().mean())
        if all(completion.logprobs is not None for completion in batch.completions):
            theirs = [value for completion in batch.completions for value in completion.logprobs]
            difference = logprob - torch.tensor(theirs, device=logprob.device)
            self._metrics["rollout/logprob_difference"].append(difference.abs().mean())

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """The end of an optimizer step: note its seconds, then log and save as asked."""
        if self._step_started is not None:
            self._metrics["time/step_s"].append(time.perf_counter() - self._step_started)
            self._step_started = None
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._loss_before_step = self._tr_loss.clone()

    def log(self, logs, start_time=None):
        """Add the means of what was recorded since the last log, over micro-batches and ranks, in one
        gather; of a name that ends with _max, the largest."""
        if self._metrics:
            names = sorted(self._metrics)
            reduce = [torch.amax if name.endswith("_max") else torch.mean for name in names]
            kind = {"dtype": torch.float32, "device": self.args.device}
            mine = [
                over(torch.stack([torch.as_tensor(value, **kind) for value in self._metrics[name]]), 0)
                for name, over in zip(names, reduce, strict=True)
            ]
            ranks = self.accelerator.gather(torch.stack(mine).unsqueeze(0)).unbind(1)
            values = torch.stack([over(one, 0) for one, over in zip(ranks, reduce, strict=True)]).tolist()
            logs = {**logs, **dict(zip(names, values, strict=True))}
            self._metrics.clear()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs) -> int:
        """Not estimated: the Trainer's formula counts one pass over `input_ids`, which a step here does not
        have."""
        return 0

    # --- checkpoints
    # -------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        """Save, mark as whole, and only then delete the oldest: a kill in between leaves one to resume
        from."""
        run_folder, limit = Path(self.args.output_dir), self.args.save_total_limit
        checkpoint = run_folder / f"checkpoint-{self.state.global_step}"
        self.args.save_total_limit = None
        try:
            with disk_errors(checkpoint):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            mark_complete(checkpoint)
            rotate(run_folder, limit)
        self.accelerator.wait_for_everyone()


def _positions(items: list[int]) -> dict[str, Tensor]:
    return {"positions": torch.tensor(items)}
