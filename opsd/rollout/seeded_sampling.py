"""Draw each completion's tokens from its own seeded stream, within transformers' `generate`.

`generate` is greedy, and the only logits processor leaves a single token possible: the one that the request's
stream of uniform numbers picks from the filtered distribution by inverse transform. The global random state
is neither read nor changed, and a completion depends on its prompt, its seed, the sampling parameters and the
weights alone (the rest of the batch changes the logits by floating-point noise only).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from opsd.rollout.engine import Sampling


def uniform_streams(seeds: Sequence[int], length: int) -> torch.Tensor:
    """Return a stream of uniform numbers in [0, 1) for each seed, from a CPU generator of its own.

    Returns:
        [B, length] float64. A longer stream of the same seed begins with the shorter one.
    """
    streams = torch.empty(len(seeds), length, dtype=torch.float64)
    for stream, seed in zip(streams, seeds, strict=True):
        stream.uniform_(generator=torch.Generator().manual_seed(seed))
    return streams


def inverse_transform(scores: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Return the token whose interval of the cumulative distribution holds the uniform number.

    Args:
        scores: [B, V] filtered logits; −inf outside the support.
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


class SeededSampler(LogitsProcessor):
    """Draw each row's token from the stream of its seed and leave only that token possible."""

    def __init__(
        self, sampling: Sampling, seeds: Sequence[int], *, prompt_length: int, want_logprobs: bool
    ) -> None:
        self.penalty = sampling.presence_penalty
        self.filters: list[LogitsProcessor] = []  # in the order of `Sampling`
        self.uniforms: torch.Tensor | None = None  # [B, max_new_tokens]
        if sampling.temperature > 0:  # at 0 no filter can change which token is likeliest
            self.uniforms = uniform_streams(seeds, sampling.max_new_tokens)
            if sampling.temperature != 1:
                self.filters.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.min_p > 0:
                self.filters.append(MinPLogitsWarper(min_p=sampling.min_p))
            if sampling.top_k > 0:
                self.filters.append(TopKLogitsWarper(top_k=sampling.top_k))
            if sampling.top_p < 1:
                self.filters.append(TopPLogitsWarper(top_p=sampling.top_p))
        self.prompt_length = prompt_length  # columns of `input_ids` that belong to the padded prompts
        self.want_logprobs = want_logprobs
        self.logprobs: list[torch.Tensor] = []  # a step's [B], in nats, under the model's own logits

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch returns Tensor, not FloatTensor
        self, input_ids: torch.Tensor, scores: torch.Tensor
    ) -> torch.Tensor:
        """Return [B, V] scores that are 0 at the drawn token and −inf elsewhere."""
        completion, filtered = input_ids[:, self.prompt_length :], scores
        if self.penalty != 0:
            present = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, completion, True)
            filtered = torch.where(present, scores - self.penalty, scores)
        for processor in self.filters:
            filtered = processor(input_ids, filtered)  # pyright: ignore[reportArgumentType]  # as above
        if self.uniforms is None:
            token = filtered.argmax(dim=-1)
        else:
            self.uniforms = self.uniforms.to(scores.device)
            token = inverse_transform(filtered, self.uniforms[:, completion.shape[1]])
        token = token.unsqueeze(-1)
        if self.want_logprobs:
            logits = scores.float()
            self.logprobs.append((logits.gather(1, token) - logits.logsumexp(-1, keepdim=True)).squeeze(-1))
        return torch.full_like(scores, float("-inf")).scatter_(1, token, 0.0)
