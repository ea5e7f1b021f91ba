"""Per-token statistics of student and teacher from hidden states, in chunks of positions.

`dense_statistics` is the definition: whole [N, V] tensors and autograd. With a vocabulary of 150,000 entries
these tensors are the memory limit of a run, so `token_statistics` computes the same in chunks: it projects a
chunk of positions with the LM head, takes its statistics, and computes the gradient of the per-token terms
with respect to the student's hidden states at once. A token's term depends on that token's hidden state
alone, so the backward pass needs [N, H] only, and any mask, weight or reduction can be chosen afterwards.

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

# Size of one role's logits of a chunk; both roles' logits are in memory at once.
CHUNK_BYTES_CPU = 22 * 2**20
CHUNK_BYTES_CUDA = 128 * 2**20
# Entries of a column in `_largest`.
COLUMN_ENTRIES = 64
# On a CPU elementwise operations run on blocks of rows of this size, which stay in the cache.
BLOCK_BYTES_CPU = 5 * 2**19

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
        student: [N, H] hidden states that predict the sampled tokens, or, without `head`, [N, V] raw logits.
        teacher: the same for the teacher; it receives no gradient.
        token_ids: [N] sampled tokens.
        config: temperature and the statistics to compute.
        term: per-token function of the statistics, [n] fields -> [n], called once per chunk; it must treat
            positions independently. It is differentiated with respect to the fields in `DIFFERENTIABLE`; the
            other fields are constants.
        head: the LM head both sides share.

    Returns:
        TokenStats with [N] fields, `term` differentiable with respect to `student`.

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
    outputs = _ChunkedStatistics.apply(student, teacher, token_ids, config, term, head)
    names = _field_names(config, term)
    return TokenStats(**{"term": None, **dict(zip(names, outputs, strict=True))})


def dense_statistics(
    student: Tensor, teacher: Tensor, token_ids: Tensor, *, config: StatsConfig, term: TermFunction | None
) -> TokenStats:
    """The definition of `token_statistics`: [N, V] raw logits whole, the gradient of `term` by autograd."""
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
        values["divergence"] = entries.sum(-1).detach()
        values["clipped_divergence"] = entries.clamp(max=clip).sum(-1)
        values["clipped_entries"] = (entries > clip).sum(-1).to(dtype)
    if config.top_k is not None:
        top_log, top_ids = teacher_log.topk(config.top_k)
        top_log = top_log.log_softmax(-1)
        values["topk_divergence"] = (top_log.exp() * (top_log - student_log.gather(1, top_ids))).sum(-1)
    result = term(TokenStats(term=None, **values)) if term is not None else None
    return TokenStats(term=result, **{name: value.detach() for name, value in values.items()})


def _field_names(config: StatsConfig, term: TermFunction | None) -> list[str]:
    names = [] if term is None else ["term"]
    names += ["student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy"]
    if config.divergence_clip is not None:
        names += ["divergence", "clipped_divergence", "clipped_entries"]
    if config.top_k is not None:
        names += ["topk_divergence"]
    return names


def _rows_per(buffer_bytes: int, vocabulary: int, itemsize: int) -> int:
    return max(1, buffer_bytes // (vocabulary * itemsize))


class _Workspace:
    """The buffers of one call. On a CPU allocating them costs more time than the arithmetic in them.

    Attributes:
        logits: [2C, V], the student's rows and then the teacher's.
        student_log, teacher_log, product: [n, V] for a block of n rows.
    """

    def __init__(self, chunk: int, block: int, vocabulary: int, dtype: torch.dtype, device: torch.device):
        self.logits = torch.empty(2 * chunk, vocabulary, dtype=dtype, device=device)
        self.student_log, self.teacher_log, self.product = (
            torch.empty(block, vocabulary, dtype=dtype, device=device) for _ in range(3)
        )

    def log_softmax(self, logits: Tensor, out: Tensor) -> Tensor:
        """[n, V] -> [n, V] in `out`, without −inf."""
        # A logit of −inf has probability 0; with a finite logarithm its 0 · log 0 is 0 in the sums, not NaN.
        lowest = torch.finfo(logits.dtype).min
        return torch.log_softmax(logits, dim=-1, out=out[: len(logits)]).clamp_(min=lowest)

    def entropy(self, probs: Tensor, logs: Tensor) -> Tensor:
        """−Σ_v p log p, [n, V] twice -> [n] nats."""
        return -torch.mul(probs, logs, out=self.product[: len(probs)]).sum(-1)


class _ChunkedStatistics(torch.autograd.Function):
    """Forward: statistics and ∂term/∂student by chunks. Backward: scale its rows by the upstream gradient."""

    @staticmethod
    def forward(ctx, student, teacher, token_ids, config, term, head):
        positions = student.shape[0]
        names = _field_names(config, term)
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        fields = {name: torch.empty(positions, dtype=dtype, device=student.device) for name in names}
        wants_gradient = term is not None and ctx.needs_input_grad[0]
        gradient = torch.empty(student.shape, dtype=dtype, device=student.device) if wants_gradient else None
        vocabulary = head.weight.shape[0] if head is not None else student.shape[1]
        on_cpu = student.device.type == "cpu"
        chunk = config.chunk_positions or _rows_per(
            CHUNK_BYTES_CPU if on_cpu else CHUNK_BYTES_CUDA, vocabulary, dtype.itemsize
        )
        block = min(chunk, _rows_per(BLOCK_BYTES_CPU, vocabulary, dtype.itemsize)) if on_cpu else chunk
        chunk, block = min(chunk, positions), min(block, positions)
        space = _Workspace(chunk, block, vocabulary, dtype, student.device)
        for start in range(0, positions, max(chunk, 1)):
            span = slice(start, min(start + chunk, positions))
            student_logits, teacher_logits = _project(head, student[span], teacher[span], space.logits)
            for low in range(0, student_logits.shape[0], block):
                rows = slice(low, low + block)
                stats = _block_statistics(
                    student_logits[rows],
                    teacher_logits[rows],
                    token_ids[span][rows],
                    config,
                    term,
                    wants_gradient,
                    head,
                    space,
                )
                for name in names:
                    fields[name][span][rows] = getattr(stats, name)
            if gradient is not None:
                gradient[span] = _back_project(head, student_logits, dtype)
        ctx.save_for_backward(gradient)
        outputs = tuple(fields[name] for name in names)
        ctx.mark_non_differentiable(*outputs[1 if term is not None else 0 :])
        ctx.student_dtype = student.dtype
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        (gradient,) = ctx.saved_tensors
        if gradient is None:
            return None, None, None, None, None, None
        scaled = gradient * upstream[0].unsqueeze(1)
        return scaled.to(ctx.student_dtype), None, None, None, None, None


def _project(head: Head | None, student: Tensor, teacher: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Twice [C, H] -> student's and teacher's raw logits, [C, V] each, in the first 2C rows of `buffer`.

    One product with the head for both roles reads its weight once.
    """
    hidden = torch.cat([student.detach(), teacher.to(student.dtype)])
    logits = buffer[: hidden.shape[0]]
    if head is None:
        logits.copy_(hidden)
    elif head.weight.dtype == buffer.dtype:
        head.logits(hidden, out=logits)
    else:
        logits.copy_(head.logits(hidden))
    return logits[: student.shape[0]], logits[student.shape[0] :]


def _back_project(head: Head | None, grad_logits: Tensor, dtype: torch.dtype) -> Tensor:
    """[C, V] gradient with respect to raw logits -> [C, H] with respect to hidden states."""
    if head is None:
        return grad_logits
    return head.back_project(grad_logits).to(dtype)


def _block_statistics(
    student_logits, teacher_logits, token_ids, config, term, wants_gradient, head, space: _Workspace
):
    """Compute the statistics of a block; ∂term/∂(raw logits), if wanted, overwrites `student_logits`.

    Both [n, V] logits are overwritten; every other tensor of that size is a buffer of `space`.
    """
    slope = head.softcap_slope(student_logits) if head is not None and wants_gradient else None
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
        kept_mass = _divergences(
            values, student_log, teacher_log, teacher_probs, config.divergence_clip, space.product
        )
    if term is None:
        return TokenStats(term=None, **values)
    values["term"], slopes = _term_and_slopes(term, values, wants_gradient)
    if wants_gradient:
        _write_gradient(student_probs, teacher_probs, kept_mass, picked, top_ids, top_probs, slopes)
        student_probs.mul_(inverse_temperature)
        if slope is not None:
            student_probs.mul_(slope)
    return TokenStats(**values)


def _largest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of [n, V] and their indices, [n, k] each, largest first.

    On a CPU `topk` copies a whole row into pairs of value and index. Here a row is divided into columns of
    every C-th entry (the few entries that remain are kept aside). The k largest are in the k columns with the
    largest maxima or among the remaining entries, so `topk` runs on these alone.
    """
    columns = rows.shape[1] // COLUMN_ENTRIES
    if rows.device.type != "cpu" or columns < 4 * k:
        return rows.topk(k, dim=-1)
    whole = rows[:, : columns * COLUMN_ENTRIES].unflatten(1, (COLUMN_ENTRIES, columns))
    best = whole.amax(1).topk(k, dim=-1).indices.unsqueeze(-1)
    places = (best + columns * torch.arange(COLUMN_ENTRIES)).flatten(1)
    rest = torch.arange(columns * COLUMN_ENTRIES, rows.shape[1]).expand(rows.shape[0], -1)
    places = torch.cat([places, rest], dim=1)
    values, chosen = rows.gather(1, places).topk(k, dim=-1)
    return values, places.gather(1, chosen)


def _divergences(values, student_log, teacher_log, teacher_probs, clip, scratch) -> Tensor:
    """Write the forward KL, clipped and not; zero clipped entries of `teacher_probs`; return its sums [n].

    A clipped entry has no gradient; one that equals the clip has, as in torch.clamp.
    """
    entries = torch.sub(teacher_log, student_log, out=teacher_log).mul_(teacher_probs)
    values["divergence"] = entries.sum(-1)
    if clip > 0:
        # 1 and 0 in the dtype of the entries: their count is exact below 2^24 and needs no integer copy.
        cut = torch.gt(entries, clip, out=scratch[: len(entries)])
        values["clipped_entries"] = cut.sum(-1)
        values["clipped_divergence"] = entries.clamp_(max=clip).sum(-1)
        teacher_probs.addcmul_(teacher_probs, cut, value=-1.0)
        return teacher_probs.sum(-1)
    values["clipped_entries"] = torch.zeros_like(values["divergence"])
    values["clipped_divergence"] = values["divergence"].clone()
    return torch.ones_like(values["divergence"])


DIFFERENTIABLE = ("student_logprob", "clipped_divergence", "topk_divergence")


def _term_and_slopes(term: TermFunction, values: dict[str, Tensor], wants_gradient: bool):
    """The term [n] and its derivative with respect to each differentiable statistic, [n] each."""
    if not wants_gradient:
        return term(TokenStats(term=None, **values)), {}
    with torch.enable_grad():
        leaves = {name: values[name].clone().requires_grad_() for name in DIFFERENTIABLE if name in values}
        result = term(TokenStats(term=None, **{**values, **leaves}))
        slopes = torch.autograd.grad(result.sum(), list(leaves.values()), allow_unused=True)
    return result.detach(), {n: s for n, s in zip(leaves, slopes, strict=True) if s is not None}


def _write_gradient(student_probs, teacher_probs, kept_mass, picked, top_ids, top_probs, slopes) -> None:
    """Write ∂term/∂(tempered logits) into `student_probs`, from the slopes of the differentiable statistics.

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
    hidden: Tensor,
    token_ids: Tensor,
    *,
    head: Head,
    temperature: float,
    top_k: int,
    top_p: float,
    chunk_positions: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compare sampled tokens with the distribution of the trainer's own logits.

    The sampler's support: the `top_k` likeliest tokens (0 = all), then the smallest set of them whose mass
    reaches `top_p`. A large share outside it means that the sampler has other weights or other rules.

    Args:
        hidden: [N, H] hidden states that predicted the tokens.
        token_ids: [N].

    Returns:
        (outside [N] bool, logprob [N] float32 in nats at temperature 1).
    """
    chunk = chunk_positions or _rows_per(CHUNK_BYTES_CPU, head.weight.shape[0], 4)
    outside = torch.zeros(len(token_ids), dtype=torch.bool, device=hidden.device)
    logprob = torch.empty(len(token_ids), device=hidden.device)
    for start in range(0, len(token_ids), chunk):
        span = slice(start, start + chunk)
        logits = head.logits(hidden[span]).float()
        chosen = logits.gather(1, token_ids[span].unsqueeze(1))
        logprob[span] = chosen.squeeze(1) - logits.logsumexp(-1)
        support = logits.topk(min(top_k, logits.shape[1]) if top_k else logits.shape[1], dim=-1).values
        masses = torch.softmax(support / temperature, dim=-1)
        # Tokens strictly likelier than the chosen one; the nucleus still takes the token that crosses top_p.
        before = masses.masked_fill(support <= chosen, 0.0).sum(-1)
        outside[span] = (chosen.squeeze(1) < support[:, -1]) | (before >= top_p)
    return outside, logprob
