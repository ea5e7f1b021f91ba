"""Copy the trainer's weights into a running vLLM engine, completely or with an error.

vLLM rebuilds every one of its layers that receives a weight from what it receives: where only q_proj of a
fused q/k/v layer arrives, k and v become uninitialised memory, without an error. So a push sends every weight
but those of the vocabulary, and how much each of vLLM's layers received is compared with what it holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opsd.errors import UsageError
from opsd.merging import adapted_layers, adapted_names, merged_matrix

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor


class WeightPushError(RuntimeError):
    """The engine does not hold the weights that were to be pushed; it cannot sample until a push succeeds."""


@dataclass
class PushReport:
    """The outcome of one push: vLLM's layers that did not receive all of their weights, and an error."""

    incomplete: list[str] = field(default_factory=list)
    error: Exception | None = None

    def check(self) -> None:
        """Raise WeightPushError unless each layer received all of its weights."""
        if self.error is not None:
            raise WeightPushError(f"the weights could not be merged: {self.error}") from self.error
        if self.incomplete:
            count, some = len(self.incomplete), ", ".join(self.incomplete[:4])
            raise WeightPushError(f"{count} layers of the engine did not receive all their weights: {some}")


def check_pushable(model: PeftModel) -> None:
    """Check that the engine can hold the merged weights.

    Raises:
        UsageError: the adapter cannot be merged into single matrices, or is on an output layer that is tied
            to the embedding (the engine holds one matrix for both).
    """
    base: Any = model.get_base_model()
    if "lm_head.weight" in adapted_names(model) and base.config.get_text_config().tie_word_embeddings:
        raise UsageError(
            "the adapter targets lm_head, which this model ties to its embedding: the engine has one matrix "
            "for both; leave lm_head out of the target modules or sample with --rollout hf"
        )


def pushed_weights(model: PeftModel, report: PushReport) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, weight) of all merged and all other weights, in module order.

    The embedding and an output layer without an adapter are left out: the engine loaded them.

    An error while a matrix is merged ends the stream and is kept in `report.error`: raised here, it would
    leave vLLM in the middle of a reload.
    """
    base: Any = model.get_base_model()
    adapted = dict(adapted_layers(model))
    vocabulary = {id(base.get_input_embeddings().weight), id(base.get_output_embeddings().weight)}
    try:
        for parameter_name, parameter in base.named_parameters():
            name = parameter_name.replace(".base_layer.", ".")
            if name in adapted:
                yield name, merged_matrix(adapted[name], model.active_adapters[0])
            elif ".lora_" not in name and id(parameter) not in vocabulary:
                yield name, parameter.detach()
    except (RuntimeError, MemoryError) as error:
        report.error = error


def reload_in_worker(worker: Any, weights: Iterator[tuple[str, Tensor]], report: PushReport) -> None:
    """Reload `weights` in vLLM's worker (which is this process) and record the layers that lack some.

    Between vLLM's loading and its clean-up it is known how many elements each layer received. Vocabulary
    layers are padded by vLLM and hold one tensor, so they cannot be loaded in part.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    model = worker.model_runner.get_model()
    load = model.load_weights

    def load_and_record(stream: Iterator[tuple[str, Tensor]]) -> set[str]:
        loaded = load(stream)
        for name, layer in model.named_modules():
            info = get_layerwise_info(layer)
            received, total = info.load_numel, info.load_numel_total or 0
            checked = layer._parameters and not isinstance(layer, VocabParallelEmbedding)
            if checked and received < total:
                report.incomplete.append(f"{name} ({received} of {total} elements)")
        return loaded

    model.load_weights = load_and_record
    try:
        worker.reload_weights(weights_iterator=weights)
    finally:
        del model.load_weights
