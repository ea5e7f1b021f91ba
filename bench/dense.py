"""The dense form of the objectives, written plainly: the baseline of the benchmarks and a test reference.

Full logits of every position, float32 log-softmax of student and teacher, elementwise divergence, clamp, sum,
autograd. Nothing is chunked and nothing is fused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsd.objectives import Hyperparameters, position_weights


def dense_loss(
    method: str,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    *,
    hyper: Hyperparameters,
    step: int = 0,
) -> Tensor:
    """Return the loss of one micro-batch, by [N, V] tensors.

    Args:
        student_hidden, teacher_hidden: [N, H] hidden states that predict the N completion tokens.
        weight: [V, H] of the LM head.
        token_ids: [N] sampled tokens, sequence after sequence.
        lengths: [B] completion tokens of each sequence.
        step: the optimizer step, which REOPOLD's mask reads.
    """
    with torch.no_grad():
        teacher_log = tempered_log_softmax(teacher_hidden @ weight.T, hyper)
    student_log = tempered_log_softmax(student_hidden @ weight.T, hyper)
    return loss_from_logs(method, student_log, teacher_log, token_ids, lengths, hyper=hyper, step=step)


def tempered_log_softmax(logits: Tensor, hyper: Hyperparameters) -> Tensor:
    """Return [..., V] raw logits as log-probabilities at temperature T in float32."""
    return torch.log_softmax(logits.float() / hyper.temperature, dim=-1)


def loss_from_logs(
    method: str,
    student_log: Tensor,
    teacher_log: Tensor,
    token_ids: Tensor,
    lengths: Tensor,
    *,
    hyper: Hyperparameters,
    step: int = 0,
) -> Tensor:
    """Return `dense_loss` from [N, V] log-probabilities of student and teacher."""
    return _LOSSES[method](student_log, teacher_log, token_ids, lengths, hyper, step)


def _clipped_divergence(student_log, teacher_log, hyper):
    entries = teacher_log.exp() * (teacher_log - student_log)
    if hyper.jsd_token_clip > 0:
        entries = entries.clamp(max=hyper.jsd_token_clip)
    return entries.sum(-1)


def _opsd(student_log, teacher_log, token_ids, lengths, hyper, step):
    return _clipped_divergence(student_log, teacher_log, hyper).mean()


def _pwopsd(student_log, teacher_log, token_ids, lengths, hyper, step):
    weights = position_weights(lengths, hyper).float()
    weighted = weights * _clipped_divergence(student_log, teacher_log, hyper)
    if hyper.position_global_reduction:
        return weighted.mean()
    return torch.stack([row.mean() for row in weighted.split(lengths.tolist()) if len(row)]).mean()


def _eopd(student_log, teacher_log, token_ids, lengths, hyper, step):
    picked = token_ids.unsqueeze(1)
    student_logprob = student_log.gather(1, picked).squeeze(1)
    advantage = (teacher_log.gather(1, picked).squeeze(1) - student_logprob).detach()
    ratio = torch.exp(student_logprob - student_logprob.detach())
    epsilon = hyper.eopd_clip_epsilon
    policy = torch.maximum(-ratio * advantage, -ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)
    gate = -(teacher_log.exp() * teacher_log).sum(-1) > hyper.eopd_entropy_threshold
    top_log, top_ids = teacher_log.topk(hyper.eopd_top_k, dim=-1)
    top_log = torch.log_softmax(top_log, dim=-1)
    forward = (top_log.exp() * (top_log - student_log.gather(1, top_ids))).sum(-1)
    return (policy + gate * forward).mean()


def _reopold(student_log, teacher_log, token_ids, lengths, hyper, step):
    picked = token_ids.unsqueeze(1)
    student_logprob = student_log.gather(1, picked).squeeze(1)
    reward = (teacher_log.gather(1, picked).squeeze(1) - student_logprob).detach()
    if step < hyper.reopold_t_switch:
        keep = reward >= hyper.reward_floor
    else:
        with torch.no_grad():
            entropy = -(student_log.exp() * student_log).sum(-1)
        keep = entropy >= torch.quantile(entropy, 1 - hyper.reopold_beta)
    terms = -reward.clamp(min=hyper.reward_floor) * keep * student_logprob
    return terms.sum() / keep.sum().clamp(min=1)


_LOSSES = {"opsd": _opsd, "pwopsd": _pwopsd, "eopd": _eopd, "reopold": _reopold}
