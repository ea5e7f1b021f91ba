"""The files that a run writes beside its checkpoints, read and written without torch."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from opsd.errors import MALFORMED, ArtefactError, printable
from opsd.files import atomic_write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from opsd.data import Example
    from opsd.rollout.engine import Completion

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"


def read_metrics(run_folder: Path) -> list[dict[str, float | None]]:
    """Return the logged steps of a run, in order; none where it has not logged yet.

    An incomplete last line, which is being written or was cut by a kill, is left out with a warning.

    Raises:
        ArtefactError: a line is not a logged step.
    """
    path = run_folder / METRICS_NAME
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    if lines.pop():
        logger.warning("%s: the last line is incomplete and left out", printable(path))
    return [_row(line, path, number) for number, line in enumerate(lines, start=1)]


def _row(line: bytes, path: Path, number: int) -> dict[str, float | None]:
    try:
        row = json.loads(line)
        # A name with half a surrogate pair cannot be drawn; steps beyond 2**53 are no exact numbers.
        good = type(row["step"]) is int and 0 <= row["step"] < 2**53
        for name, value in row.items():
            good &= bool(name.encode()) and (value is None or (value is not True and math.isfinite(value)))
    except MALFORMED:
        good = False
    if not good:
        raise ArtefactError(
            f"line {number} of {str(path)!r} is damaged: {line.decode('utf-8', 'replace')[:60]!r} is no "
            "logged step; delete the line, or train anew"
        )
    return row


def write_completions(
    run_folder: Path,
    step: int,
    examples: Sequence[Example],
    completions: Sequence[Completion],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write the completions of an optimizer step of this rank to `completions/step-000010.jsonl`."""
    lines = [
        json.dumps(
            {
                "step": step,
                "row": example.index,
                "problem": example.problem,
                "completion": tokenizer.decode(completion.token_ids, skip_special_tokens=False),
                "tokens": len(completion.token_ids),
                "truncated": completion.truncated,
            },
            ensure_ascii=False,
        )
        for example, completion in zip(examples, completions, strict=True)
    ]
    atomic_write_text(run_folder / "completions" / f"step-{step:06d}.jsonl", "\n".join(lines) + "\n")
