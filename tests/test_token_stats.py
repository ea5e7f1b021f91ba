"""Chunked statistics and gradients against the dense form, and what is kept for the backward pass."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from opsd.head import Head, attach_hidden_forward, head_of
from opsd.objectives import CLIP_SCOPES, METHODS, Hyperparameters, ReductionInput, StatsConfig
from opsd.rollout.engine import Sampling
from opsd.token_stats import COLUMN_ENTRIES, _largest, dense_statistics, sampling_audit, token_statistics


def chunked_loss(method, student, teacher, ids, lengths, *, head, hyper, step=0, chunk=None):
    """The project's own path: [N, H] hidden states (or [N, V] logits without a head) -> scalar."""
    row = METHODS[method]
    config = dataclasses.replace(row.statistics(hyper), chunk_positions=chunk)
    stats = token_statistics(
        student, teacher, ids, config=config, term=lambda s: row.term(s, hyper), head=head
    )
    return row.reduce(ReductionInput(stats, torch.tensor(lengths), step), hyper).loss()


def plain_logits(head, *hidden):
    """What the model itself computes from each role's hidden states, as autograd sees it."""
    return [torch.nn.functional.linear(states, head.weight, head.bias) for states in hidden]


def dense_loss(method, student, teacher, ids, lengths, *, hyper, step=0):
    """The loss from all [N, V] logits; tests/reference_objectives.py is independent of opsd/."""
    row = METHODS[method]
    stats = dense_statistics(
        student, teacher, ids, config=row.statistics(hyper), term=lambda s: row.term(s, hyper)
    )
    return row.reduce(ReductionInput(stats, torch.tensor(lengths), step), hyper).loss()


def random_inputs(seed, lengths, hidden, vocabulary, dtype, *, bias=False):
    """Hidden states of both roles (the teacher is a perturbed student), ids and a head."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    total = sum(lengths)
    student = draw(total, hidden)
    teacher = student + 0.7 * draw(total, hidden)
    weight = (draw(vocabulary, hidden) * 1.5 / hidden**0.5).to(dtype)
    layer = Head(weight, draw(vocabulary).to(dtype) if bias else None)
    ids = torch.randint(vocabulary, (total,), generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), ids, layer


def relative_error(ours, reference):
    """Euclidean distance over the reference's norm, in float64."""
    ours, reference = ours.double(), reference.double()
    return float((ours - reference).norm() / reference.norm().clamp(min=1e-12))


# bfloat16 hidden states and head: each logit carries a rounding error of about 2^-9 of its size in both.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(0, 7), min_size=1, max_size=4).filter(any),
    shape=st.tuples(st.integers(1, 12), st.integers(16, 90)),
    dtype=st.sampled_from(list(TOLERANCES)),
    method=st.sampled_from(sorted(METHODS)),
    step=st.sampled_from([0, 50]),
    chunk=st.sampled_from([None, 1, 2, 3, 7, 100]),
    bias=st.booleans(),
    hyper=st.builds(
        Hyperparameters,
        jsd_token_clip=st.sampled_from([0.0, 0.05]),
        temperature=st.sampled_from([0.8, 1.0, 1.1]),
    ),
)
def test_loss_and_gradient_equal_the_dense_form(
    seed, lengths, shape, dtype, method, step, chunk, bias, hyper
):
    student, teacher, ids, head = random_inputs(seed, lengths, *shape, dtype, bias=bias)
    settings = {"hyper": hyper, "step": step}
    ours = chunked_loss(method, student, teacher, ids, lengths, head=head, chunk=chunk, **settings)
    (gradient,) = torch.autograd.grad(ours, student)
    dense = dense_loss(method, *plain_logits(head, student, teacher), ids, lengths, **settings)
    (expected,) = torch.autograd.grad(dense, student)
    tolerance = TOLERANCES[dtype]
    assert (gradient.dtype, ours.dtype) == (dtype, max(dtype, torch.float32, key=lambda d: d.itemsize))
    ours, dense = float(ours.detach()), float(dense.detach())
    assert abs(ours - dense) <= tolerance * max(abs(dense), 1.0)
    assert relative_error(gradient, expected) <= tolerance


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    chunk=st.sampled_from([None, 1, 3, 100]),
    clip=st.sampled_from([None, 0.0, 0.05]),
    scope=st.sampled_from(CLIP_SCOPES),
    top_k=st.sampled_from([None, 1, 16]),
    temperature=st.sampled_from([0.8, 1.0, 1.1]),
)
def test_every_statistic_equals_its_definition(seed, chunk, clip, scope, top_k, temperature):
    student, teacher, ids, head = random_inputs(seed, [5, 0, 8], 6, 40, torch.float64)
    how = {"temperature": temperature, "divergence_clip": clip, "clip_scope": scope}
    config = StatsConfig(**how, top_k=top_k, chunk_positions=chunk)

    def term(stats):
        extra = (vars(stats).get(name) for name in ("clipped_divergence", "topk_divergence"))
        return sum((part for part in extra if part is not None), start=stats.student_logprob**2)

    ours = token_statistics(student, teacher, ids, config=config, term=term, head=head)
    plain = token_statistics(student, teacher, ids, config=config, head=head)
    assert vars(plain).keys() == vars(ours).keys() - {"term"}
    assert not any(value.requires_grad for value in vars(plain).values())
    dense = dense_statistics(*plain_logits(head, student, teacher), ids, config=config, term=term)
    for name, value in vars(dense).items():
        torch.testing.assert_close(getattr(ours, name), value, rtol=1e-10, atol=1e-12, msg=name)
    gradients = [torch.autograd.grad(stats.term.sum(), student)[0] for stats in (ours, dense)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_float32_at_a_vocabulary_of_several_blocks(method):
    """The automatic chunk and block sizes, with more positions than one block holds."""
    lengths = [31, 0, 20]
    student, teacher, ids, head = random_inputs(5, lengths, 16, 40_000, torch.float32)
    hyper = Hyperparameters()
    ours = chunked_loss(method, student, teacher, ids, lengths, head=head, hyper=hyper)
    (gradient,) = torch.autograd.grad(ours, student)
    dense = dense_loss(method, *plain_logits(head, student, teacher), ids, lengths, hyper=hyper)
    (expected,) = torch.autograd.grad(dense, student)
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)
    assert relative_error(gradient, expected) < 1e-5


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation under it returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_positions_times_vocabulary_is_formed_or_kept(method):
    lengths, vocabulary, hidden, chunk = [40, 24], 500, 8, 4
    positions = sum(lengths)
    student, teacher, ids, head = random_inputs(1, lengths, hidden, vocabulary, torch.float32)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hyper = Hyperparameters()
        loss = chunked_loss(method, student, teacher, ids, lengths, head=head, hyper=hyper, chunk=chunk)
        loss.backward()
    assert kept, "the hooks see what is saved"
    assert max(kept) <= positions * hidden
    # Two roles' logits of one chunk, or the head itself.
    assert largest.numel <= max(2 * chunk * vocabulary, vocabulary * hidden) < positions * vocabulary


def statistics(student, teacher, ids, method):
    hyper = Hyperparameters()
    config = StatsConfig(temperature=hyper.temperature, divergence_clip=hyper.jsd_token_clip, top_k=16)
    return token_statistics(
        student, teacher, ids, config=config, term=lambda s: METHODS[method].term(s, hyper)
    )


@pytest.mark.parametrize("method", METHODS)
def test_impossible_tokens_are_as_if_they_were_not_there(method):
    """−inf in both roles' logits at the same entries: every statistic is that of the smaller vocabulary."""
    student, teacher = torch.randn(2, 6, 20, generator=torch.manual_seed(2), dtype=torch.float64) * 2
    ids = torch.arange(6)
    small = student[:, :17].clone().requires_grad_()
    expected = statistics(small, teacher[:, :17], ids, method)
    student[:, 17:] = teacher[:, 17:] = -math.inf
    student.requires_grad_()
    ours = statistics(student, teacher, ids, method)
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(ours, name), value, msg=name)
    expected.term.sum().backward()
    ours.term.sum().backward()
    torch.testing.assert_close(student.grad[:, :17], small.grad)
    assert torch.equal(student.grad[:, 17:], torch.zeros(6, 3, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
def test_a_token_impossible_to_the_teacher_alone(method):
    """−inf gives what a logit gives whose probability underflows to 0."""
    student, teacher = torch.randn(2, 6, 20, generator=torch.manual_seed(3))
    results = []
    for teacher[:, 18:] in (-math.inf, -1e4):
        leaf = student.clone().requires_grad_()
        stats = statistics(leaf, teacher, torch.arange(6), method)
        stats.term.sum().backward()
        results.append([*vars(stats).values(), leaf.grad])
        assert all(value.isfinite().all() for value in results[-1])
    for with_inf, with_small in zip(*results, strict=True):
        torch.testing.assert_close(with_inf, with_small)


def test_a_support_larger_than_the_vocabulary_is_refused():
    student, teacher, ids, head = random_inputs(0, [3], 4, 15, torch.float32)
    config = StatsConfig(temperature=1.0, top_k=16)
    with pytest.raises(ValueError, match="top_k=16 exceeds the vocabulary of 15 entries"):
        token_statistics(student, teacher, ids, config=config, head=head)
    with pytest.raises(ValueError, match=r"\(3, 4\), teacher \(2, 4\)"):
        token_statistics(student, teacher[:2], ids, config=StatsConfig(temperature=1.0), head=head)


@pytest.mark.parametrize("temperature", [0.7, 1.1])
@pytest.mark.parametrize("top_k", [0, 1, 5, 20])
@pytest.mark.parametrize("top_p", [0.5, 0.9, 1.0])
def test_the_audit_knows_the_samplers_support(temperature, top_k, top_p):
    vocabulary, positions = 24, 3
    _, hidden, _, head = random_inputs(7, [positions], 6, vocabulary, torch.float32)
    every, repeated = torch.arange(vocabulary).repeat(positions), hidden.repeat_interleave(vocabulary, 0)
    rules = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=1)
    outside, logprob = sampling_audit(repeated, every, head=head, chunk_positions=7, sampling=rules)
    for position in range(positions):
        logits = (hidden[position] @ head.weight.T).double()
        ranked = sorted(range(vocabulary), key=lambda v: -float(logits[v]))[: top_k or vocabulary]
        weights = [math.exp(float(logits[v]) / temperature) for v in ranked]
        support, mass = set(), 0.0
        for v, weight in zip(ranked, weights, strict=True):
            if mass >= top_p * sum(weights):
                break
            support.add(v)
            mass += weight
        span = slice(position * vocabulary, (position + 1) * vocabulary)
        assert {v for v in range(vocabulary) if not outside[span][v]} == support
        # Temperature 1, whatever the sampling temperature: what both engines report.
        torch.testing.assert_close(logprob[span], logits.log_softmax(-1).float(), rtol=1e-5, atol=1e-5)


# --- through a real network: LoRA gradients of the chunked path and of full logits


def tiny_adapted_model(dtype=torch.float32):
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, **layers, tie_word_embeddings=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    model = get_peft_model(model.to(dtype), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    attach_hidden_forward(model.get_base_model())
    return model.train()


def network_gradients(model, method, *, dense, autocast=False):
    """(loss, LoRA gradients as one vector) of two sequences of five tokens; the last three are scored."""
    base = (model.module if hasattr(model, "module") else model).get_base_model()
    generator = torch.Generator().manual_seed(1)
    sequences = torch.randint(40, (2, 5), generator=generator)
    ids = sequences[:, 2:].flatten()
    positions = torch.tensor([1, 2, 3, 6, 7, 8])
    hyper = Hyperparameters(eopd_entropy_threshold=0.1)
    model.zero_grad()
    with torch.no_grad():
        teacher = base(input_ids=sequences.flip(0), positions=positions)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if dense:
            student = model(input_ids=sequences).logits.flatten(0, 1)[positions]
        else:
            student = model(input_ids=sequences, positions=positions)
    if dense:
        loss = dense_loss(method, student, *plain_logits(head_of(base), teacher), ids, [3, 3], hyper=hyper)
    else:
        loss = chunked_loss(method, student, teacher, ids, [3, 3], head=head_of(base), hyper=hyper, chunk=2)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return loss.detach(), torch.cat([gradient.flatten().float() for gradient in gradients])


@pytest.mark.parametrize("method", METHODS)
def test_through_a_network_with_checkpointing_autocast_and_ddp(method, tmp_path):
    import torch.distributed as dist

    model = tiny_adapted_model()
    loss, expected = network_gradients(model, method, dense=True)
    assert expected.norm() > 1e-3
    plain = network_gradients(model, method, dense=False)
    torch.testing.assert_close(plain[0], loss, rtol=1e-5, atol=1e-6)
    assert relative_error(plain[1], expected) < 1e-5
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = network_gradients(model, method, dense=False)
    assert relative_error(checkpointed[1], expected) < 1e-5
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        distributed = network_gradients(parallel, method, dense=False)
    finally:
        dist.destroy_process_group()
    assert relative_error(distributed[1], expected) < 1e-5
    # The paper's run: a bfloat16 base, float32 LoRA, bfloat16 autocast. Both forms carry bfloat16's rounding,
    # which two layers' backward passes turn into some percent of the gradient's norm.
    low = tiny_adapted_model(torch.bfloat16)
    low_loss, low_expected = network_gradients(low, method, dense=True, autocast=True)
    ours = network_gradients(low, method, dense=False, autocast=True)
    torch.testing.assert_close(ours[0], low_loss, rtol=5e-2, atol=5e-3)
    assert relative_error(ours[1], low_expected) < 0.1


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("vocabulary", "k"),
    [(151, 16), (64 * COLUMN_ENTRIES, 16), (64 * COLUMN_ENTRIES + 63, 16), (4 * COLUMN_ENTRIES, 1)],
)
def test_the_largest_entries_are_those_of_topk(vocabulary, k, ties):
    rows = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(vocabulary + k))
    rows[0, -1] = 50.0  # in what is left over behind the columns, where there is such a rest
    if ties:
        rows = rows.mul(2).round()
    values, places = _largest(rows, k)
    expected = rows.topk(k, dim=-1)
    assert torch.equal(values, expected.values)
    assert torch.equal(rows.gather(1, places), values)
    assert all(len(set(row)) == k for row in places.tolist())
    if not ties:
        assert torch.equal(places, expected.indices)
