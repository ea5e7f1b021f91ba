"""Mistakes that a user can make: the cases of tests/test_bad_input.py and of the table in docs/mistakes.md.

`python -m tests.bad_input_cases --write` makes every mistake and writes the table.
"""

# ruff: noqa: E501 - one case a line, as in the table
from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from opsd.errors import run_cli
from tests.launchers.test_launchers import SETTINGS
from tests.test_merge_lora import scale_weights, tiny_base, train_nothing

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "mistakes.md"
# The kernel lets nobody write there, root included.
FORBIDDEN = "/sys/nothing"
DEEP = '{"a":' * 200_000 + "1" + "}" * 200_000


@dataclass(frozen=True)
class World:
    """Valid artefacts to copy and damage, and an empty folder for each case."""

    root: Path  # base/ (a tiny model), outputs/tiny_pwopsd/, tiny_pwopsd_merged/, rows.jsonl, sums.jsonl
    new: Path  # the case's own folder

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def run(self) -> Path:
        return self.root / "outputs" / "tiny_pwopsd"

    @property
    def merged(self) -> Path:
        return self.root / "tiny_pwopsd_merged"

    def copy(self, folder: Path, damage: Callable[[Path], object]) -> Path:
        """Return a damaged copy of `folder` in `new`."""
        target = shutil.copytree(folder, self.new / folder.name)
        damage(target)
        return target

    def file(self, name: str, text: str | bytes) -> Path:
        path = self.new / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def rows(self, *rows: dict) -> Path:
        return self.file("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def build_world(root: Path) -> World:
    """Make everything that `World` lists."""
    import merge_lora

    base = tiny_base(root / "base", max_position_embeddings=2048)
    checkpoint = train_nothing(base, root / "outputs" / "tiny_pwopsd")
    with contextlib.redirect_stderr(io.StringIO()):
        merge_lora.merge(str(base), checkpoint, root / "tiny_pwopsd_merged")
    world = World(root, root)
    rows = world.rows(
        *[{"problem": f"{n}+1", "solution": f"{n + 1}", "answer": f"{n + 1}"} for n in range(8)]
    )
    shutil.copy(rows, root / "sums.jsonl")
    return world


# -- command lines that would work ---------------------------------------------------------------------------


def words(flags: dict[str, object]) -> list[str]:
    return [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]


def train(w: World, *more: str, **flags: object) -> list[str]:
    values = {
        "method": "pwopsd", "model_name_or_path": w.base, "train_dataset": w.root / "rows.jsonl",
        "output_dir": w.new / "run", "rollout": "hf", "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "max_completion_length": 4, "max_steps": 1, "max_length": 2000,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    return [*words(values | flags), *more]


def merge(w: World, *more: str, **flags: object) -> list[str]:
    adapter = w.run / "checkpoint-100"
    values = {"base_model": w.base, "adapter": adapter, "output": w.new / "tiny_pwopsd_merged"}
    return [*words(values | flags), *more]


def evaluate(w: World, *more: str, **flags: object) -> list[str]:
    values = {
        "base_model": w.base, "dataset": "sums", "dataset_path": w.root / "sums.jsonl",
        "output": w.new / "r.json", "engine": "hf", "val_n": 1, "max_new_tokens": 4, "grading_workers": 1,
    }  # fmt: skip
    return [*words(values | flags), *more]


def branch(w: World, *more: str, **flags: object) -> list[str]:
    values = {"model_name_or_path": w.base, "dataset": w.root / "rows.jsonl", "engine": "hf"}
    return [*words(values | {"output_dir": w.new / "branches"} | flags), *more]


# -- damages -------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def edit(path: Path, **changes: object) -> None:
    """Change fields of a JSON file; None removes one."""
    value = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: field for name, field in value.items() if field is not None}))


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()


def ships_code(folder: Path) -> None:
    edit(folder / "config.json", model_type="novel", auto_map={"AutoConfig": "novel.Config"})
    (folder / "novel.py").write_text("raise SystemExit('code of the model was run')\n")


def encoder_decoder(folder: Path) -> None:
    from transformers import T5Config

    T5Config().save_pretrained(folder)


def empty_marker(run: Path) -> Path:
    (run / "checkpoint-100" / ".complete").write_text('{"files": []}')
    return run / "checkpoint-100"


def a_result() -> dict:
    """Return a valid result of another model's evaluation."""
    record = {
        "problem_id": 0, "problem": "1+1", "ground_truth": "2", "val_n": 1, "num_correct": 1,
        "pass_at_n": True, "majority_vote_correct": True,
        "generations": [{"predicted_answer": "2", "full_generation": "2", "correct": True, "formatted": True}],
    }  # fmt: skip
    return {
        "base_model": "x", "dataset": "sums", "temperature": 1.0, "top_p": 0.95, "max_new_tokens": 4,
        "val_n": 1, "seed": 0, "num_problems": 1, "results": [record],
    }  # fmt: skip


# -- circumstances -------------------------------------------------------------------------------------------


def without_vllm(patch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    absent = lambda name, *more: None if name == "vllm" else find(name, *more)  # noqa: E731
    patch.setattr(importlib.util, "find_spec", absent)


def offline(patch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE=1 as if set before the start; no cache has the models of the cases."""
    import datasets.config
    import huggingface_hub.constants

    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def no_permission(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "access", lambda *_: False)


def full_disk(patch: pytest.MonkeyPatch) -> None:
    """Let every file be opened and none be written to the disk."""

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(os, "fsync", fail)


# -- the cases -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One mistake."""

    name: str  # in words, as in the table
    program: str  # a module with `main`, or a launcher's name
    argv: Callable[[World], list[str]]
    code: int  # 2 = usage, 3 = an artefact is missing or invalid
    says: tuple[str, ...]  # parts of the message: the wrong value and the remedy
    settings: dict[str, str] | None = None  # environment variables, for a launcher
    circumstance: Callable[[pytest.MonkeyPatch], None] | None = None  # what the machine is like


def with_one(prefix: str, program: str, argv: Callable[[World, Callable], list[str]]) -> Callable[..., Case]:
    """Return a maker of cases that differ in one artefact; `argv` takes the world and what makes it."""

    def make(name: str, change: Callable, *says: str, code: int = 3) -> Case:
        return Case(f"{prefix} {name}", program, lambda w: argv(w, change), code, says)

    return make


def with_flags(program: str, argv: Callable[..., list[str]]) -> Callable[..., Case]:
    """Return a maker of cases that differ in flags; None leaves one out."""

    def make(
        name: str, *says: str, code: int = 2, circumstance: Callable | None = None, **flags: object
    ) -> Case:
        return Case(name, program, lambda w: argv(w, **flags), code, says, circumstance=circumstance)

    return make


def launcher(name: str, script: str, argv: list[str], *says: str, code: int = 2, **settings: str) -> Case:
    return Case(name, script, lambda w: argv, code, says, settings={"DRY_RUN": "1"} | settings)


ROW = {"problem": "1+1", "solution": "2"}
TRAIN, MERGE, EVALUATE = "ea_opsd_train", "merge_lora", "evaluate_math"
training, merging = with_flags(TRAIN, train), with_flags(MERGE, merge)
evaluation = with_flags(EVALUATE, evaluate)
model = with_one("base model", TRAIN, lambda w, damage: train(w, model_name_or_path=w.copy(w.base, damage)))
data = with_one("training data", TRAIN, lambda w, make: train(w, train_dataset=make(w)))
adapter = with_one(
    "merging", MERGE, lambda w, damage: merge(w, adapter=w.copy(w.run, damage) / "checkpoint-100")
)
merged = with_one(
    "evaluating a merged folder", EVALUATE, lambda w, damage: evaluate(w, base_model=w.copy(w.merged, damage))
)
benchmark = with_one("benchmark file", EVALUATE, lambda w, make: evaluate(w, dataset_path=make(w)))

CASES: list[Case] = [
    # training: the command line
    training("no --method", "--method", "opsd, eopd, reopold, pwopsd", method=None),
    training("--method sft", "'sft'", "opsd, eopd, reopold, pwopsd", method="sft"),
    training("a flag that does not exist", "--learning_rat", "--help", learning_rat=1),
    training("--learning_rate nan", "nan", "more than 0", learning_rate="nan"),
    training("--position_w_min 1.5", "1.5", "[0, 1]", position_w_min="1.5"),
    training("--max_completion_length 2000", "2000", "--max_length", max_completion_length="2000"),
    training("--save_only_model True", "resumed", save_only_model="True"),
    training("--optim adam9", "adam9", optim="adam9"),
    training("--push_to_hub True", "not supported", "hf upload", push_to_hub="True"),
    training("--report_to wandb", "pip install wandb", report_to="wandb"),
    training("no --model_name_or_path", "--model_name_or_path", "hub id or folder", model_name_or_path=None),
    training("no --output_dir", "--output_dir", output_dir=None),
    training("--lora_target_modules of another architecture", "c_attn", lora_target_modules="c_attn"),
    training("--attn_implementation that is not installed", "flash_attention_2", attn_implementation="flash_attention_2"),
    training("vLLM is not installed", "vLLM is not installed", "hf", circumstance=without_vllm, rollout="vllm"),
    # training: the model
    training("base model: no such folder", "./nowhere", "does not exist", code=3, model_name_or_path="./nowhere"),
    training("base model: a hub name, HF_HUB_OFFLINE=1, nothing in the cache", "no-one/nothing-4b", "HF_HUB_OFFLINE", code=3, circumstance=offline, model_name_or_path="no-one/nothing-4b"),
    model("without config.json", lambda f: (f / "config.json").unlink(), "no config.json"),
    model("whose config.json is nested 200,000 deep", lambda f: (f / "config.json").write_text(DEEP), "configuration", "recursion"),
    model("whose tokenizer.json is nested 200,000 deep", lambda f: (f / "tokenizer.json").write_text(DEEP), "tokenizer", "cannot be loaded", "download it again"),
    model("that is an encoder-decoder", encoder_decoder, "t5", "not a causal language model"),
    model("that ships code", ships_code, "code of its own", "--trust_remote_code", code=2),
    model("whose tokenizer has no chat template", lambda f: (f / "chat_template.jinja").unlink(), "no chat template", "chat_template.jinja"),
    model("whose chat template raises", lambda f: (f / "chat_template.jinja").write_text("{{ raise_exception('no\\nerror: x') }}"), "chat template", "no\\nerror: x", "repair"),
    model("whose tokenizer has no end token", lambda f: edit(f / "tokenizer_config.json", eos_token=None), "no end-of-sequence token", "eos_token"),
    model("without weights", lambda f: (f / "model.safetensors").unlink(), "weights", "cannot be loaded"),
    model("with cut weights", lambda f: cut(f / "model.safetensors"), "weights", "cannot be loaded"),
    # training: the data
    data("without the column solution", lambda w: w.rows({"problem": "1", "answer": "1"}), "no column solution", "problem, answer"),
    data("of null and empty texts alone", lambda w: w.rows(ROW | {"solution": None}, ROW | {"problem": " "}), "2 are left out", "null, empty or not text"),
    data("with half a surrogate pair", lambda w: w.file("rows.jsonl", '{"problem": "\\ud800", "solution": "2"}\n'), "rows.jsonl", "surrogate", "repair"),
    data("smaller than one step", lambda w: w.rows(ROW), "takes 2 problems", "has 1", code=2),
    training("training data: a hub name, HF_HUB_OFFLINE=1, nothing in the cache", "no-one/no-problems", "HF_HUB_OFFLINE", code=3, circumstance=offline, train_dataset="no-one/no-problems"),
    Case("prompts longer than the model's positions", TRAIN, lambda w: train(w, max_length=9000, train_dataset=w.rows(*[ROW | {"solution": "1" * 2100}] * 2)), 2, ("2048 positions", "lower --max_length")),
    # training: where it writes and resumes
    Case("--output_dir is a file", TRAIN, lambda w: train(w, output_dir=w.file("taken", "")), 3, ("taken", "cannot be written")),
    training("--output_dir without permission", FORBIDDEN, "cannot be written", code=3, output_dir=FORBIDDEN),
    training("the disk is full at the start", "disk is full", "same command", code=3, circumstance=full_disk),
    Case("--output_dir holds a run already", TRAIN, lambda w: train(w, output_dir=w.run), 3, ("checkpoint-100", "--resume_from_checkpoint auto")),
    training("--resume_from_checkpoint of nothing", "./none/checkpoint-1", "does not exist", code=3, resume_from_checkpoint="./none/checkpoint-1"),
    Case("--resume_from_checkpoint with an empty list in its marker", TRAIN, lambda w: train(w, resume_from_checkpoint=w.copy(w.run, empty_marker) / "checkpoint-100"), 3, ("checkpoint-100", "marker", "auto")),
    # merging
    merging("merging without --adapter", "--adapter missing", adapter=None),
    Case("merging: no such checkpoint", MERGE, lambda w: merge(w, adapter=w.run / "checkpoint-75"), 3, ("checkpoint-75", "holds checkpoint-100")),
    adapter("with an empty list in its marker", empty_marker, "checkpoint-100", "damaged"),
    adapter("with a torn manifest", lambda r: cut(r / "manifest.json"), "manifest", "not valid JSON"),
    Case("merging into a base with other weights", MERGE, lambda w: merge(w, "--accept_base_name", base_model=w.copy(w.base, scale_weights)), 3, ("another base model", "SHA-256", "pass that one")),
    Case("merging: no such base", MERGE, lambda w: merge(w, "--accept_base_name", base_model="./none"), 3, ("./none", "does not exist")),
    Case("merging into a folder with other files", MERGE, lambda w: merge(w, output=w.file("thesis.tex", "years").parent), 2, ("thesis.tex", "choose another")),
    merging("merging: the disk is full on the way", "is full", "same command", code=3, circumstance=full_disk),
    merging("merging: no permission", FORBIDDEN, code=3, output=f"{FORBIDDEN}/x_merged"),
    Case("checking a merged folder of another run", MERGE, lambda w: ["--check", str(w.merged), "--run_name", "other"], 3, ("tiny_pwopsd", "'other'", "RUN_NAME")),
    # evaluation
    evaluation("evaluating without --base_model", "--base_model is missing", "hub id", base_model=None),
    evaluation("--temperature nan", "temperature is nan", "at least 0", temperature="nan"),
    evaluation("--max_new_tokens beyond the model", "--max_new_tokens 4000", "lower", max_new_tokens=4000),
    evaluation("--max_model_len beyond the model", "4000", "2048", max_model_len=4000),
    evaluation("--output without permission", "r.json", "no permission", circumstance=no_permission),
    evaluation("evaluating an adapter that is not there", "no checkpoint at none", "train first", code=3, adapter="./none"),
    evaluation("evaluating: the disk is full", "disk is full", "same command", code=3, circumstance=full_disk),
    merged("that is cut", lambda f: cut(f / "model.safetensors"), "not complete", "merge_lora.py again"),
    merged("without tokenizer", no_tokenizer, "is missing", "merge_lora.py again"),
    Case("evaluating a model without weights", EVALUATE, lambda w: evaluate(w, base_model=w.copy(w.base, lambda f: (f / "model.safetensors").unlink())), 3, ("model.safetensors", "cannot be loaded")),
    benchmark("nested 200,000 deep", lambda w: w.file("sums.jsonl", "[" * 200_000), "damaged", "recursion"),
    benchmark("with a problem of 50 MB", lambda w: w.rows(ROW | {"problem": "1" * 50_000_000, "answer": "2"}), "row 0", "50000000 characters", "at most 1000000"),
    Case("--output holds another run's result", EVALUATE, lambda w: evaluate(w, output=w.file("r.json", json.dumps(a_result()))), 2, ("base_model", "--replace")),
    Case("--output holds a result with NaN", EVALUATE, lambda w: evaluate(w, output=w.file("r.json", json.dumps(a_result() | {"temperature": float("nan")}))), 2, ("NaN", "--replace")),
    Case("the journal is of another program", EVALUATE, lambda w: evaluate(w, output=w.file("r.json.journal.jsonl", "hello\n").with_name("r.json")), 3, ("line 1 of the journal", "delete the journal")),
    # the other programs
    Case("summarize_results.py: no such file", "summarize_results", lambda w: ["./none/*.json"], 2, ("./none/*.json",)),
    Case("summarize_results.py --plot of an unknown kind", "summarize_results", lambda w: ["--plot", "x.docx"], 2, ("x.docx", ".png")),
    Case("prepare_hmmt25.py: no such file", "data.prepare_hmmt25", lambda w: ["--source", "./no.jsonl"], 3, ("./no.jsonl",)),
    Case("plot_run.py of a log of 1e999", "plot_run", lambda w: [str(w.file("metrics.jsonl", '{"step": 1, "loss": 1e999}\n').parent)], 3, ("line 1", "1e999", "delete the line")),
    Case("testbed/problems.py --check of files that are not there", "testbed.problems", lambda w: ["--check", "--output", str(w.new)], 3, ("heldout.jsonl", "run python testbed/problems.py")),
    # launchers
    launcher("a GPU count that does not divide the batch", "train.sh", ["small", "opsd"], "NUM_PROCESSES=3", "32", NUM_PROCESSES="3"),
    launcher("run_eval.sh: no merged model", "run_eval.sh", ["small_opsd", "small"], "no merged model", "train.sh", code=3, DRY_RUN="0", OUTPUT_ROOT="/nowhere"),
    launcher("ablation.sh of an unknown cell", "ablation.sh", ["small", "diagonal"], "'diagonal'", "flat_global"),
    launcher("reproduce_paper.sh without the hmmt25 file", "reproduce_paper.sh", [], "/nowhere", "data/README.md", code=3, DRY_RUN="0", HMMT25_PARQUET_PATH="/nowhere"),
]  # fmt: skip


# -- running them --------------------------------------------------------------------------------------------


def run_case(case: Case, world: World) -> tuple[int, str]:
    """Return (exit code, what was written to stderr)."""
    argv = case.argv(world)
    if case.settings is not None:
        environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        command = ["bash", str(ROOT / "launchers" / case.program), *argv]
        done = subprocess.run(
            command, env=environment | case.settings, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stderr
    said = io.StringIO()
    main = importlib.import_module(case.program).main
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        for name in ("", "datasets", "transformers"):
            # What an earlier test left there writes to its own stream, which is closed.
            patch.setattr(logging.getLogger(name), "handlers", [])
        if case.circumstance is not None:
            case.circumstance(patch)
        code = run_cli(lambda: main(argv))
    return code, said.getvalue()


def error_line(said: str) -> str:
    """Return the one line that begins with `error:`, whatever progress bars and log lines precede it."""
    (line,) = [line for line in said.split("\n") if line.startswith("error:")]
    return line


# -- the table -----------------------------------------------------------------------------------------------

INTRODUCTION = """# Mistakes and their messages

Made by `python -m tests.bad_input_cases --write`, which makes every mistake; `pytest tests/test_bad_input.py`
tests each one. A number outside its range, whichever flag it belongs to, is answered as `--position_w_min 1.5`
is. Exit code 2: the call is wrong. 3: a file, folder, model or data set is missing or invalid, or the machine
refuses.

| mistake | program | exit code | message |
| --- | --- | --- | --- |
"""


def row(case: Case, world: World) -> str:
    world.new.mkdir()
    text = error_line(run_case(case, world)[1]).removeprefix("error: ")
    for place in (world.new, world.root, ROOT):
        text = text.replace(str(place), ".")
    text = re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")
    program = case.program if case.settings is not None else f"{case.program.replace('.', '/')}.py"
    return f"| {case.name} | {program} | {case.code} | {text} |\n"


def document() -> str:
    """Return the page: every case with its message on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        world = build_world(Path(folder))
        rows = [row(case, replace(world, new=world.root / f"case-{n}")) for n, case in enumerate(CASES)]
    return INTRODUCTION + "".join(rows)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: python -m tests.bad_input_cases --write")
    DOCUMENT.write_text(document(), encoding="utf-8")
