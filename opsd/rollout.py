"""Sampling engines behind one call: prompt token ids and a seed each -> completion token ids.

Training and evaluation use the same interface. `HFEngine` (opsd/rollout_hf.py) samples with transformers,
`VLLMEngine` (opsd/rollout_vllm.py) with vLLM. Neither ever sees text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from opsd.errors import UsageError

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw from the next-token distribution. Filters apply in vLLM's order: temperature, min_p, top_k,
    top_p.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: nucleus mass in (0, 1]; 1 = off.
        top_k: how many of the likeliest tokens stay; 0 = off.
        min_p: smallest probability relative to the likeliest token's that stays; 0 = off.
        presence_penalty: subtracted from the logit of every token already generated.
        max_new_tokens: a completion that reaches this many tokens without end-of-sequence is truncated.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    max_new_tokens: int


def check_sampling(sampling: Sampling) -> None:
    """Refuse sampling parameters outside their range.

    Raises:
        UsageError: names the parameter, its value and its range.
    """
    ranges = (
        ("temperature", sampling.temperature >= 0, "at least 0"),
        ("top_p", 0 < sampling.top_p <= 1, "in (0, 1]"),
        ("top_k", sampling.top_k >= 0, "at least 0 (0 = off)"),
        ("min_p", 0 <= sampling.min_p <= 1, "in [0, 1]"),
        ("presence_penalty", -2 <= sampling.presence_penalty <= 2, "in [-2, 2]"),
        ("max_new_tokens", sampling.max_new_tokens >= 1, "at least 1"),
    )
    for name, fits, wanted in ranges:
        if not fits:
            raise UsageError(f"{name} is {getattr(sampling, name)}, but must be {wanted}")


@dataclass(frozen=True)
class Request:
    """One completion to draw. Equal prompt ids, seed, sampling and weights give the same completion."""

    prompt_ids: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Completion:
    """What one request gave.

    Attributes:
        token_ids: the completion's own tokens, its end-of-sequence token included when it ended by itself.
        truncated: True when it was cut at max_new_tokens.
        logprobs: the engine's own log-probability (nats, before temperature and filters) of each token, where
        asked.
    """

    token_ids: list[int]
    truncated: bool
    logprobs: list[float] | None = None


class Engine(Protocol):
    """A sampler. `close` releases its memory; the engine is unusable afterwards."""

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        want_logprobs: bool = False,
        on_finish: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Complete every request, in order. `on_finish(index, completion)` is called as each one finishes."""

    def push_weights(self, model: PeftModel) -> None:
        """Make the next `generate` sample from `model` as it is now (base + adapter)."""

    def close(self) -> None:
        """Release the engine's memory."""
