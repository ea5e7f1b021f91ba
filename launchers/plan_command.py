"""Complete and check the training flags of one cell, for launchers/train.sh:

    plan_command.py NAME=VALUE ... -- FLAGS OF THE LAUNCHER -- FLAGS OF THE USER

The settings are train.sh's variables. A flag of the user replaces the launcher's, so that each stands once,
and a line on stderr says which value it replaces. Standard output holds words that each end in a NUL byte:
the value for PYTORCH_CUDA_ALLOC_CONF (empty: none), then the flags of ea_opsd_train.py. A wrong setting ends
it with 2 and one line. It runs before anything is installed, so it needs only Python's standard library.
"""

from __future__ import annotations

import math
import os
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

    def meaning(value: str) -> object:
        try:
            return float(value)
        except ValueError:
            return value.lower() if value.lower() in ("true", "false") else value

    return [meaning(v) for v in first or ["true"]] == [meaning(v) for v in second or ["true"]]


def override(own: Mapping[str, list[str]], user: Mapping[str, list[str]]) -> list[str]:
    """Say what the user's flags replace and add; return the names of those that change the experiment.

    Raises:
        WrongSettingError: one of them follows from a setting, or the run would bear the name of the cell that
            it is not.
    """
    changed = []
    for name, values in user.items():
        if name in OWN_FLAGS:
            raise WrongSettingError(f"--{name} is set by the launcher: {OWN_FLAGS[name]}")
        given = " ".join(flag_words(name, values))
        if name not in own:
            say(f"{given} added")
        elif not same_values(own[name], values):
            say(f"{given} instead of {' '.join(own[name])}")
            if name not in SAME_EXPERIMENT:
                changed.append(name)
    return changed


def check_run_name(
    changed: Sequence[str], user: Mapping[str, list[str]], settings: Mapping[str, str]
) -> None:
    """Refuse an experiment with other numbers under the name of the paper's cell."""
    cell = f"{settings['MODEL']}_{settings['METHOD']}"
    if changed and settings["RUN_NAME"] == cell:
        given = " ".join(flag_words(changed[0], user[changed[0]]))
        raise WrongSettingError(
            f"{given} makes another experiment than {cell}; give it a name of its own, such as "
            f"RUN_NAME={cell}_{changed[0]}"
        )


def count(settings: Mapping[str, str], name: str, example: str) -> int:
    """Return a setting that must be a positive whole number."""
    value = settings[name]
    if not (value.isascii() and value.isdigit() and len(value) < 10 and value[0] != "0"):
        raise WrongSettingError(f"{name}={value}: give {example}")
    return int(value)


def accumulation(settings: Mapping[str, str]) -> int:
    """Return the micro-batches of an optimizer step of EFFECTIVE_BATCH sequences; check ranks and GPUs."""
    processes = count(settings, "NUM_PROCESSES", "the number of ranks, such as 4")
    batch = count(settings, "PER_DEVICE_BATCH", "a number of sequences, such as 2")
    if EFFECTIVE_BATCH % (processes * batch):
        raise WrongSettingError(
            f"NUM_PROCESSES={processes} x PER_DEVICE_BATCH={batch} does not divide the effective batch of "
            f"{EFFECTIVE_BATCH}; choose both so that it does"
        )
    if settings["DEVICE"] == "gpu" and settings["DRY_RUN"] != "1":
        gpus = len(visible_gpus())
        if gpus == 0:
            raise WrongSettingError(
                f"{settings['MODEL']} needs NVIDIA GPUs and none is visible; the small world does not: "
                "bash launchers/quickstart.sh"
            )
        if processes > gpus:
            raise WrongSettingError(
                f"NUM_PROCESSES={processes}, but {gpus} GPU(s) are visible; lower NUM_PROCESSES (the "
                f"effective batch stays {EFFECTIVE_BATCH})"
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
    last = number(flags, "max_steps", int)
    if last < step:
        raise WrongSettingError(f"--max_steps {last} ends before checkpoint-{step}; {remedy}")
    every = number(flags, "save_steps", float)
    if 0 < every < 1:
        every = math.ceil(last * every)
    if step != last and not (every > 0 and step % every == 0):
        raise WrongSettingError(
            f"--save_steps {flags['save_steps'][0]} never saves checkpoint-{step}; {remedy}"
        )


def number(flags: Mapping[str, list[str]], name: str, kind: type) -> float:
    """Return the one number that is a flag's value."""
    try:
        (value,) = map(kind, flags[name])
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


def check_names(settings: Mapping[str, str]) -> None:
    """Check the settings that are words."""
    if settings["ROLLOUT"] not in ("hf", "vllm"):
        raise WrongSettingError(f"ROLLOUT={settings['ROLLOUT']}: use hf or vllm")
    name = settings["RUN_NAME"]
    if not name.isprintable() or "/" in name or name[:1] in ".-" or name.endswith("_merged"):
        raise WrongSettingError(
            f"RUN_NAME={name}: use a name without '/' or control characters, not starting with '.' or '-', "
            "not ending in _merged"
        )


def plan(words: Sequence[str]) -> list[str]:
    """Return the allocator's setting and the words of all flags. Raises WrongSettingError."""
    first = words.index("--")
    second = words.index("--", first + 1)
    settings = dict(word.split("=", 1) for word in words[:first])
    check_names(settings)
    own = parse_flags(words[first + 1 : second])
    user = parse_flags(words[second + 1 :])
    own["gradient_accumulation_steps"] = [str(accumulation(settings))]
    step = count(settings, "MERGE_STEP", "a number of optimizer steps such as 100")
    changed = override(own, user)
    flags = {name: values for name, values in own.items() if name not in user} | user
    check_merge_step(step, flags)
    check_run_name(changed, user, settings)
    return [
        allocator(settings, flags),
        *(w for name, values in flags.items() for w in flag_words(name, values)),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    try:
        words = plan(sys.argv[1:] if argv is None else argv)
    except WrongSettingError as error:
        print(f"error: {shown(str(error))}", file=sys.stderr)
        return 2
    sys.stdout.buffer.write(b"".join(os.fsencode(word) + b"\0" for word in words))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
