"""Drawing a completion's tokens from its own seeded stream, as logits processors for `generate`.

`generate` is told to be greedy, and the last processor leaves a single token possible: the one that the
request's own stream of uniform numbers picks from the filtered distribution by inverse transform. The global
random state is never read or moved, and a completion depends on its prompt, its seed, the sampling parameters
and the weights alone (batch mates change the logits by floating-point noise only).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from opsd.rollout.engine import Sampling


def uniform_streams(seeds: Sequence[int], length: int) -> torch.Tensor:
    """One stream of uniform numbers in [0, 1) per seed, from a generator of its own on the CPU.

    Returns:
        [B, length] float64. A longer stream of the same seed begins with the shorter one.
    """
    streams = torch.empty(len(seeds), length, dtype=torch.float64)
    for stream, seed in zip(streams, seeds, strict=True):
        stream.uniform_(generator=torch.Generator().manual_seed(seed))
    return streams


def inverse_transform(scores: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token whose slice of the cumulative distribution holds the uniform number.

    Args:
        scores: [B, V] filtered logits; −inf marks what is outside the support.
        uniforms: [B] in [0, 1), float64.

    Returns:
        [B] token ids, always inside the support. The sum runs in float64: in float32 the tail of a large
        vocabulary is lost in rounding.
    """
    mass = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
    total = mass[:, -1:].contiguous()
    # A token of probability 0 adds nothing to the sum, so neither search can stop at one.
    picked = torch.searchsorted(mass, uniforms.unsqueeze(-1) * total, right=True)
    last = torch.searchsorted(mass, total)
    return torch.minimum(picked, last).squeeze(-1)


class RawScores(LogitsProcessor):
    """First in the chain: keeps this step's logits [B, V] as the model gave them, for log-probabilities."""

    def __init__(self) -> None:
        self.scores: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.scores = scores
        return scores


class PresencePenalty(LogitsProcessor):
    """Subtracts a constant from the logit of every token that the completion (not the prompt) holds."""

    def __init__(self, penalty: float, *, prompt_length: int) -> None:
        self.penalty = penalty
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        present = torch.zeros_like(scores, dtype=torch.bool)
        present.scatter_(1, input_ids[:, self.prompt_length :], True)
        return torch.where(present, scores - self.penalty, scores)


class SeededChoice(LogitsProcessor):
    """Last in the chain: draws each row's token from its own stream and leaves only that token possible.

    Args:
        uniforms: [B, max_new_tokens] float64, or None to take the likeliest token.
        prompt_length: columns of `input_ids` that belong to the padded prompts.
        raw: where the unfiltered logits of this step are, if log-probabilities are wanted.
    """

    def __init__(
        self, uniforms: torch.Tensor | None, *, prompt_length: int, raw: RawScores | None = None
    ) -> None:
        self.uniforms = uniforms
        self.prompt_length = prompt_length
        self.raw = raw
        self.logprobs: list[torch.Tensor] = []  # one [B] float32 per step

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.uniforms is None:
            token = scores.argmax(dim=-1)
        else:
            token = inverse_transform(scores, self.uniforms[:, input_ids.shape[1] - self.prompt_length])
        token = token.unsqueeze(-1)
        if self.raw is not None and self.raw.scores is not None:
            logits = self.raw.scores.float()
            self.logprobs.append((logits.gather(1, token) - logits.logsumexp(-1, keepdim=True)).squeeze(-1))
        return torch.full_like(scores, float("-inf")).scatter_(1, token, 0.0)


def filters(sampling: Sampling) -> list[LogitsProcessor]:
    """The processors that turn logits into the distribution drawn from, in the order of `Sampling`."""
    chain: list[LogitsProcessor] = []
    if sampling.temperature == 0:
        return chain  # neither the temperature nor a filter can change which token is likeliest
    if sampling.temperature != 1:
        chain.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.min_p > 0:
        chain.append(MinPLogitsWarper(min_p=sampling.min_p))
    if sampling.top_k > 0:
        chain.append(TopKLogitsWarper(top_k=sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(top_p=sampling.top_p))
    return chain


def processors(
    sampling: Sampling,
    seeds: Sequence[int],
    *,
    prompt_length: int,
    device: torch.device,
    want_logprobs: bool = False,
) -> tuple[LogitsProcessorList, SeededChoice]:
    """The whole chain for one batch, and its last link, which collects the log-probabilities.

    Args:
        seeds: one per row.
        prompt_length: columns of the padded prompts.
    """
    raw = RawScores() if want_logprobs else None
    chain = LogitsProcessorList([raw] if raw is not None else [])
    if sampling.presence_penalty != 0:
        chain.append(PresencePenalty(sampling.presence_penalty, prompt_length=prompt_length))
    chain.extend(filters(sampling))
    drawn = sampling.temperature > 0
    uniforms = uniform_streams(seeds, sampling.max_new_tokens).to(device) if drawn else None
    choice = SeededChoice(uniforms, prompt_length=prompt_length, raw=raw)
    chain.append(choice)
    return chain, choice
