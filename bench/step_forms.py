"""The two forms of a training step that bench_step.py compares, both driven by the real Trainer loop.

`TimedTrainer` is OPSDTrainer with a clock around its phases; nothing it computes changes. `DenseTrainer` is
the baseline: a rollout call per micro-batch, prompts padded to the longest and completions to the maximum,
logits of every position of the sequence, and the objective by autograd through [B, C, V] tensors.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bench.dense import loss_from_logs, tempered_log_softmax
from opsd.batch import RoleBatch
from opsd.trainer import MicroBatch, OPSDTrainer

PHASES = (
    "rollout",
    "push",
    "student forward",
    "teacher forward",
    "objective",
    "backward",
    "optimizer",
    "other",
)


class Clock:
    """Assigns all time between two `next_step` calls to one phase at a time, the innermost open one.

    Attributes:
        steps: per finished step {phase: [wall seconds, processor seconds of this process]}.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.steps: list[dict[str, list[float]]] = []
        self._current: dict[str, list[float]] | None = None
        self._open: list[str] = ["other"]
        self._last = (0.0, 0.0)

    def _charge(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # otherwise a kernel's time falls on the phase that happens to wait
        now = (time.perf_counter(), time.process_time())
        if self._current is not None:
            charged = self._current[self._open[-1]]
            charged[0] += now[0] - self._last[0]
            charged[1] += now[1] - self._last[1]
        self._last = now

    def enter(self, phase: str) -> None:
        self._charge()
        self._open.append(phase)

    def leave(self) -> None:
        self._charge()
        self._open.pop()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def next_step(self) -> None:
        """End the current step, if any, and begin one."""
        self._charge()
        if self._current is not None:
            self.steps.append(dict(self._current))
        self._current = defaultdict(lambda: [0.0, 0.0])


class _TimedEngine:
    """An engine whose two calls are timed."""

    def __init__(self, engine, clock: Clock):
        self.engine, self.clock, self.calls = engine, clock, 0

    def generate(self, requests, sampling, **options):
        self.calls += 1
        with self.clock.phase("rollout"):
            return self.engine.generate(requests, sampling, **options)

    def push_weights(self, model, *, measure: bool = False) -> dict[str, float]:
        with self.clock.phase("push"):
            return self.engine.push_weights(model, measure=measure)

    def close(self) -> None:
        self.engine.close()


class _TimedRole(RoleBatch):
    """A layout whose pass is timed."""

    @classmethod
    def of(cls, role: RoleBatch, clock: Clock, phase: str) -> _TimedRole:
        timed = cls(**{f.name: getattr(role, f.name) for f in fields(role)})
        object.__setattr__(timed, "on_clock", lambda: clock.phase(phase))
        return timed

    def hidden_states(self, forward):
        with self.on_clock():
            return super().hidden_states(forward)


@dataclass
class StepRecord:
    """What one optimizer step worked on.

    Attributes:
        student, teacher: prompt + completion tokens of each sequence, per role.
        completion_tokens: of all sequences.
        processed: tokens that met the backbone, padding included, both roles.
        losses: one per micro-batch.
    """

    student: list[int]
    teacher: list[int]
    completion_tokens: int
    processed: int
    losses: list[Tensor]


class TimedTrainer(OPSDTrainer):
    """OPSDTrainer with timed phases. `clock.steps` and `records` hold one entry per optimizer step."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.clock = Clock(self.args.device)
        self.engine = _TimedEngine(self.engine, self.clock)
        self.records: list[StepRecord] = []

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self.clock.next_step()

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.register_step_pre_hook(lambda *_: self.clock.enter("optimizer"))
        optimizer.register_step_post_hook(lambda *_: self.clock.leave())
        return optimizer

    def get_batch_samples(self, *args, **kwargs):
        self.clock.next_step()
        batches, count = super().get_batch_samples(*args, **kwargs)
        self.records.append(
            StepRecord(
                student=[len(e.student_ids) + len(c.token_ids) for b in batches for e, c in _pairs(b)],
                teacher=[len(e.teacher_ids) + len(c.token_ids) for b in batches for e, c in _pairs(b)],
                completion_tokens=sum(len(c.token_ids) for b in batches for c in b.completions),
                processed=sum(b.student.padded_tokens + b.teacher.padded_tokens for b in batches),
                losses=[],
            )
        )
        return batches, count

    def _align(self, examples, completions) -> MicroBatch:
        batch = super()._align(examples, completions)
        batch.student = _TimedRole.of(batch.student, self.clock, "student forward")
        return batch

    def _base_hidden(self, batch: RoleBatch) -> Tensor:
        with self.clock.phase("teacher forward"):
            return super()._base_hidden(batch)

    def training_step(self, *args, **kwargs):
        with self.clock.phase("backward"):  # what is left when the loss has been charged to its own phases
            return super().training_step(*args, **kwargs)

    def compute_loss(self, *args, **kwargs):
        with self.clock.phase("objective"):
            loss = super().compute_loss(*args, **kwargs)
        self.records[-1].losses.append(loss.detach())
        return loss

    def _clip_grad_norm(self, model):
        with self.clock.phase("optimizer"):
            return super()._clip_grad_norm(model)


def _pairs(batch: MicroBatch):
    return zip(batch.examples, batch.completions, strict=True)


@dataclass(frozen=True)
class PaddedRole:
    """One role of a micro-batch as a single grid: prompts left-padded to P, completions padded to C tokens.

    Attributes:
        input_ids, attention_mask, position_ids: [B, P + C].
        prompt_width: P.
        valid_tokens, padded_tokens: as in `RoleBatch`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    prompt_width: int
    valid_tokens: int
    padded_tokens: int

    def logits(self, model) -> Tensor:
        """Return the [B, C, V] logits that predict the completions."""
        logits = model(
            input_ids=self.input_ids,
            attention_mask=self.attention_mask,
            position_ids=self.position_ids,
            use_cache=False,
        ).logits
        return logits[:, self.prompt_width - 1 : -1]


def padded_role(
    prompts: Sequence[Sequence[int]], completions, *, maximum: int, pad_id: int, device
) -> PaddedRole:
    """Return the padded grid of B prompts and completions; `maximum` is C, tokens."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width + maximum), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        tokens = [*prompt, *completion]
        span = slice(width - len(prompt), width + len(completion))
        ids[row, span] = torch.tensor(tokens, dtype=torch.long)
        mask[row, span] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    valid = int(mask.sum())
    return PaddedRole(ids.to(device), mask.to(device), positions.to(device), width, valid, ids.numel())


class DenseTrainer(TimedTrainer):
    """The baseline. Micro-batch scope only; the same rollouts give the same loss as OPSDTrainer's."""

    def _roll_out(self, examples):
        size = self.args.per_device_train_batch_size
        groups = [examples[start : start + size] for start in range(0, len(examples), size)]
        return [completion for group in groups for completion in super(DenseTrainer, self)._roll_out(group)]

    def _align(self, examples, completions) -> MicroBatch:
        ids = [completion.token_ids for completion in completions]
        layout = {
            "maximum": self.rollout.max_completion_length,
            "pad_id": self.processing_class.pad_token_id or 0,
            "device": self.args.device,
        }
        return MicroBatch(
            examples,
            completions,
            torch.tensor([len(row) for row in ids], device=self.args.device),
            torch.tensor([token for row in ids for token in row], dtype=torch.long, device=self.args.device),
            padded_role([e.student_ids for e in examples], ids, **layout),
            padded_role([e.teacher_ids for e in examples], ids, **layout),
            None,
        )

    def compute_loss(self, model, inputs: MicroBatch, return_outputs=False, num_items_in_batch=None):
        with self.clock.phase("objective"):
            loss = self._dense_loss(model, inputs)
        self.records[-1].losses.append(loss.detach())
        self._metrics["loss/objective"].append(loss.detach().float())
        return loss

    def _dense_loss(self, model, inputs: MicroBatch) -> Tensor:
        columns = torch.arange(self.rollout.max_completion_length, device=self.args.device)
        valid = columns < inputs.lengths.unsqueeze(1)  # [B, C]
        adapter_off = self.accelerator.unwrap_model(model).disable_adapter()
        with self.clock.phase("teacher forward"), torch.no_grad(), adapter_off, self.accelerator.autocast():
            teacher = inputs.teacher.logits(model)
        with self.clock.phase("student forward"), self.accelerator.autocast():
            student = inputs.student.logits(model)
        with torch.no_grad():
            teacher = tempered_log_softmax(teacher, self.hyper)
        student = tempered_log_softmax(student, self.hyper)
        return loss_from_logs(
            self._method_name(),
            student[valid],
            teacher[valid],
            inputs.token_ids,
            inputs.lengths,
            hyper=self.hyper,
            step=self.state.global_step,
        )

    def _method_name(self) -> str:
        from opsd.objectives import METHODS

        return next(name for name, row in METHODS.items() if row is self.method)
