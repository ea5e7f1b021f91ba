"""The diagnostic's problems, the forks along a student's rollout, and the tokens forced there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from opsd.data import LEFT_OUT, check_columns, has_text, warn_of_rows
from opsd.errors import ArtefactError
from opsd.evaluation.benchmarks import answer_text
from opsd.evaluation.grading import extract_boxed
from opsd.prompts import encode_student, encode_teacher
from opsd.seeds import hashed_seed
from opsd.tables import load_table

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from opsd.head import Head

# Positions that meet the LM head at once while scoring: two [C, V] float32 buffers, 0.15 GB at V = 151,936.
SCORE_CHUNK = 128


@dataclass(frozen=True)
class BranchProblem:
    """One problem behind both prompts (token ids), with its answer. `index` is its row in the dataset."""

    index: int
    problem: str
    answer: str
    student_ids: list[int]
    teacher_ids: list[int]


@dataclass(frozen=True)
class Alternative:
    """One of the teacher's next tokens; `rank` 1 is its likeliest. The scoring temperature applies."""

    rank: int
    token_id: int
    teacher_probability: float
    student_probability: float


@dataclass(frozen=True)
class Fork:
    """A place where branches leave the spine: they share its first `offset` tokens."""

    offset: int
    teacher_entropy: float  # nats
    student_entropy: float  # nats
    margin: float  # the teacher's largest probability minus its second largest
    kl: float  # Σ_v p_T [log p_T − log p_S], nats
    alternatives: list[Alternative]  # the teacher's top k, likeliest first


def load_problems(
    dataset: str, tokenizer: PreTrainedTokenizerBase, *, num_problems: int | None
) -> list[BranchProblem]:
    """Load the dataset's first problems with both prompts.

    The answer is the column `answer`, else the content of the last box of `solution`. Rows without text are
    left out with one counted warning.

    Raises:
        ArtefactError: no such dataset, a missing column, no row with text, or a problem without an answer.
    """
    rows = load_table(dataset)
    check_columns(rows, dataset)
    rows = rows.select(range(min(len(rows), num_problems or len(rows))))
    problems, left_out = [], []
    for index, row in enumerate(rows):
        if not has_text(row["problem"], row["solution"]):
            left_out.append(index)
            continue
        answer = answer_text(row.get("answer")) or extract_boxed(row["solution"])
        if not answer:
            raise ArtefactError(
                f"row {index} of {dataset!r} has neither an `answer` nor a \\boxed answer in its solution; "
                "a branch of it cannot be graded"
            )
        student_ids = encode_student(tokenizer, row["problem"])
        teacher_ids = encode_teacher(tokenizer, row["problem"], row["solution"])
        problems.append(BranchProblem(index, row["problem"], answer, student_ids, teacher_ids))
    warn_of_rows(left_out, len(rows), LEFT_OUT["empty"])
    if not problems:
        raise ArtefactError(f"no row of {dataset!r} has text in problem and solution; clean the dataset")
    return problems


def fork_offsets(length: int, count: int, *, seed: int, problem: int) -> list[int]:
    """Draw `count` offsets in 0..length−1, one in each of `count` equal stretches; all of a shorter spine.

    Evenly spaced offsets would meet a text with a period (a step every six tokens) always at the same phase.
    `length` counts the end-of-sequence, which is predicted and trained on too.
    """
    if length <= count:
        return list(range(length))
    drawn = random.Random(hashed_seed("fork", seed, problem, length, count))
    edges = [length * k // count for k in range(count + 1)]
    return [drawn.randrange(low, high) for low, high in pairwise(edges)]


@torch.no_grad()
def score_forks(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    offsets: Sequence[int],
    *,
    head: Head,
    temperature: float,
    top_k: int,
) -> list[Fork]:
    """Compute K forks from the states [K, H] that predict the tokens at `offsets` after each prompt.

    Args:
        temperature: divides both sides' logits, of which no more than `SCORE_CHUNK` rows exist at once.
        top_k: alternatives per fork; fewer where the vocabulary is smaller.
    """
    forks: list[Fork] = []
    for start in range(0, len(offsets), SCORE_CHUNK):
        span = slice(start, start + SCORE_CHUNK)
        # Log-probabilities, [C, V].
        student, teacher = (
            torch.log_softmax(head.logits(hidden[span]).float() / temperature, dim=-1)
            for hidden in (student_hidden, teacher_hidden)
        )
        top = teacher.topk(min(max(top_k, 2), teacher.shape[1]), dim=-1)
        kept = top.indices[:, :top_k]
        entropies = -_expectation(teacher, teacher), -_expectation(student, student)
        margin = top.values[:, 0].exp() - top.values[:, 1].exp()
        figures = torch.stack([*entropies, margin, _expectation(teacher, teacher - student)], dim=1).tolist()
        shares = torch.stack([teacher.gather(1, kept).exp(), student.gather(1, kept).exp()], dim=2).tolist()
        for offset, values, tokens, pairs in zip(offsets[span], figures, kept.tolist(), shares, strict=True):
            rows = enumerate(zip(tokens, pairs, strict=True), 1)
            alternatives = [Alternative(rank, token, *pair) for rank, (token, pair) in rows]
            forks.append(Fork(offset, *values, alternatives))
    return forks


def _expectation(log: Tensor, value: Tensor) -> Tensor:
    """Return Σ p·value over [C, V] with p = exp(log); where p is 0, so is the product, not NaN."""
    return torch.where(log.exp() > 0, log.exp() * value, 0.0).sum(-1)
