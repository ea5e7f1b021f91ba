"""The training loop: roll out, align, teacher pass, student pass, objective. One class for all four methods.

In an optimizer step each rank samples the completions of all its micro-batches in one engine call and scores
them with the teacher (the same network, adapter off); then, for each micro-batch, it runs a student pass with
gradients and the method's objective.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful
from transformers import PreTrainedTokenizerBase, Trainer

from opsd.arguments import MethodArguments, ModelArguments, RolloutArguments
from opsd.batch import RoleBatch, role_batch
from opsd.checkpoints import mark_complete, rotate
from opsd.data import Example, Problems
from opsd.files import disk_errors
from opsd.head import Head
from opsd.nonfinite import NonFiniteGuard
from opsd.objectives import METHODS, ReductionInput, StepScale, TokenStats
from opsd.records import write_completions
from opsd.rollout.engine import Completion, Engine, Request, Sampling
from opsd.seeds import rollout_seed
from opsd.step_metrics import StepMetrics
from opsd.token_stats import token_statistics


@dataclass
class MicroBatch:
    """One micro-batch after rollout and teacher pass."""

    examples: list[Example]  # B problems
    completions: list[Completion]  # one each
    lengths: Tensor  # [B] completion tokens
    token_ids: Tensor  # [N] the completions, flat
    student: RoleBatch
    teacher: RoleBatch
    teacher_hidden: Tensor  # [N, H], no gradient


class OPSDTrainer(Trainer):
    """A Trainer whose batches are problems and whose loss is a method's objective on fresh rollouts."""

    train_dataset: Problems
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        *,
        method: MethodArguments,
        engine: Engine,
        head: Head,
        rollout: RolloutArguments,
        options: ModelArguments,
        train_dataset: Problems,
        **kwargs,
    ):
        super().__init__(train_dataset=train_dataset, data_collator=_positions, **kwargs)
        # The objective is normalised here; the Trainer divides by the number of micro-batches only.
        self.model_accepts_loss_kwargs = False
        self.method, self.hyper, self.loss_scope = METHODS[method.method], method, method.loss_scope
        self.engine, self.head, self.rollout, self.options = engine, head, rollout, options
        self.sampling = Sampling(
            temperature=rollout.rollout_temperature,
            top_p=rollout.rollout_top_p,
            top_k=rollout.rollout_top_k,
            max_new_tokens=rollout.max_completion_length,
        )
        self.run_folder = Path(str(self.args.output_dir))
        self.guard = NonFiniteGuard(self.run_folder, tolerated=options.skip_nonfinite)
        self._scale: StepScale | None = None
        self._metrics = StepMetrics()
        self._step_started: float | None = None
        self._loss_before_step = torch.zeros(())

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetch the step's micro-batches, sample their completions in one call, score them (teacher)."""
        positions, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not positions:
            return [], None
        self._step_started = time.perf_counter()
        groups = [[self.train_dataset.example(p) for p in batch["positions"].tolist()] for batch in positions]
        completions = iter(self._roll_out([example for group in groups for example in group]))
        batches = [self._align(group, [*itertools.islice(completions, len(group))]) for group in groups]
        self._record_rollout(batches)
        self._scale = self._step_scale(batches) if self.loss_scope == "global" else None
        return batches, None

    def _roll_out(self, examples: Sequence[Example]) -> list[Completion]:
        model = self.accelerator.unwrap_model(self.model)
        started = time.perf_counter()
        audit = self._due(self.rollout.rollout_audit_steps)
        for name, value in self.engine.push_weights(model, measure=audit).items():
            self._metrics[name].append(value)
        pushed = time.perf_counter()
        seeds = {"seed": self.args.seed, "step": self.state.global_step}
        requests = [Request(e.student_ids, rollout_seed(**seeds, problem=e.index)) for e in examples]
        completions = self.engine.generate(requests, self.sampling, want_logprobs=audit)
        self._metrics["time/push_s"].append(pushed - started)
        self._metrics["time/rollout_s"].append(time.perf_counter() - pushed)
        return completions

    def _due(self, every: int) -> bool:
        return every > 0 and self.state.global_step % every == 0

    def _align(self, examples: list[Example], completions: list[Completion]) -> MicroBatch:
        device, ids = self.args.device, [completion.token_ids for completion in completions]
        student, teacher = (
            role_batch(prompts, ids, max_padding_ratio=self.options.max_padding_ratio, device=device)
            for prompts in ([e.student_ids for e in examples], [e.teacher_ids for e in examples])
        )
        started = time.perf_counter()
        hidden = self._base_hidden(teacher)
        self._metrics["time/teacher_s"].append(time.perf_counter() - started)
        lengths = torch.tensor([len(row) for row in ids], device=device)
        token_ids = torch.tensor([token for row in ids for token in row], dtype=torch.long, device=device)
        return MicroBatch(examples, completions, lengths, token_ids, student, teacher, hidden)

    def _base_hidden(self, batch: RoleBatch) -> Tensor:
        """Compute [N, H] with the adapter off and no graph; on the privileged prompt, the teacher's."""
        with torch.inference_mode(), self._evaluation_mode() as model, model.disable_adapter():
            return batch.hidden_states(model)

    @contextlib.contextmanager
    def _evaluation_mode(self):
        """Yield the unwrapped model without dropout, under the run's autocast."""
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        with self.accelerator.autocast():
            yield model
        model.train(was_training)

    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:
        return inputs  # `_align` has put everything on the device

    def training_step(self, model, *args, **kwargs):
        """Run one micro-batch forward and backward.

        PEFT casts an adapter's input to float32 and autocast casts it back; without dropout in between that
        changes nothing, so the casts are left out.
        """
        needless = self.args.bf16 and self.options.lora_dropout == 0
        with disable_input_dtype_casting(model, active=needless):
            return super().training_step(model, *args, **kwargs)

    def compute_loss(self, model, inputs: MicroBatch, return_outputs=False, num_items_in_batch=None):
        """Compute the method's loss on one micro-batch; see opsd/objectives.py."""
        # Before the student's pass, whose graph would take memory beside this one.
        base_hidden = (
            self._base_hidden(inputs.student) if self._due(self.rollout.rollout_audit_steps) else None
        )
        with self.accelerator.autocast():
            hidden = inputs.student.hidden_states(model)
        stats, scale = self._statistics(hidden, inputs), self._scale
        threshold = None if scale is None else scale.threshold
        batch = ReductionInput(stats, inputs.lengths, self.state.global_step, threshold)
        reduction = self.method.reduce(batch, self.hyper)
        loss = reduction.loss(scale and scale.count)
        if scale is not None:
            # DistributedDataParallel averages over ranks and the Trainer over micro-batches; undo both.
            loss = loss * (self.args.world_size * self.current_gradient_accumulation_steps)
        self.guard.see_loss(loss, [example.index for example in inputs.examples], stats)
        self._metrics.record_objective(loss, reduction, stats, self.head.weight.shape[0])
        if base_hidden is not None:
            self._metrics.record_audit(inputs, hidden, base_hidden, head=self.head, sampling=self.sampling)
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

    def _step_scale(self, batches: Sequence[MicroBatch]) -> StepScale:
        """Compute what the loss is divided by, over all micro-batches and ranks of this optimizer step.

        A count that depends on the statistics needs one more student pass, without gradients, and without
        dropout, since a resumed run restores the random state only after this.
        """
        if self.method.count is not None:
            lengths = torch.cat([batch.lengths for batch in batches])
            scale = StepScale(self.method.count(lengths, self.hyper))
        else:
            assert self.method.over_step is not None, "a method has the one or the other"
            inputs = []
            for batch in batches:
                with torch.no_grad(), self._evaluation_mode() as model:
                    hidden = batch.student.hidden_states(model)
                stats = self._statistics(hidden, batch, with_term=False)
                inputs.append(ReductionInput(stats, batch.lengths, self.state.global_step))
            scale = self.method.over_step(inputs, self.hyper, self._gather_tokens)
        return replace(scale, count=self._sum_over_ranks(scale.count.double()))

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        return cast("Tensor", self.accelerator.reduce(value, "sum"))

    def _gather(self, values: Tensor) -> Tensor:
        return cast("Tensor", self.accelerator.gather(values))

    def _gather_tokens(self, values: Sequence[Tensor]) -> Tensor:
        """Join [n] of each micro-batch into the finite values of all micro-batches and ranks, [M]."""
        infinity = cast("int", math.inf)  # accelerate's annotation is narrower than what it pads with
        padded = self.accelerator.pad_across_processes(torch.cat(list(values)), pad_index=infinity)
        gathered = self._gather(cast("Tensor", padded))
        return gathered[gathered.isfinite()]

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
        """Stop, or drop this step's gradients on all ranks, before the optimizer sees a NaN of any rank."""
        verdict = torch.tensor(float(self.guard.bad(norm)), device=self.args.device)
        if self._sum_over_ranks(verdict) > 0:
            self.guard.handle(self.state.global_step, norm, is_main=self.is_world_process_zero())
            # AdamW skips parameters without a gradient: neither weights nor moments change.
            model.zero_grad(set_to_none=True)
            # The Trainer sums losses up to the next log; a NaN in that sum would stay in every later one.
            self._tr_loss.copy_(self._loss_before_step)
        self.guard.reset()

    def _record_rollout(self, batches: Sequence[MicroBatch]) -> None:
        self._metrics.record_rollout(batches)
        if self._due(self.rollout.log_completions_steps) and self.is_world_process_zero():
            examples = [example for batch in batches for example in batch.examples]
            completions = [completion for batch in batches for completion in batch.completions]
            step = self.state.global_step
            write_completions(self.run_folder, step, examples, completions, self.processing_class)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """Record the seconds of the optimizer step that ends, then log and save."""
        if self._step_started is not None:
            self._metrics["time/step_s"].append(time.perf_counter() - self._step_started)
            self._step_started = None
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._loss_before_step = self._tr_loss.clone()

    def log(self, logs, start_time=None):
        """Add the means of what was recorded since the last log."""
        if self._metrics:
            logs = {**logs, **self._metrics.means(self._gather, self.args.device)}
            self._metrics.clear()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs) -> int:
        return 0  # the Trainer's formula counts one pass over `input_ids`, which is not a step here

    def _save_checkpoint(self, model, trial):
        """Save, mark as complete, and only then delete the oldest, so that one to resume is always there."""
        limit = self.args.save_total_limit
        checkpoint = self.run_folder / f"checkpoint-{self.state.global_step}"
        self.args.save_total_limit = None
        try:
            with disk_errors(checkpoint):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            mark_complete(checkpoint)
            rotate(self.run_folder, limit, keep=self.options.merge_step)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Load both to the CPU first: a rank's device may be "cpu:1", which torch.load does not know."""
        if checkpoint is None:
            return
        for name, owner in (("optimizer.pt", self.optimizer), ("scheduler.pt", self.lr_scheduler)):
            state = torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            cast("Stateful", owner).load_state_dict(state)


def _positions(items: list[int]) -> dict[str, Tensor]:
    return {"positions": torch.tensor(items)}
