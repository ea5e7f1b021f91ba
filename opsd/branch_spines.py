"""Forks: the problems, where along a student's rollout branches leave it, and which tokens are forced."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from opsd.benchmarks import answer_text
from opsd.data import LEFT_OUT, check_columns, has_text, warn_of_rows
from opsd.errors import ArtefactError
from opsd.grading import extract_boxed
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
    """A place where branches leave the spine: they share its first `offset` tokens.

    Attributes:
        offset: how many spine tokens precede the forced one.
        teacher_entropy, student_entropy: H(p_T), H(p_S), nats.
        margin: the teacher's largest probability minus its second largest.
        kl: Σ_v p_T [log p_T − log p_S], nats.
        alternatives: the teacher's top k, likeliest first.
    """

    offset: int
    teacher_entropy: float
    student_entropy: float
    margin: float
    kl: float
    alternatives: list[Alternative]

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Fork:
        """Back from `as_dict`."""
        return cls(**{**fields, "alternatives": [Alternative(**a) for a in fields["alternatives"]]})


def load_problems(
    dataset: str, tokenizer: PreTrainedTokenizerBase, *, num_problems: int | None
) -> list[BranchProblem]:
    """The dataset's first problems with both prompts.

    The answer is the column `answer`, else the content of the last box of `solution`.

    Rows without text are left out with one counted warning.

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
        problems.append(
            BranchProblem(
                index,
                row["problem"],
                answer,
                encode_student(tokenizer, row["problem"]),
                encode_teacher(tokenizer, row["problem"], row["solution"]),
            )
        )
    warn_of_rows(left_out, len(rows), LEFT_OUT["empty"])
    if not problems:
        raise ArtefactError(f"no row of {dataset!r} has text in problem and solution; clean the dataset")
    return problems


def fork_offsets(length: int, count: int, *, seed: int, problem: int) -> list[int]:
    """`count` offsets in 0..length−1, one drawn in each of `count` equal stretches; all of a shorter spine.

    Drawn rather than evenly spaced: a text with a period (a step every six tokens) would otherwise be met at
    the same phase again and again.

    Args:
        length: tokens of the spine, its end-of-sequence included: that token is predicted and trained on too.
    """
    if length <= count:
        return list(range(length))
    drawn = random.Random(hashed_seed("fork", seed, problem, length, count))
    edges = [length * k // count for k in range(count + 1)]
    return [drawn.randrange(low, high) for low, high in pairwise(edges)]


def relative_position(offset: int, length: int) -> float:
    """f = (i − ½)/L of the token i = offset + 1 that is forced: the position the schedule weighs."""
    return (offset + 0.5) / length


def score_forks(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    offsets: Sequence[int],
    *,
    student_head: Head,
    teacher_head: Head,
    temperature: float,
    top_k: int,
) -> list[Fork]:
    """Forks from hidden states, in chunks: no more than `SCORE_CHUNK` rows of logits exist at once.

    Args:
        student_hidden: [K, H] states behind the student's prompt that predict the token at each offset.
        teacher_hidden: [K, H] the same behind the teacher's prompt.
        offsets: K offsets.
        temperature: divides both sides' logits.
        top_k: alternatives per fork; fewer where the vocabulary is smaller.
    """
    import torch

    forks: list[Fork] = []
    for start in range(0, len(offsets), SCORE_CHUNK):
        span = slice(start, start + SCORE_CHUNK)
        with torch.no_grad():
            student = torch.log_softmax(
                student_head.logits(student_hidden[span]).float() / temperature, dim=-1
            )
            teacher = torch.log_softmax(
                teacher_head.logits(teacher_hidden[span]).float() / temperature, dim=-1
            )
            forks += _forks(student, teacher, offsets[span], top_k)
    return forks


def _forks(student: Tensor, teacher: Tensor, offsets: Sequence[int], top_k: int) -> list[Fork]:
    """From log-probabilities [C, V]."""
    import torch

    teacher_p = teacher.exp()
    # A probability of 0 has log −inf: 0 · (−inf) is 0 in an entropy or a divergence, not NaN.
    held = teacher_p > 0
    entropy_t = -torch.where(held, teacher_p * teacher, 0.0).sum(-1)
    entropy_s = -torch.where(student.exp() > 0, student.exp() * student, 0.0).sum(-1)
    kl = torch.where(held, teacher_p * (teacher - student), 0.0).sum(-1)
    top = teacher.topk(min(max(top_k, 2), teacher.shape[1]), dim=-1)
    margin = top.values[:, 0].exp() - top.values[:, 1].exp()
    kept = top.indices[:, :top_k]
    columns = (
        entropy_t,
        entropy_s,
        margin,
        kl,
        kept,
        teacher_p.gather(1, kept),
        student.gather(1, kept).exp(),
    )
    return [
        Fork(
            offset,
            h_t,
            h_s,
            gap,
            divergence,
            [Alternative(r, *fields) for r, fields in enumerate(zip(ids, p_t, p_s, strict=True), start=1)],
        )
        for offset, h_t, h_s, gap, divergence, ids, p_t, p_s in zip(
            offsets, *(column.tolist() for column in columns), strict=True
        )
    ]
