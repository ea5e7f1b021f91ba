"""Measure each departure from the authors' code in the small world; print a Markdown table.

    OMP_NUM_THREADS=1 VLLM_CPU_KVCACHE_SPACE=1 python bench/measure_departures.py
    python bench/measure_departures.py --only padding dtype

"As described" is what the published code is known to do (docs/departures.md), rebuilt in a few lines; none of
that code is used. "Here" is this project's own code. Every figure comes from testbed/base_model, a
trained transformer, on problems of testbed/data; docs/departures.md explains the rows. The seeds row needs
vLLM; without it the row says so.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# vLLM's CPU build asks for half of the memory by default.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from opsd.batch import role_batch  # noqa: E402
from opsd.head import attach_hidden_forward, head_of  # noqa: E402
from opsd.models import load_causal_lm, load_tokenizer  # noqa: E402
from opsd.prompts import encode_student, encode_teacher  # noqa: E402
from opsd.rollout.engine import Completion, Request, Sampling  # noqa: E402
from opsd.rollout.hf import HFEngine  # noqa: E402
from opsd.seeds import evaluation_seed, rollout_seed  # noqa: E402
from opsd.tables import load_table  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEMPERATURE, CLIP = 1.1, 0.05
# The paper's training: optimizer steps, the learning rate's linear decay, LoRA.
CYCLES, LEARNING_RATE, RANK, ALPHA = 150, 5e-6, 64, 128
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SAMPLES = 12


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    figure: str
    theirs: str
    ours: str


@dataclass
class World:
    """The small world's model, with problems behind both prompts and a completion of each."""

    path: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    students: list[list[int]]
    teachers: list[list[int]]
    completions: list[Completion]
    rollout_seconds: float

    @property
    def ids(self) -> list[list[int]]:
        return [completion.token_ids for completion in self.completions]


ROLLOUT = Sampling(temperature=1.1, top_p=0.95, top_k=20, max_new_tokens=128)


def make_world(path: str, data: str, problems: int) -> World:
    """Load the model and draw one completion a problem, as training does at step 0."""
    tokenizer = load_tokenizer(path)
    rows = load_table(data).select(range(problems))
    students = [encode_student(tokenizer, row["problem"]) for row in rows]
    teachers = [encode_teacher(tokenizer, row["problem"], row["solution"]) for row in rows]
    model = load_causal_lm(path, dtype=torch.float32).eval().requires_grad_(False)
    started = time.process_time()
    completions = HFEngine(model, tokenizer, batch_size=problems).generate(requests(students), ROLLOUT)
    seconds = time.process_time() - started
    attach_hidden_forward(model)
    return World(path, model, tokenizer, students, teachers, completions, seconds)


def requests(prompts: list[list[int]]) -> list[Request]:
    """Return training's own requests at optimizer step 0."""
    return [Request(p, rollout_seed(seed=42, step=0, problem=k)) for k, p in enumerate(prompts)]


# --- the merge that drifts ----------------------------------------------------------------------------------


def merge_drift(world: World) -> list[Row]:
    """PEFT's merge and unmerge in place in bf16, once an optimizer step, against merging out of place."""
    spread, cells = _drift(world, lambda: load_causal_lm(world.path, dtype=torch.bfloat16), 1e-3, True)
    what = f"base entries (bf16) that {CYCLES} pushes change"
    figure = f"{what} in the small world at a learning rate of 1e-3 (weights' deviation {spread:.2f})"
    rows = [Row("weight push", f"{figure}; KL(teacher before ‖ after), nats a token", *cells)]
    for kept in (True, False):
        spread, cells = _drift(world, _random_model, LEARNING_RATE, kept)
        path = "each adapter entry moving one way" if kept else "each adapter entry moving at random"
        figure = f"{what} at the paper's {LEARNING_RATE:g} (random weights, deviation {spread:.2f}; {path})"
        rows.append(Row("weight push", figure, *cells))
    return rows


def _random_model():
    """Return two layers whose entries have the size of a large model's."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, initializer_range=0.02,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _drift(world: World, make: Callable, rate: float, kept: bool) -> tuple[float, list[str]]:
    """Return (standard deviation of the base's entries, what changed with each way of pushing)."""
    from peft import LoraConfig, get_peft_model

    from opsd.merging import adapted_layers, merged_matrix

    cells = []
    for in_place in (True, False):
        torch.manual_seed(0)
        base = make()
        model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
        weights = {n: p for n, p in model.named_parameters() if n.endswith("base_layer.weight")}
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        ways = {n: torch.randn_like(p).sign() for n, p in model.named_parameters() if "lora_" in n}
        for cycle in range(CYCLES):
            _move_adapter(model, rate * (1 - cycle / CYCLES), ways if kept else None)
            if in_place:
                model.merge_adapter()
                model.unmerge_adapter()
            else:
                for _, layer in adapted_layers(model):
                    merged_matrix(layer, "default")
        total = sum(weight.numel() for weight in weights.values())
        changed = sum(int((weights[n] != before[n]).sum()) for n in weights) / total
        largest = max(float((weights[n].float() - before[n].float()).abs().max()) for n in weights)
        cell = f"{changed:.1%} of the entries, by up to {largest:.1e}" if changed else "none"
        if make is not _random_model:
            cell += f"; KL {_teacher_kl(world, model):.1e}"
        cells.append(cell)
    return float(torch.cat([weight.flatten().float() for weight in before.values()]).std()), cells


@torch.no_grad()
def _move_adapter(model, rate: float, ways: dict[str, Tensor] | None) -> None:
    """Move every entry by the learning rate, as AdamW does, in its own or a random direction."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter += rate * (torch.randn_like(parameter).sign() if ways is None else ways[name])


def _teacher_kl(world: World, model) -> float:
    """Return KL(teacher as loaded ‖ teacher now) on the completions, in bf16 as in training."""
    now = model.get_base_model()
    attach_hidden_forward(now)
    loaded = load_causal_lm(world.path, dtype=torch.bfloat16).requires_grad_(False)
    attach_hidden_forward(loaded)
    with model.disable_adapter():
        after = log_probabilities(now, world.teachers, world.ids)
    before = log_probabilities(loaded, world.teachers, world.ids)
    return float(kl(before, after).mean())


# --- scoring ------------------------------------------------------------------------------------------------


def logits_of(model, prompts: list[list[int]], completions: list[list[int]], *, pad_id: int = 0) -> Tensor:
    """Return [N, V] raw logits at the completion tokens, each sequence laid out as in training."""
    batch = role_batch(prompts, completions, pad_id=pad_id, max_padding_ratio=1.25, device="cpu")
    with torch.no_grad():
        hidden = batch.hidden_states(model)
        return head_of(model).logits(hidden).float()


def log_probabilities(model, prompts, completions) -> Tensor:
    """Return [N, V] log-probabilities at the temperature of the objectives."""
    return torch.log_softmax(logits_of(model, prompts, completions) / TEMPERATURE, dim=-1)


def kl(left: Tensor, right: Tensor) -> Tensor:
    """Return KL(left ‖ right) of [N, V] log-probabilities, [N] nats."""
    return (left.exp() * (left - right)).sum(-1)


def opsd_loss(student: Tensor, teacher: Tensor, clip: float = CLIP) -> Tensor:
    """Return the opsd objective of [N, V] raw logits in their own dtype."""
    p, q = (torch.log_softmax(z / TEMPERATURE, dim=-1) for z in (teacher, student))
    entries = p.exp() * (p - q)
    return (entries.clamp(max=clip) if clip else entries).sum(-1).mean()


# --- padding ------------------------------------------------------------------------------------------------


def padding(world: World, *, batch: int = 4) -> list[Row]:
    """Micro-batches of `batch` with prompts right-padded to the longest, against completions that follow."""
    rows = []
    for role, prompts in (("student", world.students), ("teacher", world.teachers)):
        first, later = [], []
        for start in range(0, len(prompts) - batch + 1, batch):
            group, ids = prompts[start : start + batch], world.ids[start : start + batch]
            width = max(map(len, group))
            for row, (prompt, completion) in enumerate(zip(group, ids, strict=True)):
                if len(prompt) == width:
                    continue
                true = log_probabilities(world.model, [prompt], [completion])
                gap = kl(true, _right_padded(world, group, ids, row))
                first.append(float(gap[0]))
                later += gap[1:].tolist()
        text = (
            f"{sum(first) / len(first):.3f} (largest {max(first):.3f}) at the first token, "
            f"{sum(later) / len(later):.2f} at the later ones"
        )
        figure = f"KL(sequence alone ‖ in a batch of {batch}), {role}, {len(first)} shorter prompts, nats"
        rows.append(Row("padding", figure, text, _batched_gap(world, prompts, batch)))
    return rows


def _right_padded(world: World, group: list[list[int]], ids: list[list[int]], row: int) -> Tensor:
    """Return [n, V] of one row: prompts padded at the right, all completions from one column on."""
    width, longest = max(map(len, group)), max(map(len, ids))
    pad = world.tokenizer.pad_token_id
    grid = torch.full((len(group), width + longest), pad)
    mask = torch.zeros_like(grid)
    for k, (prompt, completion) in enumerate(zip(group, ids, strict=True)):
        grid[k, : len(prompt)] = torch.tensor(prompt)
        mask[k, : len(prompt)] = 1
        grid[k, width : width + len(completion)] = torch.tensor(completion)
        mask[k, width : width + len(completion)] = 1
    with torch.no_grad():
        logits = world.model(input_ids=grid, attention_mask=mask, use_cache=False).logits
    # The column before the first completion token: a pad for every prompt but the longest.
    span = logits[row, width - 1 : width - 1 + len(ids[row])].float()
    return torch.log_softmax(span / TEMPERATURE, dim=-1)


def _batched_gap(world: World, prompts: list[list[int]], batch: int) -> str:
    worst = 0.0
    for start in range(0, len(prompts) - batch + 1, batch):
        group, ids = prompts[start : start + batch], world.ids[start : start + batch]
        together = log_probabilities(world.model, group, ids)
        alone = torch.cat([log_probabilities(world.model, [p], [c]) for p, c in zip(group, ids, strict=True)])
        worst = max(worst, float(kl(alone, together).abs().max()))
    return f"at most {worst:.0e} at any token of any sequence"


# --- precision ----------------------------------------------------------------------------------------------


def dtype(world: World) -> list[Row]:
    """opsd on bf16 logits in bf16 arithmetic, and on the same bf16 logits in float32, against float32."""
    with torch.no_grad():
        exact = [logits_of(world.model, prompts, world.ids) for prompts in (world.students, world.teachers)]
    rounded = [logits.bfloat16() for logits in exact]
    rows = []
    for name, clip in (("the clip 0.05", CLIP), ("no clip", 0.0)):
        reference = _loss_and_gradient(*(z.double() for z in rounded), clip)
        found = [
            _loss_and_gradient(*rounded, clip),
            _loss_and_gradient(*(z.float() for z in rounded), clip),
        ]
        cells = [
            f"loss {abs(loss / reference[0] - 1):.1e}, gradient "
            f"{float((gradient - reference[1]).norm() / reference[1].norm()):.1e}"
            for loss, gradient in found
        ]
        figure = f"opsd with {name}, relative error on equal bf16 logits"
        rows.append(Row("precision", figure, *cells))
    empty = torch.zeros(0, rounded[0].shape[1])
    nothing = float(opsd_loss(empty.bfloat16(), empty.bfloat16()))
    return [
        *rows,
        Row("precision", "opsd of a micro-batch without a valid token", f"{nothing}", _ours_empty(world)),
    ]


def _loss_and_gradient(student: Tensor, teacher: Tensor, clip: float) -> tuple[float, Tensor]:
    leaf = student.clone().requires_grad_()
    loss = opsd_loss(leaf, teacher, clip)
    loss.backward()
    return float(loss.detach()), leaf.grad.double()


def _ours_empty(world: World) -> str:
    from opsd.objectives import METHODS, Hyperparameters, ReductionInput
    from opsd.token_stats import token_statistics

    method, hyper, head = METHODS["opsd"], Hyperparameters(), head_of(world.model)
    hidden = torch.zeros(0, head.weight.shape[1], requires_grad=True)
    stats = token_statistics(
        hidden,
        hidden.detach(),
        torch.zeros(0, dtype=torch.long),
        config=method.statistics(hyper),
        term=lambda found: method.term(found, hyper),
        head=head,
    )
    return str(float(method.reduce(ReductionInput(stats, torch.tensor([0, 0])), hyper).loss().detach()))


# --- rollouts -----------------------------------------------------------------------------------------------


def rollout_calls(world: World) -> list[Row]:
    """One sampling call an optimizer step against one a micro-batch; 4 × 2 and 2 × 4 are the paper's."""
    rows = []
    for accumulation in (2, 4):
        engine = HFEngine(world.model, world.tokenizer, batch_size=len(world.students))
        step = requests(world.students)
        size = len(step) // accumulation
        started = time.process_time()
        for start in range(0, len(step), size):
            engine.generate(step[start : start + size], ROLLOUT)
        parts = time.process_time() - started
        cell = f"{accumulation} calls, {parts:.1f} s ({parts / world.rollout_seconds:.1f} times ours)"
        figure = f"rollouts of a step of {len(step)}, accumulation {accumulation} (transformers, CPU seconds)"
        rows.append(Row("rollouts", figure, cell, f"1 call, {world.rollout_seconds:.1f} s"))
    return rows


def end_of_sequence(world: World) -> list[Row]:
    """What a mask by comparison with the pad id loses where the pad token is the end-of-sequence token."""
    end = world.tokenizer.eos_token_id
    tokens = sum(map(len, world.ids))
    ends = sum(row.count(end) for row in world.ids)
    figure = (
        f"end-of-sequence tokens left out of the loss, of {ends} in {tokens} completion tokens, if pad = eos"
    )
    return [Row("end of sequence", figure, f"{ends} of {ends} ({ends / tokens:.1%} of all tokens)", "0")]


def text_prompts(world: World) -> list[Row]:
    """Prompts that reach the sampler as text, decoded and encoded again."""
    rows = []
    encode = world.tokenizer
    for what, sequences in (("prompts", world.students + world.teachers), ("completions", world.ids)):
        again = [
            encode(encode.decode(row, skip_special_tokens=False), add_special_tokens=False)["input_ids"]
            for row in sequences
        ]
        changed = sum(new != row for new, row in zip(again, sequences, strict=True))
        figure = f"{what} of {len(sequences)} whose token ids change when decoded and encoded again"
        rows.append(Row("text", figure, str(changed), "0 (ids go in and come out)"))
    return rows


# --- beginning of sequence ----------------------------------------------------------------------------------

BOS = "<bos>"


def bos_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The small world's tokenizer with what DSR1's has: a template that opens with the beginning-of-sequence
    token, and a post-processor that puts one before every text."""
    from tokenizers import processors

    tokenizer = load_tokenizer(path)
    tokenizer.add_special_tokens({"bos_token": BOS})
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    single, pair = f"{BOS} $A", f"{BOS} $A {BOS} $B"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(BOS, tokenizer.bos_token_id)]
    )
    return tokenizer


def beginnings(tokenizer: PreTrainedTokenizerBase, problem: str) -> dict[str, int]:
    """Return the beginning-of-sequence tokens of a prompt by code path; "here" is this project's."""
    message = [{"role": "user", "content": problem}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    once = tokenizer(text)["input_ids"]
    again = tokenizer(tokenizer.decode(once, skip_special_tokens=False))["input_ids"]
    ways = {
        "teacher and evaluation": once,
        "rollout": again,
        "here": encode_student(tokenizer, problem),
    }
    return {way: ids.count(tokenizer.bos_token_id) for way, ids in ways.items()}


def beginning_of_sequence(world: World) -> list[Row]:
    """A template that holds the token, encoded by a tokenizer that adds one; and what a second one moves."""
    counts = beginnings(bos_tokenizer(world.path), "Find 12 + 30.")
    rows = [
        Row(
            "beginning of sequence",
            "beginning-of-sequence tokens of a prompt (template and tokenizer each add one, as DSR1's)",
            f"{counts['teacher and evaluation']} (teacher, evaluation), {counts['rollout']} (rollout)",
            str(counts["here"]),
        )
    ]
    # The small world was trained without such a token. Its prompts open with one token that is its own, so
    # doubling that one is the same change to a model that knows the token.
    first = {ids[0] for ids in world.students + world.teachers}
    student, teacher = (
        log_probabilities(world.model, p, world.ids) for p in (world.students, world.teachers)
    )
    twice = log_probabilities(world.model, [[p[0], *p] for p in world.students], world.ids)
    double = log_probabilities(world.model, [[p[0], *p] for p in world.teachers], world.ids)
    loss, changed = (float(kl(t, s).mean()) for t, s in ((teacher, student), (double, twice)))
    figure = (
        f"first token of every prompt ({len(first)} kind) doubled: KL(as it is ‖ doubled), student and "
        "teacher; KL(teacher ‖ student), nats a token"
    )
    theirs = (
        f"{float(kl(student, twice).mean()):.4f} and {float(kl(teacher, double).mean()):.4f}; "
        f"{changed:.4f} in place of {loss:.4f}"
    )
    return [*rows, Row("beginning of sequence", figure, theirs, f"0 and 0; {loss:.4f}")]


# --- bf16 adapters and merges -------------------------------------------------------------------------------


def bf16_adapter(world: World) -> list[Row]:
    """Adapter entries that stay as they are under AdamW's steps at the paper's learning rate, in bf16."""
    start = torch.empty(RANK, 2560)
    torch.nn.init.kaiming_uniform_(start, a=5**0.5, generator=torch.Generator().manual_seed(0))
    way = torch.randn(start.shape, generator=torch.Generator().manual_seed(1)).sign()
    cells = []
    for dtype in (torch.bfloat16, torch.float32):
        weight, still = start.to(dtype), start.to(dtype)
        for cycle in range(CYCLES):
            weight = weight + (LEARNING_RATE * (1 - cycle / CYCLES) * way).to(dtype)
        cells.append(f"{float((weight == still).float().mean()):.1%} unmoved")
    figure = (
        f"entries of LoRA's A ({RANK} × 2560, as initialised) after {CYCLES} steps of one direction at "
        f"{LEARNING_RATE:g}, linear decay"
    )
    return [Row("precision of the adapter", figure, *cells)]


def bf16_merge(world: World) -> list[Row]:
    """The share of a small update that is left when W + scale·BA is rounded to bf16."""
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(512, 512)).bfloat16()
    steps = LEARNING_RATE * CYCLES / 2
    up = steps * torch.randn(512, RANK).sign()
    down = torch.empty(RANK, 512)
    torch.nn.init.kaiming_uniform_(down, a=5**0.5)
    delta = ALPHA / RANK * up @ down
    merged = (weight.float() + delta).bfloat16()
    kept = merged.float() - weight.float()
    unchanged = float((merged == weight).float().mean())
    share = float((kept * delta).sum() / delta.square().sum())
    noise = float((kept - delta).norm() / delta.norm())
    figure = f"W + scale·BA in bf16, W of deviation 0.02, B after {CYCLES} steps at {LEARNING_RATE:g}"
    cell = (
        f"{unchanged:.1%} of the entries unchanged; error {noise:.2f} of the update, {share:.2f} of it kept"
    )
    exact = float((weight.float() + delta - weight.float() - delta).norm() / delta.norm())
    return [Row("merge", figure, cell, f"the same; in float32 error {exact:.0e}")]


# --- evaluation seeds ---------------------------------------------------------------------------------------


def seeds(world: World) -> list[Row]:
    """Samples that evaluations of two neighbouring seeds share, on the real vLLM engine."""
    figure = f"samples of {SAMPLES} that seeds 0 and 1 share (vLLM, mean over problems)"
    try:
        from opsd.rollout.vllm import VLLMEngine
        from opsd.rollout.vllm_setup import require_vllm

        require_vllm()
    except Exception as error:
        return [Row("evaluation seeds", figure, f"not measured: {error}", "–")]
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    prompts = world.students[:8]
    sampling = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=128)
    engine = VLLMEngine(world.path, max_model_len=max(map(len, prompts)) + 128, dtype="float32")
    try:
        ours = [
            engine.generate(
                [
                    Request(prompt, evaluation_seed(seed=seed, problem_id=k, sample=j))
                    for k, prompt in enumerate(prompts)
                    for j in range(SAMPLES)
                ],
                sampling,
            )
            for seed in (0, 1)
        ]
        mine = [[tuple(c.token_ids) for c in run] for run in ours]
        theirs = [_children(engine, prompts, seed) for seed in (0, 1)]
    finally:
        engine.close()
    shared = [
        sum(
            _shared(a[k * SAMPLES : (k + 1) * SAMPLES], b[k * SAMPLES : (k + 1) * SAMPLES])
            for k in range(len(prompts))
        )
        / len(prompts)
        for a, b in (theirs, mine)
    ]
    return [Row("evaluation seeds", figure, *(f"{count:.2f}" for count in shared))]


def _children(engine, prompts: list[list[int]], seed: int) -> list[tuple[int, ...]]:
    """What one request with n = 12 gives: vLLM derives each child's seed itself."""
    from vllm import SamplingParams

    params = SamplingParams(
        n=SAMPLES, seed=seed, temperature=1.0, top_p=0.95, max_tokens=128, stop_token_ids=list(engine.end_ids)
    )
    outputs = engine._llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )
    return [tuple(child.token_ids) for output in outputs for child in output.outputs]


def _shared(left: list[tuple[int, ...]], right: list[tuple[int, ...]]) -> int:
    """Count the samples of `left` that are also in `right`, each once, chance matches included."""
    pool = list(right)
    count = 0
    for sample in left:
        if sample in pool:
            pool.remove(sample)
            count += 1
    return count


MEASURES: dict[str, Callable[[World], list[Row]]] = {
    "merge": merge_drift,
    "padding": padding,
    "dtype": dtype,
    "rollouts": rollout_calls,
    "eos": end_of_sequence,
    "text": text_prompts,
    "bos": beginning_of_sequence,
    "adapter": bf16_adapter,
    "rounding": bf16_merge,
    "seeds": seeds,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--model", default=str(ROOT / "testbed" / "base_model"))
    parser.add_argument("--data", default=str(ROOT / "testbed" / "data" / "train.jsonl"))
    parser.add_argument("--problems", type=int, default=32, help="one optimizer step's worth")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    world = make_world(args.model, args.data, args.problems)
    print("| departure | measured | as described | here |\n| --- | --- | --- | --- |", flush=True)
    for name in args.only:
        for row in MEASURES[name](world):
            print(f"| {row.what} | {row.figure} | {row.theirs} | {row.ours} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
