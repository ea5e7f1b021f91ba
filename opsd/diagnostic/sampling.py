"""Draw spines, forks, forced branches and unforced controls, and record them as they finish.

Every draw has a hashed seed of its own: a resumed run gives the branches of the uninterrupted one, and any
continuation can be drawn again alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from opsd.diagnostic.config import BranchConfig
from opsd.diagnostic.spines import Alternative, BranchProblem, Fork, fork_offsets
from opsd.evaluation.grading import Grader, extract_boxed
from opsd.evaluation.journal import Journal
from opsd.rollout.engine import Completion, Request
from opsd.seeds import hashed_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from opsd.diagnostic.model import ModelBackend

# The branch number of a fork's control; forced alternatives have their rank, from 1.
CONTROL = 0
# Continuations in one engine call. Enough to fill any batch; their prompts stay a few hundred MB.
REQUESTS_PER_CALL = 8192

BranchKey = tuple[int, int, int]  # problem index, offset, branch number


@dataclass(frozen=True)
class Plan:
    """All that is settled before the first token."""

    config: BranchConfig
    problems: list[BranchProblem]
    tokenizer: PreTrainedTokenizerBase
    regime: dict[str, Any]  # identifies the run


@dataclass(frozen=True)
class Spine:
    """A student rollout, and the answer that it boxes last."""

    answer: str | None
    truncated: bool
    tokens: list[int]  # end-of-sequence included


@dataclass(frozen=True)
class Continued:
    """A continuation, and the answer boxed last in spine prefix + forced token + continuation."""

    answer: str | None
    truncated: bool
    tokens: int


@dataclass
class Branches:
    """All that was drawn. `continued[key][sample]`; keys are (problem, offset, branch number)."""

    spines: dict[int, Spine] = field(default_factory=dict)
    forks: dict[int, list[Fork]] = field(default_factory=dict)
    continued: dict[BranchKey, dict[int, Continued]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, record: dict) -> None:
        """Add one record of the journal."""
        kind, problem = record["kind"], record["problem"]
        if kind == "forks":
            for fork in record["forks"]:
                alternatives = [Alternative(**fields) for fields in fork["alternatives"]]
                self.forks.setdefault(problem, []).append(Fork(**fork | {"alternatives": alternatives}))
            return
        drawn = (record["answer"], record["truncated"], record["tokens"])
        if kind == "spine":
            self.spines[problem] = Spine(*drawn)
        else:
            key = (problem, record["offset"], record["branch"])
            self.continued[key][record["sample"]] = Continued(*drawn)


class Sampler:
    """Draws what the journal does not hold yet."""

    def __init__(self, plan: Plan, journal: Journal, backend: ModelBackend) -> None:
        self.config, self.tokenizer = plan.config, plan.tokenizer
        self.journal, self.backend = journal, backend
        self.problems = {problem.index: problem for problem in plan.problems}
        self.branches = Branches()
        for record in journal.records:
            self.branches.add(record)

    def run(self) -> Branches:
        """Draw spines, score their forks, continue every branch, apart from what the journal holds."""
        self._sample_spines()
        self._score_forks()
        self._continue_branches()
        self.journal.sync()
        return self.branches

    def _keep(self, record: dict) -> None:
        self.journal.append(record)
        self.branches.add(record)

    def _answer(self, token_ids: Sequence[int]) -> str | None:
        return extract_boxed(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _sample_spines(self) -> None:
        pending = [index for index in self.problems if index not in self.branches.spines]
        prompts = [self.problems[index].student_ids for index in pending]
        seeds = [hashed_seed("spine", self.config.seed, index) for index in pending]
        requests = list(map(Request, prompts, seeds))

        def finish(at: int, done: Completion) -> None:
            spine = Spine(self._answer(done.token_ids), done.truncated, list(done.token_ids))
            self._keep({"kind": "spine", "problem": pending[at], **asdict(spine)})
            bar.update()

        if pending:
            with _bar("spines", len(self.problems), len(pending)) as bar:
                self.backend.engine().generate(requests, self.config.sampling(), on_finish=finish)

    def _score_forks(self) -> None:
        pending = [index for index in self.problems if index not in self.branches.forks]
        if not pending:
            return
        # Neighbours in length share a batch.
        pending.sort(key=lambda index: len(self.branches.spines[index].tokens))
        size = self.config.hf_batch_size
        place = partial(fork_offsets, count=self.config.num_positions, seed=self.config.seed)
        with _bar("scoring", len(self.problems), len(pending)) as bar:
            for start in range(0, len(pending), size):
                batch = pending[start : start + size]
                spines = [self.branches.spines[index].tokens for index in batch]
                offsets = [place(len(spine), problem=k) for k, spine in zip(batch, spines, strict=True)]
                scored = self.backend.score([self.problems[index] for index in batch], spines, offsets)
                for index, forks in zip(batch, scored, strict=True):
                    self._keep({"kind": "forks", "problem": index, "forks": [asdict(f) for f in forks]})
                bar.update(len(batch))
        self.backend.scoring_done()

    def _continue_branches(self) -> None:
        every = [
            (problem, fork.offset, branch, sample, token)
            for problem, forks in sorted(self.branches.forks.items())
            for fork in forks
            for branch, token in [(CONTROL, None), *((a.rank, a.token_id) for a in fork.alternatives)]
            for sample in range(self.config.continuations)
        ]
        pending = [work for work in every if work[3] not in self.branches.continued[work[:3]]]
        if pending:
            with _bar("continuations", len(every), len(pending)) as bar:
                for start in range(0, len(pending), REQUESTS_PER_CALL):
                    self._continue(pending[start : start + REQUESTS_PER_CALL], bar)

    def _continue(self, pending: Sequence[tuple[int, int, int, int, int | None]], bar: tqdm) -> None:
        """Draw continuations: (problem, offset, branch, sample number, token forced there)."""
        engine, seed = self.backend.engine(), self.config.seed
        work: list[tuple[tuple[int, ...], list[int]]] = []
        requests = []

        def keep(key: tuple[int, ...], prefix: list[int], done: Completion) -> None:
            names = dict(zip(("problem", "offset", "branch", "sample"), key, strict=True))
            answer = self._answer([*prefix, *done.token_ids])
            continued = Continued(answer, done.truncated, len(done.token_ids))
            self._keep({"kind": "continuation", **names, **asdict(continued)})
            bar.update()

        for *key, token in pending:
            problem, offset = key[:2]
            prefix = [*self.branches.spines[problem].tokens[:offset], *([] if token is None else [token])]
            if token in engine.end_ids:
                # A forced end-of-sequence leaves nothing to continue.
                keep(key, prefix, Completion([], False))
                continue
            work.append((key, prefix))
            prompt = [*self.problems[problem].student_ids, *prefix]
            requests.append(Request(prompt, hashed_seed("branch", seed, *key)))
        if requests:
            sampling = self.config.sampling()
            engine.generate(requests, sampling, on_finish=lambda at, done: keep(*work[at], done))


def _bar(title: str, total: int, pending: int) -> tqdm:
    return tqdm(total=total, initial=total - pending, desc=title, mininterval=1)


def grade_branches(
    branches: Branches, problems: Sequence[BranchProblem], grader: Grader
) -> dict[tuple[int, str], bool]:
    """Grade each distinct answer of each problem: {(problem, answer): it recovers the gold answer}."""
    gold = {problem.index: problem.answer for problem in problems}
    answers = {(index, spine.answer) for index, spine in branches.spines.items()}
    answers |= {(key[0], done.answer) for key, some in branches.continued.items() for done in some.values()}
    pairs = sorted(pair for pair in answers if pair[1] is not None)
    verdicts = grader.equivalent([(gold[problem], answer) for problem, answer in pairs])
    return dict(zip(pairs, verdicts, strict=True))
