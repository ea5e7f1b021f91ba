"""The training set: problems with reference solutions, encoded behind the student's and the teacher's
prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.utils.data import Dataset
from tqdm import tqdm

from opsd.errors import ArtefactError, UsageError
from opsd.prompts import encode_rendered, render_student, render_teacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

COLUMNS = ("problem", "solution")
# No tokenizer packs more characters than this into a token of prose; a longer row is over the limit
# unencoded.
CHARACTERS_PER_TOKEN = 64
ENCODING_BATCH = 512


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
    """The usable problems. Items are their positions in `examples`; the trainer looks the rest up itself."""

    def __init__(self, examples: Sequence[Example]):
        self.examples = list(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, position: int) -> int:
        return position

    @property
    def longest_student_prompt(self) -> int:
        """In tokens."""
        return max(len(example.student_ids) for example in self.examples)

    @property
    def longest_prompt(self) -> int:
        """In tokens, over both roles."""
        return max(max(len(e.student_ids), len(e.teacher_ids)) for e in self.examples)


def check_rows(rows, source: str) -> None:
    """Refuse a table that cannot be trained on.

    Raises:
        ArtefactError: a missing column, no rows, or a row whose problem or solution is null, empty or not
        text;
            the row and column are named.
    """
    missing = [column for column in COLUMNS if column not in rows.column_names]
    if missing:
        raise ArtefactError(
            f"the dataset {source!r} has no column {', '.join(missing)} (it has "
            f"{', '.join(rows.column_names)}); "
            "rename its columns to problem and solution"
        )
    if len(rows) == 0:
        raise ArtefactError(f"the dataset {source!r} has no rows")
    for column in COLUMNS:
        for index, value in enumerate(rows[column]):
            if not isinstance(value, str):
                kind = "null" if value is None else type(value).__name__
                raise ArtefactError(
                    f"row {index} of {source!r}: {column} is {kind}, not text; clean the dataset"
                )
            if not value.strip():
                raise ArtefactError(f"row {index} of {source!r}: {column} is empty; remove the row")


def encode_problems(
    rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str,
    max_prompt_length: int,
    show_progress: bool = True,
) -> Problems:
    """Encode every row behind both prompts; leave out the ones whose prompt exceeds `max_prompt_length`
    tokens.

    A prompt is never truncated: half a reference solution is another teacher. What is left out is counted in
    one warning.

    Raises:
        ArtefactError: as `check_rows`, or no problem is short enough.
    """
    check_rows(rows, source)
    examples, skipped = [], []
    with tqdm(
        total=len(rows), desc="encoding problems", disable=not show_progress, mininterval=1
    ) as progress:
        for start in range(0, len(rows), ENCODING_BATCH):
            batch = rows[start : start + ENCODING_BATCH]
            _encode_batch(start, batch, tokenizer, max_prompt_length, examples, skipped)
            progress.update(len(batch["problem"]))
    if skipped:
        shown = ", ".join(map(str, skipped[:5])) + (", …" if len(skipped) > 5 else "")
        logger.warning(
            "%d of %d problems are left out: a prompt has more than %d tokens (rows %s)",
            len(skipped),
            len(rows),
            max_prompt_length,
            shown,
        )
    if not examples:
        raise ArtefactError(
            f"no problem of {source!r} has prompts of at most {max_prompt_length} tokens; raise --max_length"
        )
    return Problems(examples)


def _encode_batch(start, batch, tokenizer, max_prompt_length: int, examples: list, skipped: list) -> None:
    pairs = list(zip(range(start, start + ENCODING_BATCH), batch["problem"], batch["solution"], strict=False))
    room = CHARACTERS_PER_TOKEN * max_prompt_length
    skipped += [index for index, problem, solution in pairs if len(problem) + len(solution) > room]
    pairs = [pair for pair in pairs if len(pair[1]) + len(pair[2]) <= room]
    if not pairs:
        return
    student = encode_rendered(tokenizer, [render_student(tokenizer, problem) for _, problem, _ in pairs])
    teacher = encode_rendered(tokenizer, [render_teacher(tokenizer, p, s) for _, p, s in pairs])
    for (index, problem, _), student_ids, teacher_ids in zip(pairs, student, teacher, strict=True):
        if max(len(student_ids), len(teacher_ids)) > max_prompt_length:
            skipped.append(index)
        else:
            examples.append(Example(index, problem, student_ids, teacher_ids))


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
