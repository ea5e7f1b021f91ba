"""The files of a base model: its folder, configuration, parameter shapes and tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from opsd.errors import ArtefactError, refuse_unasked_code
from opsd.run_identity import TOKENIZER_FILES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Copied from the base letter for letter: a tokenizer that is loaded and saved may change.
COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def base_folder(base: str, revision: str | None) -> Path:
    """The folder with the base's files: itself, or a hub model's local copy (downloaded where needed).

    Raises:
        ArtefactError: it is neither a folder nor a model of the hub, or the hub cannot be reached.
    """
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = ["*.safetensors", "*.json", *COPIED_FILES, "*.py"]
    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=wanted))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ArtefactError(
            f"the base model {base!r} is neither a folder nor to be had: {first_line(error)}"
        ) from error


def base_config(folder: Path, base: str, *, trust_remote_code: bool) -> PreTrainedConfig:
    """The model's configuration. ArtefactError where there is none or it is of no known kind."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        refuse_unasked_code(base, error)
        raise ArtefactError(
            f"the base model {base!r} has no usable config.json: {first_line(error)}"
        ) from error


def base_shapes(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape of the causal language model that `config` describes; no memory is taken.

    Raises:
        ArtefactError: the configuration is not a causal language model's.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ArtefactError(f"{config.name_or_path!r} is not a causal language model: {error}") from error
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_tokenizer(folder: Path, base: str, *, trust_remote_code: bool) -> None:
    """Load the base's tokenizer to see that it works.

    Raises:
        ArtefactError: the base has no usable tokenizer, or one without a chat template.
    """
    from transformers import AutoTokenizer

    # Without any of these, transformers makes up an empty tokenizer instead of failing.
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ArtefactError(f"the base model {base!r} has no tokenizer ({', '.join(TOKENIZER_FILES)})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ArtefactError(f"the base model {base!r} has no usable tokenizer: {reason}") from error
    if not tokenizer.chat_template:
        raise ArtefactError(f"the tokenizer of {base!r} has no chat template; evaluation needs one")


def copy_base_files(folder: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation settings, letter for letter."""
    for name in COPIED_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)


def first_line(error: Exception) -> str:
    """The first line with text of an error's message: libraries write whole pages."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
