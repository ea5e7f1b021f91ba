"""Per-token statistics of student and teacher from hidden states, in chunks of positions.

`dense_statistics` is the definition, by autograd on [N, V] tensors. With a vocabulary of 150,000 entries they
do not fit in memory, so `token_statistics` computes the same in chunks: it projects a chunk of positions with
the LM head, computes its statistics, and at once the gradient of the per-token terms with respect to the
student's hidden states. A token's term depends on that token's hidden state alone, so the backward pass needs
[N, H] only, and any mask, weight or reduction can be chosen afterwards.

Shapes: N positions (completion tokens of all sequences, flat), H hidden, V vocabulary, C positions of a
chunk. All quantities are at the distillation temperature T, in nats, in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd.head import Head
from opsd.objectives import StatsConfig, TokenStats
from opsd.rollout.engine import Sampling

# Size of one role's logits of a chunk; both roles' logits are in memory at once.
CHUNK_BYTES_CPU = 22 * 2**20
CHUNK_BYTES_CUDA = 128 * 2**20
# On a CPU elementwise operations run on blocks of rows of this size, which stay in the cache.
BLOCK_BYTES_CPU = 5 * 2**19
# Entries of a column in `_largest`.
COLUMN_ENTRIES = 64
# The statistics through which a term's gradient reaches the student.
DIFFERENTIABLE = ("student_logprob", "clipped_divergence", "topk_divergence")

TermFunction = Callable[[TokenStats], Tensor]


def token_statistics(
    student: Tensor,
    teacher: Tensor,
    token_ids: Tensor,
    *,
    config: StatsConfig,
    term: TermFunction | None = None,
    head: Head | None = None,
) -> TokenStats:
    """Compute the statistics of N positions; the gradient of `term` reaches `student` alone.

    Args:
        student, teacher: [N, H] hidden states that predict the sampled tokens; without `head` [N, V] logits.
        token_ids: [N] sampled tokens.
        term: per-token function of the statistics, [n] fields -> [n], that treats positions independently. It
            is differentiated with respect to the fields in `DIFFERENTIABLE`; the others are constants.
        head: the LM head that both roles share.

    Raises:
        ValueError: shapes disagree, or `top_k` exceeds the vocabulary.
    """
    if student.shape != teacher.shape or student.ndim != 2 or token_ids.shape != student.shape[:1]:
        raise ValueError(
            f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)} and token_ids "
            f"{tuple(token_ids.shape)} must be [N, H], [N, H] and [N]"
        )
    vocabulary = head.weight.shape[0] if head is not None else student.shape[1]
    if config.top_k is not None and config.top_k > vocabulary:
        raise ValueError(f"top_k={config.top_k} exceeds the vocabulary of {vocabulary} entries")
    differentiate = term is not None and student.requires_grad
    values, gradient = _chunked_statistics(
        student.detach(), teacher, token_ids, config=config, term=term, head=head, differentiate=differentiate
    )
    if gradient is not None:
        values["term"] = _GradientOfTerm.apply(student, values["term"], gradient)
    return TokenStats(**values)


def dense_statistics(
    student: Tensor, teacher: Tensor, token_ids: Tensor, *, config: StatsConfig, term: TermFunction | None
) -> TokenStats:
    """Define `token_statistics`: from [N, V] raw logits, the gradient of `term` by autograd."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    student_log, teacher_log = (
        (logits.to(dtype) / config.temperature).log_softmax(-1) for logits in (student, teacher.detach())
    )
    picked, teacher_probs = token_ids.unsqueeze(1), teacher_log.exp()
    values = {
        "student_logprob": student_log.gather(1, picked).squeeze(1),
        "teacher_logprob": teacher_log.gather(1, picked).squeeze(1),
        "student_entropy": -(student_log.exp() * student_log).sum(-1).detach(),
        "teacher_entropy": -(teacher_probs * teacher_log).sum(-1),
    }
    if config.divergence_clip is not None:
        clip = config.divergence_clip or math.inf
        entries = teacher_probs * (teacher_log - student_log)
        total = entries.sum(-1)
        values["divergence"] = total.detach()
        if config.clip_scope == "token":
            values["clipped_divergence"] = total.clamp(max=clip)
            cut = (total > clip).unsqueeze(1).expand_as(entries)
        else:
            values["clipped_divergence"] = entries.clamp(max=clip).sum(-1)
            cut = entries > clip
        values["clipped_entries"] = cut.sum(-1).to(dtype)
        values["clipped_teacher_mass"] = (teacher_probs * cut).sum(-1)
    if config.top_k is not None:
        top_log, top_ids = teacher_log.topk(config.top_k)
        top_log = top_log.log_softmax(-1)
        values["topk_divergence"] = (top_log.exp() * (top_log - student_log.gather(1, top_ids))).sum(-1)
    terms = {"term": term(TokenStats(**values))} if term is not None else {}
    return TokenStats(**{name: value.detach() for name, value in values.items()}, **terms)


class _Workspace:
    """The buffers of one call. On a CPU allocating them costs more time than the arithmetic in them."""

    def __init__(self, chunk: int, block: int, vocabulary: int, dtype: torch.dtype, device: torch.device):
        def empty(rows: int) -> Tensor:
            return torch.empty(rows, vocabulary, dtype=dtype, device=device)

        self.logits = empty(2 * chunk)  # the student's rows, then the teacher's
        self.student_log, self.teacher_log, self.product = empty(block), empty(block), empty(block)

    def log_softmax(self, logits: Tensor, out: Tensor) -> Tensor:
        """Write log-softmax of [n, V] logits, without −inf, to the first rows of `out` and return them."""
        # A logit of −inf has probability 0; with a finite logarithm its 0 · log 0 is 0 in the sums, not NaN.
        lowest = torch.finfo(logits.dtype).min
        return torch.log_softmax(logits, dim=-1, out=out[: len(logits)]).clamp_(min=lowest)

    def entropy(self, probs: Tensor, logs: Tensor) -> Tensor:
        """Return −Σ_v p log p, nats: twice [n, V] -> [n]."""
        return -torch.mul(probs, logs, out=self.product[: len(probs)]).sum(-1)


class _GradientOfTerm(torch.autograd.Function):
    """Attach to the term its gradient with respect to the student, which was formed beside it."""

    @staticmethod
    def forward(ctx, student, term, gradient):
        ctx.save_for_backward(gradient)
        ctx.student_dtype = student.dtype
        return term.view_as(term)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0].unsqueeze(1)).to(ctx.student_dtype), None, None


@torch.no_grad()
def _chunked_statistics(
    student: Tensor,
    teacher: Tensor,
    token_ids: Tensor,
    *,
    config: StatsConfig,
    term: TermFunction | None,
    head: Head | None,
    differentiate: bool,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return the statistics by name, [N] each, and, if wanted, ∂term/∂student, [N, H]."""
    positions, device = student.shape[0], student.device
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    gradient = torch.empty(student.shape, dtype=dtype, device=device) if differentiate else None
    vocabulary = head.weight.shape[0] if head is not None else student.shape[1]
    on_cpu, row_bytes = device.type == "cpu", vocabulary * dtype.itemsize
    automatic = (CHUNK_BYTES_CPU if on_cpu else CHUNK_BYTES_CUDA) // row_bytes
    chunk = max(min(config.chunk_positions or max(automatic, 1), positions), 1)
    block = min(chunk, max(BLOCK_BYTES_CPU // row_bytes, 1)) if on_cpu else chunk
    space = _Workspace(chunk, block, vocabulary, dtype, device)
    blocks = []
    # Without a position one empty block gives the names and the types of the statistics.
    for start in range(0, max(positions, 1), chunk):
        span = slice(start, start + chunk)
        student_logits, teacher_logits = _project(head, student[span], teacher[span], space.logits)
        for low in range(0, max(len(student_logits), 1), block):
            rows = slice(low, low + block)
            inputs = student_logits[rows], teacher_logits[rows], token_ids[span][rows]
            blocks.append(_block_statistics(*inputs, config, term, space, differentiate=differentiate))
        if gradient is not None:
            gradient[span] = student_logits if head is None else head.back_project(student_logits)
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}, gradient


def _project(head: Head | None, student: Tensor, teacher: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Project [C, H] of both roles to raw logits, [C, V] each, in `buffer`; the weight is read once."""
    hidden = torch.cat([student, teacher.to(student.dtype)])
    logits = buffer[: hidden.shape[0]]
    if head is None:
        logits.copy_(hidden)
    elif head.weight.dtype == buffer.dtype:
        head.logits(hidden, out=logits)
    else:
        logits.copy_(head.logits(hidden))
    return logits[: student.shape[0]], logits[student.shape[0] :]


def _block_statistics(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    config: StatsConfig,
    term: TermFunction | None,
    space: _Workspace,
    *,
    differentiate: bool,
) -> dict[str, Tensor]:
    """Compute the statistics of a block, [n] each; ∂term/∂(raw logits), if wanted, replaces `student_logits`.

    Both [n, V] logits are overwritten; every other tensor of that size is a buffer of `space`.
    """
    inverse_temperature = 1.0 / config.temperature
    student_log = space.log_softmax(student_logits.mul_(inverse_temperature), space.student_log)
    teacher_log = space.log_softmax(teacher_logits.mul_(inverse_temperature), space.teacher_log)
    student_probs = torch.exp(student_log, out=student_logits)
    teacher_probs = torch.exp(teacher_log, out=teacher_logits)
    picked = token_ids.unsqueeze(1)
    values = {
        "student_logprob": student_log.gather(1, picked).squeeze(1),
        "teacher_logprob": teacher_log.gather(1, picked).squeeze(1),
        "student_entropy": space.entropy(student_probs, student_log),
        "teacher_entropy": space.entropy(teacher_probs, teacher_log),
    }
    top_ids = top_probs = kept_mass = None
    if config.top_k is not None:
        top_log, top_ids = _largest(teacher_log, config.top_k)
        top_log = torch.log_softmax(top_log, dim=-1)  # renormalised over the teacher's own top k
        top_probs = top_log.exp()
        values["topk_divergence"] = (top_probs * (top_log - student_log.gather(1, top_ids))).sum(-1)
    if config.divergence_clip is not None:
        kept_mass = _divergences(values, student_log, teacher_log, teacher_probs, config, space.product)
    if term is None:
        return values
    values["term"], slopes = _term_and_slopes(term, values, differentiate)
    if differentiate:
        _write_gradient(student_probs, teacher_probs, kept_mass, picked, top_ids, top_probs, slopes)
        student_probs.mul_(inverse_temperature)
    return values


def _largest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest entries of each row of [n, V] and their indices, [n, k] each, largest first.

    On a CPU `topk` copies each row into pairs of value and index, so it runs here on the k columns (of every
    C-th entry) with the largest maxima and the few entries left over, which hold the k largest.
    """
    columns = rows.shape[1] // COLUMN_ENTRIES
    if rows.device.type != "cpu" or columns < 4 * k:
        return rows.topk(k, dim=-1)
    grid = rows[:, : columns * COLUMN_ENTRIES].unflatten(1, (COLUMN_ENTRIES, columns))
    best = grid.amax(1).topk(k, dim=-1).indices.unsqueeze(-1)
    places = (best + columns * torch.arange(COLUMN_ENTRIES)).flatten(1)
    rest = torch.arange(columns * COLUMN_ENTRIES, rows.shape[1]).expand(rows.shape[0], -1)
    places = torch.cat([places, rest], dim=1)
    values, chosen = rows.gather(1, places).topk(k, dim=-1)
    return values, places.gather(1, chosen)


def _divergences(values, student_log, teacher_log, teacher_probs, config: StatsConfig, scratch) -> Tensor:
    """Write the forward KL, clipped and not; zero p_T where the clip cuts and return its sums [n].

    A clipped entry has no gradient; one that equals the clip has, as in torch.clamp.
    """
    clip = config.divergence_clip
    entries = torch.sub(teacher_log, student_log, out=teacher_log).mul_(teacher_probs)
    divergence = values["divergence"] = entries.sum(-1)
    if not clip:
        values["clipped_divergence"] = divergence.clone()
        values["clipped_entries"] = values["clipped_teacher_mass"] = torch.zeros_like(divergence)
        return torch.ones_like(divergence)
    # 1 and 0 in the dtype of the entries: their count is exact below 2^24 and needs no integer copy.
    if config.clip_scope == "token":
        cut = (divergence > clip).to(entries.dtype).unsqueeze(1)
        values["clipped_entries"] = cut.squeeze(1) * entries.shape[1]
        values["clipped_divergence"] = divergence.clamp(max=clip)
    else:
        cut = torch.gt(entries, clip, out=scratch[: len(entries)])
        values["clipped_entries"] = cut.sum(-1)
        values["clipped_divergence"] = entries.clamp_(max=clip).sum(-1)
    teacher_probs.addcmul_(teacher_probs, cut, value=-1.0)
    kept = teacher_probs.sum(-1)
    values["clipped_teacher_mass"] = (1.0 - kept).clamp_(min=0.0)
    return kept


def _term_and_slopes(term: TermFunction, values: dict[str, Tensor], differentiate: bool):
    """Return the term [n] and its derivative with respect to each differentiable statistic, [n] each."""
    if not differentiate:
        return term(TokenStats(**values)), {}
    with torch.enable_grad():
        leaves = {name: values[name].clone().requires_grad_() for name in DIFFERENTIABLE if name in values}
        result = term(TokenStats(**values | leaves))
        slopes = torch.autograd.grad(result.sum(), list(leaves.values()), allow_unused=True)
    return result.detach(), {n: s for n, s in zip(leaves, slopes, strict=True) if s is not None}


def _write_gradient(student_probs, teacher_probs, kept_mass, picked, top_ids, top_probs, slopes) -> None:
    """Write ∂term/∂(logits / T) into `student_probs`, from the slopes of the differentiable statistics.

    ∂ log p_S(y) = δ_y − p_S;  ∂ Σ min(·, c) = p_S Σ_kept p_T − p_T·1[kept];  ∂ top-k KL = p_S − q.
    """
    scale = torch.zeros_like(student_probs[:, :1])
    if "student_logprob" in slopes:
        scale -= slopes["student_logprob"].unsqueeze(1)
    if "clipped_divergence" in slopes:
        scale += (slopes["clipped_divergence"] * kept_mass).unsqueeze(1)
    if "topk_divergence" in slopes:
        scale += slopes["topk_divergence"].unsqueeze(1)
    student_probs.mul_(scale)
    if "clipped_divergence" in slopes:
        student_probs.addcmul_(teacher_probs, slopes["clipped_divergence"].unsqueeze(1), value=-1.0)
    if "topk_divergence" in slopes:
        student_probs.scatter_add_(1, top_ids, top_probs * -slopes["topk_divergence"].unsqueeze(1))
    if "student_logprob" in slopes:
        student_probs.scatter_add_(1, picked, slopes["student_logprob"].unsqueeze(1))


@torch.no_grad()
def sampling_audit(
    hidden: Tensor, token_ids: Tensor, *, head: Head, sampling: Sampling, chunk_positions: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compare sampled tokens with the distribution of the trainer's own logits.

    The sampler's support: the `top_k` likeliest tokens (0 = all), then the smallest set of them whose mass
    reaches `top_p`. A large share outside it means that the sampler has other weights or other rules.

    Returns:
        (outside [N] bool, logprob [N] float32 in nats at temperature 1) of [N, H] states and [N] tokens.
    """
    top_k = sampling.top_k
    chunk = chunk_positions or max(CHUNK_BYTES_CPU // (head.weight.shape[0] * 4), 1)
    outside = torch.zeros(len(token_ids), dtype=torch.bool, device=hidden.device)
    logprob = torch.empty(len(token_ids), device=hidden.device)
    for start in range(0, len(token_ids), chunk):
        span = slice(start, start + chunk)
        logits = head.logits(hidden[span]).float()
        chosen = logits.gather(1, token_ids[span].unsqueeze(1))
        logprob[span] = chosen.squeeze(1) - logits.logsumexp(-1)
        support = logits.topk(min(top_k, logits.shape[1]) if top_k else logits.shape[1], dim=-1).values
        masses = torch.softmax(support / sampling.temperature, dim=-1)
        # Tokens strictly likelier than the chosen one; the nucleus still takes the token that crosses top_p.
        before = masses.masked_fill(support <= chosen, 0.0).sum(-1)
        outside[span] = (chosen.squeeze(1) < support[:, -1]) | (before >= sampling.top_p)
    return outside, logprob
