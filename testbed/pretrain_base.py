"""OMP_NUM_THREADS=1 python testbed/pretrain_base.py

Train the small world's base model from scratch and write it, with its tokenizer, to testbed/base_model/.

Each step mixes the student's and the evaluation prompt, answered with mistakes that become more frequent
towards the end of a solution, and the privileged teacher's prompt, answered without mistakes. The model is
then fallible when it sees the problem alone and reliable when it sees the reference solution too. A part of
the teacher's examples contains mistakes that are masked out of the loss, so that the teacher also learns how
to continue after a student's mistake.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

    from testbed.problems import Problem

HERE = Path(__file__).resolve().parent
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings that determine the base model.

    Attributes:
        steps: optimizer steps.
        examples: sequences per step and prompt; the teacher's prompt gets twice as many.
        fewest, most: operations per problem, uniformly drawn. They reach beyond the training set's, so that
            the harder held-out set is not out of reach.
        first_slip, last_slip: chance of a mistake at the first and at the last operation.
        forced_share: share of the teacher's examples with masked mistakes.
        muon_lr, adamw_lr: peak learning rates for the matrices of the layers, and for embeddings and norms.
        warmup, cooldown: shares of the steps in which the rate rises from and falls to 0, linearly.
    """

    seed: int = 42
    steps: int = 700
    examples: int = 16
    fewest: int = 4
    most: int = 9
    first_slip: float = 0.08
    last_slip: float = 0.20
    forced_share: float = 0.25
    muon_lr: float = 0.02
    adamw_lr: float = 3e-3
    warmup: float = 0.02
    cooldown: float = 0.5

    def rate(self, step: int) -> float:
        """Return the learning rate's factor at `step` (from 0)."""
        up = (step + 1) / max(1, self.warmup * self.steps)
        down = (self.steps - step) / max(1, self.cooldown * self.steps)
        return min(1.0, up, down)


@dataclass(frozen=True)
class Example:
    """Token ids of one sequence and its labels: `labels[i]` is `ids[i]` or IGNORED."""

    ids: list[int]
    labels: list[int]


def draw_example(
    tokenizer: PreTrainedTokenizerFast,
    kind: str,
    operations: int,
    rng: random.Random,
    recipe: Recipe,
    forbidden: frozenset[Problem],
) -> Example:
    """Draw an example of `kind` "student", "evaluation" or "teacher"; its problem is not in `forbidden`."""
    from opsd.prompts import render_evaluation, render_student, render_teacher
    from testbed.problems import draw_problem, slipped_totals, write_solution

    problem = draw_problem(rng, operations)
    while problem in forbidden:
        problem = draw_problem(rng, operations)
    reference = write_solution(problem, rng)
    slipping = kind != "teacher" or rng.random() < recipe.forced_share
    totals, slips = slipped_totals(
        problem,
        rng,
        first=recipe.first_slip if slipping else 0.0,
        last=recipe.last_slip if slipping else 0.0,
    )
    written = write_solution(problem, rng, totals)
    if kind == "teacher":
        prompt = render_teacher(tokenizer, problem.text, reference.text)
        at = prompt.index(reference.text)
        learned = [(at + start, at + end) for start, end in reference.total_spans]
        masked = [span for span, slip in zip(written.total_spans, slips, strict=True) if slip]
    else:
        render = render_student if kind == "student" else render_evaluation
        prompt, learned, masked = render(tokenizer, problem.text), [], []
    return join(tokenizer, prompt, written.text, learned=learned, masked=masked)


def join(
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    completion: str,
    *,
    learned: Sequence[tuple[int, int]],
    masked: Sequence[tuple[int, int]],
) -> Example:
    """Join prompt, completion and end-of-sequence into one example.

    Learned are the completion but for its characters in `masked`, and the prompt's characters in `learned`.
    """
    front = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    back = tokenizer(completion, add_special_tokens=False, return_offsets_mapping=True)

    def inside(offset: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
        return any(start <= offset[0] and offset[1] <= end for start, end in spans)

    ids = [*front["input_ids"], *back["input_ids"], tokenizer.eos_token_id]
    keep = [
        *(inside(offset, learned) for offset in front["offset_mapping"]),
        *(not inside(offset, masked) for offset in back["offset_mapping"]),
        True,
    ]
    return Example(ids, [token if kept else IGNORED for token, kept in zip(ids, keep, strict=True)])


def pad(examples: Sequence[Example], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ids and labels [B, T], padded on the right, which causal attention never sees."""
    import torch

    width = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), width), pad_id)
    labels = torch.full((len(examples), width), IGNORED)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        labels[row, : len(example.ids)] = torch.tensor(example.labels)
    return ids, labels


def batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield each step's two batches: the two short prompts, and the teacher's.

    The problems of a batch have equally many operations, so that there is almost no padding.
    """
    from testbed.problems import HELDOUT, HELDOUT_HARD, all_splits

    splits = all_splits()
    forbidden = frozenset(splits[HELDOUT.name] + splits[HELDOUT_HARD.name])
    rng = random.Random(f"{recipe.seed}/pretraining")
    for _ in range(recipe.steps):
        parts = []
        for kinds in (("student", "evaluation"), ("teacher", "teacher")):
            operations = rng.randint(recipe.fewest, recipe.most)
            parts.append(
                [
                    draw_example(tokenizer, kind, operations, rng, recipe, forbidden)
                    for kind in kinds
                    for _ in range(recipe.examples)
                ]
            )
        yield [pad(part, tokenizer.pad_token_id) for part in parts]


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Build an untrained Qwen3 of hidden size 128 with 4 layers and tied embeddings, float32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def build_optimizers(model: Qwen3ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices, AdamW for embeddings and norms."""
    import torch

    from testbed.muon import Muon

    matrices = [
        weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name
    ]
    chosen = {id(weight) for weight in matrices}
    rest = [weight for weight in model.parameters() if id(weight) not in chosen]
    return [
        Muon(matrices, lr=recipe.muon_lr, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=recipe.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def batch_loss(model: Qwen3ForCausalLM, ids: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Return the summed cross-entropy (nats) of the learned tokens and their number. ids, labels: [B, T]."""
    from torch.nn.functional import cross_entropy

    hidden = model.model(ids).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    learned = targets != IGNORED
    logits = model.lm_head(hidden[learned])
    return cross_entropy(logits, targets[learned], reduction="sum"), int(learned.sum())


def train(
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    data: Iterable[Sequence[tuple[Tensor, Tensor]]] | None = None,
) -> Qwen3ForCausalLM:
    """Train a base model from scratch by `recipe` on the batches of each step; by default this world's."""
    from torch.nn.utils import clip_grad_norm_
    from tqdm import tqdm

    model = build_model(tokenizer, recipe.seed)
    optimizers = build_optimizers(model, recipe)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    data = batches(tokenizer, recipe) if data is None else data
    bar = tqdm(data, total=recipe.steps, desc="pretraining", mininterval=2)
    for step, parts in enumerate(bar):
        sums = [batch_loss(model, ids, labels) for ids, labels in parts]
        total = sum(count for _, count in sums)
        (sum(loss for loss, _ in sums) / total).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * recipe.rate(step)
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0 or step == recipe.steps - 1:
            plain, teacher = (float(loss.detach()) / count for loss, count in sums)
            bar.set_postfix(plain=f"{plain:.3f}", teacher=f"{teacher:.3f}")
    return model.eval()


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model, tokenizer, chat template and generation configuration, completely or not at all."""
    from transformers import GenerationConfig

    from opsd.files import atomic_directory

    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=0.95,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with atomic_directory(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def main(argv: list[str] | None = None) -> int:
    """Train and save the base model."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(description="Train the small world's base model from scratch.")
    parser.add_argument("--output", type=Path, default=HERE / "base_model", help="(default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=recipe.steps, help="optimizer steps (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=recipe.seed, help="(default: %(default)s)")
    arguments = parser.parse_args(argv)

    import torch

    from opsd.errors import UsageError
    from testbed.tokenizer import build_tokenizer

    if arguments.steps < 1:
        raise UsageError(f"--steps is {arguments.steps}, but must be at least 1")
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    started = time.monotonic()
    model = train(tokenizer, Recipe(seed=arguments.seed, steps=arguments.steps))
    save(model, tokenizer, arguments.output)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{arguments.output}: {parameters:,} parameters, {time.monotonic() - started:.0f} s")
    return 0


def _run() -> int:
    sys.path.insert(0, str(HERE.parent))
    from opsd.errors import run_cli

    return run_cli(main)


if __name__ == "__main__":
    raise SystemExit(_run())
