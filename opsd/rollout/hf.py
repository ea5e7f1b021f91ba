"""Sampling with transformers: `HFEngine`, the engine that needs nothing but the model itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig

from opsd.errors import ArtefactError, UsageError
from opsd.models import merge_end_ids
from opsd.rollout.engine import Completion, Request, Sampling, check_sampling
from opsd.rollout.seeded_sampling import processors

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextlib.contextmanager
def generation_state(model: PreTrainedModel) -> Iterator[None]:
    """The model ready to generate with its KV cache; every flag touched is as before afterwards.

    Training leaves dropout on, gradient checkpointing on (which turns the cache off) and `use_cache` false.
    The model's own generation defaults (a hub model may ask for top_k 20 or a repetition penalty) are set
    aside: the caller's sampling parameters are the whole truth.
    """
    modes = [(module, module.training) for module in model.modules()]
    checkpointing = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    use_cache = getattr(model.config, "use_cache", None)
    defaults = model.generation_config
    try:
        model.eval()
        for module in checkpointing:
            module.gradient_checkpointing = False
        model.config.use_cache = True
        model.generation_config = GenerationConfig()
        yield
    finally:
        model.generation_config = defaults
        model.config.use_cache = use_cache
        for module in checkpointing:
            module.gradient_checkpointing = True
        for module, training in modes:
            module.training = training


def _plain_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside DDP and PEFT wrappers. LoRA layers sit in it, so it samples adapted."""
    model = model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
    if not hasattr(model, "get_base_model"):
        return model
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise UsageError("prompt-learning adapters are not supported; use a LoRA adapter")
    return model.get_base_model()


class HFEngine:
    """`Engine` over a transformers model, or a PeftModel whose adapter then takes part as it stands.

    Args:
        model: a causal LM, a PeftModel over one, or either inside DistributedDataParallel. It is not copied.
        tokenizer: gives the end-of-sequence and padding ids; no text passes through it.
        batch_size: how many completions are generated at once. Lower it when memory runs out.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 32,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"the engine's batch size is {batch_size}, but must be at least 1")
        self.model = _plain_model(model)
        self.batch_size = batch_size
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        self.end_ids = merge_end_ids(configured, tokenizer.eos_token_id)
        pad = tokenizer.pad_token_id
        self.pad_id = pad if pad is not None else (self.end_ids[0] if self.end_ids else 0)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        want_logprobs: bool = False,
        on_finish: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Complete every request; see `Engine.generate`. `on_finish` fires when the request's batch is done.

        Raises:
            UsageError: an empty prompt, an id outside the vocabulary, or a sampling parameter out of range.
            ArtefactError: the device's memory is exhausted; the message says what to lower.
        """
        check_sampling(sampling)
        self._check_prompts(requests)
        # Neighbours in length share a batch, so little is padded; the longest go first, so that a batch that
        # does not fit in memory says so at once.
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt_ids))
        results: dict[int, Completion] = {}
        with torch.no_grad(), generation_state(self.model):
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                completions = self._generate_batch(
                    [requests[index] for index in batch], sampling, want_logprobs
                )
                for index, completion in zip(batch, completions, strict=True):
                    results[index] = completion
                    if on_finish is not None:
                        on_finish(index, completion)
        return [results[index] for index in range(len(requests))]

    def push_weights(self, model: PeftModel) -> None:
        """Nothing to do: the engine samples from the very model that is trained, not from a copy of it."""

    def close(self) -> None:
        """Drop the reference to the model; its memory is free once nobody else holds it."""
        del self.model

    def _check_prompts(self, requests: Sequence[Request]) -> None:
        vocabulary = self.model.get_input_embeddings().num_embeddings
        for index, request in enumerate(requests):
            if len(request.prompt_ids) == 0:
                raise UsageError(
                    f"request {index} has an empty prompt; every prompt needs at least one token"
                )
            if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < vocabulary:
                raise UsageError(
                    f"request {index} holds a token id outside 0..{vocabulary - 1}; "
                    "the tokenizer does not belong to this model"
                )

    def _generate_batch(
        self, batch: Sequence[Request], sampling: Sampling, want_logprobs: bool
    ) -> list[Completion]:
        device = self.model.get_input_embeddings().weight.device
        width = max(len(request.prompt_ids) for request in batch)
        input_ids = torch.full((len(batch), width), self.pad_id)
        mask = torch.zeros_like(input_ids)
        for row, request in enumerate(batch):
            # Left padding: the last prompt token stands beside the first completion token in every row.
            input_ids[row, width - len(request.prompt_ids) :] = torch.as_tensor(request.prompt_ids)
            mask[row, width - len(request.prompt_ids) :] = 1
        chain, choice = processors(
            sampling,
            [request.seed for request in batch],
            prompt_length=width,
            device=device,
            want_logprobs=want_logprobs,
        )
        try:
            output = self.model.generate(
                input_ids.to(device),
                attention_mask=mask.to(device),
                generation_config=GenerationConfig(
                    do_sample=False,
                    num_beams=1,
                    use_cache=True,
                    max_new_tokens=sampling.max_new_tokens,
                    eos_token_id=self.end_ids or None,
                    pad_token_id=self.pad_id,
                ),
                logits_processor=chain,
            )
        except torch.OutOfMemoryError as error:
            raise ArtefactError(
                f"out of memory while generating {len(batch)} completions of up to "
                f"{sampling.max_new_tokens} tokens at once; lower the engine's batch size "
                f"(now {self.batch_size}) or the number of new tokens"
            ) from error
        logprobs = torch.stack(choice.logprobs, dim=1).tolist() if want_logprobs else None
        return [
            self._completion(row, sampling, logprobs[index] if logprobs is not None else None)
            for index, row in enumerate(output[:, width:].tolist())
        ]

    def _completion(self, row: list[int], sampling: Sampling, logprobs: list[float] | None) -> Completion:
        """Cut `row` behind its first end-of-sequence token; without one it was stopped by the limit."""
        ends = [index for index, token in enumerate(row) if token in self.end_ids]
        length = ends[0] + 1 if ends else min(len(row), sampling.max_new_tokens)
        return Completion(
            token_ids=row[:length],
            truncated=not ends,
            logprobs=logprobs[:length] if logprobs is not None else None,
        )
