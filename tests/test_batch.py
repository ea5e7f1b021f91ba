"""Layout of prompts and completions: nothing depends on padding or batch mates, and little is padded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd.batch import length_groups, role_batch
from opsd.head import head_of
from opsd.objectives import METHODS, Hyperparameters, ReductionInput, reopold_mask
from opsd.token_stats import token_statistics
from tests.test_token_stats import tiny_adapted_model

PAD = 0


def layout(prompts, completions, *, ratio=1.15, pad=PAD):
    return role_batch(prompts, completions, pad_id=pad, max_padding_ratio=ratio, device="cpu")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    sequences=st.lists(
        st.tuples(
            st.lists(st.integers(5, 99), min_size=1, max_size=9), st.lists(st.integers(5, 99), max_size=9)
        ),
        min_size=1,
        max_size=7,
    ),
    ratio=st.sampled_from([1.0, 1.15, 1.5, 100.0]),
)
def test_every_scored_position_reads_its_own_sequence(sequences, ratio):
    """A completion follows its prompt directly: what predicts each token is prompt + completion so far."""
    prompts, completions = [p for p, _ in sequences], [c for _, c in sequences]
    batch = layout(prompts, completions, ratio=ratio)
    # The "network" tells, of each asked position, everything that a causal model may look at.
    seen = []

    def forward(input_ids, positions):
        width = input_ids.shape[1]
        seen.extend(input_ids[int(p) // width, : int(p) % width + 1].tolist() for p in positions)
        return torch.arange(len(seen) - len(positions), len(seen)).unsqueeze(1)

    rows = batch.hidden_states(forward).squeeze(1).tolist()
    expected = [
        [*prompt, *completion[:place]] for prompt, completion in sequences for place in range(len(completion))
    ]
    assert [seen[row] for row in rows] == expected
    assert batch.valid_tokens == sum(max(len(p) + len(c) - 1, 1) for p, c in sequences)
    assert batch.padded_tokens == sum(grid.input_ids.numel() for grid in batch.grids)
    assert batch.padded_tokens <= ratio * batch.valid_tokens


def test_a_prompt_without_a_token_is_refused():
    with pytest.raises(ValueError, match="the prompt of sequence 1 has no token"):
        layout([[5], []], [[6], [7]])
    with pytest.raises(ValueError):
        layout([[5], [6]], [[6]])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 8000), min_size=1, max_size=40), ratio=st.floats(1.0, 2.0))
def test_groups_keep_the_ratio_and_lose_nothing(lengths, ratio):
    groups = length_groups(lengths, ratio)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        members = [lengths[index] for index in group]
        assert max(members) * len(members) <= ratio * sum(members) * (1 + 1e-12)
    assert len(length_groups([90, 100, 95], 1.15)) == 1, "similar lengths share a pass"


# --- through a network: losses and gradients of a sequence alone and among others


@pytest.fixture(scope="module")
def model():
    return tiny_adapted_model()


SEQUENCES = [
    ([5, 6, 7], [8, 9, 10, 11, 1]),
    ([12, 13, 14, 15, 16, 17, 18], [19, 1]),
    ([20], [21, 22, 23, 24, 25, 26, 27, 28]),
    ([29, 30], [31, 32, 33]),
]


def loss_and_gradient(model, method, sequences, *, ratio, pad=PAD):
    """Per-token terms by sequence, the loss, and the LoRA gradient of the loss as one vector."""
    hyper = Hyperparameters(eopd_entropy_threshold=0.5)
    row = METHODS[method]
    prompts, completions = [p for p, _ in sequences], [c for _, c in sequences]
    student = layout(prompts, completions, ratio=ratio, pad=pad)
    # The teacher reads longer prompts of other lengths, so its grids differ from the student's.
    teacher = layout([[33, 34, *p, *p[::-1]] for p in prompts], completions, ratio=ratio, pad=pad)
    with torch.no_grad(), model.disable_adapter():
        teacher_hidden = teacher.hidden_states(model)
    model.zero_grad()
    stats = token_statistics(
        student.hidden_states(model),
        teacher_hidden,
        torch.tensor([token for completion in completions for token in completion]),
        config=row.statistics(hyper),
        term=lambda s: row.term(s, hyper),
        head=head_of(model.get_base_model()),
    )
    lengths = torch.tensor([len(completion) for completion in completions])
    batch = ReductionInput(stats, lengths)
    loss = row.reduce(batch, hyper).loss()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    kept = reopold_mask(batch, hyper) if method == "reopold" else torch.ones_like(stats.term)
    weight = kept.split(lengths.tolist())
    terms = stats.term.detach().split(lengths.tolist())
    return terms, loss.detach(), gradient, [float(w.sum()) for w in weight]


@pytest.mark.parametrize("method", METHODS)
def test_padding_and_mates_change_no_loss_and_no_gradient(model, method):
    """In one padded pass, in several, with another pad id, in another order: the same. And the micro-batch is
    the mean of its sequences taken alone, weighted as the method's reduction weights them."""
    terms, loss, gradient, kept = loss_and_gradient(model, method, SEQUENCES, ratio=100.0)
    assert float(gradient.norm()) > 1e-3

    def same(other):
        torch.testing.assert_close(other[1], loss, rtol=1e-4, atol=1e-6)
        assert float((other[2] - gradient).norm()) < 1e-4 * float(gradient.norm())

    same(loss_and_gradient(model, method, SEQUENCES, ratio=1.0))
    # The pad token is also the end-of-sequence token, or one that every sequence holds.
    same(loss_and_gradient(model, method, SEQUENCES, ratio=100.0, pad=1))
    same(loss_and_gradient(model, method, SEQUENCES[::-1], ratio=100.0))
    alone = [loss_and_gradient(model, method, [sequence], ratio=1.15) for sequence in SEQUENCES]
    for together, (own, *_) in zip(terms, alone, strict=True):
        torch.testing.assert_close(together, own[0], rtol=1e-3, atol=1e-5)
    weights = torch.tensor([1.0] * 4 if method == "pwopsd" else kept)
    weights /= weights.sum()
    torch.testing.assert_close(
        sum(w * a[1] for w, a in zip(weights, alone, strict=True)), loss, rtol=1e-4, atol=1e-6
    )
    mean = sum(w * a[2] for w, a in zip(weights, alone, strict=True))
    assert float((mean - gradient).norm()) < 1e-4 * float(gradient.norm())


@pytest.mark.parametrize("method", METHODS)
def test_the_end_token_counts_also_where_it_is_the_pad_token(model, method):
    """Dropping the last token, the end-of-sequence, changes the loss: it was part of it."""
    whole = loss_and_gradient(model, method, SEQUENCES[:1], ratio=1.15, pad=1)
    cut = loss_and_gradient(model, method, [(SEQUENCES[0][0], SEQUENCES[0][1][:-1])], ratio=1.15, pad=1)
    assert len(whole[0][0]) == len(cut[0][0]) + 1 == 5
    assert abs(float(whole[1] - cut[1])) > 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_empty_completions_add_nothing(model, method):
    without = loss_and_gradient(model, method, SEQUENCES[:2], ratio=100.0)
    mixed = [SEQUENCES[0], ([34, 35, 36], []), SEQUENCES[1]]
    with_empty = loss_and_gradient(model, method, mixed, ratio=100.0)
    torch.testing.assert_close(with_empty[1], without[1], rtol=1e-4, atol=1e-6)
    assert float((with_empty[2] - without[2]).norm()) < 1e-4 * float(without[2].norm())
