"""What tests/test_ranks.py launches on every rank: `rank_runs.py PLAN.json`.

The plan is a list of `[command line of ea_opsd_train.py, fault]`. After each training every rank writes which
problems it saw at each step and a hash of its adapter to `<output_dir>/rank-<R>.json`. A fault (`exception`,
`memory`, `kill`) strikes rank 1 in its second optimizer step; `stop` leaves the training there on every rank
and goes on with the plan.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import ea_opsd_train
from opsd.errors import run_cli
from opsd.trainer import OPSDTrainer

RANK = int(os.environ.get("RANK", "0"))
ROLL_OUT, TRAIN = OPSDTrainer._roll_out, OPSDTrainer.train


class Stopped(Exception):
    """The planned end of a training that another launch resumes."""


class Recorder:
    """Watches the trainer of one run, and breaks it where the plan says so."""

    def __init__(self, fault: str | None):
        self.fault = fault
        self.seen: list[list[int]] = []
        self.adapter = ""

    def install(self) -> None:
        def watched_roll_out(trainer, examples):
            if self.fault and trainer.state.global_step == 1 and (RANK == 1 or self.fault == "stop"):
                self.strike()
            self.seen.append([example.index for example in examples])
            return ROLL_OUT(trainer, examples)

        def watched_train(trainer, *arguments, **more):
            result = TRAIN(trainer, *arguments, **more)
            digest = hashlib.sha256()
            for name, parameter in sorted(trainer.accelerator.unwrap_model(trainer.model).named_parameters()):
                if "lora_" in name:
                    digest.update(name.encode())
                    digest.update(parameter.detach().numpy().tobytes())
            self.adapter = digest.hexdigest()
            return result

        OPSDTrainer._roll_out, OPSDTrainer.train = watched_roll_out, watched_train

    def strike(self) -> None:
        if self.fault == "stop":
            raise Stopped
        # When it struck, for the report of how long the other rank then took to end.
        print(f"rank 1 breaks at {time.time():.2f}", file=sys.stderr, flush=True)
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        raise RuntimeError("the planned defect of rank 1")


def carry_out(plan: Path) -> int:
    """Train everything in the plan, and return the first exit code that is not 0."""
    for argv, fault in json.loads(plan.read_text()):
        recorder = Recorder(fault)
        recorder.install()
        try:
            code = ea_opsd_train.main(argv)
        except Stopped:
            continue
        if code:
            return code
        folder = Path(argv[argv.index("--output_dir") + 1])
        record = {"seen": recorder.seen, "adapter": recorder.adapter}
        (folder / f"rank-{RANK}.json").write_text(json.dumps(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(lambda: carry_out(Path(sys.argv[1]))))
