"""Sample with transformers: `HFEngine`, which needs nothing but the model itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from opsd.errors import ArtefactError
from opsd.models import merge_end_ids
from opsd.rollout.engine import Completion, Request, Sampling, check_requests
from opsd.rollout.seeded_sampling import SeededSampler

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextlib.contextmanager
def generation_state(model: Any) -> Iterator[None]:
    """Turn dropout and gradient checkpointing off, and restore every module's mode afterwards.

    The model's own generation defaults (a hub model may ask for top_k 20 or a repetition penalty) do not
    apply: the caller's sampling parameters alone do.
    """
    training = [(module, module.training) for module in model.modules()]
    defaults = model.generation_config
    try:
        model.eval()
        model.generation_config = GenerationConfig()
        yield
    finally:
        model.generation_config = defaults
        for module, mode in training:
            module.training = mode


class HFEngine:
    """`Engine` over a transformers model, or over a PeftModel with its adapter.

    Args:
        model: a causal LM, or a PeftModel over one. It is not copied.
        tokenizer: gives the end-of-sequence and padding ids; it handles no text.
        batch_size: how many completions are generated at once. Lower it when memory runs out.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 32
    ) -> None:
        # PEFT's LoRA layers are inside the transformers model, whose type lacks the generate method.
        self.model: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
        self.batch_size = batch_size
        own: Any = tokenizer  # its ids are typed as anything
        self.end_ids = merge_end_ids(
            getattr(self.model.generation_config, "eos_token_id", None), own.eos_token_id
        )
        self.pad_id: int = own.pad_token_id if own.pad_token_id is not None else (*self.end_ids, 0)[0]

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        want_logprobs: bool = False,
        on_finish: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """See `Engine.generate`; `on_finish` is called when the request's batch is done."""
        check_requests(requests, sampling, vocabulary=self.model.get_input_embeddings().num_embeddings)
        # Similar lengths need little padding; with the longest first, memory runs out at once or not at all.
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt_ids))
        results: dict[int, Completion] = {}
        with torch.no_grad(), generation_state(self.model):
            for start in range(0, len(order), self.batch_size):
                indices = order[start : start + self.batch_size]
                batch = [requests[index] for index in indices]
                completions = self._generate_batch(batch, sampling, want_logprobs)
                for index, completion in zip(indices, completions, strict=True):
                    results[index] = completion
                    if on_finish is not None:
                        on_finish(index, completion)
        return [results[index] for index in range(len(requests))]

    def push_weights(self, model: PeftModel, *, measure: bool = False) -> dict[str, float]:
        """Do nothing: the engine samples from the model that is trained, not from a copy of it."""
        return {}

    def close(self) -> None:
        """Drop the reference to the model."""
        del self.model

    def _generate_batch(
        self, batch: Sequence[Request], sampling: Sampling, want_logprobs: bool
    ) -> list[Completion]:
        device = self.model.get_input_embeddings().weight.device
        width = max(len(request.prompt_ids) for request in batch)
        input_ids = torch.full((len(batch), width), self.pad_id)
        mask = torch.zeros_like(input_ids)
        for row, request in enumerate(batch):
            # Left padding: the last prompt token is beside the first completion token in every row.
            input_ids[row, width - len(request.prompt_ids) :] = torch.as_tensor(request.prompt_ids)
            mask[row, width - len(request.prompt_ids) :] = 1
        seeds = [request.seed for request in batch]
        sampler = SeededSampler(sampling, seeds, prompt_length=width, want_logprobs=want_logprobs)
        try:
            output = self.model.generate(
                input_ids.to(device),
                attention_mask=mask.to(device),
                logits_processor=LogitsProcessorList([sampler]),
                generation_config=GenerationConfig(
                    use_cache=True,
                    max_new_tokens=sampling.max_new_tokens,
                    eos_token_id=self.end_ids or None,
                    pad_token_id=self.pad_id,
                ),
            )
        except torch.OutOfMemoryError as error:
            raise ArtefactError(
                f"{len(batch)} completions of up to {sampling.max_new_tokens} tokens at once do not fit into "
                f"memory; lower the engine's batch size (now {self.batch_size}) or the number of new tokens"
            ) from error
        logprobs = torch.stack(sampler.logprobs, dim=1).tolist() if want_logprobs else [None] * len(batch)
        completions = []
        for tokens, values in zip(output[:, width:].tolist(), logprobs, strict=True):
            ends = [index for index, token in enumerate(tokens) if token in self.end_ids]
            length = ends[0] + 1 if ends else len(tokens)
            completions.append(Completion(tokens[:length], not ends, values and values[:length]))
        return completions
