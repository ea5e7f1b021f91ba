"""Sampling engines behind one call: prompt token ids and a seed each -> completion token ids.

Training and evaluation use the same interface. `HFEngine` (opsd/rollout/hf.py) samples with transformers,
`VLLMEngine` (opsd/rollout/vllm.py) with vLLM. Neither ever sees text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from opsd.options import AT_LEAST_ONE, FRACTION, NOT_NEGATIVE, PROPER_SHARE, Range, check_options, option

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw from the next-token distribution.

    Filters apply in vLLM's order: temperature, min_p, top_k, top_p.
    """

    temperature: float = option(help="divides the logits; 0 takes the likeliest token", range=NOT_NEGATIVE)
    top_p: float = option(1.0, "nucleus mass; 1 = off", range=PROPER_SHARE)
    top_k: int = option(0, "likeliest tokens that stay; 0 = off", range=NOT_NEGATIVE)
    min_p: float = option(
        0.0, "smallest probability relative to the likeliest token's; 0 = off", range=FRACTION
    )
    presence_penalty: float = option(
        0.0, "subtracted from the logit of every token already generated", range=Range(-2, 2)
    )
    max_new_tokens: int = option(
        help="a completion that reaches it without end-of-sequence is truncated", range=AT_LEAST_ONE
    )


def check_sampling(sampling: Sampling) -> None:
    """Raise UsageError for the first sampling parameter outside its range."""
    check_options(Sampling, vars(sampling))


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
