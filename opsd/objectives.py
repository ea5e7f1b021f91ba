"""The four objectives as pure functions of per-token statistics. A fifth is one function, one row, one test.

A method is a per-token term and a reduction. Terms and reductions see tensors over the N valid tokens of one
micro-batch, flat, sequence after sequence; `lengths` [B] says whose they are, and padding never gets here.
Everything is at temperature T, in nats, in float32 or better (arXiv:2605.21606, section 4).

Sources: OPSD arXiv:2601.18734; EOPD arXiv:2603.07079; REOPOLD arXiv:2603.11137; PW-OPSD arXiv:2605.21606.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from opsd.options import AT_LEAST_ONE, FINITE, FRACTION, NOT_NEGATIVE, POSITIVE, Range, option

# The functions use methods of tensors alone, so that command lines know the methods' names, the defaults and
# their ranges without the seconds that importing torch takes.
if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Every number of the four objectives; the defaults are the paper's."""

    temperature: float = option(1.1, "T, divides the logits of student and teacher", range=POSITIVE)
    jsd_token_clip: float = option(
        0.05, "c, cap on each vocabulary entry of the forward KL; 0 = none", range=NOT_NEGATIVE
    )
    position_w_min: float = option(0.25, "pwopsd: smallest position weight", range=FRACTION)
    position_tau: float = option(0.30, "pwopsd: relative position of half weight", range=FINITE)
    position_s: float = option(0.10, "pwopsd: width of the schedule", range=POSITIVE)
    position_global_reduction: bool = option(
        False, "pwopsd: mean over all tokens instead of per sequence first (an ablation)"
    )
    eopd_entropy_threshold: float = option(
        0.8, "eopd: teacher entropy above which the forward KL is added, nats", range=NOT_NEGATIVE
    )
    eopd_top_k: int = option(16, "eopd: size of the teacher's support in that KL", range=AT_LEAST_ONE)
    eopd_clip_epsilon: float = option(0.2, "eopd: ε of the PPO clip", range=Range(0, 1, high_open=True))
    reopold_lambda: float = option(
        0.1, "reopold: the reward floor is log λ / (1 − λ)", range=Range(0, 1, True, True)
    )
    reopold_beta: float = option(
        0.2, "reopold: share of tokens, by student entropy, kept in refinement", range=FRACTION
    )
    reopold_t_switch: int = option(
        50, "reopold: optimizer step at which refinement begins", range=NOT_NEGATIVE
    )

    @property
    def reward_floor(self) -> float:
        """REOPOLD's floor log λ / (1 − λ), nats; about −2.558 at λ = 0.1."""
        return math.log(self.reopold_lambda) / (1.0 - self.reopold_lambda)


@dataclass(frozen=True)
class TokenStats:
    """What the objectives read, each [N]. Fields that a method does not ask for are None.

    Attributes:
        term: the method's per-token term; the only field that carries a gradient.
        student_logprob: log p_S(y) of the sampled token.
        teacher_logprob: log p_T(y) of the sampled token.
        student_entropy: H(p_S).
        teacher_entropy: H(p_T).
        divergence: Σ_v p_T [log p_T − log p_S], not clipped.
        clipped_divergence: Σ_v min(p_T [log p_T − log p_S], c).
        clipped_entries: how many vocabulary entries the clip cut.
        topk_divergence: Σ_{v∈top-k(p_T)} q [log q − log p_S], q = p_T renormalised over its own top k.
    """

    term: Tensor | None
    student_logprob: Tensor
    teacher_logprob: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    divergence: Tensor | None = None
    clipped_divergence: Tensor | None = None
    clipped_entries: Tensor | None = None
    topk_divergence: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class StatsConfig:
    """Which statistics to compute, and how (opsd/token_stats.py).

    Attributes:
        temperature: divides both sides' logits.
        divergence_clip: cap on each vocabulary entry of the forward KL; 0 = no cap; None = not computed.
        top_k: size of the teacher's support in `topk_divergence`; None = not computed.
        chunk_positions: positions per chunk; None chooses by memory.
    """

    temperature: float
    divergence_clip: float | None = None
    top_k: int | None = None
    chunk_positions: int | None = None


@dataclass(frozen=True)
class ReductionInput:
    """What a reduction reads of one micro-batch.

    Attributes:
        stats: [N] fields.
        lengths: [B] completion tokens of each sequence.
        step: the optimizer step, from 0.
        threshold: what `Method.over_step` found for the whole optimizer step; None takes the micro-batch's.
    """

    stats: TokenStats
    lengths: Tensor
    step: int = 0
    threshold: Tensor | None = None


@dataclass(frozen=True)
class Reduction:
    """A loss as a sum and its count, so that the count can be taken over more than one micro-batch.

    Attributes:
        total: weighted sum of the terms, a scalar attached to the graph even when no token is valid.
        count: what the sum is divided by: tokens, sequences or kept tokens. A scalar, not differentiable.
        metrics: detached scalars, named `method/…`.
    """

    total: Tensor
    count: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def loss(self, count: Tensor | None = None) -> Tensor:
        """total / max(count, 1), with the count of this micro-batch unless another is given."""
        divisor = self.count if count is None else count.to(self.total.dtype)
        return self.total / divisor.to(self.total.device).clamp(min=1)


@dataclass(frozen=True)
class StepScale:
    """What `--loss_scope global` takes over a whole optimizer step: the count and, if any, the threshold."""

    count: Tensor
    threshold: Tensor | None = None


def position_fractions(lengths: Tensor, tokens: int | None = None) -> Tensor:
    """f_t = (i − ½) / L for i = 1..L within each sequence: [B] lengths -> [N] in float64.

    i counts the sequence's own valid tokens; neither padding nor the maximum length enters. `tokens` is N; a
    caller that knows it saves a wait for the device.
    """
    tokens = int(lengths.sum()) if tokens is None else tokens
    before = lengths.cumsum(0) - lengths
    index = lengths.new_ones(tokens).cumsum(0) - _per_token(before, lengths, tokens)
    return (index.double() - 0.5) / _per_token(lengths, lengths, tokens)


def _per_token(values: Tensor, lengths: Tensor, tokens: int) -> Tensor:
    """[B] one value a sequence -> [N] one a token."""
    return values.repeat_interleave(lengths, output_size=tokens)


def position_weights(lengths: Tensor, hyper: Hyperparameters, tokens: int | None = None) -> Tensor:
    """w_t = w_min + (1 − w_min) · σ((f_t − τ) / s), [B] -> [N] in float64. Not normalised to mean 1."""
    gate = ((position_fractions(lengths, tokens) - hyper.position_tau) / hyper.position_s).sigmoid()
    return hyper.position_w_min + (1.0 - hyper.position_w_min) * gate


def opsd_term(stats: TokenStats, hyper: Hyperparameters) -> Tensor:
    """Σ_v min(p_T [log p_T − log p_S], c): the forward KL with each vocabulary entry capped. [N] -> [N]."""
    return stats.clipped_divergence


def eopd_term(stats: TokenStats, hyper: Hyperparameters) -> Tensor:
    """−A·r, PPO-clipped, plus the teacher's top-k forward KL where the teacher is uncertain. [N] -> [N].

    A = log p_T(y) − log p_S(y) is a constant; r = exp(log p_S(y) − const) is 1 in value, since the rollouts
    are on-policy.
    """
    advantage = (stats.teacher_logprob - stats.student_logprob).detach()
    ratio = (stats.student_logprob - stats.student_logprob.detach()).exp()
    clipped = ratio.clamp(1.0 - hyper.eopd_clip_epsilon, 1.0 + hyper.eopd_clip_epsilon)
    policy = (-ratio * advantage).maximum(-clipped * advantage)
    gate = (stats.teacher_entropy > hyper.eopd_entropy_threshold).to(policy.dtype)
    return policy + gate * stats.topk_divergence


def reopold_term(stats: TokenStats, hyper: Hyperparameters) -> Tensor:
    """−R̂·log p_S(y), R̂ = max(R, floor); the mask comes in the reduction. [N] -> [N].

    R = log p_T(y) − log p_S(y) is a constant.
    """
    reward = (stats.teacher_logprob - stats.student_logprob).detach().clamp(min=hyper.reward_floor)
    return -reward * stats.student_logprob


def entropy_threshold(entropies: Tensor, hyper: Hyperparameters) -> Tensor:
    """The (1 − β)-quantile of student entropy, linearly interpolated: [N] -> scalar nats; +inf for N = 0."""
    if entropies.numel() == 0:
        return entropies.new_tensor(math.inf)
    ordered = entropies.sort().values
    place = (1.0 - hyper.reopold_beta) * (ordered.numel() - 1)
    low = min(int(place), ordered.numel() - 1)
    high = min(low + 1, ordered.numel() - 1)
    return ordered[low].lerp(ordered[high], place - low)


def reopold_mask(batch: ReductionInput, hyper: Hyperparameters) -> Tensor:
    """Which tokens REOPOLD keeps, [N] bool.

    Before `reopold_t_switch` (exploration) those whose reward reaches the floor; from it on (refinement)
    those whose student entropy reaches the threshold, by default this micro-batch's own (1 − β)-quantile.
    """
    stats, threshold = batch.stats, batch.threshold
    if batch.step < hyper.reopold_t_switch:
        return stats.teacher_logprob - stats.student_logprob >= hyper.reward_floor
    if threshold is None:
        threshold = entropy_threshold(stats.student_entropy, hyper)
    return stats.student_entropy >= threshold


def reopold_over_step(batches: Sequence[ReductionInput], hyper: Hyperparameters, gather: Gather) -> StepScale:
    """REOPOLD's threshold over all tokens of an optimizer step, and how many tokens of this rank it keeps."""
    threshold = None
    if batches[0].step >= hyper.reopold_t_switch:
        threshold = entropy_threshold(gather([batch.stats.student_entropy for batch in batches]), hyper)
    kept = [reopold_mask(replace(batch, threshold=threshold), hyper).sum() for batch in batches]
    return StepScale(sum(kept), threshold)


def _count_tokens(lengths: Tensor, hyper: Hyperparameters) -> Tensor:
    return lengths.sum()


def _count_weighted(lengths: Tensor, hyper: Hyperparameters) -> Tensor:
    return lengths.sum() if hyper.position_global_reduction else (lengths > 0).sum()


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
        weighted = weighted / _per_token(lengths, lengths, term.numel())
    return Reduction(weighted.sum(), _count_weighted(lengths, hyper), {"method/mean_weight": _mean(weights)})


def _mean(values: Tensor) -> Tensor:
    return values.detach().float().sum() / max(values.numel(), 1)


# [n] of each micro-batch of this rank -> those of the whole optimizer step, all ranks, in one [M].
Gather = Callable[[Sequence["Tensor"]], "Tensor"]


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Attributes:
        term: per-token term, [N].
        reduce: the terms of a micro-batch -> its loss.
        statistics: which statistics the term reads.
        count: lengths [B] -> what the sum is divided by; None where that depends on the statistics.
        over_step: with `--loss_scope global`, the count of this rank (and a threshold) from the statistics of
            all micro-batches, which costs one more student pass; needed where `count` is None.
    """

    term: Callable[[TokenStats, Hyperparameters], Tensor]
    reduce: Callable[[ReductionInput, Hyperparameters], Reduction]
    statistics: Callable[[Hyperparameters], StatsConfig]
    count: Callable[[Tensor, Hyperparameters], Tensor] | None = None
    over_step: Callable[[Sequence[ReductionInput], Hyperparameters, Gather], StepScale] | None = None


def _forward_kl(hyper: Hyperparameters) -> StatsConfig:
    return StatsConfig(temperature=hyper.temperature, divergence_clip=hyper.jsd_token_clip)


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
