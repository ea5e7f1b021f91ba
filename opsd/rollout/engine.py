"""The interface of a sampler: prompt token ids and a seed per request in, completion token ids out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from opsd.errors import UsageError
from opsd.options import AT_LEAST_ONE, FRACTION, NOT_NEGATIVE, PROPER_SHARE, Range, check_options, option

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw the next token; the filters apply in vLLM's order: temperature, min_p, top_k, top_p."""

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


def check_requests(
    requests: Sequence[Request], sampling: Sampling, *, vocabulary: int, max_model_len: int | None = None
) -> None:
    """Check the sampling parameters and every prompt; `max_model_len` limits prompt + completion, in tokens.

    Raises:
        UsageError: a parameter is out of range; a prompt is empty, too long or outside the vocabulary.
    """
    check_sampling(sampling)
    for index, request in enumerate(requests):
        length = len(request.prompt_ids)
        if length == 0:
            raise UsageError(f"request {index} has an empty prompt; give it at least one token")
        outside = [token for token in request.prompt_ids if not 0 <= token < vocabulary]
        if outside:
            raise UsageError(
                f"request {index} has token id {outside[0]}, outside 0..{vocabulary - 1}; use its tokenizer"
            )
        needed = length + sampling.max_new_tokens
        if max_model_len is not None and needed > max_model_len:
            raise UsageError(
                f"request {index} has {length} prompt tokens and up to {sampling.max_new_tokens} new ones, "
                f"but max_model_len is {max_model_len}; raise it to {needed} or lower max_new_tokens"
            )


@dataclass(frozen=True)
class Completion:
    """The completion of one request."""

    token_ids: list[int]  # without the prompt; including the end-of-sequence token that ended it
    truncated: bool  # whether it was cut at max_new_tokens
    logprobs: list[float] | None = None  # nats, before temperature and filters; None if not wanted


class Engine(Protocol):
    """A sampler."""

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        want_logprobs: bool = False,
        on_finish: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Complete every request, in order. Call `on_finish(index, completion)` as each one finishes.

        Raises:
            UsageError: as `check_requests`.
            ArtefactError: the engine died or its memory is exhausted; `on_finish` received what finished.
        """
        ...

    def push_weights(self, model: PeftModel, *, measure: bool = False) -> dict[str, float]:
        """Make the next `generate` sample from `model` as it is now (base + adapter).

        With `measure`, return what of the adapter's update a push of merged weights keeps:
        `rollout/update_kept` (projection, 1 = all) and `rollout/update_changed_share` (of the entries).
        """
        ...

    def close(self) -> None:
        """Release the engine's memory; the engine is unusable afterwards."""
