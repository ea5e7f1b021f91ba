"""The figures of an optimizer step that the trainer logs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opsd.head import Head
from opsd.objectives import Reduction, TokenStats
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
        self, loss: Tensor, reduction: Reduction, stats: TokenStats, *, vocabulary: int
    ) -> None:
        """Record the loss of a micro-batch and the means of its [N] statistics."""
        tokens = max(len(stats.student_logprob), 1)
        self["loss/objective"].append(loss.detach().float())
        self["student/entropy"].append(stats.student_entropy.sum() / tokens)
        self["teacher/entropy"].append(stats.teacher_entropy.sum() / tokens)
        self["loss/sampled_divergence"].append((stats.student_logprob - stats.teacher_logprob).sum() / tokens)
        if stats.divergence is not None:
            self["loss/divergence"].append(stats.divergence.sum() / tokens)
            self["loss/clip_fraction"].append(stats.clipped_entries.sum() / (tokens * vocabulary))
            self["loss/clipped_token_share"].append((stats.clipped_entries > 0).sum() / tokens)
        for name, value in reduction.metrics.items():
            self[name].append(value)

    def record_audit(self, batch: MicroBatch, hidden: Tensor, *, head: Head, sampling: Sampling) -> None:
        """Record how far the sampler is from the trainer's own distribution.

        Args:
            hidden: [N, H] the student's hidden states of `batch`.
        """
        outside, logprob = sampling_audit(
            hidden.detach(),
            batch.token_ids,
            head=head,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )
        self["rollout/outside_support_share"].append(outside.float().mean())
        if all(completion.logprobs is not None for completion in batch.completions):
            theirs = [value for completion in batch.completions for value in completion.logprobs]
            difference = logprob - torch.tensor(theirs, device=logprob.device)
            self["rollout/logprob_difference"].append(difference.abs().mean())

    def means(self, gather: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Return each name's mean over what was recorded and over ranks; of a name with _max, the maximum.

        Args:
            gather: [1, M] of this rank -> [ranks, M]; called once.
        """
        names = sorted(self)
        reduce = [torch.amax if name.endswith("_max") else torch.mean for name in names]
        kind = {"dtype": torch.float32, "device": device}
        mine = [
            over(torch.stack([torch.as_tensor(value, **kind) for value in self[name]]), 0)
            for name, over in zip(names, reduce, strict=True)
        ]
        ranks = gather(torch.stack(mine).unsqueeze(0)).unbind(1)
        values = torch.stack([over(one, 0) for one, over in zip(ranks, reduce, strict=True)]).tolist()
        return dict(zip(names, values, strict=True))
