"""The training set: problems with reference solutions, encoded behind the student's and the teacher's prompt.

The rows are encoded once, into an Arrow file in the cache of `datasets`, which all ranks of a machine map
into memory and a later start reads again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch.utils.data import Dataset

from opsd import prompts
from opsd.errors import ArtefactError, UsageError
from opsd.prompts import (
    encode_prompts,
    render_student,
    render_teacher,
    spells_control_token,
    student_message,
    teacher_message,
)
from opsd.run_identity import dataset_fingerprint, versions

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

COLUMNS = ("problem", "solution")
ENCODING_BATCH = 512
LEFT_OUT = {
    "empty": "are left out: their problem or solution is null, empty or not text",
    "long": "are left out: a prompt has more than {limit} tokens",
}


@dataclass(frozen=True)
class Example:
    """One problem behind both prompts."""

    index: int  # row of the dataset as loaded; identifies the problem in rollout seeds and records
    problem: str
    student_ids: list[int]  # tokens of the student's prompt
    teacher_ids: list[int]  # tokens of the teacher's prompt


class Problems(Dataset):
    """The usable problems. Items are their positions; the trainer calls `example` for the rest."""

    def __init__(self, table: datasets.Dataset, sha256: str = ""):
        self.table = table  # the fields of `Example` as columns, memory-mapped, token ids as int32
        self.sha256 = sha256  # of all rows as loaded (`opsd.run_identity.dataset_fingerprint`)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, position: int) -> int:
        return position

    def example(self, position: int) -> Example:
        """Return the problem at a position, its token ids as lists."""
        return Example(**self.table[position])

    @property
    def longest_student_prompt(self) -> int:
        """Tokens of the longest student's prompt."""
        return self._longest("student_ids")

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt of either role."""
        return max(self._longest("student_ids"), self._longest("teacher_ids"))

    def _longest(self, column: str) -> int:
        # The Arrow file also holds the rows that are left out, without tokens.
        return max(
            max(chunk.value_lengths().to_pylist()) for chunk in self.table.data[column].chunks if chunk
        )


def check_columns(rows: datasets.Dataset, source: str) -> None:
    """Raise ArtefactError for a table without rows, or without the columns of `COLUMNS`."""
    missing = [column for column in COLUMNS if column not in rows.column_names]
    if missing:
        raise ArtefactError(
            f"the dataset {source!r} has no column {', '.join(missing)} (it has "
            f"{', '.join(rows.column_names)}); rename its columns to problem and solution"
        )
    if len(rows) == 0:
        raise ArtefactError(f"the dataset {source!r} has no rows; give one with problems")


def has_text(problem: object, solution: object) -> bool:
    """Return whether both are text and more than spaces."""
    return all(isinstance(value, str) and value.strip() for value in (problem, solution))


def warn_of_rows(numbers: Sequence[int], total: int, what: str) -> None:
    """Log one warning that counts rows and shows the first of them; nothing where there is none."""
    if len(numbers):
        shown = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
        logger.warning("%d of %d problems %s (rows %s)", len(numbers), total, what, shown)


def encode_problems(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, *, source: str, max_prompt_length: int
) -> Problems:
    """Encode every row behind both prompts, or read the file that an earlier start or another rank wrote.

    Rows without text and rows with a prompt of more than `max_prompt_length` tokens are left out, with one
    warning for each reason. A prompt is never truncated: half a reference solution is another teacher. Text
    that spells a control token stays text; one warning counts such rows.

    Raises:
        ArtefactError: a missing column, no rows, or no usable one.
    """
    import datasets.config
    import pyarrow

    check_columns(rows, source)
    sha256 = dataset_fingerprint(cast("Iterable[dict]", rows.select_columns(list(COLUMNS))))
    key = _key(sha256, tokenizer, max_prompt_length)
    file = Path(datasets.config.HF_DATASETS_CACHE) / "pwopsd_prompts" / f"{key}.arrow"
    file.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"index": "int64", "problem": "string", "left_out": "string", "spells_control": "bool"}
    features = {name: datasets.Value(kind) for name, kind in kinds.items()}
    features |= {name: datasets.List(datasets.Value("int32")) for name in ("student_ids", "teacher_ids")}
    try:
        table = rows.map(
            _encode,
            with_indices=True,
            batched=True,
            batch_size=ENCODING_BATCH,
            fn_kwargs={"tokenizer": tokenizer, "limit": max_prompt_length},
            remove_columns=rows.column_names,
            features=datasets.Features(features),
            cache_file_name=str(file),
            load_from_cache_file=True,
            new_fingerprint=key,
            desc="encoding problems",
        )
    except pyarrow.ArrowInvalid as error:
        raise ArtefactError(f"{file} is damaged ({error}); delete it and run again") from error
    left_out = table["left_out"][:]
    reasons = {kind: reason.format(limit=max_prompt_length) for kind, reason in LEFT_OUT.items()}
    for kind, reason in reasons.items():
        warn_of_rows([row for row, why in enumerate(left_out) if why == kind], len(rows), reason)
    spelled = [row for row, spells in enumerate(table["spells_control"][:]) if spells]
    warn_of_rows(spelled, len(rows), "spell a control token of the tokenizer, which is encoded as text")
    usable = [row for row, why in enumerate(left_out) if not why]
    if not usable:
        found = "; ".join(f"{left_out.count(k)} {r}" for k, r in reasons.items() if k in left_out)
        raise ArtefactError(f"no problem of {source!r} is usable ({found}); clean it or raise --max_length")
    return Problems(table.select(usable).remove_columns(["left_out", "spells_control"]), sha256)


def _key(sha256: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> str:
    """Return the SHA-256 (hex) of all that the token ids depend on; a tokenizer in Python matches nothing."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    code = [Path(file).read_text(encoding="utf-8") for file in (prompts.__file__, __file__)]
    parts = [
        sha256, limit, code, versions(), backend.to_str() if backend is not None else uuid.uuid4().hex,
        tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.split_special_tokens,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _encode(batch: dict, indices: list[int], *, tokenizer: PreTrainedTokenizerBase, limit: int) -> dict:
    """Turn rows into columns of the cached file, where texts and tokens of what is left out are empty."""
    empty = {"problem": "", "left_out": "", "spells_control": False, "student_ids": [], "teacher_ids": []}
    rows, kept = [{"index": i} | empty for i in indices], []
    for row, problem, solution in zip(rows, batch["problem"], batch["solution"], strict=True):
        if not has_text(problem, solution):
            row["left_out"] = "empty"
        else:
            kept.append((row, problem, solution))
    students = [(student_message(p), render_student(tokenizer, p)) for _, p, _ in kept]
    teachers = [(teacher_message(p, s), render_teacher(tokenizer, p, s)) for _, p, s in kept]
    encoded = [encode_prompts(tokenizer, prompts) for prompts in (students, teachers)]
    for (row, problem, _), (message, _), student, teacher in zip(kept, teachers, *encoded, strict=True):
        if max(len(student), len(teacher)) > limit:
            row["left_out"] = "long"
        else:
            row |= {"problem": problem, "student_ids": student, "teacher_ids": teacher}
            row["spells_control"] = spells_control_token(tokenizer, message)
    return {name: [row[name] for row in rows] for name in rows[0]}


def check_positions(problems: Problems, *, max_completion_length: int, positions: int | None) -> None:
    """Raise UsageError where the longest prompt + completion exceeds the model's positions."""
    longest = problems.longest_prompt + max_completion_length
    if positions is not None and longest > positions:
        raise UsageError(
            f"the longest prompt ({problems.longest_prompt} tokens) + --max_completion_length "
            f"{max_completion_length} = {longest} exceeds the model's {positions} positions; lower "
            f"--max_length to {positions}"
        )
