"""The model under evaluation: checked before any long work, identified, and turned into an engine."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsd.checkpoints import CONFIG_NAME, WEIGHTS_NAME, Adapter, read_adapter
from opsd.errors import ArtefactError, UsageError
from opsd.evaluation.config import MAX_MODEL_LEN, EvalConfig
from opsd.files import cached_sha256
from opsd.models import load_adapter, load_causal_lm, load_config, model_folder
from opsd.run_identity import SENTINEL_NAME, base_differences, check_merged, model_identity, same_source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from opsd.rollout.engine import Engine

logger = logging.getLogger(__name__)

# Files that decide a model's output.
_DECIDING_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
# What a result records of the manifest of its model's training run.
_KEPT = ("run_name", "method", "base_model", "base_revision", "git", "dataset", "seeds")


@dataclass(frozen=True)
class ModelFacts:
    """What an evaluation needs to know of its model, and records.

    Attributes:
        identity: a SHA-256 over the files that decide the model's output, independent of their folder.
        adapter_identity: the same for the adapter, None without one.
        max_model_len: tokens of prompt + completion that this run may use.
        manifest: the training run of a merged folder or of the adapter (None for any other model).
    """

    identity: str
    adapter_identity: str | None
    max_model_len: int
    manifest: dict[str, Any] | None


def check_model(config: EvalConfig) -> ModelFacts:
    """Check base model and adapter without reading their weights.

    Raises:
        ArtefactError: no such causal language model or adapter, weights missing, cut or of other shapes than
            the configuration's, or an adapter of another base model.
        UsageError: --max_model_len exceeds what the model was built for.
    """
    name, load = config.base_model, _load_options(config)
    model_config, folder, manifest = load_config(name, **load), Path(name), None
    if (folder / SENTINEL_NAME).exists():
        merged = check_merged(folder, hashes=True)
        identity = merged["identity"]
        manifest = {key: merged["manifest"].get(key) for key in _KEPT}
        manifest |= {key: merged.get(key) for key in ("adapter_step", "merged")}
    else:
        folder = model_folder(name, getattr(model_config, "_commit_hash", None) or config.revision)
        files = {path for pattern in _DECIDING_FILES for path in folder.glob(pattern) if path.is_file()}
        identity = model_identity({path.name: cached_sha256(path) for path in files})
    # vLLM itself leaves parameters that the files lack uninitialised.
    hollow = load_causal_lm(name, dtype="auto", device_map="meta", **load)
    adapter_identity = None
    if config.adapter is not None:
        adapter, adapter_identity = _check_adapter(config.adapter, name, folder)
        load_adapter(hollow, config.adapter)
        if adapter.manifest is not None:
            manifest = {key: adapter.manifest.get(key) for key in _KEPT} | {"adapter_step": adapter.step}
    return ModelFacts(identity, adapter_identity, _max_model_len(config, model_config), manifest)


def build_engine(config: EvalConfig, facts: ModelFacts, tokenizer: PreTrainedTokenizerBase) -> Engine:
    """Return the engine that samples from the model (and adapter) of `config`, on the devices visible here.

    Raises:
        UsageError: vLLM is asked for and not installed.
        ArtefactError: the weights do not load.
    """
    if config.engine == "vllm":
        from opsd.rollout.vllm import VLLMEngine
        from opsd.rollout.vllm_setup import local_model

        return VLLMEngine(
            local_model(config.base_model, config.revision),
            tensor_parallel_size=config.tensor_parallel_size,
            gpu_memory_utilization=config.gpu_memory_utilization,
            max_model_len=facts.max_model_len,
            trust_remote_code=config.trust_remote_code,
            dtype=config.dtype,
            adapter=config.adapter,
        )
    import torch

    from opsd.rollout.hf import HFEngine

    model = load_causal_lm(config.base_model, dtype=config.dtype, **_load_options(config))
    if config.adapter is not None:
        model = load_adapter(model, config.adapter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)  # pyright: ignore[reportArgumentType]  # transformers wraps torch's method without its type
    return HFEngine(model.eval(), tokenizer, batch_size=config.hf_batch_size)


def _load_options(config: EvalConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def _max_model_len(config: EvalConfig, model_config: PreTrainedConfig) -> int:
    """Return the asked length, or the lesser of the paper's and the number of position embeddings."""
    positions = getattr(model_config, "max_position_embeddings", None) or 0
    rope = getattr(model_config, "rope_parameters", None) or {}
    if rope.get("factor") and rope.get("original_max_position_embeddings"):
        positions = max(positions, int(rope["factor"] * rope["original_max_position_embeddings"]))
    if config.max_model_len is None:
        return min(MAX_MODEL_LEN, positions or MAX_MODEL_LEN)
    if 0 < positions < config.max_model_len:
        raise UsageError(
            f"--max_model_len is {config.max_model_len}, but {config.base_model!r} was built for {positions} "
            "positions"
        )
    return config.max_model_len


def _check_adapter(path: str, base: str, folder: Path) -> tuple[Adapter, str]:
    """Return the adapter and its identity; refuse one of a run on another base model."""
    adapter = read_adapter(path)
    if adapter.manifest is not None:
        if wrong := base_differences(adapter.manifest, base, folder):
            raise ArtefactError(
                f"{path} was trained on another base model: {wrong[0]}; evaluate it on that one"
            )
    elif adapter.base_model and not same_source(adapter.base_model, base):
        logger.warning("the adapter was trained on %s, not on %s", adapter.base_model, base)
    files = {name: cached_sha256(adapter.path / name) for name in (CONFIG_NAME, WEIGHTS_NAME)}
    return adapter, model_identity(files)
