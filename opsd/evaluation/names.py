"""Names of result files: `<method_name>[_<dataset>]_<length>[_first<K>][_<mark> ...][_seed<N>].json`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opsd.errors import UsageError

PAPER_MAX_NEW_TOKENS = 38912
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Settings that a name marks where they are not the usual ones: another file, and another row of the table.
_MARKED = {"dtype": "auto", "prompt": "evaluation"}
_MARKS = "adapter|float32|bfloat16|student|teacher"
_NAME = re.compile(rf"(?P<run>.+)_\d+k?(?:_first(?P<first>\d+))?(?:_(?:{_MARKS}))*(?:_seed\d+)?\.json")


def marks(settings: Mapping[str, Any]) -> list[str]:
    """Return the marks of an evaluation, or of a result's facts: `adapter` (not merged), dtype, prompt."""
    marked = [settings[name] for name, usual in _MARKED.items() if settings.get(name) not in (None, usual)]
    return ["adapter", *marked] if settings.get("adapter") else marked


def result_path(
    method_name: str,
    dataset: str,
    seed: int | None = None,
    *,
    max_new_tokens: int = PAPER_MAX_NEW_TOKENS,
    num_samples: int | None = None,
    marked: Sequence[str] = (),
    folder: Path | str = "eval_results",
) -> Path:
    """Return the path of the result of one cell.

    Args:
        dataset: left out of the name where it is math500.
        max_new_tokens: `38k` for 38,912, `160` where 1,024 does not divide it.
        num_samples: the first so many problems; None for all of the benchmark.
        marked: what `marks` returns.

    Raises:
        UsageError: a part does not fit a file name, or the seed is negative.
    """
    for name in (method_name, dataset):
        if not _PART.fullmatch(name):
            raise UsageError(f"{name!r} does not fit a file name; use letters, digits, '.', '_' and '-'")
    if seed is not None and seed < 0:
        raise UsageError(f"the seed is {seed}, but must be at least 0")
    parts = [method_name] if dataset == "math500" else [method_name, dataset]
    parts.append(str(max_new_tokens) if max_new_tokens % 1024 else f"{max_new_tokens // 1024}k")
    parts += [] if num_samples is None else [f"first{num_samples}"]
    parts += marked
    parts += [] if seed is None else [f"seed{seed}"]
    return Path(folder) / f"{'_'.join(parts)}.json"


def parse_name(path: Path | str, dataset: str) -> tuple[str, int | None] | None:
    """Return method name and `first<K>` of a result file of `dataset`; None for a name of another form."""
    match = _NAME.fullmatch(Path(path).name)
    if match is None:
        return None
    run = match["run"] if dataset == "math500" else match["run"].removesuffix(f"_{dataset}")
    return run, int(match["first"]) if match["first"] else None
