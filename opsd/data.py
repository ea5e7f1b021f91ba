"""The training set: problems with reference solutions, encoded behind the student's and the teacher's prompt.

The rows are encoded once. The token ids lie in an Arrow file in the cache of `datasets`, which all ranks of a
machine map into memory and which the next start finds again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
from opsd.provenance import dataset_fingerprint, versions

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

COLUMNS = ("problem", "solution")
# No tokenizer packs more characters than this into a token of prose; a longer row is over the limit
# unencoded.
CHARACTERS_PER_TOKEN = 64
ENCODING_BATCH = 512
LEFT_OUT = {
    "empty": "are left out: their problem or solution is null, empty or not text",
    "long": "are left out: a prompt has more than {limit} tokens",
}


@dataclass(frozen=True)
class Example:
    """One problem behind both prompts.

    Attributes:
        index: its row in the dataset as loaded; identifies the problem in rollout seeds and records.
        problem: the text.
        student_ids: token ids of the student's prompt.
        teacher_ids: token ids of the teacher's prompt.
    """

    index: int
    problem: str
    student_ids: list[int]
    teacher_ids: list[int]


class Problems(Dataset):
    """The usable problems. Items are their positions; the trainer looks the rest up with `example`.

    Attributes:
        table: the fields of `Example` as columns, token ids as int32 in memory-mapped Arrow arrays.
        sha256: of all rows as loaded (`opsd.provenance.dataset_fingerprint`).
    """

    def __init__(self, table: datasets.Dataset, sha256: str = ""):
        self.table, self.sha256 = table, sha256

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, position: int) -> int:
        return position

    def example(self, position: int) -> Example:
        """Return the problem at a position, its token ids as lists."""
        return Example(**self.table[position])

    @property
    def longest_student_prompt(self) -> int:
        """In tokens."""
        return self._longest("student_ids")

    @property
    def longest_prompt(self) -> int:
        """In tokens, over both roles."""
        return max(self._longest("student_ids"), self._longest("teacher_ids"))

    def _longest(self, column: str) -> int:
        import pyarrow.compute

        # Rows that are left out are in the file too, without tokens.
        return pyarrow.compute.max(pyarrow.compute.list_value_length(self.table.data[column])).as_py()


def check_columns(rows: datasets.Dataset, source: str) -> None:
    """Refuse a table without rows, or without the columns of `COLUMNS`. Raises ArtefactError."""
    missing = [column for column in COLUMNS if column not in rows.column_names]
    if missing:
        raise ArtefactError(
            f"the dataset {source!r} has no column {', '.join(missing)} (it has "
            f"{', '.join(rows.column_names)}); rename its columns to problem and solution"
        )
    if len(rows) == 0:
        raise ArtefactError(f"the dataset {source!r} has no rows; give one with problems")


def has_text(problem: object, solution: object) -> bool:
    """Whether both are text that is more than spaces."""
    return all(isinstance(value, str) and value.strip() for value in (problem, solution))


def warn_of_rows(numbers: Sequence[int], total: int, what: str) -> None:
    """Log one warning that counts rows and shows the first of them; nothing where there is none."""
    if len(numbers):
        shown = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
        logger.warning("%d of %d problems %s (rows %s)", len(numbers), total, what, shown)


def encode_problems(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str,
    max_prompt_length: int,
) -> Problems:
    """Encode every row behind both prompts, or find the file in which an earlier start or another rank did.

    Left out, with one counted warning for each reason, are rows without text and rows with a prompt of more
    than `max_prompt_length` tokens. A prompt is never truncated: half a reference solution is another
    teacher. Text that spells a control token stays text, which is counted in a warning too.

    Raises:
        ArtefactError: a missing column, no rows, or no usable one.
    """
    import datasets
    import pyarrow

    check_columns(rows, source)
    sha256 = dataset_fingerprint(rows.select_columns(list(COLUMNS)))
    key = _key(sha256, tokenizer, max_prompt_length)
    file = Path(datasets.config.HF_DATASETS_CACHE) / "pwopsd_prompts" / f"{key}.arrow"
    file.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"index": "int64", "problem": "string", "left_out": "string", "spells_control": "bool"}
    features = {name: datasets.Value(kind) for name, kind in kinds.items()}
    ids = datasets.List(datasets.Value("int32"))
    try:
        table = rows.map(
            _encode,
            with_indices=True,
            batched=True,
            batch_size=ENCODING_BATCH,
            fn_kwargs={"tokenizer": tokenizer, "limit": max_prompt_length},
            remove_columns=rows.column_names,
            features=datasets.Features(features | {"student_ids": ids, "teacher_ids": ids}),
            cache_file_name=str(file),
            load_from_cache_file=True,
            new_fingerprint=key,
            desc="encoding problems",
        )
    except pyarrow.ArrowInvalid as error:
        raise ArtefactError(
            f"{file} is damaged ({error}); delete it and run the same command again"
        ) from error
    reasons = {kind: reason.format(limit=max_prompt_length) for kind, reason in LEFT_OUT.items()}
    left_out = table["left_out"][:]
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
    """SHA-256 (hex) of everything that the token ids follow from; a tokenizer in Python matches nothing."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    code = [Path(file).read_text(encoding="utf-8") for file in (prompts.__file__, __file__)]
    parts = [
        sha256, limit, code, versions(), backend.to_str() if backend is not None else uuid.uuid4().hex,
        tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.split_special_tokens,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _encode(batch: dict, indices: list[int], *, tokenizer: PreTrainedTokenizerBase, limit: int) -> dict:
    """A batch of rows -> the columns of the cached file; texts and tokens of what is left out are empty."""
    count = len(indices)
    out = {
        "index": indices,
        "problem": [""] * count,
        "left_out": [""] * count,
        "spells_control": [False] * count,
        "student_ids": [[] for _ in indices],
        "teacher_ids": [[] for _ in indices],
    }
    kept = []
    for row, (problem, solution) in enumerate(zip(batch["problem"], batch["solution"], strict=True)):
        if not has_text(problem, solution):
            out["left_out"][row] = "empty"
        elif len(problem) + len(solution) > CHARACTERS_PER_TOKEN * limit:
            out["left_out"][row] = "long"
        else:
            kept.append((row, problem, solution))
    if not kept:
        return out
    students = [(student_message(p), render_student(tokenizer, p)) for _, p, _ in kept]
    teachers = [(teacher_message(p, s), render_teacher(tokenizer, p, s)) for _, p, s in kept]
    encoded = [encode_prompts(tokenizer, *zip(*pairs, strict=True)) for pairs in (students, teachers)]
    for (row, problem, _), (message, _), *ids in zip(kept, teachers, *encoded, strict=True):
        if max(map(len, ids)) > limit:
            out["left_out"][row] = "long"
            continue
        out["problem"][row], (out["student_ids"][row], out["teacher_ids"][row]) = problem, ids
        out["spells_control"][row] = spells_control_token(tokenizer, message)
    return out


def check_positions(problems: Problems, *, max_completion_length: int, positions: int | None) -> None:
    """Refuse prompts that together with a completion exceed the model's positions.

    Raises:
        UsageError: the longest prompt + completion does not fit `positions`; the remedy is named.
    """
    longest = problems.longest_prompt + max_completion_length
    if positions is not None and longest > positions:
        raise UsageError(
            f"the longest prompt ({problems.longest_prompt} tokens) + --max_completion_length "
            f"{max_completion_length} = {longest} exceeds the model's {positions} positions; lower "
            f"--max_length to {positions}"
        )
