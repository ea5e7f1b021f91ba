"""The model under evaluation: checked before any long work, identified, and turned into an engine."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsd.checkpoints import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from opsd.errors import ArtefactError, UsageError
from opsd.evaluation.config import MAX_MODEL_LEN, EvalConfig
from opsd.models import load_adapter, load_causal_lm, load_config, model_folder
from opsd.provenance import cached_sha256
from opsd.run_identity import (
    SENTINEL_NAME,
    base_differences,
    check_merged,
    model_identity,
    same_source,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from opsd.rollout.engine import Engine

logger = logging.getLogger(__name__)

# What decides a model's output, beside its safetensors.
_DECIDING_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")


@dataclass(frozen=True)
class ModelFacts:
    """What an evaluation needs to know of its model, and records.

    Attributes:
        identity: a SHA-256 over the files that decide the model's output, wherever they lie.
        adapter_identity: the same for the adapter, None without one.
        max_model_len: tokens of prompt + completion that this run may use.
        manifest: which training run a merged folder came from (None for any other model).
    """

    identity: str
    adapter_identity: str | None
    max_model_len: int
    manifest: dict[str, Any] | None


def check_model(config: EvalConfig) -> ModelFacts:
    """Check base model and adapter without reading their weights.

    Raises:
        ArtefactError: no such model or adapter, not a causal language model, weights missing, empty, cut or
            of other shapes than the configuration's.
        UsageError: --max_model_len exceeds what the model was built for.
    """
    folder = Path(config.base_model)
    load = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    model_config = load_config(config.base_model, **load)
    manifest = None
    if (folder / SENTINEL_NAME).exists():
        merged = check_merged(folder, hashes=True)
        identity = merged["identity"]
        manifest = _manifest_identity(merged)
    else:
        folder = model_folder(
            config.base_model, getattr(model_config, "_commit_hash", None) or config.revision
        )
        files = {path for pattern in _DECIDING_FILES for path in folder.glob(pattern) if path.is_file()}
        identity = model_identity({path.name: cached_sha256(path) for path in files})
    # vLLM leaves what the files lack as it was allocated.
    hollow = load_causal_lm(config.base_model, dtype="auto", device_map="meta", **load)
    adapter_identity = _check_adapter(config, folder) if config.adapter is not None else None
    if config.adapter is not None:
        load_adapter(hollow, config.adapter)
    return ModelFacts(identity, adapter_identity, _max_model_len(config, model_config), manifest)


def build_engine(config: EvalConfig, facts: ModelFacts, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """The engine that samples from the model (and adapter) that `config` names, on the devices visible here.

    Raises:
        UsageError: vLLM is asked for and not installed.
        ArtefactError: the weights do not load.
    """
    if config.engine == "vllm":
        return _vllm_engine(config, facts)
    return _hf_engine(config, tokenizer)


def _vllm_engine(config: EvalConfig, facts: ModelFacts) -> Engine:
    from opsd.rollout.vllm import VLLMEngine
    from opsd.rollout.vllm_setup import local_model

    return VLLMEngine(
        local_model(config.base_model, config.revision),
        tensor_parallel_size=config.tensor_parallel_size,
        gpu_memory_utilization=config.gpu_memory_utilization,
        max_model_len=facts.max_model_len,
        trust_remote_code=config.trust_remote_code,
        adapter=config.adapter,
    )


def _hf_engine(config: EvalConfig, tokenizer: PreTrainedTokenizerBase) -> Engine:
    import torch

    from opsd.rollout.hf import HFEngine

    model = load_causal_lm(
        config.base_model, dtype="auto", revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    if config.adapter is not None:
        model = load_adapter(model, config.adapter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return HFEngine(model.to(device).eval(), tokenizer, batch_size=config.hf_batch_size)


def _max_model_len(config: EvalConfig, model_config: PreTrainedConfig) -> int:
    """The asked length, or the lesser of the paper's and what the position embeddings were made for."""
    positions = getattr(model_config, "max_position_embeddings", None)
    rope = getattr(model_config, "rope_parameters", None) or {}
    # Stretched position embeddings state their original length and the factor.
    if isinstance(rope, dict) and rope.get("factor") and rope.get("original_max_position_embeddings"):
        stretched = int(rope["factor"] * rope["original_max_position_embeddings"])
        positions = max(positions or 0, stretched)
    if config.max_model_len is None:
        return min(MAX_MODEL_LEN, positions) if positions else MAX_MODEL_LEN
    if positions and config.max_model_len > positions:
        raise UsageError(
            f"--max_model_len is {config.max_model_len}, but {config.base_model!r} was built for {positions} "
            "positions"
        )
    return config.max_model_len


def _check_adapter(config: EvalConfig, base: Path) -> str:
    adapter = read_adapter(config.adapter)
    wrong = base_differences(adapter.manifest, config.base_model, base) if adapter.manifest else []
    if wrong:
        raise ArtefactError(
            f"{adapter.path} was trained on another base model: {wrong[0]}; evaluate it on that one"
        )
    if not adapter.manifest and adapter.base_model and not same_source(adapter.base_model, config.base_model):
        logger.warning("the adapter was trained on %s, not on %s", adapter.base_model, config.base_model)
    return model_identity({name: cached_sha256(adapter.path / name) for name in (CONFIG_NAME, WEIGHTS_NAME)})


def _manifest_identity(merged: dict[str, Any]) -> dict[str, Any]:
    """From sentinel and manifest, what tells a reader of the result which training run it measures."""
    manifest = merged["manifest"]
    names = ("run_name", "method", "base_model", "base_revision", "git", "dataset", "seeds")
    kept = {name: manifest.get(name) for name in names}
    return {**kept, "adapter_step": merged.get("adapter_step"), "merged": merged.get("merged")}
