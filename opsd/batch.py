"""Lay prompts and completions out in token grids for the backbone, and put its rows back in order.

A completion follows its prompt directly and padding follows it, where a causal model cannot attend to it. So
a sequence's hidden states depend neither on padding nor on the rest of the batch, and lengths alone say which
tokens are valid. Shapes: B sequences, N = Σ lengths completion tokens, H hidden.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """One forward pass: sequences of similar length, padded to the longest of them."""

    input_ids: Tensor  # [b, t], padded at the right
    positions: Tensor  # [n] flat indices into b·t of the positions that predict completion tokens


@dataclass(frozen=True)
class RoleBatch:
    """One role's view of a micro-batch."""

    grids: list[Grid]
    restore: Tensor  # [N] permutation of the grids' rows into the order of the sequences
    valid_tokens: int  # prompt and completion tokens of all sequences, without the last of each
    padded_tokens: int  # tokens that the backbone processes, padding included

    def hidden_states(self, forward: Callable[..., Tensor]) -> Tensor:
        """Return the [N, H] hidden states that predict the completion tokens, in the sequences' order.

        `forward` is a model with the keyword `positions` of `opsd.head.attach_hidden_forward`.
        """
        rows = [forward(input_ids=grid.input_ids, positions=grid.positions) for grid in self.grids]
        return torch.cat(rows).index_select(0, self.restore)


def length_groups(lengths: Sequence[int], max_padding_ratio: float) -> list[list[int]]:
    """Group the indices of sequences so that padded / valid tokens of a group stay within the ratio.

    Greedy from the longest down; every index appears once. A ratio of 1 groups equal lengths only.
    """
    groups: list[list[int]] = []
    longest = valid = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if groups and longest * (len(groups[-1]) + 1) <= max_padding_ratio * (valid + length):
            groups[-1].append(index)
            valid += length
        else:
            groups.append([index])
            longest = valid = length
    return groups


def role_batch(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    *,
    pad_id: int = 0,
    max_padding_ratio: float,
    device: torch.device | str,
) -> RoleBatch:
    """Lay prompts and completions out for one role.

    Args:
        prompts: B prompts of at least one token, whose last predicts the completion's first.
        completions: B completions, end-of-sequence included; one may be empty.
        pad_id: any valid id; its value has no influence.

    Raises:
        ValueError: a prompt without tokens, or the two lists differ in length.
    """
    # The last token predicts nothing that is scored, so it is left out.
    lengths = [max(len(p) + len(c) - 1, 1) for p, c in zip(prompts, completions, strict=True)]
    if not all(prompts):
        raise ValueError(f"the prompt of sequence {[*map(len, prompts)].index(0)} has no token")
    starts = [0, *itertools.accumulate(map(len, completions))]
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
    restore = torch.tensor(order, dtype=torch.long, device=device).argsort()
    return RoleBatch(grids, restore, sum(lengths), sum(grid.input_ids.numel() for grid in grids))
