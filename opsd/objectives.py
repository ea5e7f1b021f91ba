"""The four objectives as pure functions of per-token statistics. A fifth is one function, one row, one test.

A method is a per-token term and a reduction. Terms and reductions see tensors over the N valid tokens of one
micro-batch, flat, sequence after sequence, with `lengths` [B] saying whose they are; padding never gets here.
Everything is at temperature T, in nats, in float32 or better (PROTOCOL: the paper's arXiv:2605.21606, section
4).

Sources: OPSD arXiv:2601.18734; EOPD arXiv:2603.07079; REOPOLD arXiv:2603.11137; PW-OPSD arXiv:2605.21606.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opsd.token_stats import StatsConfig, TokenStats


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Every number of the four objectives; the defaults are the paper's.

    Attributes:
        temperature: T, divides student and teacher logits.
        jsd_token_clip: c, the cap on each vocabulary entry of the forward KL; 0 = no cap.
        position_w_min, position_tau, position_s: PW-OPSD's schedule; the defaults are the Moderate one.
        position_global_reduction: weighted terms under a mean over all tokens (the 2×2 ablation's other
        cell).
        eopd_entropy_threshold: τ, nats of teacher entropy above which the top-k forward KL is added.
        eopd_top_k: k, the size of the teacher's support in that divergence.
        eopd_clip_epsilon: ε of the PPO clip.
        reopold_lambda: λ; the reward floor is log λ / (1 − λ).
        reopold_beta: β; refinement keeps the tokens above the (1 − β)-quantile of student entropy.
        reopold_t_switch: the optimizer step at which refinement begins.
    """

    temperature: float = 1.1
    jsd_token_clip: float = 0.05
    position_w_min: float = 0.25
    position_tau: float = 0.30
    position_s: float = 0.10
    position_global_reduction: bool = False
    eopd_entropy_threshold: float = 0.8
    eopd_top_k: int = 16
    eopd_clip_epsilon: float = 0.2
    reopold_lambda: float = 0.1
    reopold_beta: float = 0.2
    reopold_t_switch: int = 50

    @property
    def reward_floor(self) -> float:
        """REOPOLD's floor log λ / (1 − λ), nats; about −2.558 at λ = 0.1."""
        return math.log(self.reopold_lambda) / (1.0 - self.reopold_lambda)


@dataclass(frozen=True)
class Reduction:
    """A loss as a sum over its natural count, so that the count can be taken over more than one micro-batch.

    Attributes:
        total: weighted sum of the terms, a scalar attached to the graph even when no token is valid.
        count: what the sum is divided by: tokens, sequences or kept tokens. A scalar, not differentiable.
        metrics: detached scalars, named `method/…`.
    """

    total: Tensor
    count: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def loss(self, count: Tensor | float | None = None) -> Tensor:
        """total / max(count, 1), with the count of this micro-batch unless another is given."""
        divisor = self.count if count is None else torch.as_tensor(count, dtype=self.total.dtype)
        return self.total / divisor.to(self.total.device).clamp(min=1)


def position_fractions(lengths: Tensor, tokens: int | None = None) -> Tensor:
    """f_t = (i − ½) / L for i = 1..L within each sequence: [B] lengths -> [N] in float64.

    i counts the sequence's own valid tokens; neither padding nor the maximum length enters. `tokens` is N; a
    caller that knows it spares a wait for the device.
    """
    tokens = int(lengths.sum()) if tokens is None else tokens
    starts = torch.cumsum(lengths, 0) - lengths
    index = torch.arange(tokens, device=lengths.device) - _per_token(starts, lengths, tokens)
    return (index.double() + 0.5) / _per_token(lengths, lengths, tokens)


def _per_token(values: Tensor, lengths: Tensor, tokens: int) -> Tensor:
    """[B] one value a sequence -> [N] one a token."""
    return torch.repeat_interleave(values, lengths, output_size=tokens)


def position_weights(lengths: Tensor, hyper: Hyperparameters, tokens: int | None = None) -> Tensor:
    """w_t = w_min + (1 − w_min) · σ((f_t − τ) / s), [B] -> [N] in float64. Not normalised to mean 1."""
    gate = torch.sigmoid((position_fractions(lengths, tokens) - hyper.position_tau) / hyper.position_s)
    return hyper.position_w_min + (1.0 - hyper.position_w_min) * gate


def opsd_term(stats: TokenStats, hyper: Hyperparameters) -> Tensor:
    """Σ_v min(p_T [log p_T − log p_S], c): the forward KL with each vocabulary entry capped. [N] -> [N]."""
    return stats.clipped_divergence


def eopd_term(stats: TokenStats, hyper: Hyperparameters) -> Tensor:
    """−A·r, PPO-clipped, plus the teacher's top-k forward KL where the teacher is uncertain. [N] -> [N].

    A = log p_T(y) − log p_S(y) is a constant, r = exp(log p_S(y) − const) is 1 in value: the rollouts are
    on-policy.
    """
    advantage = (stats.teacher_logprob - stats.student_logprob).detach()
    ratio = torch.exp(stats.student_logprob - stats.student_logprob.detach())
    clipped = ratio.clamp(1.0 - hyper.eopd_clip_epsilon, 1.0 + hyper.eopd_clip_epsilon)
    policy = torch.maximum(-ratio * advantage, -clipped * advantage)
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
    return torch.lerp(ordered[low], ordered[high], place - low)


def reopold_mask(
    stats: TokenStats, hyper: Hyperparameters, *, step: int, threshold: Tensor | None = None
) -> Tensor:
    """Which tokens REOPOLD keeps, [N] bool.

    Before `reopold_t_switch` (exploration) those whose reward reaches the floor; from it on (refinement)
    those whose student entropy reaches `threshold`, by default this micro-batch's own (1 − β)-quantile.
    """
    if step < hyper.reopold_t_switch:
        return stats.teacher_logprob - stats.student_logprob >= hyper.reward_floor
    if threshold is None:
        threshold = entropy_threshold(stats.student_entropy, hyper)
    return stats.student_entropy >= threshold


def _count_tokens(lengths: Tensor, hyper: Hyperparameters) -> Tensor:
    return lengths.sum()


def _count_weighted(lengths: Tensor, hyper: Hyperparameters) -> Tensor:
    return lengths.sum() if hyper.position_global_reduction else (lengths > 0).sum()


def _token_mean(stats: TokenStats, lengths: Tensor, hyper: Hyperparameters, **_) -> Reduction:
    return Reduction(stats.term.sum(), _count_tokens(lengths, hyper))


def _eopd_mean(stats: TokenStats, lengths: Tensor, hyper: Hyperparameters, **_) -> Reduction:
    gated = stats.teacher_entropy > hyper.eopd_entropy_threshold
    metrics = {
        "method/gate_share": _mean(gated),
        "method/advantage": _mean(stats.teacher_logprob - stats.student_logprob),
        "method/topk_divergence": _mean(stats.topk_divergence),
    }
    return Reduction(stats.term.sum(), _count_tokens(lengths, hyper), metrics)


def _reopold_mean(
    stats: TokenStats, lengths: Tensor, hyper: Hyperparameters, *, step: int, threshold: Tensor | None = None
) -> Reduction:
    keep = reopold_mask(stats, hyper, step=step, threshold=threshold)
    reward = stats.teacher_logprob - stats.student_logprob
    metrics = {
        "method/kept_share": _mean(keep),
        "method/below_floor_share": _mean(reward < hyper.reward_floor),
        "method/reward": _mean(reward),
        "method/refinement": stats.student_entropy.new_tensor(float(step >= hyper.reopold_t_switch)),
    }
    # A masked sum, not a product: 0 · inf from a dropped token stays out of the loss.
    return Reduction(torch.where(keep, stats.term, 0.0).sum(), keep.sum(), metrics)


def _position_weighted(stats: TokenStats, lengths: Tensor, hyper: Hyperparameters, **_) -> Reduction:
    tokens = stats.term.numel()
    weights = position_weights(lengths, hyper, tokens).to(stats.term.dtype)
    metrics = {"method/mean_weight": _mean(weights)}
    weighted = weights * stats.term
    if not hyper.position_global_reduction:
        weighted = weighted / _per_token(lengths, lengths, tokens)
    return Reduction(weighted.sum(), _count_weighted(lengths, hyper), metrics)


def _mean(values: Tensor) -> Tensor:
    return values.detach().float().sum() / max(values.numel(), 1)


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Attributes:
        term: (stats, hyper) -> [N] per-token term.
        reduce: (stats, lengths [B], hyper, step=, threshold=) -> Reduction.
        statistics: hyper -> which statistics the term reads.
        count: (lengths [B], hyper) -> what the sum is divided by; None where that depends on the statistics
            (REOPOLD's kept tokens), so that a count over several micro-batches needs a look at all of them.
    """

    term: Callable[[TokenStats, Hyperparameters], Tensor]
    reduce: Callable[..., Reduction]
    statistics: Callable[[Hyperparameters], StatsConfig]
    count: Callable[[Tensor, Hyperparameters], Tensor] | None = None


def _forward_kl(hyper: Hyperparameters) -> StatsConfig:
    return StatsConfig(temperature=hyper.temperature, divergence_clip=hyper.jsd_token_clip)


def _with_top_k(hyper: Hyperparameters) -> StatsConfig:
    return StatsConfig(temperature=hyper.temperature, top_k=hyper.eopd_top_k)


def _sampled(hyper: Hyperparameters) -> StatsConfig:
    return StatsConfig(temperature=hyper.temperature)


METHODS: dict[str, Method] = {
    "opsd": Method(opsd_term, _token_mean, _forward_kl, _count_tokens),
    "eopd": Method(eopd_term, _eopd_mean, _with_top_k, _count_tokens),
    "reopold": Method(reopold_term, _reopold_mean, _sampled),
    "pwopsd": Method(opsd_term, _position_weighted, _forward_kl, _count_weighted),
}
