"""Load rows with text columns from a hub id, a folder, parquet, JSONL, JSON or CSV."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from opsd.errors import MALFORMED, ArtefactError

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}


def load_table(source: str, *, split: str = "train", revision: str | None = None) -> Dataset:
    """Load the rows of `source` with `datasets`.

    Args:
        source: an existing file or folder (files of one kind, or written by `save_to_disk`), or a hub id.
        split: of a hub dataset, or of a folder that holds several.
        revision: hub branch, tag or commit.

    Raises:
        ArtefactError: `source` does not exist or cannot be read, or the hub cannot be reached.
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
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in BUILDERS)
        files = [p for p in files if split in p.name] or files
    builders = {BUILDERS.get(p.suffix) for p in files}
    if len(builders) != 1 or None in builders:
        found = ", ".join(sorted({p.suffix for p in files})) or "no data file"
        raise ArtefactError(f"{path} holds {found}; give files of one kind among {', '.join(BUILDERS)}")
    paths = {split: [str(p) for p in files]}
    try:
        # Read the file as it is now: a cache keyed by its path would return the rows of an earlier version.
        return datasets.load_dataset(
            builders.pop(), data_files=paths, split=split, download_mode="force_redownload"
        )
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError, KeyError) as error:
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause):
            raise ArtefactError(f"{path} has no rows; give a file with problems") from error
        kind = files[0].suffix[1:]
        raise ArtefactError(f"{path} cannot be read as {kind} ({cause}); repair the file") from error


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

    try:
        return datasets.load_dataset(source, split=split, revision=revision)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ArtefactError(
            f"the dataset {source!r} (split {split!r}) cannot be loaded: {error}. Without a connection set "
            "HF_HUB_OFFLINE=1 after one download, or give a local file or folder"
        ) from error
