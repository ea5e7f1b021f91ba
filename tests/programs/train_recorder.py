"""Run ea_opsd_train.py with each rank recording its problems, completions and digests of the weights.

Used within a process by `recording`, and on several ranks as the script that the launcher starts:

    RECORDS=FOLDER accelerate launch … tests/programs/train_recorder.py [flags of ea_opsd_train.py]
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


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


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import ea_opsd_train
    from opsd.errors import run_cli

    with recording(Path(os.environ["RECORDS"])):
        raise SystemExit(run_cli(ea_opsd_train.main))
