"""The four objectives against the authors' numbers, an independent naive version, and hand arithmetic."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd.objectives import (
    CLIP_SCOPES,
    METHODS,
    Hyperparameters,
    entropy_threshold,
    position_fractions,
    position_weights,
)
from tests.reference_objectives import reference_loss
from tests.test_token_stats import chunked_loss

# tests/golden/losses.npz: 8 cases (L1..L8) produced by running the published PW-OPSD training code
# (SaFo-Lab/PW-OPSD, commit 35303e0) on CPU with torch 2.13.0, trl 0.26.0 and transformers 4.57.1; see
# tests/golden/README.md.
GOLDEN = np.load(Path(__file__).parent / "golden" / "losses.npz")
CASES = {
    "L1": ("opsd", {}, 0),
    "L2": ("opsd", {"jsd_token_clip": 0.0, "temperature": 1.0}, 0),
    "L3": ("eopd", {}, 0),
    "L4": ("pwopsd", {}, 0),
    "L5": ("pwopsd", {"jsd_token_clip": 0.0, "temperature": 1.0}, 0),
    "L6": ("pwopsd", {"position_global_reduction": True}, 0),
    "L7": ("reopold", {}, 0),
    "L8": ("reopold", {}, 60),
}


def dense_loss(method, student, teacher, ids, mask, *, hyper, step=0, chunk=None):
    """The project's own objective on [B, T, V] logits: the valid positions, flat, go through the chunks."""
    inputs = student[mask], teacher[mask], ids[mask], mask.sum(1).tolist()
    return chunked_loss(method, *inputs, head=None, hyper=hyper, step=step, chunk=chunk)


def golden(name, key):
    return torch.from_numpy(np.asarray(GOLDEN[f"{name}_{key}"]))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_loss_and_gradient(name, dtype):
    method, overrides, step = CASES[name]
    student = golden(name, "student_logits").to(dtype).requires_grad_()
    teacher, ids = golden(name, "teacher_logits").to(dtype), golden(name, "token_ids")
    mask = golden(name, "valid_mask")
    loss = dense_loss(method, student, teacher, ids, mask, hyper=Hyperparameters(**overrides), step=step)
    loss.backward()
    suffix, rel, tolerance = ("", 1e-5, 1e-6) if dtype == torch.float32 else ("_f64", 0, 1e-7)
    expected = pytest.approx(float(golden(name, f"loss{suffix}")), rel=rel, abs=1e-7)
    assert float(loss.detach()) == expected
    torch.testing.assert_close(student.grad.double(), golden(name, f"grad{suffix}"), rtol=0, atol=tolerance)


def random_case(seed, batch, length, vocabulary, spread=2.5):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(batch, length, vocabulary, generator=generator, dtype=torch.float64) * spread
    noise = torch.randn(batch, length, vocabulary, generator=generator, dtype=torch.float64)
    teacher = student + noise * spread
    ids = torch.randint(vocabulary, (batch, length), generator=generator)
    lengths = torch.randint(0, length + 1, (batch,), generator=generator)
    mask = torch.arange(length) < lengths[:, None]
    return student.requires_grad_(), teacher, ids, mask


HYPERPARAMETERS = st.builds(
    Hyperparameters,
    temperature=st.sampled_from([0.7, 1.0, 1.1, 2.0]),
    jsd_token_clip=st.sampled_from([0.0, 0.01, 0.05, 0.3]),
    divergence_clip_scope=st.sampled_from(CLIP_SCOPES),
    position_w_min=st.sampled_from([0.0, 0.25, 1.0]),
    position_global_reduction=st.booleans(),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(16, 24)),
    method=st.sampled_from(sorted(METHODS)),
    step=st.sampled_from([0, 49, 50, 149]),
    chunk=st.sampled_from([1, 2, 3, 64]),
    hyper=HYPERPARAMETERS,
)
def test_agrees_with_plain_loops(seed, shape, method, step, chunk, hyper):
    student, teacher, ids, mask = random_case(seed, *shape)
    ours = dense_loss(method, student, teacher, ids, mask, hyper=hyper, step=step, chunk=chunk)
    (gradient,) = torch.autograd.grad(ours, student)
    naive = reference_loss(method, student, teacher, ids, mask, hyper=hyper, step=step)
    (expected,) = torch.autograd.grad(naive, student)
    torch.testing.assert_close(ours, naive, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [0, 60])
def test_no_valid_token_gives_zero_and_zero_gradients(method, step):
    student = torch.randn(2, 3, 20, requires_grad=True)
    ids = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    loss = dense_loss(method, student, torch.randn(2, 3, 20), ids, mask, hyper=Hyperparameters(), step=step)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_hand_arithmetic_of_the_position_schedule():
    assert position_fractions(torch.tensor([2, 0, 3])).tolist() == pytest.approx(
        [1 / 4, 3 / 4, 1 / 6, 3 / 6, 5 / 6]
    )
    weights = position_weights(torch.tensor([2]), Hyperparameters())
    # f = 0.25: σ(−0.5) = 0.377541; f = 0.75: σ(4.5) = 0.989013
    assert weights.tolist() == pytest.approx([0.25 + 0.75 * 0.377541, 0.25 + 0.75 * 0.989013], abs=1e-6)


def test_hand_arithmetic_of_the_clip():
    """p_T = (0.8, 0.2), p_S = (0.5, 0.5): 0.8 ln 1.6 = 0.376 is cut at 0.05, 0.2 ln 0.4 = −0.183 stays."""
    student, teacher = torch.zeros(1, 1, 2), torch.tensor([[[0.8, 0.2]]]).log()
    ids, mask = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
    for clip, first in ((0.05, 0.05), (0.0, 0.8 * math.log(1.6))):
        hyper = Hyperparameters(temperature=1.0, jsd_token_clip=clip)
        loss = dense_loss("opsd", student, teacher, ids, mask, hyper=hyper)
        assert loss.item() == pytest.approx(first + 0.2 * math.log(0.4), abs=1e-6)


@pytest.mark.parametrize(
    ("clip", "scope", "gradient"),
    [
        (0.05, "entry", [0.05, -0.05]),
        (0.05, "token", [0.0, 0.0]),
        (0.5, "token", [-0.4, 0.4]),
        (0.0, "entry", [-0.4, 0.4]),
    ],
)
def test_hand_arithmetic_of_a_cut_entrys_gradient(clip, scope, gradient):
    """p_T = (0.9, 0.1), p_S = (0.5, 0.5): entry 0.9 ln 1.8 = 0.529 is cut; the token's sum is 0.368.

    A cut entry's gradient is p_S Σ_kept p_T > 0: descent lowers the teacher's favourite.
    """
    student = torch.zeros(1, 1, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[[0.9, 0.1]]], dtype=torch.float64).log()
    ids, mask = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
    hyper = Hyperparameters(temperature=1.0, jsd_token_clip=clip, divergence_clip_scope=scope)
    dense_loss("opsd", student, teacher, ids, mask, hyper=hyper).backward()
    assert student.grad.flatten().tolist() == pytest.approx(gradient, abs=1e-9)


def test_reward_floor_and_quantile_by_hand():
    assert Hyperparameters().reward_floor == pytest.approx(-2.5584278811, abs=1e-9)
    entropies = torch.tensor([0.0, 4.0, 1.0, 3.0, 2.0])
    # (1 − 0.2) · (5 − 1) = 3.2 -> 3 + 0.2 · (4 − 3)
    assert entropy_threshold(entropies, Hyperparameters()).item() == pytest.approx(3.2)
    assert entropy_threshold(entropies, Hyperparameters(reopold_beta=0.0)).item() == 4.0
    assert entropy_threshold(entropies, Hyperparameters(reopold_beta=1.0)).item() == 0.0


def test_the_teacher_receives_no_gradient():
    student, teacher, ids, mask = random_case(5, 2, 4, 20)
    teacher.requires_grad_()
    for method in METHODS:
        dense_loss(method, student, teacher, ids, mask, hyper=Hyperparameters()).backward()
    assert teacher.grad is None
