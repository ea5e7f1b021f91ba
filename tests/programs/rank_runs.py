"""Train a list of runs on every rank, for tests/test_ranks.py: `rank_runs.py PLAN.json`.

The plan is a list of `[command line of ea_opsd_train.py, fault]`; each run is recorded (train_recorder.py) in
<output_dir>_records. A fault (`exception`, `memory`, `kill`) strikes rank 1 in its second optimizer step;
`stop` leaves the training there on every rank and continues with the plan.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import ea_opsd_train
from opsd.errors import run_cli
from opsd.trainer import OPSDTrainer
from tests.programs.train_recorder import recording


class Stopped(Exception):
    """The planned end of a training that another launch resumes."""


def strike(fault: str) -> None:
    if fault == "stop":
        raise Stopped
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    raise RuntimeError("the planned defect of rank 1")


def carry_out(plan: Path) -> int:
    """Train everything in the plan, and return the first exit code that is not 0."""
    roll_out = OPSDTrainer._roll_out
    for argv, fault in json.loads(plan.read_text()):

        def breaking(trainer, examples, fault=fault):
            if trainer.state.global_step == 1 and (fault == "stop" or (fault and trainer.args.process_index)):
                strike(fault)
            return roll_out(trainer, examples)

        OPSDTrainer._roll_out = breaking
        try:
            with recording(Path(argv[argv.index("--output_dir") + 1] + "_records")):
                code = ea_opsd_train.main(argv)
        except Stopped:
            continue
        finally:
            OPSDTrainer._roll_out = roll_out
        if code:
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(lambda: carry_out(Path(sys.argv[1]))))
