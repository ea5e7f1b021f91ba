"""Copy the trainer's weights into a running vLLM engine, completely or with an error.

vLLM rebuilds every one of its layers that receives a weight from what it receives: where only q_proj of a
fused q/k/v layer arrives, k and v become uninitialised memory, without an error. So a push sends complete
decoder layers: as soon as one matrix of a layer is adapted, all of its weights are sent. Layers without an
adapter keep what was loaded. What was sent is checked against what is adapted, and what vLLM reports as
loaded against what its layers hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opsd.errors import UsageError
from opsd.merging import adapted_names, merged_weights

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

_DECODER_LAYER = re.compile(r"^(.*\blayers\.\d+)\.")


class WeightPushError(RuntimeError):
    """The engine does not hold the weights that were to be pushed; it cannot sample until a push succeeds."""


@dataclass
class PushReport:
    """The outcome of one push: `sent` are Hugging Face names, `loaded` and `incomplete` vLLM's own."""

    sent: list[str] = field(default_factory=list)
    loaded: set[str] = field(default_factory=set)
    incomplete: list[str] = field(default_factory=list)
    error: Exception | None = None


def unit_of(name: str) -> str:
    """Return the part of the model that is pushed together with weight `name`: decoder layer or module."""
    layer = _DECODER_LAYER.match(name)
    return layer.group(1) if layer else name.rpartition(".")[0]


def check_pushable(model: PeftModel) -> list[str]:
    """Return the names of the adapted weights.

    Raises:
        UsageError: the adapter cannot be merged into single matrices, or is on an output layer that is tied
            to the embedding (the engine holds one matrix for both).
    """
    names = adapted_names(model)
    base: Any = model.get_base_model()
    if "lm_head.weight" in names and base.config.get_text_config().tie_word_embeddings:
        raise UsageError(
            "the adapter targets lm_head, which this model ties to its embedding: the engine has one matrix "
            "for both; leave lm_head out of the target modules or sample with --rollout hf"
        )
    return names


def pushed_weights(
    model: PeftModel, report: PushReport, earlier: Iterable[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, weight) of every unit with an adapted matrix, a unit's weights together.

    The units in `earlier`, which previous pushes wrote, follow: one without an adapter now is the base again.

    An error while a matrix is merged ends the stream and is kept in `report.error`: raised here, it would
    leave vLLM in the middle of a reload.
    """
    try:
        for name, weight in _units(model, set(earlier)):
            report.sent.append(name)
            yield name, weight
            del weight  # before the next matrix is merged
    except (RuntimeError, MemoryError, UsageError) as error:
        report.error = error


def _units(model: PeftModel, earlier: set[str]) -> Iterator[tuple[str, Tensor]]:
    adapted = set(adapted_names(model))
    units: dict[str, list[tuple[str, Tensor]]] = {}  # the base's own weights, not copied
    for parameter_name, parameter in model.get_base_model().named_parameters():
        name = parameter_name.replace(".base_layer.", ".")
        if name not in adapted and not any(part.startswith("lora_") for part in name.split(".")):
            units.setdefault(unit_of(name), []).append((name, parameter.detach()))
    for name, matrix in merged_weights(model):
        yield from units.pop(unit_of(name), [])
        yield name, matrix
        del matrix
    for unit in sorted(earlier & units.keys()):
        yield from units[unit]


def check_complete(report: PushReport, expected: list[str]) -> None:
    """Raise WeightPushError unless each adapted matrix was sent and each layer reached is complete."""
    if report.error is not None:
        raise WeightPushError(f"the weights could not be merged: {report.error}") from report.error
    missing = sorted(set(expected) - set(report.sent))
    if missing:
        raise WeightPushError(
            f"{len(missing)} of {len(expected)} adapted matrices were not sent: {_some(missing)}"
        )
    if report.incomplete:
        raise WeightPushError(
            f"the engine's layers received only part of their weights: {_some(report.incomplete)}"
        )
    unreached = {unit_of(name) for name in report.sent} - {unit_of(name) for name in report.loaded}
    if unreached:
        raise WeightPushError(
            f"the engine loaded nothing for {_some(sorted(unreached))}: its names differ from the model's"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def reload_in_worker(worker: Any, weights: Iterator[tuple[str, Tensor]], report: PushReport) -> None:
    """Reload `weights` in vLLM's worker (which is this process) and record what vLLM loaded.

    Between vLLM's loading and its clean-up it is known how many elements each layer received; a layer that
    received some but not all of its own is recorded as incomplete. Vocabulary layers are padded by vLLM and
    hold one tensor, so they cannot be loaded in part.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    model = worker.model_runner.get_model()
    load = model.load_weights

    def load_and_record(stream: Iterator[tuple[str, Tensor]]) -> set[str]:
        loaded = load(stream)
        report.loaded |= set(loaded or ())
        for name, layer in model.named_modules():
            info = get_layerwise_info(layer)
            received, total = info.load_numel, info.load_numel_total or 0
            if 0 < received < total and not isinstance(layer, VocabParallelEmbedding):
                report.incomplete.append(f"{name} ({received} of {total} elements)")
        return loaded

    model.load_weights = load_and_record
    try:
        worker.reload_weights(weights_iterator=weights)
    finally:
        del model.load_weights
