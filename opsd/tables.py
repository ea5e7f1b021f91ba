"""Rows with text columns from wherever a user keeps them: a hub id, a folder, parquet, JSONL, JSON or CSV."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from opsd.errors import MALFORMED, ArtefactError

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def load_table(source: str, *, split: str = "train", revision: str | None = None) -> Dataset:
    """The rows of `source` through `datasets`.

    Args:
        source: an existing file or folder (files of one kind, or one written by `save_to_disk`), else a hub
        id.
        split: which split of a hub dataset, or of a folder that holds several.
        revision: hub branch, tag or commit.

    Raises:
        ArtefactError: nothing there, not readable, or the hub cannot be reached.
    """
    path = Path(source)
    rows = _load_local(path, split) if path.exists() else _load_hub(source, split, revision)
    try:
        rows.data.validate(full=True)
    except ValueError as error:
        raise ArtefactError(f"{source!r} cannot be used: {error}; repair it and save it as UTF-8") from error
    return rows


def _load_local(path: Path, split: str) -> Dataset:
    import datasets

    if path.is_dir() and any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return _load_saved(path, split)
    files = sorted(p for p in path.rglob("*") if p.suffix in BUILDERS) if path.is_dir() else [path]
    if path.is_dir():
        files = [p for p in files if split in p.name] or files
    kinds = {p.suffix for p in files}
    if not files or len({BUILDERS.get(kind) for kind in kinds}) != 1 or not kinds <= BUILDERS.keys():
        found = ", ".join(sorted(kinds)) or "no data file"
        raise ArtefactError(f"{path} holds {found}; give files of one kind among {', '.join(BUILDERS)}")
    try:
        builder = BUILDERS[files[0].suffix]
        # The file is read as it is now: a cache keyed by its path would serve yesterday's rows.
        return datasets.load_dataset(
            builder,
            data_files={split: [str(p) for p in files]},
            split=split,
            download_mode="force_redownload",
        )
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError, KeyError) as error:
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause):
            raise ArtefactError(f"{path} has no rows; give a file with problems") from error
        raise ArtefactError(
            f"{path} cannot be read as {files[0].suffix[1:]} ({cause}); repair the file"
        ) from error


def _load_saved(path: Path, split: str) -> Dataset:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, *MALFORMED) as error:
        raise ArtefactError(f"{path} cannot be read ({error}); save it again with save_to_disk") from error
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise ArtefactError(f"{path} has no split {split!r}, only {', '.join(saved)}; give one's own folder")
    return saved[split]


def _load_hub(source: str, split: str, revision: str | None) -> Dataset:
    if Path(source).suffix in BUILDERS or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ArtefactError(
            f"{source!r} does not exist; give an existing file or folder, or a hub id owner/name"
        )
    import datasets
    import huggingface_hub
    import requests

    problems = (
        datasets.exceptions.DatasetNotFoundError,
        datasets.exceptions.DatasetGenerationError,
        huggingface_hub.errors.HfHubHTTPError,
        requests.exceptions.RequestException,
        ConnectionError,
        FileNotFoundError,
        ValueError,
        OSError,
    )
    try:
        return datasets.load_dataset(source, split=split, revision=revision)
    except problems as error:
        raise ArtefactError(
            f"the dataset {source!r} (split {split!r}) cannot be loaded: {error}. Without a connection set "
            "HF_HUB_OFFLINE=1 after one download, or give a local file or folder"
        ) from error
