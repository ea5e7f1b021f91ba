"""branch_viability.py from flags to report: worlds of known answer, a real model, kills, wrong calls."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import branch_viability
from opsd.diagnostic import run as branch_run
from opsd.diagnostic.analysis import PREDICTORS
from opsd.diagnostic.config import BranchConfig
from opsd.diagnostic.model import ModelBackend
from opsd.diagnostic.run import carry_out
from opsd.diagnostic.sampling import CONTROL, Branches, Plan
from opsd.diagnostic.spines import Alternative, BranchProblem, Fork, fork_offsets, load_problems
from opsd.errors import ArtefactError, UsageError
from opsd.evaluation.journal import decode_line
from opsd.models import load_causal_lm, load_tokenizer
from opsd.prompts import encode_student, encode_teacher
from opsd.rollout.engine import Completion, Request
from opsd.rollout.hf import HFEngine
from opsd.seeds import hashed_seed
from tests.evaluation.eval_world import make_tokenizer
from tests.rollout.vllm_models import SEVEN, needs_vllm

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "testbed" / "base_model"
HELDOUT = ROOT / "testbed" / "data" / "heldout.jsonl"


class KnownBackend:
    """Engine and scorer in one: success depends on the position alone, as `chance(f, forced)` says.

    Scores are noise. Forced tokens are letters that no spine holds: that tells a branch from a control.
    """

    end_ids = frozenset({1})

    def __init__(self, problems: list[BranchProblem], tokenizer, config: BranchConfig, chance, *, limit=None):
        self.by_prompt = {tuple(p.student_ids): p for p in problems}
        self.tokenizer, self.chance, self.config = tokenizer, chance, config
        self.lengths = {p.index: random.Random(p.index).randrange(24, 60) for p in problems}
        self.spine_seeds = {hashed_seed("spine", config.seed, p.index) for p in problems}
        self.letters = tokenizer.encode("xyz")
        self.limit, self.seeds = limit, []

    def engine(self):
        return self

    def close(self):
        pass

    def scoring_done(self):
        pass

    def generate(self, requests, sampling, *, want_logprobs=False, on_finish=None):
        for index, request in enumerate(requests):
            if self.limit is not None and len(self.seeds) >= self.limit:
                raise KeyboardInterrupt
            self.seeds.append(request.seed)
            on_finish(index, self._complete(list(request.prompt_ids), request.seed))
        return []

    def _complete(self, prompt: list[int], seed: int) -> Completion:
        size = next(n for n in range(len(prompt), 0, -1) if tuple(prompt[:n]) in self.by_prompt)
        problem = self.by_prompt[tuple(prompt[:size])]
        length = self.lengths[problem.index]
        if seed in self.spine_seeds:
            text = self.tokenizer.encode("a" * (length - 2))
            return Completion([*text, *self._box(problem.answer), 1], False)
        prefix = prompt[size:]
        forced = bool(prefix) and prefix[-1] in self.letters
        f = (len(prefix) - forced + 0.5) / length
        right = random.Random(seed).random() < self.chance(f, forced)
        return Completion([*self._box(problem.answer if right else "9"), 1], False)

    def _box(self, answer: str) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids(f"\\boxed{{{answer}}}")]

    def score(self, problems, spines, offsets):
        return [
            [self._fork(problem.index, offset) for offset in some]
            for problem, some in zip(problems, offsets, strict=True)
        ]

    def _fork(self, problem: int, offset: int) -> Fork:
        draw = random.Random(f"{problem}/{offset}")
        shares = sorted((draw.random() for _ in self.letters), reverse=True)
        alternatives = [
            Alternative(rank, token, share / 3, draw.random() / 30)
            for rank, (token, share) in enumerate(zip(self.letters, shares, strict=True), start=1)
        ]
        return Fork(offset, draw.random(), draw.random(), draw.random(), draw.random(), alternatives[:2])


def known_plan(folder: Path, *, problems: int = 40, **settings) -> Plan:
    tokenizer = make_tokenizer()
    fields = {"num_positions": 6, "top_k": 2, "continuations": 8, "resamples": 300, "grading_workers": 1}
    names = {"model_name_or_path": "known", "dataset": "known", "output_dir": str(folder), "engine": "hf"}
    config = BranchConfig(**names, **(fields | settings))
    made = []
    for k in range(problems):
        text = f"what is {k}+0?"
        prompts = encode_student(tokenizer, text), encode_teacher(tokenizer, text, "0")
        made.append(BranchProblem(k, text, str(k % 9), *prompts))
    names = ("num_positions", "top_k", "continuations", "seed")
    regime = {name: getattr(config, name) for name in names} | {"num_problems": problems}
    return Plan(config, made, tokenizer, regime)


def run_known(plan: Plan, chance, **options):
    backend = KnownBackend(plan.problems, plan.tokenizer, plan.config, chance, **options)
    return carry_out(plan, lambda: backend), backend


def records_of(folder: Path) -> list[dict]:
    lines = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    return [decode_line(line) for line in lines]


def figure(analysis, column: str, which: str):
    return analysis.subsets[0].aurocs[column][which]


NOISE = ("teacher_entropy", "student_entropy", "margin", "kl", "teacher_probability", "student_probability")


def test_position_alone_decides(tmp_path):
    """Everything behind the middle succeeds, forced or not: AUROC 1 for position, 0.5 for noise, and the
    control says that no forced token mattered."""
    analysis, _ = run_known(known_plan(tmp_path), lambda f, forced: float(f >= 0.5))
    assert figure(analysis, "relative_position", "absolute").value == 1.0
    assert figure(analysis, "relative_position", "absolute").low == 1.0
    for column in NOISE:
        estimate = figure(analysis, column, "absolute")
        assert abs(estimate.value - 0.5) < 0.08, column
        assert estimate.low < 0.5 < estimate.high, column
    assert analysis.subsets[0].ties == 1.0
    assert figure(analysis, "relative_position", "relative").value is None
    assert figure(analysis, "relative_position", "graded").value is None
    assert [point.success.value for point in analysis.curve] == pytest.approx([0.0] * 5 + [1.0] * 5)
    assert [point.control.value for point in analysis.curve] == pytest.approx([0.0] * 5 + [1.0] * 5)


def test_the_forced_token_decides(tmp_path):
    """The control succeeds half of the time everywhere: relative viability finds the position too."""
    analysis, _ = run_known(known_plan(tmp_path), lambda f, forced: float(f >= 0.5) if forced else 0.5)
    assert figure(analysis, "relative_position", "relative").value > 0.99
    # Of two branches on one side of the middle, chance says which differs more from its control.
    assert figure(analysis, "relative_position", "graded").value == pytest.approx(0.77, abs=0.05)
    assert abs(figure(analysis, "teacher_entropy", "relative").value - 0.5) < 0.08
    # The teacher's early choices fail, so less weight there is predicted to help.
    early, late = analysis.decision.early, analysis.decision.late
    assert early.high < 0 < late.low
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "**PW-OPSD (Moderate) is predicted better than OPSD**: where the schedule takes" in text
    assert early.text(digits=3) in text


def test_teacher_and_student_alike_is_the_null(tmp_path):
    """A forced token that is worth what the student's own is: position predicts success, and nothing predicts
    success beyond the control's."""
    plan = known_plan(tmp_path, problems=60, suggest_schedule=True)
    analysis, _ = run_known(plan, lambda f, forced: f)
    assert figure(analysis, "relative_position", "absolute").low > 0.8
    for column in ("relative_position", "position", *NOISE):
        for which in ("relative", "graded"):
            assert abs(figure(analysis, column, which).value - 0.5) < 0.09, (column, which)
    relative = figure(analysis, "relative_position", "relative")
    assert relative.low < 0.5 < relative.high
    assert analysis.decision.early.low < 0 < analysis.decision.early.high
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "These 60 problems do not determine the schedule, and recommend none. Open: whether" in text
    assert "is predicted not told apart from OPSD" in text
    assert "is not told apart from chance" in text
    assert "Relative position predicts it" in text


def test_the_table_holds_every_column_and_the_doc_names_them(tmp_path):
    plan = known_plan(tmp_path, problems=4)
    run_known(plan, lambda f, forced: 0.7 if forced else 0.2)
    table = pd.read_csv(tmp_path / "branches.csv")
    assert table.equals(pd.read_parquet(tmp_path / "branches.parquet").astype(table.dtypes))
    assert len(table) == 4 * 6 * 2
    assert not table.isna().any().any()
    assert set(PREDICTORS) <= set(table.columns)
    documented = re.findall(
        r"^\| `(\w+)` \|", (ROOT / "docs" / "branch_viability.md").read_text("utf-8"), re.M
    )
    assert documented == list(table.columns)
    assert (table["relative_position"] == (table["position"] - 0.5) / table["spine_tokens"]).all()
    assert np.allclose(table["viability"] - table["control_viability"], table["relative_viability"])
    assert (table["viable"] == (table["viability"] >= 0.5)).all()
    # The control belongs to the fork: all its branches are compared with the same continuations.
    assert (table.groupby(["problem", "position"])["control_viability"].nunique() == 1).all()
    assert table["spine_correct"].all()
    assert not table["is_spine_token"].any()
    assert (tmp_path / "viability_vs_position.png").read_bytes().startswith(b"\x89PNG")


def test_viability_is_what_the_journal_says(tmp_path):
    """Counted by hand from the journal's answers, branches and controls alike."""
    plan = known_plan(tmp_path, problems=3)
    run_known(plan, lambda f, forced: 0.6)
    found = [r for r in records_of(tmp_path) if r.get("kind") == "continuation"]
    table = pd.read_csv(tmp_path / "branches.csv")
    assert len(found) == 3 * 6 * (2 + 1) * 8
    for row in table.itertuples():
        for branch, column in ((row.rank, row.viability), (CONTROL, row.control_viability)):
            key = (row.problem, row.position - 1, branch)
            answers = [r["answer"] for r in found if (r["problem"], r["offset"], r["branch"]) == key]
            assert len(answers) == 8
            assert column == sum(answer == str(row.problem % 9) for answer in answers) / 8


def chance(f, forced):
    return 0.3 + 0.5 * f * forced


@pytest.mark.parametrize("share", ["interrupt", 0.001, 0.03, 0.5, 0.97])
def test_a_killed_run_is_resumed_to_the_same_branches(tmp_path, share):
    """Killed at any byte: what is there is kept, the rest is drawn, the table is the uninterrupted run's."""
    complete, cut = tmp_path / "complete", tmp_path / "cut"
    run_known(known_plan(complete, problems=5), chance)
    journal = (complete / "journal.jsonl").read_bytes()
    if share == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            run_known(known_plan(cut, problems=5), chance, limit=300)
        assert not (cut / "report.md").exists()
    else:
        cut.mkdir()
        (cut / "journal.jsonl").write_bytes(journal[: int(len(journal) * share)])
    _, backend = run_known(known_plan(cut, problems=5), chance)
    drawn = len(backend.seeds)
    assert (cut / "branches.csv").read_bytes() == (complete / "branches.csv").read_bytes()
    everything = 5 + 5 * 6 * 3 * 8
    assert drawn == everything - 300 if share == "interrupt" else 0 < drawn <= everything
    # What is there is kept, and every draw has a seed of its own.
    assert share in ("interrupt", 0.001) or drawn < everything
    assert len(set(backend.seeds)) == drawn


def test_a_finished_run_is_analysed_anew_without_sampling(tmp_path):
    run_known(known_plan(tmp_path, problems=12), chance)
    analysis, backend = run_known(known_plan(tmp_path, problems=12, viable_share=0.9, resamples=50), chance)
    assert backend.seeds == []
    assert analysis.subsets[0].viable < 0.2


@pytest.mark.parametrize("field", [{"top_k": 3}, {"continuations": 4}, {"seed": 1}, {"num_positions": 5}])
def test_another_runs_journal_is_refused(tmp_path, field):
    run_known(known_plan(tmp_path, problems=2), chance)
    before = (tmp_path / "journal.jsonl").read_bytes()
    with pytest.raises(UsageError, match=next(iter(field))):
        run_known(known_plan(tmp_path, problems=2, **field), chance)
    assert (tmp_path / "journal.jsonl").read_bytes() == before


def test_a_forced_end_is_not_continued(tmp_path):
    """The prefix must hold the answer by then; the engine is not asked."""
    plan = known_plan(tmp_path, problems=3)
    forced = plan.tokenizer.convert_tokens_to_ids("x")

    class Ending(KnownBackend):
        end_ids = frozenset({1, forced})

    backend = Ending(plan.problems, plan.tokenizer, plan.config, lambda f, forced: 1.0)
    carry_out(plan, lambda: backend)
    table = pd.read_csv(tmp_path / "branches.csv")
    ended = table[table["token_id"] == forced]
    assert len(ended) == 3 * 6
    # Only behind the spine's own box does a prefix hold an answer.
    held = ended["position"] > ended["spine_tokens"] - 1
    assert (ended["viability"] == held.astype(float)).all()
    assert (table[table["token_id"] != forced]["viability"] == 1.0).all()
    assert len(backend.seeds) == 3 + 3 * 6 * 2 * 8


@given(st.integers(1, 400), st.integers(1, 40), st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_one_fork_in_each_equal_stretch(length, count, seed, problem):
    offsets = fork_offsets(length, count, seed=seed, problem=problem)
    assert offsets == fork_offsets(length, count, seed=seed, problem=problem)
    count = min(length, count)
    edges = [length * k // count for k in range(count + 1)]
    assert all(low <= o < high for o, low, high in zip(offsets, edges[:-1], edges[1:], strict=True))


def test_forks_reach_every_place_of_a_spine():
    seen = {o for problem in range(400) for o in fork_offsets(30, 3, seed=0, problem=problem)}
    assert seen == set(range(30))


def test_the_answer_is_the_column_or_the_solutions_last_box(tmp_path):
    tokenizer = make_tokenizer()
    rows = [
        {"problem": "1+1", "solution": r"\boxed{3} no, \boxed{2}", "answer": None},
        {"problem": "2+2", "solution": r"\boxed{5}", "answer": "4"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [p.answer for p in load_problems(str(path), tokenizer, num_problems=None)] == ["2", "4"]
    assert len(load_problems(str(path), tokenizer, num_problems=1)) == 1
    path.write_text(json.dumps({"problem": "1+1", "solution": "two"}) + "\n")
    with pytest.raises(ArtefactError, match=r"row 0 of .* has neither"):
        load_problems(str(path), tokenizer, num_problems=None)


def command(folder: Path, **flags) -> list[str]:
    given = {"model_name_or_path": BASE, "dataset": HELDOUT, "output_dir": folder, "engine": "hf"}
    given |= {"num_problems": 3, "num_positions": 3, "top_k": 2, "continuations": 2, "max_new_tokens": 100}
    given |= {"resamples": 50, "grading_workers": 1} | flags
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The small world's base model under the real command line, with few forks."""
    folder = tmp_path_factory.mktemp("real")
    assert branch_viability.main([*command(folder), "--suggest_schedule"]) == 0
    return folder


@pytest.fixture(scope="module")
def model():
    return load_causal_lm(str(BASE), dtype=torch.float32).eval()


def journal_of(folder: Path) -> Branches:
    branches = Branches()
    for record in records_of(folder):
        if "kind" in record:
            branches.add(record)
    return branches


def test_the_real_run_writes_its_files(real):
    names = "branches.csv branches.parquet report.md viability_vs_position.png journal.jsonl"
    assert set(names.split()) <= {path.name for path in real.iterdir()}
    report = (real / "report.md").read_text("utf-8")
    assert "3 problems, one spine each" in report
    assert "too few problems for a prediction" in report
    assert "3 problems are too few for any interval" in report or "No schedule gains anything" in report
    assert "branch_viability.py --model_name_or_path" in report


@torch.no_grad()
def test_the_figures_of_a_fork_are_those_of_a_plain_forward_pass(real, model):
    """Every recorded probability, entropy and divergence, from full logits of one unpadded sequence."""
    tokenizer = load_tokenizer(str(BASE))
    problems = load_problems(str(HELDOUT), tokenizer, num_problems=3)
    spines = journal_of(real).spines
    table = pd.read_csv(real / "branches.csv")
    for row in table.itertuples():
        problem, offset = problems[row.problem], row.position - 1
        prefix = spines[row.problem].tokens[:offset]
        student, teacher = (
            torch.log_softmax(model(torch.tensor([[*ids, *prefix]])).logits[0, -1].double() / 1.1, dim=-1)
            for ids in (problem.student_ids, problem.teacher_ids)
        )
        token = int(teacher.topk(2).indices[row.rank - 1])
        top = teacher.topk(2).values.exp()
        expected = {
            "token_id": token,
            "teacher_probability": float(teacher[token].exp()),
            "student_probability": float(student[token].exp()),
            "teacher_entropy": float(-(teacher.exp() * teacher).sum()),
            "student_entropy": float(-(student.exp() * student).sum()),
            "margin": float(top[0] - top[1]),
            "kl": float((teacher.exp() * (teacher - student)).sum()),
            "spine_tokens": len(spines[row.problem].tokens),
            "is_spine_token": token == spines[row.problem].tokens[offset],
        }
        for name, value in expected.items():
            assert getattr(row, name) == pytest.approx(value, abs=2e-4), (name, row)


def test_any_continuation_can_be_drawn_again_alone(real, model):
    """Student's prompt + spine prefix + forced token and the hashed seed give the recorded answer."""
    tokenizer = load_tokenizer(str(BASE))
    problems = load_problems(str(HELDOUT), tokenizer, num_problems=3)
    branches = journal_of(real)
    engine = HFEngine(model, tokenizer, batch_size=1)
    config = BranchConfig(model_name_or_path="", dataset="", output_dir="", max_new_tokens=100)
    wanted = [(2, branches.forks[2][1], 0), (1, branches.forks[1][0], 2)]
    for problem, fork, rank in wanted:
        forced = [] if rank == CONTROL else [fork.alternatives[rank - 1].token_id]
        prefix = [*branches.spines[problem].tokens[: fork.offset], *forced]
        seed = hashed_seed("branch", 0, problem, fork.offset, rank, 1)
        request = Request([*problems[problem].student_ids, *prefix], seed)
        (completion,) = engine.generate([request], config.sampling())
        recorded = branches.continued[problem, fork.offset, rank][1]
        assert recorded.tokens == len(completion.token_ids)
        text = tokenizer.decode([*prefix, *completion.token_ids], skip_special_tokens=True)
        boxes = re.findall(r"\\boxed\{([^{}]*)\}", text)
        assert recorded.answer == (boxes[-1] if boxes else None)


def test_a_real_run_is_continued_to_the_same_table(real, tmp_path, capsys):
    """Cut in the middle of a line, with another batch size, under the real command line."""
    journal = (real / "journal.jsonl").read_bytes()
    (tmp_path / "journal.jsonl").write_bytes(journal[: int(len(journal) * 0.8)])
    assert branch_viability.main(command(tmp_path, hf_batch_size=5)) == 0
    assert (tmp_path / "branches.csv").read_bytes() == (real / "branches.csv").read_bytes()
    assert "AUROC of relative position" in capsys.readouterr().out


@torch.no_grad()
def test_with_an_adapter_the_teacher_is_the_base():
    """The student's figures are the adapted model's, the teacher's those of the base alone."""
    from tests.rollout.vllm_models import with_adapter

    tokenizer = load_tokenizer(str(BASE))
    (problem,) = load_problems(str(HELDOUT), tokenizer, num_problems=1)
    adapted = with_adapter(load_causal_lm(str(BASE), dtype=torch.float32), SEVEN, seed=3)
    spine = tokenizer.encode("First, 31+18=49.", add_special_tokens=False)
    settings = {"engine": "hf", "score_temperature": 1.0, "top_k": 2}
    config = BranchConfig(model_name_or_path="", dataset="", output_dir="", **settings)
    backend = ModelBackend(config, tokenizer, longest=64)
    backend._model = adapted
    ((fork,),) = backend.score([problem], [spine], [[2]])

    def entropy(model, ids):
        log = torch.log_softmax(model(torch.tensor([[*ids, *spine[:2]]])).logits[0, -1], dim=-1)
        return float(-(log.exp() * log).sum())

    assert fork.student_entropy == pytest.approx(entropy(adapted, problem.student_ids), abs=1e-4)
    with adapted.disable_adapter():
        base = entropy(adapted, problem.teacher_ids)
    assert fork.teacher_entropy == pytest.approx(base, abs=1e-4)
    assert fork.teacher_entropy != pytest.approx(entropy(adapted, problem.teacher_ids), abs=1e-2)


@needs_vllm
@pytest.mark.vllm
def test_vllm_samples_and_a_second_copy_scores(tmp_path):
    """The same flags under vLLM: spines and continuations of its own, scored at the same temperature."""
    assert branch_viability.main(command(tmp_path, engine="vllm", num_problems=2, dtype="float32")) == 0
    table = pd.read_csv(tmp_path / "branches.csv")
    assert len(table) == 2 * 3 * 2
    assert not table.isna().any().any()
    branches = journal_of(tmp_path)
    assert all(spine.tokens and not spine.truncated for spine in branches.spines.values())
    assert all(len(samples) == 2 for samples in branches.continued.values())
    # A finished run needs no engine: the command may be given again with the other one.
    assert branch_viability.main(command(tmp_path, engine="hf", num_problems=2)) == 0


def test_one_context_for_both_roles_and_a_copy_that_is_freed_beside_vllm():
    """One prompt for both roles gives KL 0 and equal probabilities; only hf samples from the scoring copy."""
    config = BranchConfig(model_name_or_path=str(BASE), dataset="", output_dir="", engine="hf", top_k=2)
    backend = ModelBackend(config, load_tokenizer(str(BASE)), longest=64)
    ids = encode_student(backend.tokenizer, "Compute 31+18-13+41+20.")
    ((fork, _),) = backend.score([BranchProblem(0, "", "", ids, ids)], [[5, 6, 7, 8]], [[1, 3]])
    assert fork.kl == 0.0
    assert fork.student_entropy == fork.teacher_entropy
    assert all(a.student_probability == a.teacher_probability for a in fork.alternatives)
    backend.scoring_done()
    assert backend._model is not None
    backend.config = dataclasses.replace(config, engine="vllm")
    backend.scoring_done()
    assert backend._model is None
    backend.close()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_positions", -1, "--num_positions is -1, but must be at least 1"),
        ("seed", -1, "--seed is -1"),
        ("resamples", 19, "--resamples is 19"),
        ("score_temperature", "nan", "--score_temperature is nan"),
        ("viable_share", 0, r"--viable_share is 0.0, but must be in \(0, 1\]"),
        ("engine", "onnx", "--engine is 'onnx', but must be one of hf, vllm"),
        ("tensor_parallel_size", 2, "--tensor_parallel_size needs --engine vllm"),
        ("rollout_top_p", 0, "top_p is 0.0"),
        ("max_new_tokens", 0, "max_new_tokens is 0"),
        ("max_new_tokens", 100000, "lower --max_new_tokens"),
        ("output_dir", HELDOUT / "x", "is a file"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_loaded(tmp_path, monkeypatch, name, value, message):
    monkeypatch.setattr(branch_run, "ModelBackend", None)
    with pytest.raises(UsageError, match=message):
        branch_viability.main(command(tmp_path / "new", **{name: value}))
    assert not (tmp_path / "new").exists()
