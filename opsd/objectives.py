"""The four objectives as pure functions of per-token statistics. A fifth is one function, one row, one test.

A method is a per-token term and a reduction. Both take tensors over the N valid tokens of one micro-batch,
flat, sequence after sequence; `lengths` [B] holds the tokens of each sequence, and no padding is among them.
All values are at temperature T, in nats, in float32 or better (arXiv:2605.21606, section 4).

Sources: OPSD arXiv:2601.18734; EOPD arXiv:2603.07079; REOPOLD arXiv:2603.11137; PW-OPSD arXiv:2605.21606.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

from opsd.options import (
    AT_LEAST_ONE,
    BELOW_ONE,
    FINITE,
    FRACTION,
    NOT_NEGATIVE,
    OPEN_FRACTION,
    POSITIVE,
    option,
)

# torch is not imported, so that a command line that needs only names, defaults and ranges starts at once.
if TYPE_CHECKING:
    from torch import Tensor

CLIP_SCOPES = ("entry", "token")


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Every number of the four objectives; the defaults are the paper's."""

    temperature: float = option(1.1, "T, divides the logits of student and teacher", range=POSITIVE)
    jsd_token_clip: float = option(0.05, "c, cap of the forward KL's entries; 0 = none", range=NOT_NEGATIVE)
    divergence_clip_scope: str = option("entry", "c caps each entry or the token's sum", choices=CLIP_SCOPES)
    position_w_min: float = option(0.25, "pwopsd: smallest position weight", range=FRACTION)
    position_tau: float = option(0.30, "pwopsd: relative position of half weight", range=FINITE)
    position_s: float = option(0.10, "pwopsd: width of the schedule", range=POSITIVE)
    position_global_reduction: bool = option(False, "pwopsd: mean over all tokens, not per sequence first")
    eopd_entropy_threshold: float = option(0.8, "eopd: the gate's teacher entropy, nats", range=NOT_NEGATIVE)
    eopd_top_k: int = option(16, "eopd: size of the teacher's support in that KL", range=AT_LEAST_ONE)
    eopd_clip_epsilon: float = option(0.2, "eopd: ε of the PPO clip", range=BELOW_ONE)
    reopold_lambda: float = option(0.1, "reopold: the reward floor is log λ / (1 − λ)", range=OPEN_FRACTION)
    reopold_beta: float = option(0.2, "reopold: share of tokens kept in refinement", range=FRACTION)
    reopold_t_switch: int = option(50, "reopold: first optimizer step of refinement", range=NOT_NEGATIVE)

    @property
    def reward_floor(self) -> float:
        """REOPOLD's floor log λ / (1 − λ), nats; about −2.558 at λ = 0.1."""
        return math.log(self.reopold_lambda) / (1.0 - self.reopold_lambda)


class TokenStats(SimpleNamespace):
    """What the objectives read, [N] each. A statistic that a method does not ask for is no attribute."""

    term: Tensor  # the method's per-token term, the only one that carries a gradient
    student_logprob: Tensor  # log p_S(y) of the sampled token y
    teacher_logprob: Tensor  # log p_T(y)
    student_entropy: Tensor  # H(p_S)
    teacher_entropy: Tensor  # H(p_T)
    divergence: Tensor  # Σ_v p_T [log p_T − log p_S], not clipped
    clipped_divergence: Tensor  # Σ_v min(p_T [log p_T − log p_S], c); scope token: min(divergence, c)
    clipped_entries: Tensor  # number of vocabulary entries above c; scope token: all V or none
    clipped_teacher_mass: Tensor  # Σ p_T of those entries
    topk_divergence: Tensor  # Σ_{v∈top-k(p_T)} q [log q − log p_S], q = p_T renormalised over its own top k


@dataclass(frozen=True, kw_only=True)
class StatsConfig:
    """Which statistics to compute, and how (opsd/token_stats.py)."""

    temperature: float  # divides the logits of both roles
    divergence_clip: float | None = None  # c of `clipped_divergence`; 0 = no cap; None = not computed
    clip_scope: str = "entry"  # one of CLIP_SCOPES
    top_k: int | None = None  # k of `topk_divergence`; None = not computed
    chunk_positions: int | None = None  # positions per chunk; None chooses by memory


@dataclass(frozen=True)
class ReductionInput:
    """What a reduction reads of one micro-batch."""

    stats: TokenStats  # [N] fields
    lengths: Tensor  # [B] completion tokens of each sequence
    step: int = 0  # optimizer step, from 0
    threshold: Tensor | None = None  # of the complete optimizer step; None = computed from this micro-batch


@dataclass(frozen=True)
class Reduction:
    """A loss as a sum and its count, so that the count can be taken over more than one micro-batch."""

    total: Tensor  # weighted sum of the terms, a scalar attached to the graph even when no token is valid
    count: Tensor  # tokens, sequences or kept tokens, a scalar without gradient
    metrics: dict[str, Tensor] = field(default_factory=dict)  # detached scalars, `method/…`

    def loss(self, count: Tensor | None = None) -> Tensor:
        """Return total / max(count, 1), with the count of this micro-batch unless another is given."""
        divisor = self.count if count is None else count.to(self.total.dtype)
        return self.total / divisor.to(self.total.device).clamp(min=1)


@dataclass(frozen=True)
class StepScale:
    """The count and the threshold, if any, of a complete optimizer step (`--loss_scope global`)."""

    count: Tensor
    threshold: Tensor | None = None


def position_fractions(lengths: Tensor, tokens: int | None = None) -> Tensor:
    """Return f_t = (i − ½) / L for the i-th of a sequence's L tokens: lengths [B] -> [N] in float64.

    Neither padding nor the maximum length enters. A known `tokens` = N saves a wait for the device.
    """
    tokens = int(lengths.sum()) if tokens is None else tokens
    before = lengths.cumsum(0) - lengths
    index = lengths.new_ones(tokens).cumsum(0) - before.repeat_interleave(lengths, output_size=tokens)
    return (index.double() - 0.5) / lengths.repeat_interleave(lengths, output_size=tokens)


def position_weights(lengths: Tensor, hyper: Hyperparameters, tokens: int | None = None) -> Tensor:
    """Return w_t = w_min + (1 − w_min) · σ((f_t − τ) / s), [B] -> [N] in float64. Their mean is not 1."""
    gate = ((position_fractions(lengths, tokens) - hyper.position_tau) / hyper.position_s).sigmoid()
    return hyper.position_w_min + (1.0 - hyper.position_w_min) * gate


def opsd_term(stats: TokenStats, hyper: Hyperparameters) -> Tensor:
    """Return Σ_v min(p_T [log p_T − log p_S], c), the forward KL with each entry (or its sum) capped, [N]."""
    return stats.clipped_divergence


def eopd_term(stats: TokenStats, hyper: Hyperparameters) -> Tensor:
    """Return −A·r, PPO-clipped, plus the top-k forward KL where the teacher's entropy is high, [N].

    A = log p_T(y) − log p_S(y) is a constant. r = exp(log p_S(y) − const) is 1 in value: on-policy rollouts.
    """
    advantage = (stats.teacher_logprob - stats.student_logprob).detach()
    ratio = (stats.student_logprob - stats.student_logprob.detach()).exp()
    clipped = ratio.clamp(1.0 - hyper.eopd_clip_epsilon, 1.0 + hyper.eopd_clip_epsilon)
    policy = (-ratio * advantage).maximum(-clipped * advantage)
    gate = (stats.teacher_entropy > hyper.eopd_entropy_threshold).to(policy.dtype)
    return policy + gate * stats.topk_divergence


def reopold_term(stats: TokenStats, hyper: Hyperparameters) -> Tensor:
    """Return −max(R, floor)·log p_S(y), [N]; R = log p_T(y) − log p_S(y) is a constant."""
    reward = (stats.teacher_logprob - stats.student_logprob).detach().clamp(min=hyper.reward_floor)
    return -reward * stats.student_logprob


def entropy_threshold(entropies: Tensor, hyper: Hyperparameters) -> Tensor:
    """Return the (1 − β)-quantile of [N] entropies, linearly interpolated, nats; +inf for N = 0."""
    if entropies.numel() == 0:
        return entropies.new_tensor(math.inf)
    ordered = entropies.sort().values
    place = (1.0 - hyper.reopold_beta) * (ordered.numel() - 1)
    low = min(int(place), ordered.numel() - 1)
    high = min(low + 1, ordered.numel() - 1)
    return ordered[low].lerp(ordered[high], place - low)


def reopold_mask(batch: ReductionInput, hyper: Hyperparameters) -> Tensor:
    """Return which tokens REOPOLD keeps, [N] bool.

    Before `reopold_t_switch` (exploration): those whose reward reaches the floor. From it on (refinement):
    those whose student entropy reaches the threshold, by default this micro-batch's (1 − β)-quantile.
    """
    stats = batch.stats
    if batch.step < hyper.reopold_t_switch:
        return stats.teacher_logprob - stats.student_logprob >= hyper.reward_floor
    if batch.threshold is None:
        return stats.student_entropy >= entropy_threshold(stats.student_entropy, hyper)
    return stats.student_entropy >= batch.threshold


def reopold_over_step(batches: Sequence[ReductionInput], hyper: Hyperparameters, gather: Gather) -> StepScale:
    """Return REOPOLD's threshold over an optimizer step, and how many tokens of this rank it keeps."""
    threshold = None
    if batches[0].step >= hyper.reopold_t_switch:
        threshold = entropy_threshold(gather([batch.stats.student_entropy for batch in batches]), hyper)
    kept = [reopold_mask(replace(batch, threshold=threshold), hyper).sum() for batch in batches]
    return StepScale(sum(kept[1:], start=kept[0]), threshold)


def _count_tokens(lengths: Tensor, hyper: Hyperparameters) -> Tensor:
    return lengths.sum()


def _count_weighted(lengths: Tensor, hyper: Hyperparameters) -> Tensor:
    return lengths.sum() if hyper.position_global_reduction else (lengths > 0).sum()


def _mean(values: Tensor) -> Tensor:
    return values.detach().float().sum() / max(values.numel(), 1)


def _token_mean(batch: ReductionInput, hyper: Hyperparameters) -> Reduction:
    return Reduction(batch.stats.term.sum(), _count_tokens(batch.lengths, hyper))


def _eopd_mean(batch: ReductionInput, hyper: Hyperparameters) -> Reduction:
    stats = batch.stats
    metrics = {
        "method/gate_share": _mean(stats.teacher_entropy > hyper.eopd_entropy_threshold),
        "method/advantage": _mean(stats.teacher_logprob - stats.student_logprob),
        "method/topk_divergence": _mean(stats.topk_divergence),
    }
    return replace(_token_mean(batch, hyper), metrics=metrics)


def _reopold_mean(batch: ReductionInput, hyper: Hyperparameters) -> Reduction:
    stats, keep = batch.stats, reopold_mask(batch, hyper)
    reward = stats.teacher_logprob - stats.student_logprob
    metrics = {
        "method/kept_share": _mean(keep),
        "method/below_floor_share": _mean(reward < hyper.reward_floor),
        "method/reward": _mean(reward),
        "method/refinement": stats.student_entropy.new_tensor(float(batch.step >= hyper.reopold_t_switch)),
    }
    # A masked sum, not a product: 0 · inf from a dropped token stays out of the loss.
    return Reduction(stats.term.where(keep, 0.0).sum(), keep.sum(), metrics)


def _position_weighted(batch: ReductionInput, hyper: Hyperparameters) -> Reduction:
    term, lengths = batch.stats.term, batch.lengths
    weights = position_weights(lengths, hyper, term.numel()).to(term.dtype)
    weighted = weights * term
    if not hyper.position_global_reduction:
        weighted = weighted / lengths.repeat_interleave(lengths, output_size=term.numel())
    return Reduction(weighted.sum(), _count_weighted(lengths, hyper), {"method/mean_weight": _mean(weights)})


# [n] of each micro-batch of this rank -> [M] of the complete optimizer step, all ranks.
Gather = Callable[[Sequence["Tensor"]], "Tensor"]


@dataclass(frozen=True)
class Method:
    """One row of the table of methods."""

    term: Callable[[TokenStats, Hyperparameters], Tensor]  # -> [N]
    reduce: Callable[[ReductionInput, Hyperparameters], Reduction]
    statistics: Callable[[Hyperparameters], StatsConfig]  # those that the term reads
    # lengths [B] -> what the sum is divided by; None where that depends on the statistics.
    count: Callable[[Tensor, Hyperparameters], Tensor] | None = None
    # Without `count`: the scale of a step from the statistics of its micro-batches, one more student pass.
    over_step: Callable[[Sequence[ReductionInput], Hyperparameters, Gather], StepScale] | None = None


def _forward_kl(hyper: Hyperparameters) -> StatsConfig:
    clip, scope = hyper.jsd_token_clip, hyper.divergence_clip_scope
    return StatsConfig(temperature=hyper.temperature, divergence_clip=clip, clip_scope=scope)


def _with_top_k(hyper: Hyperparameters) -> StatsConfig:
    return StatsConfig(temperature=hyper.temperature, top_k=hyper.eopd_top_k)


def _sampled(hyper: Hyperparameters) -> StatsConfig:
    return StatsConfig(temperature=hyper.temperature)


METHODS: dict[str, Method] = {
    "opsd": Method(opsd_term, _token_mean, _forward_kl, count=_count_tokens),
    "eopd": Method(eopd_term, _eopd_mean, _with_top_k, count=_count_tokens),
    "reopold": Method(reopold_term, _reopold_mean, _sampled, over_step=reopold_over_step),
    "pwopsd": Method(opsd_term, _position_weighted, _forward_kl, count=_count_weighted),
}
