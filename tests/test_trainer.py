"""Real training of the small world's base model, a few steps of each method, with transformers' sampling."""

from __future__ import annotations

import json
import math
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import opsd.trainer
from opsd.arguments import parse_arguments
from opsd.checkpoints import incompleteness
from opsd.objectives import METHODS
from opsd.prompts import encode_student, encode_teacher
from opsd.records import read_metrics
from opsd.rollout.engine import Completion, Request
from opsd.rollout.hf import HFEngine
from opsd.seeds import rollout_seed
from opsd.step_metrics import StepMetrics
from opsd.trainer import OPSDTrainer
from opsd.training import train
from tests.test_token_stats import dense_loss

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "testbed" / "base_model"


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


ROWS = read_lines(ROOT / "testbed" / "data" / "train.jsonl")[:24]

SMALL = (
    "--rollout hf --bf16 false --use_cpu true --gradient_checkpointing false --disable_tqdm true "
    "--max_length 1000 --max_completion_length 16 --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps 2 --learning_rate 1e-3 --max_steps 3 --save_steps 3 "
    "--eopd_entropy_threshold 0.02 --reopold_t_switch 1"
)


def run(tmp_path: Path, method: str, *flags: str, inside=None, name: str = "run"):
    """The real training, from flags to checkpoints; `inside` gets the trainer in place of `Trainer.train`.

    Returns (output folder, what `inside` returned).
    """
    tmp_path.mkdir(exist_ok=True)
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    places = ["--model_name_or_path", str(BASE), "--output_dir", str(tmp_path / name)]
    places += ["--train_dataset", str(table), "--method", method]
    training, arguments, rollout, options = parse_arguments([*places, *SMALL.split(), *flags])

    class Opened(OPSDTrainer):
        outcome = None

        def train(self, **kwargs):
            type(self).outcome = (inside or OPSDTrainer.train)(self)

    patch = pytest.MonkeyPatch()
    patch.setattr(opsd.trainer, "OPSDTrainer", Opened)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    try:
        assert train(training, arguments, rollout, options) == 0
    finally:
        patch.undo()
    return tmp_path / name, Opened.outcome


def adapter(model) -> dict[str, torch.Tensor]:
    """Copies of the LoRA parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def fresh_base(dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype).eval()


def score(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """[L, V] logits of one sequence alone, by the model's ordinary forward pass."""
    return model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]


@torch.no_grad()
def independent_loss(trainer, teacher, batch) -> float:
    """The micro-batch's loss from full logits of each sequence alone, by the dense form."""
    tokenizer = trainer.processing_class
    students, teachers, ids = [], [], []
    for example, completion in zip(batch.examples, batch.completions, strict=True):
        row, tokens = ROWS[example.index], completion.token_ids
        students.append(score(trainer.model, encode_student(tokenizer, row["problem"]), tokens))
        teachers.append(score(teacher, encode_teacher(tokenizer, row["problem"], row["solution"]), tokens))
        ids.append(torch.tensor(tokens))
    name = next(name for name, method in METHODS.items() if method == trainer.method)
    flat, lengths = [torch.cat(rows) for rows in (students, teachers, ids)], [len(row) for row in ids]
    return float(dense_loss(name, *flat, lengths, hyper=trainer.hyper, step=trainer.state.global_step))


COMMON_KEYS = {
    "step", "epoch", "loss", "grad_norm", "learning_rate", "loss/objective", "loss/sampled_divergence",
    "student/entropy", "teacher/entropy", "student/padded_over_valid", "teacher/padded_over_valid",
    "rollout/completion_tokens", "rollout/completion_tokens_max", "rollout/truncated_share",
    "rollout/outside_support_share", "rollout/logprob_difference",
    "rollout/logprob_difference_base", "rollout/staleness",
    "time/push_s", "time/rollout_s", "time/teacher_s", "time/step_s",
}  # fmt: skip
DIVERGENCE_KEYS = {
    "loss/divergence", "loss/clip_fraction", "loss/clipped_token_share", "loss/clipped_teacher_mass"
}  # fmt: skip
METHOD_KEYS = {
    "opsd": DIVERGENCE_KEYS,
    "pwopsd": DIVERGENCE_KEYS | {"method/mean_weight"},
    "eopd": {"method/gate_share", "method/advantage", "method/topk_divergence"},
    "reopold": {"method/kept_share", "method/below_floor_share", "method/reward", "method/refinement"},
}


@pytest.mark.parametrize("method", METHODS)
def test_three_steps_of_each_method(tmp_path, method):
    seen = {"calls": [], "losses": [], "norms": []}

    def inside(trainer):
        teacher = fresh_base()
        generate, compute = trainer.engine.generate, trainer.compute_loss
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        gradients = []

        def counted(requests, sampling, **kwargs):
            seen["calls"].append([request.seed for request in requests])
            return generate(requests, sampling, **kwargs)

        def checked(model, batch, *args, **kwargs):
            loss = compute(model, batch, *args, **kwargs)
            step = trainer.state.global_step
            gradient = torch.autograd.grad(loss, parameters, retain_graph=True)
            gradients.append(torch.cat([g.flatten() for g in gradient]))
            if len(gradients) % 2 == 0:
                seen["norms"].append(float((gradients[-1] + gradients[-2]).norm() / 2))
            # The first two steps lie before and after REOPOLD's switch.
            if step < 2 and len(gradients) % 2 == 1:
                seen["losses"].append((float(loss.detach()), independent_loss(trainer, teacher, batch)))
            return loss

        trainer.engine.generate, trainer.compute_loss = counted, checked
        OPSDTrainer.train(trainer)
        return trainer

    settings = ("--log_completions_steps", "1", "--rollout_audit_steps", "1")
    folder, trainer = run(tmp_path, method, *settings, inside=inside)
    # One engine call an optimizer step, for both of its micro-batches.
    assert [len(call) for call in seen["calls"]] == [4, 4, 4]
    assert len({seed for call in seen["calls"] for seed in call}) == 12
    assert len(seen["losses"]) == 2
    for ours, expected in seen["losses"]:
        assert ours == pytest.approx(expected, rel=1e-3, abs=1e-5)
    _check_weights(trainer)
    _check_records(folder, method, seen["norms"])
    _check_first_rollout(folder, trainer)
    checkpoint = folder / "checkpoint-3"
    assert incompleteness(checkpoint) is None
    saved = load_file(checkpoint / "adapter_model.safetensors")
    for name, value in adapter(trainer.model).items():
        assert torch.equal(saved[name.replace(".default", "")], value)


def _check_weights(trainer) -> None:
    assert all("lora_" in name for name, p in trainer.model.named_parameters() if p.requires_grad)
    _check_base(trainer, torch.float32)
    for name, value in adapter(trainer.model).items():
        assert value.dtype == torch.float32
        assert "lora_B" not in name or value.abs().max() > 0, f"{name} was not trained"


def _check_base(trainer, dtype: torch.dtype) -> None:
    ours = dict(trainer.model.get_base_model().named_parameters())
    for name, value in fresh_base(dtype).named_parameters():
        adapted = name.replace(".weight", ".base_layer.weight")
        assert torch.equal(ours.get(adapted, ours.get(name)), value), f"{name} has changed"


def _check_records(folder: Path, method: str, norms: list[float]) -> None:
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for number, row in enumerate(rows):
        assert set(row) == COMMON_KEYS | METHOD_KEYS[method]
        assert all(math.isfinite(value) for value in row.values())
        assert row["loss"] == pytest.approx(row["loss/objective"], rel=1e-5, abs=1e-7)
        # The Trainer divides by the two micro-batches once; the norm is that of before clipping.
        assert row["grad_norm"] == pytest.approx(norms[number], rel=1e-4)
        assert row["learning_rate"] == pytest.approx(1e-3 * (3 - number) / 3)
        assert 1.0 <= row["student/padded_over_valid"] <= 1.15
        assert 1.0 <= row["teacher/padded_over_valid"] <= 1.15
        assert row["rollout/outside_support_share"] == 0.0
        assert row["rollout/logprob_difference"] < 1e-4
        written = read_lines(folder / "completions" / f"step-{number:06d}.jsonl")
        assert len(written) == 4
        assert all(entry["problem"] == ROWS[entry["row"]]["problem"] for entry in written)
        tokens = [entry["tokens"] for entry in written]
        assert row["rollout/completion_tokens"] == pytest.approx(sum(tokens) / 4)
        assert row["rollout/completion_tokens_max"] == max(tokens)
        assert row["rollout/truncated_share"] == sum(entry["truncated"] for entry in written) / 4
        assert all(entry["truncated"] == (entry["tokens"] == 16) for entry in written if entry["truncated"])
    if method == "reopold":
        assert [row["method/refinement"] for row in rows] == [0.0, 1.0, 1.0]
        # 1 − β of two sequences' tokens, and ties at the quantile itself.
        assert all(0.1 < row["method/kept_share"] < 0.35 for row in rows[1:])


def _check_first_rollout(folder: Path, trainer) -> None:
    """Step 0's completions are the base's own, by seeds of (42, step, dataset row)."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    written = read_lines(folder / "completions" / "step-000000.jsonl")
    prompts = [encode_student(tokenizer, entry["problem"]) for entry in written]
    seeds = [rollout_seed(seed=42, step=0, problem=entry["row"]) for entry in written]
    drawn = HFEngine(fresh_base(), tokenizer).generate([*map(Request, prompts, seeds)], trainer.sampling)
    texts = [tokenizer.decode(completion.token_ids) for completion in drawn]
    assert texts == [entry["completion"] for entry in written]


def test_the_papers_precision_and_gradient_checkpointing(tmp_path):
    """bfloat16 base and autocast, float32 LoRA and objective, checkpointing: the defaults of a real run."""
    dtypes = set()

    def inside(trainer):
        def inputs_of_adapters(module, inputs):
            if torch.is_grad_enabled():  # the student pass; rollouts and the teacher have no gradients
                dtypes.add(inputs[0].dtype)

        for name, module in trainer.model.named_modules():
            if name.endswith("lora_A.default"):
                module.register_forward_pre_hook(inputs_of_adapters)
        OPSDTrainer.train(trainer)
        return trainer

    flags = ("--bf16", "true", "--gradient_checkpointing", "true", "--max_steps", "2", "--save_steps", "2")
    folder, trainer = run(tmp_path, "pwopsd", *flags, inside=inside)
    assert trainer.head.weight.dtype == torch.bfloat16
    assert dtypes == {torch.bfloat16}, "not cast to float32 and back"
    assert all(value.dtype == torch.float32 for value in adapter(trainer.model).values())
    rows = read_metrics(folder)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[0]["grad_norm"] > 0
    _check_base(trainer, torch.bfloat16)


def test_a_log_holds_means_over_steps_and_ranks():
    metrics = StepMetrics()
    for name in ("student/entropy", "rollout/completion_tokens_max"):
        metrics[name] += [1.0, torch.tensor(3.0)]
    means = metrics.means(lambda mine: torch.cat([mine, mine + 2]), torch.device("cpu"))
    assert means == {"student/entropy": 3.0, "rollout/completion_tokens_max": 5.0}


# --- experiments on a built trainer


def perturb(model, size: float = 0.03) -> None:
    """A student that is not its teacher: LoRA's B matrices drawn with this standard deviation."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def cut_completions(trainer, lengths: list[int]) -> None:
    """Let the trainer's real engine return completions cut to these lengths."""
    generate = type(trainer.engine).generate

    def cut(requests, sampling, *, want_logprobs=False):
        drawn = generate(trainer.engine, requests, sampling)
        return [Completion(c.token_ids[:n], True) for c, n in zip(drawn, lengths, strict=True)]

    trainer.engine.generate = cut


def update(trainer, split: list[list[int]], scope: str) -> torch.Tensor:
    """The gradient of one optimizer step whose micro-batches are `split`, as one vector."""
    trainer.loss_scope = scope
    trainer.model.zero_grad()
    fetched = iter([{"positions": torch.tensor(positions)} for positions in split])
    batches, _ = trainer.get_batch_samples(fetched, len(split), trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(batches)
    for batch in batches:
        trainer.training_step(trainer.model, batch)
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / one.norm())


ORDER = [3, 0, 7, 5, 1, 6, 2, 4]
SPLITS = {
    "4x2": [ORDER[:4], ORDER[4:]],
    "2x4": [ORDER[:2], ORDER[2:4], ORDER[4:6], ORDER[6:]],
    "8x1": [ORDER],
}


@pytest.mark.parametrize("method", METHODS)
def test_the_split_into_micro_batches(tmp_path, method):
    """--loss_scope global: 4 × 2, 2 × 4 and 8 × 1 give the same update to 1e-5 of its norm (float32).

    By default only pwopsd's does not depend on the split, as long as no completion is empty.
    """

    def inside(trainer):
        perturb(trainer.model)
        cut_completions(trainer, [2, 9, 16, 4, 12, 3, 14, 7])
        for step in (0, 60) if method == "reopold" else (0,):
            trainer.state.global_step = step
            whole = {name: update(trainer, split, "global") for name, split in SPLITS.items()}
            assert float(whole["8x1"].norm()) > 1e-4
            assert distance(whole["8x1"], whole["4x2"]) < 1e-5
            assert distance(whole["8x1"], whole["2x4"]) < 1e-5
            parts = {name: update(trainer, split, "micro_batch") for name, split in SPLITS.items()}
            # One micro-batch is the whole step: both scopes say the same.
            assert distance(whole["8x1"], parts["8x1"]) < 1e-5
            if method == "pwopsd":
                assert distance(whole["8x1"], parts["2x4"]) < 1e-5
            else:
                assert distance(whole["8x1"], parts["2x4"]) > 1e-2
        cut_completions(trainer, [2, 9, 0, 4, 12, 3, 14, 7])
        assert distance(*(update(trainer, SPLITS[name], "global") for name in ("8x1", "2x4"))) < 1e-5
        _empty_step(trainer)

    run(tmp_path, method, inside=inside)


def _empty_step(trainer) -> None:
    """No token in the step: loss 0 and gradients 0, under both scopes."""
    cut_completions(trainer, [0] * 8)
    for scope in ("micro_batch", "global"):
        gradient = update(trainer, SPLITS["2x4"], scope)
        assert torch.equal(gradient, torch.zeros_like(gradient))
    assert all(float(loss) == 0.0 for loss in trainer._metrics["loss/objective"][-8:])


def test_the_teacher_is_the_base_and_steps_can_be_repeated(tmp_path):
    def inside(trainer):
        perturb(trainer.model)
        trainer.model.train()
        examples = [trainer.train_dataset.example(p) for p in range(3)]
        first = trainer._roll_out(examples)
        torch.manual_seed(99)
        torch.rand(7)
        assert trainer._roll_out(examples) == first, "the same step gives the same completions"
        assert trainer._roll_out(examples[::-1]) == first[::-1], "whatever shares the call"
        trainer.state.global_step = 1
        second = trainer._roll_out(examples)
        assert [c.token_ids for c in second] != [c.token_ids for c in first], "another step draws anew"
        before = adapter(trainer.model)
        batch = trainer._align(examples, first)
        assert trainer.model.training
        assert all(torch.equal(value, before[name]) for name, value in adapter(trainer.model).items())
        assert all(p.requires_grad for n, p in trainer.model.named_parameters() if "lora_" in n)
        assert not batch.teacher_hidden.requires_grad
        _check_teacher(trainer, batch, examples, first)

    run(tmp_path, "opsd", inside=inside)


@torch.no_grad()
def _check_teacher(trainer, batch, examples, completions) -> None:
    def logits(model, prompts):
        pairs = zip(prompts, completions, strict=True)
        return torch.cat([score(model, prompt, completion.token_ids) for prompt, completion in pairs])

    base, students = fresh_base(), [example.student_ids for example in examples]
    teacher = logits(base, [example.teacher_ids for example in examples])
    torch.testing.assert_close(trainer.head.logits(batch.teacher_hidden), teacher, rtol=1e-4, atol=1e-4)
    student = trainer.head.logits(batch.student.hidden_states(trainer.model))
    torch.testing.assert_close(student, logits(trainer.model, students), rtol=1e-4, atol=1e-4)
    assert (student - logits(base, students)).abs().max() > 0.1, "the adapter takes part in the student"


def test_an_audit_notices_a_sampler_with_other_weights(tmp_path):
    """The sampler runs the base while the trainer's student is adapted: both audit figures say so."""

    def inside(trainer):
        trainer.engine = HFEngine(fresh_base(), trainer.processing_class)
        perturb(trainer.model, 0.1)
        update(trainer, SPLITS["8x1"], "micro_batch")
        return {name: float(values[-1]) for name, values in trainer._metrics.items() if "rollout/" in name}

    _, figures = run(tmp_path, "opsd", inside=inside)
    assert figures["rollout/outside_support_share"] > 0.0
    assert figures["rollout/logprob_difference"] > 0.05
