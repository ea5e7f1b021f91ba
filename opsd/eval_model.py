"""The model under evaluation: checked before any long work, identified, and turned into an engine."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsd.base_files import first_line
from opsd.errors import MALFORMED, ArtefactError, UsageError, refuse_unasked_code
from opsd.eval_config import MAX_MODEL_LEN, EvalConfig
from opsd.manifest import SENTINEL_NAME, check_merged, weights_identity
from opsd.provenance import file_sha256

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from opsd.rollout import Engine

logger = logging.getLogger(__name__)

# What decides a model's output, beside its safetensors.
_DECIDING_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")


@dataclass(frozen=True)
class ModelFacts:
    """What an evaluation needs to know of its model, and records.

    Attributes:
        identity: names the weights: a SHA-256 over a local folder's files, the commit of a hub model.
        adapter_identity: the same for the adapter, None without one.
        max_model_len: tokens of prompt + completion that this run may use.
        manifest: which training run a merged folder came from (None for any other model).
    """

    identity: str
    adapter_identity: str | None
    max_model_len: int
    manifest: dict[str, Any] | None


def load_tokenizer(config: EvalConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which must have a chat template.

    Raises:
        ArtefactError: there is no tokenizer, or it has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.base_model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, *MALFORMED) as error:
        raise ArtefactError(
            f"the tokenizer of {config.base_model!r} cannot be loaded: {first_line(error)}; "
            "put the tokenizer's files into the model's folder"
        ) from error
    if not tokenizer.chat_template:
        raise ArtefactError(
            f"the tokenizer of {config.base_model!r} has no chat template; use an instruction-tuned model, "
            "or put a chat_template.jinja beside its tokenizer.json"
        )
    return tokenizer


def check_model(config: EvalConfig) -> ModelFacts:
    """Check base model and adapter without loading their weights.

    Raises:
        ArtefactError: no such model or adapter, not a causal language model, weights missing, empty or cut.
        UsageError: --max_model_len exceeds what the model was built for.
    """
    folder = Path(config.base_model)
    local = folder.is_dir()
    if not local and _looks_like_a_path(config.base_model):
        raise ArtefactError(
            f"there is no model folder {config.base_model!r}; give a folder or a hub id (org/name)"
        )
    model_config = _load_model_config(config)
    _check_causal(config.base_model, model_config)
    manifest = None
    if not local:
        identity = f"hub:{config.base_model}@{getattr(model_config, '_commit_hash', None)}"
    elif (folder / SENTINEL_NAME).exists():
        merged = check_merged(folder)
        identity = merged["identity"]
        manifest = _manifest_identity(merged)
    else:
        _check_weights(folder)
        identity = _folder_identity(folder)
    adapter_identity = _check_adapter(config) if config.adapter is not None else None
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
    from opsd.rollout_vllm import VLLMEngine
    from opsd.vllm_setup import local_model

    rank = {}
    if config.adapter is not None:
        rank = {"adapter": config.adapter, "max_lora_rank": _adapter_settings(Path(config.adapter))["r"]}
    return VLLMEngine(
        local_model(config.base_model, config.revision),
        tensor_parallel_size=config.tensor_parallel_size,
        gpu_memory_utilization=config.gpu_memory_utilization,
        max_model_len=facts.max_model_len,
        trust_remote_code=config.trust_remote_code,
        **rank,
    )


def _hf_engine(config: EvalConfig, tokenizer: PreTrainedTokenizerBase) -> Engine:
    import torch
    from transformers import AutoModelForCausalLM

    from opsd.rollout_hf import HFEngine

    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.base_model,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            dtype="auto",
            use_safetensors=True,
        )
        if config.adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, config.adapter)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ArtefactError(f"{config.base_model!r} does not load: {first_line(error)}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return HFEngine(model.to(device).eval(), tokenizer, batch_size=config.hf_batch_size)


def _load_model_config(config: EvalConfig) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            config.base_model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, *MALFORMED) as error:
        refuse_unasked_code(config.base_model, error)
        where = "" if Path(config.base_model).is_dir() else "no folder has that name, and as a hub id "
        raise ArtefactError(
            f"the model {config.base_model!r} cannot be loaded: {where}its configuration fails with: "
            f"{first_line(error)}"
        ) from error


def _check_causal(name: str, model_config: PretrainedConfig) -> None:
    architectures = model_config.architectures or []
    if not any(str(a).endswith(("ForCausalLM", "LMHeadModel")) for a in architectures):
        raise ArtefactError(
            f"{name!r} is no causal language model: its config.json names the architectures {architectures}"
        )


def _max_model_len(config: EvalConfig, model_config: PretrainedConfig) -> int:
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


def _check_weights(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ArtefactError(f"{index} is damaged: {first_line(error)}; copy the model again") from error
    else:
        shards = ["model.safetensors"]
    for shard in shards:
        _check_safetensors(folder / shard)


def _check_safetensors(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise ArtefactError(f"{file} is missing; the weights must be there as safetensors")
    try:
        # Opening compares the header with the file's length.
        with safe_open(file, framework="np") as tensors:
            names = tensors.keys()
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtefactError(
            f"{file} ({file.stat().st_size} bytes) is empty, cut or no safetensors file: "
            f"{first_line(error)}; copy or download it again"
        ) from error
    if not names:
        raise ArtefactError(f"{file} holds no tensors; copy or download it again")


def _folder_identity(folder: Path) -> str:
    files = {path for pattern in _DECIDING_FILES for path in folder.glob(pattern) if path.is_file()}
    return weights_identity({path.name: {"sha256": file_sha256(path)} for path in files})


def _adapter_settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(
            f"{str(folder)!r} holds no adapter_config.json; give a checkpoint folder of a LoRA run"
        ) from None
    except (ValueError, OSError) as error:
        raise ArtefactError(
            f"{folder / 'adapter_config.json'} cannot be read: {first_line(error)}"
        ) from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA" or "r" not in settings:
        raise ArtefactError(f"the adapter in {str(folder)!r} is not a LoRA adapter")
    return settings


def _check_adapter(config: EvalConfig) -> str:
    folder = Path(config.adapter)
    settings = _adapter_settings(folder)
    _check_safetensors(folder / "adapter_model.safetensors")
    trained_on = settings.get("base_model_name_or_path")
    if trained_on and str(trained_on) != config.base_model:
        logger.warning("the adapter was trained on %s and is evaluated on %s", trained_on, config.base_model)
    names = ("adapter_config.json", "adapter_model.safetensors")
    return weights_identity({name: {"sha256": file_sha256(folder / name)} for name in names})


def _manifest_identity(merged: dict[str, Any]) -> dict[str, Any]:
    """From sentinel and manifest, what tells a reader of the result which training run it measures."""
    manifest = merged["manifest"]
    names = ("run_name", "method", "base_model", "base_revision", "git", "dataset", "seeds")
    kept = {name: manifest.get(name) for name in names}
    return {**kept, "adapter_step": merged.get("adapter_step"), "merged": merged.get("merged")}


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith("/")
