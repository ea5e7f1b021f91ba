"""Loading a configuration, a tokenizer and a causal language model, with the user's mistakes named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from opsd.errors import MALFORMED, ArtefactError, UsageError, refuse_unasked_code
from opsd.manifest import TOKENIZER_FILES

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HUB_HINT = (
    "check the name; without a connection download it once, then set HF_HUB_OFFLINE=1, or give a local folder"
)


def load_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """The configuration of a decoder-only language model.

    Raises:
        ArtefactError: it cannot be loaded.
        UsageError: it is no decoder-only model, or needs code of its own that was not allowed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    _check_folder(name)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, *MALFORMED) as error:
        refuse_unasked_code(name, error)
        raise ArtefactError(
            f"the configuration of {name!r} cannot be loaded ({_brief(error)}); {HUB_HINT}"
        ) from error
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.is_encoder_decoder or not (remote or type(config) in AutoModelForCausalLM._model_mapping):
        raise UsageError(f"{name!r} is a {config.model_type} model, not a causal language model; use one")
    return config


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer, with a pad token (the end-of-sequence token stands in) and a chat template.

    Raises:
        ArtefactError: it cannot be loaded, has no chat template or no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    _check_folder(name)
    # Without any of these, transformers makes up an empty tokenizer instead of failing.
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in TOKENIZER_FILES):
        raise ArtefactError(f"{name} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the base model's")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, *MALFORMED) as error:
        raise ArtefactError(
            f"the tokenizer of {name!r} cannot be loaded ({_brief(error)}); {HUB_HINT}"
        ) from error
    if not tokenizer.chat_template:
        raise ArtefactError(
            f"the tokenizer of {name!r} has no chat template; use an instruction-tuned model, or put a "
            "chat_template.jinja beside its tokenizer.json"
        )
    if tokenizer.eos_token_id is None:
        raise ArtefactError(f"the tokenizer of {name!r} has no end-of-sequence token; set eos_token in it")
    if tokenizer.pad_token_id is None:
        # Validity comes from lengths, so the pad token may be any token at all.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    name: str,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """The model on the CPU, from safetensors alone.

    Raises:
        ArtefactError: weights are missing, truncated or not safetensors.
        UsageError: the attention implementation is not available.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            use_safetensors=True,
        )
    except ImportError as error:
        raise UsageError(f"--attn_implementation {attn_implementation}: {_brief(error)}") from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ArtefactError(
            f"the weights of {name!r} cannot be loaded ({_brief(error)}); {HUB_HINT}"
        ) from error


def _check_folder(name: str) -> None:
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise ArtefactError(f"{name} has no config.json: it is not a model folder")
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ArtefactError(f"the folder {name} does not exist")


def _brief(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
