"""A NaN or infinite loss or gradient: the optimizer never sees it, the evidence is saved, the run stops."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import math
import weakref

import pytest
import torch
from transformers import TrainerCallback

from opsd.errors import ArtefactError
from opsd.nonfinite import NonFiniteGuard
from opsd.objectives import METHODS, StatsConfig
from opsd.records import read_metrics
from opsd.token_stats import token_statistics
from opsd.trainer import OPSDTrainer
from tests.test_trainer import adapter, run


def strict(text: str) -> dict:
    """JSON without Python's NaN and Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(name))


class States(TrainerCallback):
    """Weights and optimizer state before each step and after the last."""

    def __init__(self, trainer):
        self.trainer, self.seen = trainer, []

    def look(self, *args, **kwargs) -> None:
        moments = copy.deepcopy(self.trainer.optimizer.state_dict()["state"])
        self.seen.append({"weights": adapter(self.trainer.model), "moments": moments})

    on_step_begin = on_train_end = look


def spoil(trainer, where: str, value: float, steps: set[int]) -> None:
    """Make the loss, or one LoRA parameter's gradient, `value` at these optimizer steps."""
    if where == "gradient":
        parameter = next(p for n, p in trainer.model.named_parameters() if "lora_B" in n)
        parameter.register_hook(lambda g: g + value if trainer.state.global_step in steps else g)
        return
    method = trainer.method

    def reduce(batch, hyper):
        reduction = method.reduce(batch, hyper)
        return dataclasses.replace(reduction, total=reduction.total * (value if batch.step in steps else 1.0))

    trainer.method = dataclasses.replace(method, reduce=reduce)


def spoiled_run(tmp_path, *flags, where="loss", value=math.nan, steps=frozenset({1})):
    """Train three steps with spoiled ones; (folder, the states seen, the error or None)."""

    def inside(trainer):
        spoil(trainer, where, value, set(steps))
        states = States(trainer)
        trainer.add_callback(states)
        try:
            OPSDTrainer.train(trainer)
        except ArtefactError as error:
            states.look()
            return states.seen, error
        return states.seen, None

    folder, outcome = run(tmp_path, "pwopsd", "--max_completion_length", "6", *flags, inside=inside)
    return folder, *outcome


def same(one, other) -> bool:
    """Equal to the bit, nested dictionaries of tensors included."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


SPOILED = [("loss", "nan", "0.1"), ("loss", "inf", "0"), ("gradient", "nan", "0"), ("gradient", "inf", "0.1")]


@pytest.mark.parametrize(("where", "value", "clip"), SPOILED)
def test_the_run_stops_before_the_optimizer_sees_it(tmp_path, where, value, clip):
    folder, states, error = spoiled_run(tmp_path, "--max_grad_norm", clip, where=where, value=float(value))
    assert "--skip_nonfinite N" in str(error)
    assert error.exit_code == 3
    path = folder / "nonfinite-step-1-rank-0.json"
    assert str(path) in str(error)
    evidence = strict(path.read_text(encoding="utf-8"))
    assert evidence["step"] == 1
    assert evidence["gradient_norm"] in ("nan", "inf")
    assert len(evidence["micro_batches"]) == 2
    rows = sorted(row for part in evidence["micro_batches"] for row in part["problems"])
    assert f"not finite at optimizer step 1 (dataset rows {rows})" in str(error)
    for part in evidence["micro_batches"]:
        assert len(part["problems"]) == 2
        assert (part["loss"] in ("nan", "inf", "-inf")) == (where == "loss")
        for name in ("student_logprob", "teacher_logprob", "student_entropy", "clipped_divergence"):
            statistic = part["statistics"][name]
            assert statistic["not_finite"] == 0
            assert statistic["min"] <= statistic["max"]
    # Steps 0 and 1 began; the state at the stop is the one that step 1 began with.
    assert len(states) == 3
    assert not same(states[0], states[1])
    assert same(states[1], states[2])
    assert not list(folder.glob("checkpoint-*"))
    assert len(read_metrics(folder)) == 1


def test_a_tolerated_step_is_left_out_and_the_run_goes_on(tmp_path):
    folder, states, error = spoiled_run(tmp_path, "--skip_nonfinite", "1")
    assert error is None
    assert (folder / "nonfinite-step-1-rank-0.json").exists()
    assert len(states) == 4
    assert same(states[1], states[2])
    assert not same(states[2], states[3])
    rows = [strict(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[1]["loss/objective"] is None
    assert rows[1]["grad_norm"] is None
    # The Trainer sums losses between logs: the bad one must not stay in the sum.
    assert rows[2]["loss"] == pytest.approx(rows[2]["loss/objective"], rel=1e-5)
    assert (folder / "checkpoint-3").is_dir()


def test_good_steps_of_a_logging_window_keep_their_losses(tmp_path):
    """Steps 0 and 2 are good, step 1 is not, one row for all three: the loss is the good ones' sum / 3."""
    flags = ("--skip_nonfinite", "1", "--logging_steps")
    (row,) = read_metrics(spoiled_run(tmp_path, *flags, "3", where="gradient")[0])
    every = read_metrics(spoiled_run(tmp_path / "each", *flags, "1", where="gradient")[0])
    assert row["loss"] == pytest.approx((every[0]["loss"] + every[2]["loss"]) / 3, rel=1e-4)


def test_one_more_than_tolerated_stops(tmp_path):
    folder, states, error = spoiled_run(tmp_path, "--skip_nonfinite", "1", steps={0, 2})
    assert "optimizer step 2" in str(error)
    files = [path.name for path in sorted(folder.glob("nonfinite-*"))]
    assert files == ["nonfinite-step-0-rank-0.json", "nonfinite-step-2-rank-0.json"]
    # Step 0 left the weights and moments untouched, step 1 moved them, step 2 did not.
    assert same(states[0]["weights"], states[1]["weights"])
    assert states[1]["moments"] == {}
    assert not same(states[1], states[2])
    assert same(states[2], states[3])


def test_the_guard_keeps_no_graph(tmp_path):
    """The hidden states of a micro-batch are freed after its backward pass, not at the end of the step."""
    guard = NonFiniteGuard(tmp_path, tolerated=0)
    hidden = torch.randn(3, 20, requires_grad=True)
    config, inputs = StatsConfig(temperature=1.0, divergence_clip=0.05), (hidden * 1.0, torch.randn(3, 20))
    stats = token_statistics(*inputs, torch.arange(3), config=config, term=lambda s: s.clipped_divergence)
    del inputs
    loss = stats.term.sum()
    loss.backward()
    guard.see_loss(loss, [1], stats)
    alive = weakref.ref(hidden)
    del hidden, stats, loss
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("method", METHODS)
def test_a_nan_in_the_network_reaches_the_guard(tmp_path, method):
    """A hidden state that is not finite gives a loss that is not, for every method: no mask hides it."""

    def inside(trainer):
        statistics = trainer._statistics

        def broken(hidden, batch, **kwargs):
            # A product keeps the graph; the last token of the micro-batch is spoiled.
            factor = torch.ones_like(hidden)
            factor[-1, 0] = math.nan
            return statistics(hidden * factor, batch, **kwargs)

        trainer._statistics = broken
        with pytest.raises(ArtefactError, match="not finite at optimizer step 0"):
            OPSDTrainer.train(trainer)

    folder, _ = run(tmp_path, method, "--max_completion_length", "6", inside=inside)
    evidence = strict((folder / "nonfinite-step-0-rank-0.json").read_text(encoding="utf-8"))
    for part in evidence["micro_batches"]:
        entropy = part["statistics"]["student_entropy"]
        assert entropy["not_finite"] == 1
        assert 0 <= entropy["min"] <= entropy["max"], "of the finite values"
