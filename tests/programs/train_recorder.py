"""Let trainings in this process record each rank's problems, completions and digests of the weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def digest(model: Any, *, adapter: bool) -> str:
    """Return the SHA-256 over the bytes of the adapter's parameters, or of all the others."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if ("lora_" in name) == adapter:
            found.update(name.encode() + value.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return found.hexdigest()


@contextlib.contextmanager
def recording(folder: Path) -> Iterator[list[Any]]:
    """Let every training write `folder`/rankN.jsonl; yield the list that trainers are appended to."""
    from opsd.trainer import OPSDTrainer

    roll_out, train, trainers = OPSDTrainer._roll_out, OPSDTrainer.train, []
    folder.mkdir(parents=True, exist_ok=True)

    def write(trainer: Any, **facts: Any) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        facts |= {"step": trainer.state.global_step}
        facts |= {"adapter": digest(model, adapter=True), "base": digest(model, adapter=False)}
        with open(folder / f"rank{trainer.args.process_index}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")

    def recorded_roll_out(self: Any, examples: Any) -> Any:
        completions = roll_out(self, examples)
        write(self, problems=[e.index for e in examples], completions=[c.token_ids for c in completions])
        return completions

    def recorded_train(self: Any, *args: Any, **kwargs: Any) -> Any:
        trainers.append(self)
        result = train(self, *args, **kwargs)
        write(self, problems=[], completions=[])
        return result

    OPSDTrainer._roll_out, OPSDTrainer.train = recorded_roll_out, recorded_train
    try:
        yield trainers
    finally:
        OPSDTrainer._roll_out, OPSDTrainer.train = roll_out, train


def records(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """Return what one rank wrote: a row a rollout, and one after the last step."""
    return [json.loads(line) for line in (folder / f"rank{rank}.jsonl").read_text("utf-8").splitlines()]
