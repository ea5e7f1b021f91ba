"""Every `from_pretrained` of the project: configuration, tokenizer, weights, adapter, end-of-sequence ids.

A model is a folder or a hub id. What is loaded is compared with the files: a tokenizer with its
`tokenizer.json`, weights with the parameters of the configuration, an adapter with its targets.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from opsd.checkpoints import WEIGHTS_NAME, read_adapter
from opsd.errors import MALFORMED, ArtefactError, UsageError, printable
from opsd.files import atomic_write_json
from opsd.run_identity import TOKENIZER_FILES, read_json_object

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TOKENIZER_CONFIG = "tokenizer_config.json"
# Merging copies these; a tokenizer that is loaded and saved may change.
COPIED_FILES = (
    *TOKENIZER_FILES, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
# Spaces, tabs and newlines in runs, digits, TeX, an apostrophe, composed letters, signs beyond two bytes.
PROBE = "Let x = 36+35;\n\n\tso  $\\boxed{\\frac{71}{2}}$ isn't 0.5 %, naïve 2 ≤ π · 漢字 🙂.\nDone"


def model_folder(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Return `name` itself, or a hub model's local copy, downloaded (with its `weights`) where needed.

    Raises ArtefactError for what is neither a model folder nor a hub model that can be reached.
    """
    _check_folder(name)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", *COPIED_FILES, "*.py", *(["*.safetensors"] if weights else [])]
    with _explained("files", name):
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))


def load_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Load the configuration of a causal language model. Raises ArtefactError for any other kind of model."""
    from transformers import AutoConfig

    _check_folder(name)
    with _explained("configuration", name):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    # Only the architecture says whether a BERT was built as a decoder.
    listed = [str(architecture) for architecture in config.architectures or ()]
    causal = any(one.endswith(("ForCausalLM", "LMHeadModel")) for one in listed)
    if config.is_encoder_decoder or not causal:
        raise ArtefactError(
            f"{name!r} is a {config.model_type} model (architectures {listed}), not a causal language model; "
            "use one"
        )
    return config


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer; without a pad token, use the end-of-sequence token.

    Raises ArtefactError when it changes a probe text or lacks a chat template or an end-of-sequence token.
    """
    folder = model_folder(name, revision, weights=False)
    tokenizer = _read_tokenizer(folder, name, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise ArtefactError(f"{name} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the base model's")
    if not tokenizer.chat_template:
        raise ArtefactError(
            f"the tokenizer of {name!r} has no chat template; use an instruction-tuned model, or put a "
            "chat_template.jinja beside its tokenizer.json"
        )
    if tokenizer.eos_token_id is None:
        raise ArtefactError(f"the tokenizer of {name!r} has no end-of-sequence token; set eos_token in it")
    if tokenizer.pad_token_id is None:
        # Validity comes from lengths, so the pad token may be any token.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_tokenizer(folder: Path, name: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """Load what `tokenizer.json` says, else the class in `tokenizer_config.json`; None without a tokenizer.

    transformers 5 builds some of those classes (LlamaTokenizer, Qwen2Tokenizer, GPT2Tokenizer) with a
    pre-tokenizer and a decoder of their own, whatever `tokenizer.json` says: spaces are lost, or ids differ.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    reference = None
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    with _explained("tokenizer", name, Exception):  # tokenizers raises no other class
        if (folder / "tokenizer.json").is_file():
            reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    check_round_trip(tokenizer, reference, name)
    return tokenizer


def check_round_trip(tokenizer: PreTrainedTokenizerBase, reference: Tokenizer | None, name: str) -> None:
    """Raise ArtefactError for a tokenizer that changes a text or disagrees with its `tokenizer.json`.

    The probe has no characters that map to the unknown token, except space and digits. `reference` is the
    tokenizer that `tokenizer.json` holds, None without that file.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    unknown = tokenizer.unk_token_id
    probe = "".join(c for c in PROBE if c in " 0123456789" or unknown is None or unknown not in encode(c))
    ids = encode(probe)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if text != probe:
        raise ArtefactError(
            f"the tokenizer of {name!r} turns {probe!r} into {text!r}; copy the tokenizer.json that belongs "
            "to the model into its folder"
        )
    if reference is not None:
        reference.no_truncation()
        reference.no_padding()
        expected = reference.encode(probe, add_special_tokens=False)
        if ids != expected.ids:
            raise ArtefactError(
                f"the tokenizer of {name!r} splits {probe!r} into {tokenizer.convert_ids_to_tokens(ids)}, "
                f"its tokenizer.json into {expected.tokens}; copy one model's tokenizer files into the folder"
            )


def copy_model_files(folder: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation settings into a merged folder.

    With a `tokenizer.json`, the tokenizer's class becomes the one that follows that file in AutoTokenizer,
    vLLM and transformers 4; everything else is copied unchanged.
    """
    for name in COPIED_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    config = target / TOKENIZER_CONFIG
    if not (folder / "tokenizer.json").is_file():
        return
    settings = read_json_object(config, what="tokenizer configuration") if config.is_file() else {}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("auto_map", None)
    # transformers 4 takes a mapping under this name, and a list under the older one, as transformers 5 does.
    if isinstance(settings.get("extra_special_tokens"), list):
        settings.setdefault("additional_special_tokens", settings.pop("extra_special_tokens"))
    atomic_write_json(config, settings)


def load_causal_lm(
    name: str,
    *,
    dtype: torch.dtype | str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str = "sdpa",
    device_map: str | None = None,
) -> PreTrainedModel:
    """Load the model on the CPU, with every parameter from safetensors files.

    Args:
        dtype: "auto" is the checkpoint's own.
        device_map: "meta" compares files and configuration without reading weights.

    Raises:
        ArtefactError: weights are missing, truncated, of other shapes or not safetensors.
        UsageError: the attention implementation is not available.
    """
    from transformers import AutoModelForCausalLM

    _check_folder(name)
    try:
        with _explained("weights", name):
            model, report = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]  # a pair
                name,
                dtype=dtype,
                revision=revision,
                trust_remote_code=trust_remote_code,
                attn_implementation=attn_implementation,
                device_map=device_map,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except ImportError as error:
        raise UsageError(f"--attn_implementation {attn_implementation}: {first_line(error)}") from error
    # transformers would fill the parameters that the files lack with random numbers.
    missing, shapes, unused = (report[f"{kind}_keys"] for kind in ("missing", "mismatched", "unexpected"))
    if missing or shapes:
        wrong = _misfits(missing, shapes, unused)
        raise ArtefactError(f"the weights of {name!r} do not fit its config.json: {wrong}; copy it again")
    if unused:
        logger.warning(
            "%s holds weights that the model does not use: %s", name, printable(", ".join(sorted(unused)))
        )
    return model


def load_adapter(model: PreTrainedModel, path: Path | str) -> PeftModel:
    """Put the LoRA adapter of a checkpoint folder on `model`; on the meta device, check that it fits.

    Raises:
        ArtefactError: it is incomplete, damaged, or its matrices are not its configuration's on this model.
        UsageError: it is more than LoRA on linear layers.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    from opsd.merging import adapted_names

    folder, meta = read_adapter(path).path, model.device.type == "meta"
    with _explained("adapter", str(folder)):
        with safe_open(folder / WEIGHTS_NAME, framework="numpy") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        adapted = PeftModel.from_pretrained(
            model, str(folder), ignore_mismatched_sizes=True, low_cpu_mem_usage=meta
        )
        state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    adapted_names(adapted)
    wanted = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if found != wanted:
        both = found.keys() & wanted.keys()
        shapes = [(key, found[key], wanted[key]) for key in both if found[key] != wanted[key]]
        wrong = _misfits(wanted.keys() - both, shapes, found.keys() - both)
        raise ArtefactError(
            f"the adapter {folder} does not fit {model.name_or_path}: {wrong}: wrong base model or damaged "
            "checkpoint; take another"
        )
    return adapted


def _misfits(
    missing: Iterable[str], shapes: Iterable[tuple[str, Sequence, Sequence]], unknown: Iterable[str]
) -> str:
    """Return a phrase for each of the first tensors that are wrong; `shapes` holds (name, found, wanted)."""
    wrong = [f"{key} is missing" for key in sorted(missing)]
    wrong += [
        f"{key} is {' x '.join(map(str, found))}, not {' x '.join(map(str, wanted))}"
        for key, found, wanted in sorted(shapes)
    ]
    wrong += [f"{key} belongs to no part of the model" for key in sorted(unknown)]
    shown = ", ".join(printable(phrase, 200) for phrase in wrong[:5])
    return f"{shown} and {len(wrong) - 5} more" if len(wrong) > 5 else shown


def merge_end_ids(*sources: int | Sequence[int] | None) -> list[int]:
    """Return the sorted token ids of `sources`, each an id, a sequence of ids or None."""
    listed = [[source] if source is None or isinstance(source, int) else source for source in sources]
    return sorted({int(token) for some in listed for token in some if token is not None})


def end_token_ids(name: str, config: PreTrainedConfig, *, trust_remote_code: bool = False) -> list[int]:
    """Return the ids that end a completion: the tokenizer's and the generation or model configuration's."""
    from transformers import GenerationConfig

    try:
        configured = GenerationConfig.from_pretrained(name)
    except OSError:
        configured = config
    folder = model_folder(name, weights=False)
    tokenizer = _read_tokenizer(folder, name, trust_remote_code=trust_remote_code)
    return merge_end_ids(*(getattr(source, "eos_token_id", None) for source in (configured, tokenizer)))


def first_line(error: BaseException) -> str:
    """Return the first line with text of an error's message: libraries write whole pages."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def _explained(what: str, name: str, *more: type[Exception]) -> Iterator[None]:
    """Turn what the libraries raise while they load `what` of the model `name` into one line."""
    try:
        yield
    except (OSError, RuntimeError, *MALFORMED, SafetensorError, StrictDataclassError, *more) as error:
        if "trust_remote_code" in str(error):
            raise UsageError(
                f"{name!r} ships code of its own; read it, then add --trust_remote_code"
            ) from error
        hub = "check the name; without a connection set HF_HUB_OFFLINE=1 after one download, or give a folder"
        remedy = "copy or download it again" if Path(name).exists() else hub
        raise ArtefactError(
            f"the {what} of {name!r} cannot be loaded ({first_line(error)}); {remedy}"
        ) from error


def _check_folder(name: str) -> None:
    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise ArtefactError(f"{name} has no config.json: it is not a model folder")
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ArtefactError(f"the folder {name} does not exist")
