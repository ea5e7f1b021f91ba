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

from opsd.arguments import parse_arguments
from opsd.errors import run_cli


def main(argv: list[str] | None = None) -> int:
    """Parse, load and train; return the exit code."""
    training, *others = parse_arguments(sys.argv[1:] if argv is None else argv)
    level = logging.INFO if training.process_index == 0 else logging.ERROR
    words = "%(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=level, format=words, stream=sys.stderr, force=True)
    for noisy in ("httpx", "datasets", "filelock", "urllib3", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from opsd.training import train  # late: it imports torch and transformers

    return train(training, *others)


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
