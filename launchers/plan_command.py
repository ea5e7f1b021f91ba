"""Complete and check the training flags of one cell, for launchers/train.sh:

    plan_command.py NAME=VALUE ... -- FLAGS OF THE LAUNCHER -- FLAGS OF THE USER

The settings are train.sh's variables. A flag of the user replaces the launcher's, and a line on stderr says
which value it replaces. Standard output holds words that each end in a NUL byte: the value for
PYTORCH_CUDA_ALLOC_CONF (empty: none), then the flags of ea_opsd_train.py. A wrong setting ends it with exit
code 2 and one line. It runs before anything is installed and needs only Python's standard library.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

EFFECTIVE_BATCH = 32

# Flags that follow from a setting, and the settings.
OWN_FLAGS = {
    "method": "use train.sh MODEL METHOD",
    "model_name_or_path": "use train.sh MODEL METHOD and BASE_MODEL_PATH",
    "output_dir": "use RUN_NAME and OUTPUT_ROOT",
    "run_name": "use RUN_NAME and OUTPUT_ROOT",
    "per_device_train_batch_size": "use NUM_PROCESSES and PER_DEVICE_BATCH",
    "gradient_accumulation_steps": "use NUM_PROCESSES and PER_DEVICE_BATCH",
    "resume_from_checkpoint": "it always resumes by itself",
    "rollout": "use ROLLOUT",
    "merge_step": "use MERGE_STEP",
}
# The launcher's flags that do not change the experiment; train_dataset may name a local copy.
SAME_EXPERIMENT = {
    "train_dataset",
    "save_strategy",
    "save_steps",
    "gradient_checkpointing",
    "vllm_gpu_memory_utilization",
}


class WrongSettingError(Exception):
    """A setting or flag of the user is wrong; the message names value, reason and remedy."""


def shown(text: str) -> str:
    """Return `text` on one line, with a question mark for each character that could move the cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {shown(text)}", file=sys.stderr)


def parse_flags(words: Sequence[str]) -> dict[str, list[str]]:
    """Return the values of each flag by its name with underscores; of a repeated flag the last one counts."""
    flags: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            flags.pop(name, None)
            values = flags[name] = [value] if equals else []
        elif values is None or word == "--":
            raise WrongSettingError(f"'{word}' is not a flag of ea_opsd_train.py: flags begin with --")
        else:
            values.append(word)
    return flags


def flag_words(name: str, values: Sequence[str]) -> list[str]:
    """Return a flag as words of a command line."""
    if len(values) == 1 and values[0].startswith("-"):
        return [f"--{name}={values[0]}"]
    return [f"--{name}", *values]


def same_values(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether two spellings of a flag's values mean the same: 1e-3 and 0.001, `--bf16` and `--bf16 true`."""

    def meaning(value: str) -> float | str:
        try:
            return float(value)
        except ValueError:
            return value.lower() if value.lower() in ("true", "false") else value

    return [meaning(v) for v in first or ["true"]] == [meaning(v) for v in second or ["true"]]


def announce(
    own: Mapping[str, list[str]], user: Mapping[str, list[str]], settings: Mapping[str, str]
) -> None:
    """Say what the user's flags replace and add.

    Raises:
        WrongSettingError: a flag follows from a setting, or changes the experiment under the name of the
            paper's cell.
    """
    cell = f"{settings['MODEL']}_{settings['METHOD']}"
    for name, values in user.items():
        given = " ".join(flag_words(name, values))
        if name in OWN_FLAGS:
            raise WrongSettingError(f"--{name} is set by the launcher: {OWN_FLAGS[name]}")
        if name not in own:
            say(f"{given} added")
        elif not same_values(own[name], values):
            say(f"{given} instead of {' '.join(own[name])}")
            if name not in SAME_EXPERIMENT and settings["RUN_NAME"] == cell:
                raise WrongSettingError(
                    f"{given} makes another experiment than {cell}; give it a name of its own, such as "
                    f"RUN_NAME={cell}_{name}"
                )


def count(name: str, value: str, example: str) -> int:
    """Return a setting that must be a positive whole number."""
    if not re.fullmatch("[1-9][0-9]{0,8}", value):
        raise WrongSettingError(f"{name}={value}: give {example}")
    return int(value)


def accumulation(settings: Mapping[str, str]) -> int:
    """Return the micro-batches of an optimizer step of EFFECTIVE_BATCH sequences; check ranks and GPUs."""
    processes = count("NUM_PROCESSES", settings["NUM_PROCESSES"], "the number of ranks, such as 4")
    batch = count("PER_DEVICE_BATCH", settings["PER_DEVICE_BATCH"], "a number of sequences, such as 2")
    if EFFECTIVE_BATCH % (processes * batch):
        raise WrongSettingError(
            f"NUM_PROCESSES={processes} x PER_DEVICE_BATCH={batch} does not divide the effective batch of "
            f"{EFFECTIVE_BATCH}; choose both so that it does"
        )
    if settings["DEVICE"] == "gpu" and settings["DRY_RUN"] != "1" and processes > (n := len(visible_gpus())):
        remedy = "lower NUM_PROCESSES (the effective batch stays 32)"
        raise WrongSettingError(
            f"NUM_PROCESSES={processes}, but {n} GPU(s) are visible; "
            + (remedy if n else "the small world needs none: bash launchers/quickstart.sh")
        )
    return EFFECTIVE_BATCH // (processes * batch)


def visible_gpus() -> list[str]:
    """Return the GPUs that CUDA programs started from here see, as CUDA_VISIBLE_DEVICES names them."""
    if (listed := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in listed.split(",")]
        return names[: names.index("-1")] if "-1" in names else [name for name in names if name]
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in done.stdout.splitlines()))]


def check_merge_step(step: int, flags: Mapping[str, list[str]]) -> None:
    """Refuse flags with which the Trainer never saves checkpoint-`step`.

    The Trainer saves at multiples of --save_steps (below 1: a share of --max_steps) and at the last step, and
    with --save_strategy steps alone. --save_total_limit deletes no checkpoint that --merge_step names.
    """
    remedy = "set MERGE_STEP to a step that is saved"
    strategy = " ".join(flags["save_strategy"])
    if strategy != "steps":
        raise WrongSettingError(f"--save_strategy {strategy} may never save checkpoint-{step}; leave it out")
    last, every = number(flags, "max_steps"), number(flags, "save_steps")
    if last < step:
        raise WrongSettingError(f"--max_steps {last:g} ends before checkpoint-{step}; {remedy}")
    interval = math.ceil(last * every) if 0 < every < 1 else every
    if step != last and (interval <= 0 or step % interval):
        raise WrongSettingError(f"--save_steps {every:g} never saves checkpoint-{step}; {remedy}")


def number(flags: Mapping[str, list[str]], name: str) -> float:
    """Return the one number that is a flag's value."""
    try:
        (value,) = map(float, flags[name])
    except ValueError:
        raise WrongSettingError(f"--{name} {' '.join(flags[name])}: give one number") from None
    return value


def allocator(settings: Mapping[str, str], flags: Mapping[str, list[str]]) -> str:
    """Return the value for PYTORCH_CUDA_ALLOC_CONF; empty to leave it to the user or to PyTorch's default.

    Expandable segments keep the long prompts from fragmenting the memory. vLLM's sleep mode has an allocator
    of its own, for which it must switch them off.
    """
    sleep = flags.get("vllm_enable_sleep_mode", ["False"])
    sleeps = not sleep or sleep[0].lower() in ("true", "t", "yes", "y", "1")
    taken = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF")
    return "" if sleeps or taken or settings["DEVICE"] != "gpu" else "expandable_segments:True"


def plan(words: Sequence[str]) -> list[str]:
    """Return the allocator's setting and the words of all flags. Raises WrongSettingError."""
    first = words.index("--")
    second = words.index("--", first + 1)
    settings = dict(word.split("=", 1) for word in words[:first])
    if settings["ROLLOUT"] not in ("hf", "vllm"):
        raise WrongSettingError(f"ROLLOUT={settings['ROLLOUT']}: use hf or vllm")
    name = settings["RUN_NAME"]
    if not name.isprintable() or "/" in name or name[:1] in ".-" or name.endswith("_merged"):
        raise WrongSettingError(
            f"RUN_NAME={name}: use a name without '/' or control characters, not starting with '.' or '-', "
            "not ending in _merged"
        )
    own, user = parse_flags(words[first + 1 : second]), parse_flags(words[second + 1 :])
    own["gradient_accumulation_steps"] = [str(accumulation(settings))]
    flags = {name: values for name, values in own.items() if name not in user} | user
    step = count("MERGE_STEP", settings["MERGE_STEP"], "a number of optimizer steps such as 100")
    check_merge_step(step, flags)
    announce(own, user, settings)
    return [
        allocator(settings, flags),
        *(word for name, values in flags.items() for word in flag_words(name, values)),
    ]


def main() -> int:
    try:
        words = plan(sys.argv[1:])
    except WrongSettingError as error:
        print(f"error: {shown(str(error))}", file=sys.stderr)
        return 2
    sys.stdout.buffer.write(b"".join(os.fsencode(word) + b"\0" for word in words))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
