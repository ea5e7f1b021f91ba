"""Train three steps of each method in two checkouts and compare the adapters byte by byte.

    python tests/programs/compare_adapters.py OLD_CHECKOUT NEW_CHECKOUT [--rollout vllm] [--bf16] [-- FLAGS]

Each checkout trains its own small world's base model (testbed/) with its own ea_opsd_train.py, on the CPU, in
float32 or (--bf16) in bfloat16 with gradient checkpointing. FLAGS are passed to both, e.g. `-- --loss_scope
global`. Prints a Markdown table with the SHA-256 of adapter_model.safetensors; exit code 1 when two differ.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

METHODS = ("opsd", "eopd", "reopold", "pwopsd")  # in old checkouts too
SMALL = (
    "--model_name_or_path testbed/base_model --train_dataset testbed/data/train.jsonl --use_cpu True "
    "--disable_tqdm True --max_length 1000 --max_completion_length 120 --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps 2 --learning_rate 1e-3 --max_steps 3 --save_steps 3 --seed 42 "
    "--eopd_entropy_threshold 0.02 --reopold_t_switch 1"
)


def train(checkout: Path, method: str, output: Path, flags: list[str]) -> str:
    """Train in `checkout`; the SHA-256 of the last checkpoint's adapter. Raises SystemExit if it fails."""
    command = [
        sys.executable,
        "ea_opsd_train.py",
        "--method",
        method,
        "--output_dir",
        str(output),
        *SMALL.split(),
    ]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(checkout)}
    log = output.with_suffix(".log")
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run([*command, *flags], cwd=checkout, env=environment, stdout=file, stderr=file)
    if done.returncode:
        raise SystemExit(f"{checkout}: {method} ended with {done.returncode}\n{log.read_text()[-2000:]}")
    return hashlib.sha256((output / "checkpoint-3" / "adapter_model.safetensors").read_bytes()).hexdigest()


def main() -> int:
    """Train and compare; the exit code."""
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT")
    parser.add_argument("new", type=Path, metavar="NEW_CHECKOUT")
    parser.add_argument("--rollout", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 with gradient checkpointing")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--output", type=Path, help="keep the runs here (default: a temporary folder)")
    options = parser.parse_args(words[:cut])
    precise = str(options.bf16)
    flags = ["--rollout", options.rollout, "--bf16", precise, "--gradient_checkpointing", precise]
    differing = 0
    print("| method | old | new | equal |\n| --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory(prefix="compare-adapters-") as temporary:
        folder = (options.output or Path(temporary)).resolve()
        for method in options.methods:
            hashes = []
            for side in ("old", "new"):
                output = folder / side / method
                output.parent.mkdir(parents=True, exist_ok=True)
                checkout = getattr(options, side).resolve()
                hashes.append(train(checkout, method, output, [*flags, *words[cut + 1 :]]))
            differing += hashes[0] != hashes[1]
            shown = " | ".join(f"`{value[:16]}`" for value in hashes)
            print(f"| {method} | {shown} | {'yes' if hashes[0] == hashes[1] else 'NO'} |", flush=True)
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
