"""Copy the trainer's weights into a running vLLM engine, completely or with an error.

vLLM rebuilds every one of its layers that receives a weight from what it receives: where only q_proj of a
fused q/k/v layer arrives, k and v become uninitialised memory, without an error. So a push sends every weight
but those of the vocabulary, and how much each of vLLM's layers received is compared with what it holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from opsd.checkpoints import WEIGHTS_NAME
from opsd.errors import UsageError
from opsd.files import disk_errors
from opsd.merging import UpdateKept, adapted_layers, adapted_names, merged_matrix, update_kept

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor


class WeightPushError(RuntimeError):
    """The engine does not hold the weights that were to be pushed; it cannot sample until a push succeeds."""


@dataclass
class PushReport:
    """The outcome of one push of merged weights."""

    measure: bool = False  # whether to fill `kept`
    incomplete: list[str] = field(
        default_factory=list
    )  # vLLM's layers that did not receive all their weights
    error: Exception | None = None
    kept: UpdateKept = field(default_factory=UpdateKept)

    def metrics(self) -> dict[str, float]:
        """Return what of the update arrived, by name; nothing where it was not measured, or is still 0."""
        if not self.kept.size:
            return {}
        shares = self.kept.shares()
        return {"rollout/update_kept": shares["kept"], "rollout/update_changed_share": shares["changed"]}

    def check(self) -> None:
        """Raise WeightPushError unless each layer received all of its weights."""
        if self.error is not None:
            raise WeightPushError(f"the weights could not be merged: {self.error}") from self.error
        if self.incomplete:
            count, some = len(self.incomplete), ", ".join(self.incomplete[:4])
            raise WeightPushError(f"{count} layers of the engine did not receive all their weights: {some}")


def check_pushable(model: PeftModel, *, merged: bool = True) -> None:
    """Check, before an engine is loaded, that it can hold what pushes will send.

    Raises:
        UsageError: the adapter is more than LoRA on linear layers, or is on an output layer that is tied to
            the embedding or, unless it is `merged`, on any output layer.
    """
    base: Any = model.get_base_model()
    if "lm_head.weight" not in adapted_names(model):
        return
    tied = base.config.get_text_config().tie_word_embeddings
    if tied or not merged:
        why = "this model ties to its embedding, and the engine has one matrix for both"
        remedy = "leave lm_head out of --lora_target_modules, or sample with --rollout hf"
        if not tied:
            why, remedy = "vLLM's adapters do not reach", f"{remedy} or --rollout_weights merged"
        raise UsageError(f"the adapter targets lm_head, which {why}; {remedy}")


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
                layer, adapter = adapted[name], model.active_adapters[0]
                matrix = merged_matrix(layer, adapter)
                if report.measure:
                    report.kept += update_kept(layer, adapter, matrix)
                yield name, matrix
                del matrix  # before the next one is merged
            elif ".lora_" not in name and id(parameter) not in vocabulary:
                yield name, parameter.detach()
    except (RuntimeError, MemoryError) as error:
        report.error = error


def write_adapter(model: PeftModel, folder: Path, dtype: torch.dtype) -> None:
    """Write `model`'s LoRA matrices, in the engine's `dtype`, as the folder that vLLM's LoRARequest names."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    matrices = {name: matrix.to("cpu", dtype).contiguous() for name, matrix in state.items()}
    with disk_errors(folder):
        save_file(matrices, folder / WEIGHTS_NAME)
        model.peft_config[model.active_adapters[0]].save_pretrained(str(folder))


def unapplied_in_worker(worker: Any, adapter: int) -> list[str]:
    """Return the matrices of an adapter that vLLM read and has no layer for, which it drops silently."""
    manager = worker.model_runner.lora_manager._adapter_manager
    return sorted(manager.get_adapter(adapter).loras.keys() - manager.modules.keys())


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
