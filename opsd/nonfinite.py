"""Stop the run at a NaN or infinite loss or gradient, before the optimizer step, and save its statistics."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch
from torch import Tensor

from opsd.errors import ArtefactError
from opsd.files import atomic_write_json
from opsd.objectives import TokenStats

logger = logging.getLogger(__name__)


class NonFiniteGuard:
    """Collect the losses of an optimizer step and check them once, with the gradient norm.

    Up to `tolerated` steps are left out; each is recorded in `output_dir`/nonfinite-step-<N>-rank-<R>.json.
    """

    def __init__(self, output_dir: Path, *, tolerated: int):
        self.output_dir, self.tolerated, self.seen = output_dir, tolerated, 0
        self._micro_batches: list[tuple[Tensor, list[int], TokenStats]] = []

    def see_loss(self, loss: Tensor, problems: list[int], stats: TokenStats) -> None:
        """Keep a micro-batch's values until `reset`; nothing is copied from the device."""
        # Attached to the graph, the term would keep [N, H] of each micro-batch until the end of the step.
        stats = TokenStats(**{name: value.detach() for name, value in vars(stats).items()})
        self._micro_batches.append((loss.detach(), problems, stats))

    def bad(self, norm: Tensor | float | None) -> bool:
        """Return whether a loss of this rank or the gradient norm is not finite; reads the device once."""
        losses = [loss.float() for loss, _, _ in self._micro_batches]
        total = torch.stack(losses).sum() if losses else torch.zeros(())
        norm = torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float32, device=total.device)
        return not bool(torch.isfinite(total + norm))

    def handle(self, step: int, norm: Tensor | float | None, *, is_main: bool) -> None:
        """Save the statistics of a non-finite step, and stop unless it is tolerated.

        Raises:
            ArtefactError: more non-finite steps than `tolerated`; names the step, the problems and the file.
        """
        self.seen += 1
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        path = self.output_dir / f"nonfinite-step-{step}-rank-{rank}.json"
        micro_batches = [
            {"loss": _number(loss), "problems": problems, "statistics": _summary(stats)}
            for loss, problems, stats in self._micro_batches
        ]
        evidence = {"step": step, "gradient_norm": _number(norm), "micro_batches": micro_batches}
        atomic_write_json(path, evidence)
        problems = sorted({p for _, ids, _ in self._micro_batches for p in ids})
        if self.seen > self.tolerated:
            raise ArtefactError(
                f"loss or gradient is not finite at optimizer step {step} (dataset rows {problems}); the "
                f"weights are unchanged and the statistics are in {path}; lower --learning_rate, or leave N "
                "such steps out with --skip_nonfinite N"
            )
        if is_main:
            message = "step %d is left out: loss or gradient is not finite (%d of %d tolerated); see %s"
            logger.warning(message, step, self.seen, self.tolerated, path)

    def reset(self) -> None:
        """Forget the step."""
        self._micro_batches.clear()


def _number(value: Tensor | float | None) -> float | str | None:
    """Return a float, or "nan", "inf" or "-inf", which JSON does not have as numbers."""
    value = None if value is None else float(value)
    return value if value is None or math.isfinite(value) else str(value)


def _summary(stats: TokenStats) -> dict:
    """Return the extremes and the count of non-finite entries of every statistic."""
    summary = {}
    for name, values in vars(stats).items():
        if values.numel() == 0:
            continue
        finite = values[values.isfinite()].float()
        extremes = (float(finite.min()), float(finite.max())) if finite.numel() else (None, None)
        summary[name] = {"not_finite": len(values) - len(finite), "min": extremes[0], "max": extremes[1]}
    return summary
