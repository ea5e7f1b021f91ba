"""Prompts + completions -> token grids for the backbone, and back to flat per-token rows.

A completion follows its prompt directly; padding comes after it, where a causal model cannot attend to it, so
a sequence's hidden states depend neither on padding nor on the rest of the batch. Lengths alone say which
tokens are valid.

Shapes: B sequences, N = Σ lengths completion tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """One forward pass: sequences of similar length, padded to the longest of them.

    Attributes:
        input_ids: [b, t], right-padded.
        positions: [n] flat indices into b·t of the positions that predict completion tokens.
    """

    input_ids: Tensor
    positions: Tensor


@dataclass(frozen=True)
class RoleBatch:
    """One role's view of a micro-batch.

    Attributes:
        grids: the forward passes.
        restore: [N] permutation that puts the grids' rows back into the order of the sequences.
        valid_tokens: prompt and completion tokens of all sequences, without each one's last.
        padded_tokens: what the backbone processes, padding included.
    """

    grids: list[Grid]
    restore: Tensor
    valid_tokens: int
    padded_tokens: int

    def hidden_states(self, forward: Callable[..., Tensor]) -> Tensor:
        """[N, H] hidden states that predict the completion tokens, in the order of the sequences.

        Args:
            forward: a model with the `positions` keyword of `opsd.head.attach_hidden_forward`.
        """
        rows = [forward(input_ids=grid.input_ids, positions=grid.positions) for grid in self.grids]
        return torch.cat(rows).index_select(0, self.restore)


def length_groups(lengths: Sequence[int], max_padding_ratio: float) -> list[list[int]]:
    """Indices of sequences in groups whose padded / valid tokens stay at or below the ratio.

    Greedy from the longest down; every index appears once. A ratio of 1 groups equal lengths only.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    valid = 0
    for index in order:
        if groups:
            longest = lengths[groups[-1][0]]
            if longest * (len(groups[-1]) + 1) <= max_padding_ratio * (valid + lengths[index]):
                groups[-1].append(index)
                valid += lengths[index]
                continue
        groups.append([index])
        valid = lengths[index]
    return groups


def role_batch(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    pad_id: int,
    max_padding_ratio: float,
    device: torch.device | str,
) -> RoleBatch:
    """Lay prompts and completions out for one role.

    Args:
        prompts: B prompts, at least one token each: the first completion token is predicted from the last of
        them.
        completions: B completions, end-of-sequence included; one may be empty.
        pad_id: what fills the grid; any valid id, its value has no influence.

    Raises:
        ValueError: a prompt without tokens, or the two lists differ in length.
    """
    # The last token predicts nothing that is scored, so it never meets the backbone.
    lengths = []
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if not len(prompt):
            raise ValueError(f"the prompt of sequence {row} has no token")
        lengths.append(max(len(prompt) + len(completion) - 1, 1))
    starts = [0]
    for completion in completions:
        starts.append(starts[-1] + len(completion))
    grids, order = [], []
    for group in length_groups(lengths, max_padding_ratio):
        width = max(lengths[i] for i in group)
        grid = torch.full((len(group), width), pad_id, dtype=torch.long)
        positions = []
        for row, i in enumerate(group):
            ids = [*prompts[i], *completions[i]][: lengths[i]]
            grid[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            first = row * width + len(prompts[i]) - 1
            positions.extend(range(first, first + len(completions[i])))
            order.extend(range(starts[i], starts[i + 1]))
        grids.append(Grid(grid.to(device), torch.tensor(positions, dtype=torch.long, device=device)))
    restore = torch.empty(len(order), dtype=torch.long)
    restore[torch.tensor(order, dtype=torch.long)] = torch.arange(len(order))
    padded = sum(grid.input_ids.numel() for grid in grids)
    return RoleBatch(grids, restore.to(device), sum(lengths), padded)
