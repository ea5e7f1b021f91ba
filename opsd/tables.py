"""Rows with text columns from wherever a user keeps them: a hub id, a folder, parquet, JSONL, JSON or CSV."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsd.errors import MALFORMED, ArtefactError

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")


def load_table(
    source: str,
    *,
    split: str = "train",
    revision: str | None = None,
    remedy: str = "give a local file or folder",
) -> Dataset:
    """Load the rows of a file, of a folder (files of one kind, or of `save_to_disk`) or else of a hub id.

    A number in the column `answer` of JSON or CSV stays the text written there. `remedy` says what to do when
    the hub cannot be reached.

    Raises:
        ArtefactError: nothing there, not readable, or the hub cannot be reached.
    """
    path = Path(source)
    rows = _load_local(path, split) if path.exists() else _load_hub(source, split, revision, remedy)
    try:
        rows.data.validate(full=True)
    except ValueError as error:
        raise ArtefactError(f"{source!r} cannot be used: {error}; repair it and save it as UTF-8") from error
    return rows


def _load_local(path: Path, split: str) -> Dataset:
    import datasets
    import pyarrow

    if path.is_dir() and any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return _load_saved(path, split)
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES) if path.is_dir() else [path]
    if path.is_dir():
        files = [p for p in files if split in p.name] or files
    kinds = {p.suffix for p in files}
    if len(kinds) != 1 or not kinds <= set(SUFFIXES):
        found = ", ".join(sorted(kinds)) or "no data file"
        raise ArtefactError(f"{path} holds {found}; give files of one kind among {', '.join(SUFFIXES)}")
    try:
        table = pyarrow.concat_tables(map(_read_file, files), promote_options="permissive")
    except pyarrow.ArrowInvalid as error:
        raise ArtefactError(f"the files of {path} have different columns ({error}); use one") from error
    if not len(table):
        raise ArtefactError(f"{path} has no rows, so it holds no problem; give a file with problems")
    return datasets.Dataset(table)


def _read_file(path: Path) -> pyarrow.Table:
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path)
        rows = _csv_rows(path) if path.suffix == ".csv" else _json_rows(path)
        names = dict.fromkeys(name for row in rows for name in row)
        if None in names:
            raise ValueError("a line has more fields than the first one")
        return pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    except (OSError, csv.Error, *MALFORMED) as error:
        problem = f"{path} cannot be read as {path.suffix[1:]} ({error}): it is damaged"
        raise ArtefactError(f"{problem}; repair it and save it as UTF-8") from error


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, strict=True))


class _Number(str):
    """A JSON number as it is written: 27.0, or an integer of any length."""


def _json_rows(path: Path) -> list[dict[str, Any]]:
    def parse(text: str) -> Any:
        return json.loads(text, parse_int=_Number, parse_float=_Number)

    rows = []
    with open(path, encoding="utf-8") as file:
        if path.suffix == ".json":
            rows = parse(file.read())
            if not isinstance(rows, list):
                raise ValueError("its top level is not a list")
        else:
            for number, line in enumerate(file, 1):
                try:
                    rows += [parse(line)] if line.strip() else []
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is not an object with columns")
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"row {number} is not text: {error}") from error
        for name, value in row.items():
            if isinstance(value, _Number) and name != "answer":
                row[name] = float(value)  # data that is no text is refused where text is needed
    return rows


def _load_saved(path: Path, split: str) -> Dataset:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except (OSError, *MALFORMED) as error:
        raise ArtefactError(f"{path} cannot be read ({error}); save it again with save_to_disk") from error
    if isinstance(saved, datasets.Dataset):
        return saved
    if split not in saved:
        raise ArtefactError(
            f"{path} has no split {split!r}, only {', '.join(map(str, saved))}; give one's own folder"
        )
    return saved[split]


def _load_hub(source: str, split: str, revision: str | None, remedy: str) -> Dataset:
    if Path(source).suffix in SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ArtefactError(
            f"{source!r} does not exist; give an existing file or folder, or a hub id owner/name"
        )
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        return datasets.load_dataset(source, split=split, revision=revision)
    except (OSError, ValueError, DatasetsError) as error:
        # Errors of the connection and of the hub are subclasses of OSError.
        raise ArtefactError(
            f"the dataset {source!r} (split {split!r}) cannot be loaded: {error}. Without a connection set "
            f"HF_HUB_OFFLINE=1 after one download, or {remedy}"
        ) from error
