"""The benchmarks: equal losses in both forms, every second counted once."""

from __future__ import annotations

import pytest
import torch

from bench import bench_loss, bench_padding, bench_step, clip_gradient, step_forms
from bench.memory import PeakMemory
from opsd.objectives import Hyperparameters


def tables(text: str) -> list[list[str]]:
    """Return the cells of the Markdown tables in a program's output."""
    lines = [line for line in text.splitlines() if line.startswith("|") and " --- " not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("method", bench_loss.METHODS)
@pytest.mark.parametrize("chunk", [None, 5])
def test_dense_and_chunked_agree(method, chunk):
    data = bench_loss.inputs(tokens=23, vocabulary=70, hidden=12, device="cpu", dtype="float64")
    loss, gradient = bench_loss.step("dense", method, data, Hyperparameters())
    chunked, chunked_gradient = bench_loss.step("chunked", method, data, Hyperparameters(), chunk)
    assert gradient.abs().max() > 1e-6, "nothing to compare"
    # The dense form rounds to float32 on purpose, as its definition asks.
    torch.testing.assert_close(chunked, loss.to(chunked.dtype), rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(chunked_gradient, gradient, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize(("clip", "cut"), [("0.05", True), ("100", False)])
def test_the_clips_gradients_are_compared(capsys, clip, cut):
    """A clip that cuts nothing leaves the gradient as it is; the published one does not."""
    assert clip_gradient.main(["--methods", "opsd", "--steps", "1", "--jsd_token_clip", clip]) == 0
    head, cells = tables(capsys.readouterr().out)
    row = dict(zip(head[1:], map(float, cells[1:]), strict=True))
    assert (row["loss/clipped_token_share"] > 0.01) == (row["loss/clipped_teacher_mass"] > 0.01) == cut
    for scope in ("entry", "token"):
        assert (row[f"cosine {scope}"] < 0.95) == (abs(row[f"norm {scope}"] - 1) > 0.05) == cut


def test_loss_bench_prints_its_table(capfd):
    arguments = "--tokens 24 --vocabulary 300 --hidden 8 --threads 1 --repeats 1 --methods pwopsd"
    assert bench_loss.main(arguments.split()) == 0
    head, row = tables(capfd.readouterr().out)
    assert head == list(bench_loss.COLUMNS)
    assert row[:3] == ["pwopsd", "300", "24"]
    assert all(row)


def test_peak_memory_includes_what_is_freed_again():
    size = 48_000_000
    with PeakMemory("cpu") as memory:
        torch.zeros(size, dtype=torch.uint8).fill_(1)
    assert 0.9 * size < memory.extra < 2 * size


def test_step_bench_runs_both_forms_on_the_small_world(capsys):
    batch = "--per_device_batch 3 --accumulation 2 --completion_tokens 24"
    assert bench_step.main(f"{batch} --steps 1 --rounds 1 --threads 1".split()) == 0
    output = capsys.readouterr().out
    cells = tables(output)
    phases = {row[0]: [float(value) for value in row[1:5]] for row in cells[1 : 2 + len(step_forms.PHASES)]}
    assert [*phases] == [*step_forms.PHASES, "whole step"]
    whole = phases.pop("whole step")
    for column, total in enumerate(whole):
        assert sum(values[column] for values in phases.values()) == pytest.approx(total, abs=0.01)
    real, dense = ({"name": row[0], "calls": row[1], "padding": float(row[4])} for row in cells[-2:])
    assert (real["name"], real["calls"]) == ("real", "1.0")
    assert (dense["name"], dense["calls"]) == ("dense", "2.0"), "the baseline rolls out per micro-batch"
    assert real["padding"] < min(dense["padding"], 1.151)
    losses = output.splitlines()[-1].removeprefix("first step's mean loss: ").split(", ")
    values = [float(loss.split()[1]) for loss in losses]
    assert 0 < values[0] == pytest.approx(values[1], rel=1e-3), "both forms compute the same objective"


def test_padding_bench_keeps_its_limit(capsys):
    assert bench_padding.main(["--sequences", "64", "--batches", "8", "--limits", "1.15", "inf"]) == 0
    _, limited, single, maximum = tables(capsys.readouterr().out)
    assert [float(limited[place]) <= 1.151 for place in (2, 3, 5, 6)] == [True] * 4
    assert single[4] == single[7] == "1.00"
    assert float(single[5]) > float(limited[5])
    assert float(maximum[5]) > float(single[5])
