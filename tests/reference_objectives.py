"""Each equation with plain loops over tokens and vocabulary entries, independent of opsd/.

Inputs are [B, T, V] logits, [B, T] ids and a [B, T] mask of valid tokens, as nested sequences or tensors; the
loss is a differentiable float64 scalar.
"""

from __future__ import annotations

import math

import torch


def _log_softmax(row, temperature):
    scaled = [value / temperature for value in row]
    top = max(float(value) for value in scaled)
    normaliser = sum(torch.exp(value - top) for value in scaled)
    return [value - top - torch.log(normaliser) for value in scaled]


def _entropy(log_probs):
    return -sum(math.exp(float(value)) * float(value) for value in log_probs)


def _clipped_kl(log_student, log_teacher, hyper):
    clip, of_token = hyper.jsd_token_clip, hyper.divergence_clip_scope == "token"
    total = 0.0
    for student, teacher in zip(log_student, log_teacher, strict=True):
        entry = math.exp(float(teacher)) * (float(teacher) - student)
        if clip and not of_token and float(entry) > clip:
            entry = clip
        total = total + entry
    return total * 0.0 + clip if clip and of_token and float(total) > clip else total


def _eopd_token(log_student, log_teacher, token, *, threshold, top_k):
    advantage = float(log_teacher[token]) - float(log_student[token])
    # r is 1 in value and its derivative is that of log p_S(y).
    policy = -advantage * (log_student[token] - float(log_student[token]) + 1.0)
    if _entropy(log_teacher) <= threshold:
        return policy
    support = sorted(range(len(log_teacher)), key=lambda v: -float(log_teacher[v]))[:top_k]
    mass = sum(math.exp(float(log_teacher[v])) for v in support)
    for v in support:
        q = math.exp(float(log_teacher[v])) / mass
        policy = policy + q * (math.log(q) - log_student[v])
    return policy


def _quantile(values, share):
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _weight(index, length, w_min, tau, s):
    fraction = (index - 0.5) / length
    return w_min + (1 - w_min) / (1 + math.exp(-(fraction - tau) / s))


def reference_loss(method, student_logits, teacher_logits, token_ids, mask, *, hyper, step=0):
    """The loss of one micro-batch, as a float64 scalar attached to `student_logits`."""
    rows = [[] for _ in token_ids]
    for b, t in mask.nonzero().tolist():
        logs = [
            _log_softmax(list(logits[b][t].double()), hyper.temperature)
            for logits in (student_logits, teacher_logits)
        ]
        rows[b].append((*logs, int(token_ids[b][t])))
    tokens = [token for row in rows for token in row]
    if not tokens:
        return student_logits.double().sum() * 0.0
    if method == "opsd":
        return sum(_clipped_kl(s, t, hyper) for s, t, _ in tokens) / len(tokens)
    if method == "eopd":
        settings = {"threshold": hyper.eopd_entropy_threshold, "top_k": hyper.eopd_top_k}
        return sum(_eopd_token(s, t, y, **settings) for s, t, y in tokens) / len(tokens)
    if method == "pwopsd":
        schedule = (hyper.position_w_min, hyper.position_tau, hyper.position_s)
        sums, weighted_total = [], 0.0
        for row in filter(None, rows):
            weighted = sum(
                _weight(i, len(row), *schedule) * _clipped_kl(s, t, hyper)
                for i, (s, t, _) in enumerate(row, start=1)
            )
            sums.append(weighted / len(row))
            weighted_total = weighted_total + weighted
        return weighted_total / len(tokens) if hyper.position_global_reduction else sum(sums) / len(sums)
    if method == "reopold":
        floor = math.log(hyper.reopold_lambda) / (1 - hyper.reopold_lambda)
        cut = _quantile([_entropy(s) for s, _, _ in tokens], 1 - hyper.reopold_beta)
        total, kept = student_logits.double().sum() * 0.0, 0
        for s, t, y in tokens:
            reward = float(t[y]) - float(s[y])
            keep = reward >= floor if step < hyper.reopold_t_switch else _entropy(s) >= cut - 1e-12
            if keep:
                total = total - max(reward, floor) * s[y]
                kept += 1
        return total / max(kept, 1)
    raise ValueError(method)
