"""A LoRA checkpoint on disk: is it whole, which step is it, and does it fit a base model?

Everything is read from headers and JSON, and the base is built without memory (the meta device), so that a
mistake is told before any weights are loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsd.checkpoints import MARKER, check_run, incompleteness
from opsd.errors import ArtefactError
from opsd.run_identity import (
    MANIFEST_NAME,
    base_differences,
    read_json_object,
    read_manifest,
    same_source,
)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
STATE_NAME = "trainer_state.json"
ANOTHER = "merge another checkpoint, or resume the training, which makes it again"
_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")


@dataclass(frozen=True)
class Adapter:
    """A complete LoRA checkpoint.

    Attributes:
        path: its folder.
        base_model: the base that it was trained on, as recorded; "" where nothing was.
        rank_shapes: module name -> {"A": (rank, in), "B": (out, rank)}.
        step: optimizer steps behind it; None for an adapter that no Trainer saved.
        manifest: its run's manifest; None for an adapter of another project.
    """

    path: Path
    base_model: str
    rank_shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    step: int | None
    manifest: dict[str, Any] | None


def read_adapter(path: Path | str) -> Adapter:
    """The LoRA checkpoint in a folder.

    Raises:
        ArtefactError: the folder, or a part of it, is missing, cut or of another kind.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ArtefactError(f"no checkpoint at {folder}{_others(folder)}")
    if not (folder / WEIGHTS_NAME).is_file() and (folder / "adapter_model.bin").is_file():
        raise ArtefactError(
            f"{folder} holds pickled weights (adapter_model.bin), which are not loaded here; save them as "
            "safetensors"
        )
    manifest = run_manifest_of(folder)
    config = read_json_object(folder / CONFIG_NAME, what="adapter configuration")
    if config.get("peft_type") != "LORA":
        raise ArtefactError(f"{folder / CONFIG_NAME}: peft_type is {config.get('peft_type')!r}, not LORA")
    base_model = config.get("base_model_name_or_path") or ""
    return Adapter(
        path=folder,
        base_model=str(base_model),
        rank_shapes=_shapes(folder / WEIGHTS_NAME),
        step=_step(folder),
        manifest=manifest,
    )


def _others(folder: Path) -> str:
    found = sorted(folder.parent.glob("checkpoint-*")) if folder.parent.is_dir() else []
    names = [path.name for path in found if path.is_dir()]
    return f"; {folder.parent} holds {', '.join(names)}" if names else "; train first"


def _shapes(path: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    if not path.is_file():
        raise ArtefactError(f"the checkpoint {path.parent} is not complete: {path.name} is missing")
    try:
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                match = _KEY.match(key)
                if match is None:
                    raise ArtefactError(f"{path} holds {key!r}; only LoRA on linear layers is merged")
                shape = tuple(file.get_slice(key).get_shape())
                shapes.setdefault(match["module"], {})[match["side"]] = shape
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"the checkpoint {path.parent} is damaged: {path.name}: {error}") from error
    if not shapes:
        raise ArtefactError(f"{path} holds no LoRA matrices")
    for module, sides in shapes.items():
        if set(sides) != {"A", "B"}:
            raise ArtefactError(f"{path}: {module} has only its lora_{min(sides)} matrix")
    return shapes


def _step(folder: Path) -> int | None:
    named = re.fullmatch(r"checkpoint-(\d+)", folder.resolve().name)
    if not (folder / STATE_NAME).is_file():
        if named:
            raise ArtefactError(f"the checkpoint {folder} is not complete: {STATE_NAME} is missing")
        return None
    step = read_json_object(folder / STATE_NAME, what="trainer state").get("global_step")
    if not isinstance(step, int) or (named and step != int(named[1])):
        raise ArtefactError(f"{folder / STATE_NAME} says step {step!r}, which is not {folder.name}'s")
    return step


def run_manifest_of(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of the run that a checkpoint belongs to; None for an adapter of another project.

    Raises:
        ArtefactError: the checkpoint is this project's and incomplete, damaged or another run's, or its
            manifest is gone.
    """
    places = (folder, Path(os.path.abspath(folder)).parent, folder.resolve().parent)
    place = next((place for place in places if (place / MANIFEST_NAME).is_file()), None)
    if place is None:
        if not (folder / MARKER).is_file():
            return None
        raise ArtefactError(
            f"{folder} has no {MANIFEST_NAME} beside it, so nothing says which run it is; put that run's "
            f"{MANIFEST_NAME} there"
        )
    manifest = read_manifest(place)
    reason = incompleteness(folder, hashes=True, only=(CONFIG_NAME, WEIGHTS_NAME, STATE_NAME))
    if reason is not None:
        raise ArtefactError(f"the checkpoint {folder} is not complete or damaged: {reason}; {ANOTHER}")
    check_run(folder, manifest)
    return manifest


def check_same_base(adapter: Adapter, base: str, folder: Path, *, accept_name: bool = False) -> None:
    """Refuse a base model that is not the one the adapter was trained on.

    Args:
        folder: the files of `base`. Their hash decides where the run's manifest has one.
        accept_name: take a base of another name for an adapter without such a hash (a renamed copy).

    Raises:
        ArtefactError: the manifest names other weights; or it, or the adapter's configuration, another name.
    """
    if adapter.manifest and adapter.manifest.get("base_weights"):
        if wrong := base_differences(adapter.manifest, base, folder):
            raise ArtefactError(
                f"{adapter.path} was trained on another base model: {wrong[0]}; pass that one"
            )
        return
    recorded = {adapter.base_model, adapter.manifest["base_model"] if adapter.manifest else ""} - {""}
    for name in sorted(recorded):
        if not accept_name and not same_source(name, base):
            raise ArtefactError(
                f"{adapter.path} was trained on {name!r}, not on {base!r}; pass that base model, or "
                "--accept_base_name if this one is a copy of it under another name"
            )


def check_fits(adapter: Adapter, weight_shapes: Mapping[str, tuple[int, ...]], base: str) -> None:
    """Refuse an adapter whose matrices do not fit the base's.

    Args:
        weight_shapes: parameter name -> shape of the base model.

    Raises:
        ArtefactError: a module is not in the base, or has other sizes there.
    """
    for module, sides in adapter.rank_shapes.items():
        shape = weight_shapes.get(f"{module}.weight")
        if shape is None:
            raise ArtefactError(
                f"{adapter.path} adapts {module}, which {base} does not have: wrong base model"
            )
        fits = (sides["B"][0], sides["A"][-1]) == shape and sides["A"][0] == sides["B"][-1]
        if not fits:
            raise ArtefactError(
                f"{adapter.path}: {module} is {sides['B'][0]} x {sides['A'][-1]} in the adapter and "
                f"{' x '.join(map(str, shape))} in {base}: wrong base model"
            )
