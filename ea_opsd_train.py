"""Train a student on its own rollouts against its privileged self.

    accelerate launch --config_file launchers/accelerate_4gpu.yaml ea_opsd_train.py \\
        --method pwopsd --model_name_or_path Qwen/Qwen3-4B --output_dir outputs/qwen3_4b_base_pwopsd

--method is opsd, eopd, reopold or pwopsd (opsd/objectives.py). Every flag of transformers' TrainingArguments
works; the defaults are the paper's (arXiv:2605.21606). Where this departs from the authors' code:
docs/departures.md.
"""

from __future__ import annotations

import logging
import sys

from opsd.arguments import command_line, parse_arguments
from opsd.errors import run_cli

logger = logging.getLogger("ea_opsd_train")


def main(argv: list[str] | None = None) -> int:
    """Parse, load, train. Returns the exit code."""
    training, method, rollout, options = parse_arguments(command_line() if argv is None else argv)
    _set_up_logging(training)
    from opsd.training import train

    return train(training, method, rollout, options)


def _set_up_logging(training) -> None:
    level = logging.INFO if training.process_index == 0 else logging.ERROR
    logging.basicConfig(
        level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr, force=True
    )
    for noisy in ("httpx", "datasets", "filelock", "urllib3", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
