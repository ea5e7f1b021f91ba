"""The trainer's weights into a running vLLM engine, complete or not at all.

vLLM rebuilds every one of its layers that receives a weight from what it receives: where only q_proj of a
fused q/k/v layer arrives, k and v become uninitialised memory, without an error. So the unit of a push is a
whole decoder layer: as soon as one of its matrices is adapted, all of its weights are sent, the merged ones
and the others. Layers without an adapter keep what was loaded. What was sent is counted against what is
adapted, and what vLLM says that it loaded against what its layers hold.
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
    from torch import Tensor, nn

_DECODER_LAYER = re.compile(r"^(.*\blayers\.\d+)\.")


class WeightPushError(RuntimeError):
    """The engine does not hold the weights that were to be pushed; it cannot sample until a push succeeds."""


@dataclass
class PushReport:
    """What one push did. `sent` are Hugging Face names, `loaded` and `incomplete` vLLM's own."""

    sent: list[str] = field(default_factory=list)
    loaded: set[str] = field(default_factory=set)
    incomplete: list[str] = field(default_factory=list)
    error: Exception | None = None


def unit_of(name: str) -> str:
    """The part of the model that is pushed as one with weight `name`: its decoder layer, else its module."""
    layer = _DECODER_LAYER.match(name)
    return layer.group(1) if layer else name.rpartition(".")[0]


def base_parameters(model: PeftModel) -> Iterator[tuple[str, nn.Parameter]]:
    """(Hugging Face name, parameter) of the base model under the adapter, in module order, not copied."""
    for name, parameter in model.get_base_model().named_parameters():
        if ".base_layer." in name or not any(part.startswith("lora_") for part in name.split(".")):
            yield name.replace(".base_layer.", "."), parameter


def check_pushable(model: PeftModel) -> list[str]:
    """The adapted weights' names.

    Raises:
        UsageError: the adapter cannot be merged into single matrices, or sits on an output layer that is tied
            to the embedding (the engine holds one matrix for both).
    """
    names = adapted_names(model)
    config = model.get_base_model().config.get_text_config()
    if "lm_head.weight" in names and config.tie_word_embeddings:
        raise UsageError(
            "the adapter targets lm_head, which this model ties to its embedding: the engine has one matrix "
            "for both; leave lm_head out of the target modules or sample with --rollout hf"
        )
    return names


def pushed_weights(
    model: PeftModel, report: PushReport, earlier: Iterable[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Every weight of every unit that holds an adapted matrix, one at a time, a unit's weights side by side.

    The units in `earlier`, which former pushes reached, follow: one without an adapter now is the base again.

    An error while a matrix is formed ends the stream and is kept in `report.error`: raised here, it would
    leave vLLM in the middle of a reload.
    """
    expected = set(adapted_names(model))
    units: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in base_parameters(model):
        if name not in expected:
            units.setdefault(unit_of(name), []).append((name, parameter.detach()))
    try:
        for name, matrix in merged_weights(model):
            for sibling, parameter in units.pop(unit_of(name), []):
                report.sent.append(sibling)
                yield sibling, parameter
            report.sent.append(name)
            yield name, matrix
            del matrix
        for unit in sorted(set(earlier) & units.keys()):
            for name, parameter in units.pop(unit):
                report.sent.append(name)
                yield name, parameter
    except (RuntimeError, MemoryError, UsageError) as error:
        report.error = error


def check_complete(report: PushReport, expected: Iterable[str]) -> None:
    """Raise WeightPushError unless each adapted matrix was sent, once, and each layer reached is complete."""
    if report.error is not None:
        raise WeightPushError(f"the merged weights could not be formed: {report.error}") from report.error
    expected, sent = list(expected), report.sent
    missing = sorted(set(expected) - set(sent))
    if missing:
        raise WeightPushError(
            f"{len(missing)} of {len(expected)} adapted matrices were not sent: {_some(missing)}"
        )
    if len(sent) != len(set(sent)):
        twice = sorted({name for name in sent if sent.count(name) > 1})
        raise WeightPushError(f"{len(twice)} weights were sent twice: {_some(twice)}")
    if report.incomplete:
        raise WeightPushError(
            f"the engine's layers got only part of their weights: {_some(report.incomplete)}"
        )
    reached = {unit_of(name) for name in report.loaded}
    unreached = sorted({unit_of(name) for name in sent} - reached)
    if unreached:
        raise WeightPushError(
            f"the engine loaded nothing for {_some(unreached)}: its names differ from the model's"
        )


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def reload_in_worker(worker: Any, weights: Iterator[tuple[str, Tensor]], report: PushReport) -> None:
    """Runs in vLLM's worker (which is this process): reload from `weights`, note what vLLM loaded.

    Between vLLM's loading and its clean-up it is known how many elements each layer received; a layer that
    received some but not all of its own is reported. Vocabulary layers are padded by vLLM and hold one
    tensor, so they cannot be loaded in part.
    """
    model = worker.model_runner.get_model()
    load = model.load_weights

    def load_and_note(stream: Iterator[tuple[str, Tensor]]) -> set[str]:
        loaded = load(stream)
        report.loaded |= set(loaded or ())
        report.incomplete += _incomplete_layers(model)
        return loaded

    model.load_weights = load_and_note
    try:
        worker.reload_weights(weights_iterator=weights)
    finally:
        del model.load_weights


def _incomplete_layers(model: nn.Module) -> list[str]:
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    found = []
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        partly = info.can_load() and 0 < info.load_numel < info.load_numel_total
        if partly and not isinstance(layer, VocabParallelEmbedding):
            found.append(f"{name} ({info.load_numel} of {info.load_numel_total} elements)")
    return found
