"""What a user can get wrong, and what is said: the cases of tests/test_bad_input.py and of the table in
docs/reliability.md, which `python -m tests.bad_input_cases --write` makes from them.
"""

# ruff: noqa: E501 - one case a line, as in the table
from __future__ import annotations

import contextlib
import errno
import importlib
import importlib.util
import io
import json
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

from opsd.checkpoints import mark_complete
from opsd.errors import run_cli
from tests.test_merge_lora import scale_weights, tiny_base, train_nothing

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- bad input: begin -->", "<!-- bad input: end -->"
# A place that the kernel lets nobody write, root included.
FORBIDDEN = "/sys/nothing"


@dataclass(frozen=True)
class World:
    """Good things to damage, and an empty folder for each case.

    Attributes:
        root: holds base/ (a tiny causal model), outputs/tiny_pwopsd/checkpoint-100, tiny_pwopsd_merged/,
            rows.jsonl (training problems), sums.jsonl (a benchmark), result.json.
        new: empty.
    """

    root: Path
    new: Path

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
        """A copy of `folder` in `new`, damaged."""
        target = self.new / folder.name
        shutil.copytree(folder, target)
        damage(target)
        return target

    def file(self, name: str, text: str | bytes) -> Path:
        path = self.new / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def rows(self, *rows: dict, name: str = "rows.jsonl") -> Path:
        return self.file(name, "".join(json.dumps(row) + "\n" for row in rows))


def build_world(root: Path) -> World:
    """Make everything that `World` lists."""
    import merge_lora

    base = tiny_base(root / "base", max_position_embeddings=2048)
    checkpoint = train_nothing(base, root / "outputs" / "tiny_pwopsd")
    with contextlib.redirect_stderr(io.StringIO()):
        merge_lora.merge(str(base), checkpoint, root / "tiny_pwopsd_merged")
    rows = [{"problem": f"{n}+1", "solution": f"{n + 1}", "answer": f"{n + 1}"} for n in range(8)]
    for name in ("rows.jsonl", "sums.jsonl"):
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return World(root, root)


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
    values = {
        "model_name_or_path": w.base,
        "dataset": w.root / "rows.jsonl",
        "output_dir": w.new / "branches",
    }
    return [*words(values | {"engine": "hf"} | flags), *more]


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


def deep(file: Path) -> None:
    file.write_text('{"a":' * 200_000 + "1" + "}" * 200_000)


def template(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")


def another_kind(folder: Path, kind: str) -> None:
    """The configuration of a model that is no decoder."""
    from transformers import BertConfig, T5Config, ViTConfig

    {"t5": T5Config, "vit": ViTConfig, "bert": BertConfig}[kind]().save_pretrained(folder)


def half_written(run: Path) -> None:
    (run / "checkpoint-100" / ".complete").unlink()


def started_differently(w: World) -> Path:
    """A run folder as training with another learning rate and other data left it."""
    from opsd import training
    from opsd.arguments import parse_arguments
    from opsd.models import load_config, load_tokenizer
    from opsd.run_identity import write_manifest

    given = train(w, learning_rate=0.001, train_dataset=w.rows(ROW, ROW))
    arguments, method, rollout, options = parse_arguments(given)
    tokenizer = load_tokenizer(options.model_name_or_path)
    problems = training._load_problems(arguments, rollout, options, tokenizer)
    config = load_config(options.model_name_or_path)
    manifest = training._manifest(arguments, method, rollout, options, config, problems)
    return w.copy(w.run, lambda folder: write_manifest(folder, manifest))


def marker_of(run: Path, text: str) -> None:
    (run / "checkpoint-100" / ".complete").write_text(text)


def logged(w: World, text: str) -> list[str]:
    """A run's folder with such a metrics.jsonl."""
    return [str(w.file("metrics.jsonl", text).parent)]


def adapter_pickled(run: Path) -> None:
    (run / "checkpoint-100" / "adapter_model.safetensors").rename(
        run / "checkpoint-100" / "adapter_model.bin"
    )


def adapter_of_kind(run: Path, kind: str) -> None:
    edit(run / "checkpoint-100" / "adapter_config.json", peft_type=kind)
    mark_complete(run / "checkpoint-100")


def a_result(w: World) -> dict:
    """A result of another program's run: whole, but not this run's."""
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
    patch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "vllm" else find(name, *more)
    )


def offline(patch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE=1, as if set before the start; nothing of the models named here is in any cache."""
    import datasets.config
    import huggingface_hub.constants

    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def no_permission(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "access", lambda *_: False)


def full_disk(patch: pytest.MonkeyPatch) -> None:
    """Everything can be opened, nothing can be brought to the disk."""

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(os, "fsync", fail)


def little_room(patch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=2**20)
    patch.setattr(shutil, "disk_usage", lambda _: usage)


# -- the cases -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
        name: the mistake in words, as the table has it.
        program: a module with `main`, or a launcher's name.
        argv: world -> the command line.
        code: 2 = usage, 3 = an artefact is missing or invalid.
        says: parts of the message: the wrong value and the remedy.
        settings: environment variables, for a launcher.
        circumstance: what the machine is like.
    """

    name: str
    program: str
    argv: Callable[[World], list[str]]
    code: int
    says: tuple[str, ...]
    settings: dict[str, str] | None = None
    circumstance: Callable[[pytest.MonkeyPatch], None] | None = None


def number(flag: str, value: str, *says: str) -> Case:
    """A training flag out of its range."""
    name = f"--{flag} {value}"
    return Case(name, "ea_opsd_train", lambda w: train(w, **{flag: value}), 2, (f"--{flag}", *says))


def model(name: str, damage: Callable[[Path], object], *says: str, code: int = 3) -> Case:
    """Training on a damaged base model."""
    argv = lambda w: train(w, model_name_or_path=w.copy(w.base, damage))  # noqa: E731
    return Case(f"base model {name}", "ea_opsd_train", argv, code, says)


def data(name: str, make: Callable[[World], object], *says: str, code: int = 3) -> Case:
    """Training on a table that cannot be trained on."""
    argv = lambda w: train(w, train_dataset=make(w))  # noqa: E731
    return Case(f"training data {name}", "ea_opsd_train", argv, code, says)


def adapter(name: str, damage: Callable[[Path], object], *says: str) -> Case:
    """Merging a damaged checkpoint."""
    argv = lambda w: merge(w, adapter=w.copy(w.run, damage) / "checkpoint-100")  # noqa: E731
    return Case(f"merging {name}", "merge_lora", argv, 3, says)


def merged(name: str, damage: Callable[[Path], object], *says: str) -> Case:
    """Evaluating a damaged merged folder."""
    argv = lambda w: evaluate(w, base_model=w.copy(w.merged, damage))  # noqa: E731
    return Case(f"evaluating a merged folder {name}", "evaluate_math", argv, 3, says)


def evaluation(name: str, *says: str, code: int = 2, **flags: object) -> Case:
    return Case(name, "evaluate_math", lambda w: evaluate(w, **flags), code, says)


def benchmark(name: str, make: Callable[[World], object], *says: str) -> Case:
    argv = lambda w: evaluate(w, dataset_path=make(w))  # noqa: E731
    return Case(f"benchmark file {name}", "evaluate_math", argv, 3, says)


def launcher(name: str, script: str, argv: list[str], *says: str, code: int = 2, **settings: str) -> Case:
    return Case(name, script, lambda w: argv, code, says, settings={"DRY_RUN": "1"} | settings)


def plain(name: str, program: str, argv: list[str], *says: str, code: int = 2) -> Case:
    return Case(name, program, lambda w: argv, code, says)


ROW = {"problem": "1+1", "solution": "2"}
TRAIN, MERGE, EVALUATE = "ea_opsd_train", "merge_lora", "evaluate_math"

CASES: list[Case] = [
    # training: the command line
    Case("no --method", TRAIN, lambda w: train(w, method=None), 2, ("--method", "opsd, eopd, reopold, pwopsd")),
    Case("--method sft", TRAIN, lambda w: train(w, method="sft"), 2, ("'sft'", "opsd, eopd, reopold, pwopsd")),
    Case("--method without a value", TRAIN, lambda w: [*train(w, method=None), "--method"], 2, ("--method",)),
    Case("a flag that does not exist", TRAIN, lambda w: train(w, learning_rat=1), 2, ("--learning_rat", "--help")),
    number("learning_rate", "fast", "fast", "--help"),
    number("learning_rate", "nan", "nan", "more than 0"),
    number("learning_rate", "-1", "-1.0", "more than 0"),
    number("temperature", "0", "0.0", "more than 0"),
    number("jsd_token_clip", "-0.05", "-0.05"),
    number("position_w_min", "1.5", "1.5", "[0, 1]"),
    number("position_s", "0", "0.0"),
    number("position_tau", "inf", "inf"),
    number("eopd_top_k", "0", "0", "at least 1"),
    number("reopold_lambda", "1", "1.0", "(0, 1)"),
    number("reopold_beta", "nan", "nan"),
    number("reopold_t_switch", "-1", "-1"),
    number("rollout_top_p", "0", "0.0", "(0, 1]"),
    number("rollout", "sglang", "'sglang'", "hf, vllm"),
    number("loss_scope", "batch", "'batch'", "micro_batch, global"),
    number("max_steps", "0", "0"),
    number("seed", "-1", "-1"),
    number("lora_r", "0", "0"),
    number("per_device_train_batch_size", "0", "0"),
    number("max_completion_length", "2000", "2000", "--max_length"),
    number("save_only_model", "True", "resumed"),
    number("fsdp", "full_shard", "not supported"),
    number("vllm_tensor_parallel_size", "0", "0"),
    number("optim", "adam9", "adam9"),
    number("push_to_hub", "True", "not supported", "hf upload"),
    number("report_to", "trackio", "pip install trackio"),
    number("report_to", "wandb", "pip install wandb"),
    Case("no --model_name_or_path", TRAIN, lambda w: train(w, model_name_or_path=None), 2, ("--model_name_or_path", "hub id or the folder")),
    Case("no --output_dir", TRAIN, lambda w: train(w, output_dir=None), 2, ("--output_dir",)),
    Case("--lora_target_modules of another architecture", TRAIN, lambda w: train(w, lora_target_modules="c_attn"), 2, ("c_attn",)),
    Case("--attn_implementation that is not installed", TRAIN, lambda w: train(w, attn_implementation="flash_attention_2"), 2, ("flash_attention_2",)),
    Case("vLLM is not installed", TRAIN, lambda w: train(w, rollout="vllm"), 2, ("vLLM is not installed", "hf"), circumstance=without_vllm),
    # training: the model
    Case("base model: no such folder", TRAIN, lambda w: train(w, model_name_or_path="./nowhere"), 3, ("./nowhere", "does not exist")),
    Case("base model: a hub name, HF_HUB_OFFLINE=1, nothing in the cache", TRAIN, lambda w: train(w, model_name_or_path="no-one/nothing-4b"), 3, ("no-one/nothing-4b", "HF_HUB_OFFLINE"), circumstance=offline),
    model("without config.json", lambda f: (f / "config.json").unlink(), "no config.json"),
    model("with a torn config.json", lambda f: cut(f / "config.json"), "configuration"),
    model("whose config.json is nested 200,000 deep", lambda f: deep(f / "config.json"), "configuration", "recursion"),
    model("whose tokenizer.json is nested 200,000 deep", lambda f: deep(f / "tokenizer.json"), "tokenizer", "recursion"),
    model("that is an encoder-decoder", lambda f: another_kind(f, "t5"), "t5", "not a causal language model"),
    model("that reads pictures", lambda f: another_kind(f, "vit"), "vit", "not a causal language model"),
    model("that ships code", ships_code, "code of its own", "--trust_remote_code", code=2),
    model("without tokenizer", no_tokenizer, "has no tokenizer", "tokenizer.json"),
    model("whose tokenizer has no chat template", lambda f: (f / "chat_template.jinja").unlink(), "no chat template", "chat_template.jinja"),
    model("whose chat template raises", lambda f: template(f, "{{ raise_exception('no\\nerror: x') }}"), "chat template", "no\\nerror: x", "repair"),
    model("whose chat template is no Jinja", lambda f: template(f, "{% if %}"), "chat template", "TemplateSyntaxError", "repair"),
    model("whose tokenizer has no end token", lambda f: edit(f / "tokenizer_config.json", eos_token=None), "no end-of-sequence token", "eos_token"),
    model("without weights", lambda f: (f / "model.safetensors").unlink(), "weights", "cannot be loaded"),
    model("with cut weights", lambda f: cut(f / "model.safetensors"), "weights", "cannot be loaded"),
    model("with weights of zero bytes", lambda f: os.truncate(f / "model.safetensors", 0), "weights", "cannot be loaded"),
    model("with pickled weights alone", pickled, "weights", "cannot be loaded"),
    # training: the data
    data("that is not there", lambda w: "./no.jsonl", "./no.jsonl", "does not exist"),
    data("of a kind that is not read", lambda w: w.file("rows.txt", "1+1"), ".txt", ".jsonl"),
    data("torn in the middle of a line", lambda w: w.file("rows.jsonl", '{"problem": "1+1", "sol'), "cannot be read"),
    data("without the column solution", lambda w: w.rows({"problem": "1", "answer": "1"}), "no column solution", "problem, answer"),
    data("without a row", lambda w: w.file("rows.csv", "problem,solution\n"), "no rows"),
    data("of null and empty texts alone", lambda w: w.rows(ROW | {"solution": None}, ROW | {"problem": " "}), "2 are left out", "null, empty or not text"),
    data("with numbers for text", lambda w: w.rows({"problem": 1, "solution": 2}), "1 are left out", "not text"),
    data("of rows of 10 MB", lambda w: w.rows(ROW | {"solution": "1" * 10**7}), "more than 1996 tokens", "--max_length"),
    data("that is not UTF-8", lambda w: w.file("rows.jsonl", b'{"problem": "a\xff", "solution": "2"}\n'), "rows.jsonl", "utf-8", "save it as UTF-8"),
    data("with half a surrogate pair", lambda w: w.file("rows.jsonl", '{"problem": "\\ud800", "solution": "2"}\n'), "rows.jsonl", "surrogate", "repair"),
    data("smaller than one step", lambda w: w.rows(ROW), "takes 2 problems", "has 1", code=2),
    Case("training data: a hub name, HF_HUB_OFFLINE=1, nothing in the cache", TRAIN, lambda w: train(w, train_dataset="no-one/no-problems"), 3, ("no-one/no-problems", "HF_HUB_OFFLINE"), circumstance=offline),
    Case("prompts longer than the model's positions", TRAIN, lambda w: train(w, max_length=9000, train_dataset=w.rows(*[ROW | {"solution": "1" * 2100}] * 2)), 2, ("2048 positions", "lower --max_length")),
    # training: where it writes and resumes
    Case("--output_dir is a file", TRAIN, lambda w: train(w, output_dir=w.file("taken", "")), 3, ("taken", "cannot be written")),
    Case("--output_dir without permission", TRAIN, lambda w: train(w, output_dir=FORBIDDEN), 3, (FORBIDDEN, "cannot be written")),
    Case("the disk is full at the start", TRAIN, lambda w: train(w), 3, ("disk is full", "same command"), circumstance=full_disk),
    Case("--output_dir holds a run already", TRAIN, lambda w: train(w, output_dir=w.run), 3, ("checkpoint-100", "--resume_from_checkpoint auto")),
    Case("--resume_from_checkpoint of nothing", TRAIN, lambda w: train(w, resume_from_checkpoint="./none/checkpoint-1"), 3, ("./none/checkpoint-1", "does not exist")),
    Case("--resume_from_checkpoint of a half-written one", TRAIN, lambda w: train(w, resume_from_checkpoint=w.copy(w.run, half_written) / "checkpoint-100"), 3, (".complete", "interrupted")),
    Case("--resume_from_checkpoint with an empty list in its marker", TRAIN, lambda w: train(w, resume_from_checkpoint=w.copy(w.run, lambda r: marker_of(r, '{"files": []}')) / "checkpoint-100"), 3, ("checkpoint-100", "marker", "auto")),
    Case("resuming with another learning rate and other data", TRAIN, lambda w: train(w, output_dir=started_differently(w), resume_from_checkpoint="auto"), 2, ("learning_rate: 0.001 before, 5e-06 now", "the dataset's content", "another --output_dir")),
    # merging
    Case("merging without --adapter", MERGE, lambda w: merge(w, adapter=None), 2, ("--adapter missing",)),
    Case("merging: a flag that does not exist", MERGE, lambda w: merge(w, "--fast"), 2, ("--fast", "merge_lora.py --help")),
    Case("merging: no such checkpoint", MERGE, lambda w: merge(w, adapter=w.run / "checkpoint-75"), 3, ("checkpoint-75", "holds checkpoint-100")),
    adapter("a half-written checkpoint", half_written, "no .complete marker"),
    adapter("with an empty list in its marker", lambda r: marker_of(r, '{"files": []}'), "checkpoint-100", "damaged"),
    adapter("a cut adapter", lambda r: cut(r / "checkpoint-100" / "adapter_model.safetensors"), "damaged"),
    adapter("an adapter as a pickle", adapter_pickled, "pickled", "not loaded"),
    adapter("an adapter that is no LoRA", lambda r: adapter_of_kind(r, "IA3"), "IA3", "not LORA"),
    adapter("with a torn manifest", lambda r: cut(r / "manifest.json"), "manifest", "not valid JSON"),
    Case("merging into a base with other weights", MERGE, lambda w: merge(w, "--accept_base_name", base_model=w.copy(w.base, scale_weights)), 3, ("another base model", "SHA-256", "pass that one")),
    Case("merging into a base of other sizes", MERGE, lambda w: merge(w, base_model=tiny_base(w.new / "wide", intermediate_size=80)), 3, ("32 x 80", "wrong base model")),
    Case("merging: no such base", MERGE, lambda w: merge(w, "--accept_base_name", base_model="./none"), 3, ("./none", "does not exist")),
    Case("merging into a folder with other files", MERGE, lambda w: merge(w, output=w.file("thesis.tex", "years").parent), 2, ("thesis.tex", "choose another")),
    Case("merging over the checkpoint itself", MERGE, lambda w: merge(w, output=w.run), 2, ("would replace", "choose another")),
    Case("merging: too little room for the model", MERGE, lambda w: merge(w), 3, ("GiB free", "needs"), circumstance=little_room),
    Case("merging: the disk is full on the way", MERGE, lambda w: merge(w), 3, ("is full", "same command"), circumstance=full_disk),
    Case("merging: no permission", MERGE, lambda w: merge(w, output=f"{FORBIDDEN}/x_merged"), 3, (FORBIDDEN,)),
    Case("checking a merged folder of another run", MERGE, lambda w: ["--check", str(w.merged), "--run_name", "other"], 3, ("tiny_pwopsd", "'other'", "RUN_NAME")),
    Case("checking a merged folder of another cell", MERGE, lambda w: ["--check", str(w.merged), "--", "--method", "opsd"], 3, ("'pwopsd'", "'opsd'")),
    # evaluation
    Case("evaluating without --base_model", EVALUATE, lambda w: evaluate(w, base_model=None), 2, ("--base_model is missing", "hub id")),
    evaluation("--dataset aime26", "'aime26'", "math500", dataset="aime26", dataset_path=None),
    evaluation("--temperature nan", "temperature is nan", "at least 0", temperature="nan"),
    evaluation("--top_p 0", "top_p is 0.0", "(0, 1]", top_p="0"),
    evaluation("--val_n 0", "--val_n is 0", "at least 1", val_n=0),
    evaluation("--seed -3", "--seed is -3", "at least 0", seed=-3),
    evaluation("--engine sglang", "'sglang'", "vllm, hf", engine="sglang"),
    evaluation("--val_n many", "many", "--help", val_n="many"),
    evaluation("--max_new_tokens beyond the model", "--max_new_tokens 4000", "lower", max_new_tokens=4000),
    evaluation("--max_model_len beyond the model", "4000", "2048", max_model_len=4000),
    evaluation("--output that is no JSON file", "'r.txt'", ".json", output="r.txt"),
    Case("--output without permission", EVALUATE, lambda w: evaluate(w), 2, ("r.json", "no permission"), circumstance=no_permission),
    evaluation("evaluating a model that is not there", "./none", "folder", code=3, base_model="./none"),
    evaluation("evaluating an adapter that is not there", "no checkpoint at none", "train first", code=3, adapter="./none"),
    Case("evaluating a hub name, HF_HUB_OFFLINE=1, nothing in the cache", EVALUATE, lambda w: evaluate(w, base_model="no-one/nothing-4b"), 3, ("no-one/nothing-4b",), circumstance=offline),
    Case("evaluating a benchmark of the hub, HF_HUB_OFFLINE=1, nothing in the cache", EVALUATE, lambda w: evaluate(w, dataset="aime25", dataset_path=None), 3, ("yentinglin/aime_2025", "--dataset_path"), circumstance=offline),
    Case("evaluating without vLLM", EVALUATE, lambda w: evaluate(w, engine="vllm"), 2, ("vLLM is not installed", "hf"), circumstance=without_vllm),
    Case("evaluating: the disk is full", EVALUATE, lambda w: evaluate(w), 3, ("disk is full", "same command"), circumstance=full_disk),
    merged("that is cut", lambda f: cut(f / "model.safetensors"), "not complete", "merge_lora.py again"),
    merged("with a shard of zero bytes", lambda f: os.truncate(f / "model.safetensors", 0), "0 bytes", "merge_lora.py again"),
    merged("without tokenizer", no_tokenizer, "is missing", "merge_lora.py again"),
    merged("with a torn sentinel", lambda f: cut(f / ".ready_for_eval"), "not valid JSON", "merge_lora.py again"),
    Case("evaluating a model without weights", EVALUATE, lambda w: evaluate(w, base_model=w.copy(w.base, lambda f: (f / "model.safetensors").unlink())), 3, ("model.safetensors", "cannot be loaded")),
    Case("evaluating a model of zero bytes", EVALUATE, lambda w: evaluate(w, base_model=w.copy(w.base, lambda f: os.truncate(f / "model.safetensors", 0))), 3, ("weights", "cannot be loaded")),
    Case("evaluating a model that is not causal", EVALUATE, lambda w: evaluate(w, base_model=w.copy(w.base, lambda f: another_kind(f, "bert"))), 3, ("bert", "not a causal language model")),
    Case("evaluating a model without chat template", EVALUATE, lambda w: evaluate(w, base_model=w.copy(w.base, lambda f: (f / "chat_template.jinja").unlink())), 3, ("no chat template", "chat_template.jinja")),
    benchmark("that is not there", lambda w: "./no.jsonl", "no.jsonl", "--dataset_path"),
    benchmark("torn", lambda w: w.file("sums.jsonl", '{"problem": "1'), "line 1"),
    benchmark("that is not UTF-8", lambda w: w.file("sums.jsonl", b'{"problem": "a\xff", "answer": "2"}\n'), "sums.jsonl", "utf-8"),
    benchmark("with half a surrogate pair", lambda w: w.file("sums.jsonl", '{"problem": "\\ud800", "answer": "2"}\n'), "row 0", "surrogates", "repair"),
    benchmark("nested 200,000 deep", lambda w: w.file("sums.jsonl", "[" * 200_000), "damaged", "recursion"),
    benchmark("with a problem of 50 MB", lambda w: w.rows(ROW | {"problem": "1" * 50_000_000, "answer": "2"}), "row 0", "50000000 characters", "at most 1000000"),
    benchmark("without answers", lambda w: w.rows({"problem": "1+1"}), "row 0", "answer"),
    benchmark("without a problem", lambda w: w.file("sums.jsonl", ""), "holds no problem"),
    Case("a file of 8 problems for aime25", EVALUATE, lambda w: evaluate(w, dataset="aime25"), 3, ("8 problems", "30")),
    Case("--output holds another run's result", EVALUATE, lambda w: evaluate(w, output=w.file("r.json", json.dumps(a_result(w)))), 2, ("base_model", "--replace")),
    Case("--output holds a torn result", EVALUATE, lambda w: evaluate(w, output=w.file("r.json", '{"results": [')), 2, ("damaged", "--replace")),
    Case("--output holds a result with NaN", EVALUATE, lambda w: evaluate(w, output=w.file("r.json", json.dumps(a_result(w) | {"temperature": float("nan")}))), 2, ("NaN", "--replace")),
    Case("--output holds JSON of another schema", EVALUATE, lambda w: evaluate(w, output=w.file("r.json", '{"accuracy": 1}')), 2, ("it lacks base_model", "--replace")),
    Case("the journal is of another program", EVALUATE, lambda w: evaluate(w, output=w.file("r.json.journal.jsonl", "hello\n").with_name("r.json")), 3, ("line 1 of the journal", "delete the journal")),
    # the other programs
    plain("summarize_results.py: no such file", "summarize_results", ["./none/*.json"], "./none/*.json"),
    plain("summarize_results.py --format html", "summarize_results", ["--format", "html"], "html", "md"),
    plain("summarize_results.py --plot of an unknown kind", "summarize_results", ["--plot", "x.docx"], "x.docx", ".png"),
    plain("recompute_majn.py: no such file", "recompute_majn", ["./none/*.json"], "./none/*.json"),
    plain("recompute_majn.py --workers many", "recompute_majn", ["--workers", "many"], "many"),
    Case("plot_run.py of a log of 1e999", "plot_run", lambda w: logged(w, '{"step": 1, "loss": 1e999}\n'), 3, ("line 1", "1e999", "delete the line")),
    Case("plot_run.py of a log of garbage", "plot_run", lambda w: logged(w, "[" * 200_000 + "\n"), 3, ("line 1", "no logged step", "delete the line")),
    plain("prepare_hmmt25.py: no such file", "prepare_hmmt25", ["--source", "./no.jsonl"], "./no.jsonl", code=3),
    Case("prepare_hmmt25.py: another number of problems", "prepare_hmmt25", lambda w: ["--source", str(w.root / "sums.jsonl"), "--output", str(w.new / "h.parquet")], 3, ("8 problems", "30")),
    Case("branch_viability.py --top_k 0", "branch_viability", lambda w: branch(w, top_k=0), 2, ("--top_k is 0", "at least 1")),
    Case("branch_viability.py --viable_share nan", "branch_viability", lambda w: branch(w, viable_share="nan"), 2, ("nan", "(0, 1]")),
    Case("branch_viability.py: a flag that does not exist", "branch_viability", lambda w: branch(w, "--deep"), 2, ("--deep", "--help")),
    Case("branch_viability.py: no such data", "branch_viability", lambda w: branch(w, dataset="./no.jsonl"), 3, ("./no.jsonl",)),
    Case("branch_viability.py: no such model", "branch_viability", lambda w: branch(w, model_name_or_path="./none"), 3, ("./none", "does not exist")),
    Case("testbed/problems.py --check of files that are not there", "testbed.problems", lambda w: ["--check", "--output", str(w.new)], 3, ("heldout.jsonl", "run python testbed/problems.py")),
    # launchers
    launcher("train.sh without arguments", "train.sh", [], "unknown model ''", "Usage"),
    launcher("train.sh of an unknown model", "train.sh", ["qwen", "opsd"], "'qwen'", "qwen3_4b_base"),
    launcher("train.sh of an unknown method", "train.sh", ["small", "sft"], "'sft'", "pwopsd"),
    launcher("a GPU count that does not divide the batch", "train.sh", ["small", "opsd"], "NUM_PROCESSES=3", "32", NUM_PROCESSES="3"),
    launcher("PER_DEVICE_BATCH=-8", "train.sh", ["small", "opsd"], "PER_DEVICE_BATCH=-8", PER_DEVICE_BATCH="-8"),
    launcher("ROLLOUT=sglang", "train.sh", ["small", "opsd"], "sglang", "hf or vllm", ROLLOUT="sglang"),
    launcher("RUN_NAME with a slash", "train.sh", ["small", "opsd"], "../elsewhere", RUN_NAME="../elsewhere"),
    launcher("RUN_NAME with a line break", "train.sh", ["small", "opsd"], "RUN_NAME", RUN_NAME="a\nerror: b"),
    launcher("MERGE_STEP=last", "train.sh", ["small", "opsd"], "MERGE_STEP=last", MERGE_STEP="last"),
    launcher("a checkpoint to merge that is never saved", "train.sh", ["small", "opsd", "--max_steps", "50"], "checkpoint-100", "MERGE_STEP"),
    launcher("a flag that the launcher sets", "train.sh", ["small", "opsd", "--output_dir", "x"], "--output_dir", "OUTPUT_ROOT"),
    launcher("run_eval.sh without arguments", "run_eval.sh", [], "METHOD_NAME and DATASET", "Usage"),
    launcher("run_eval.sh of an unknown run", "run_eval.sh", ["small_ppo", "small"], "'small_ppo'", "pwopsd"),
    launcher("run_eval.sh of an unknown benchmark", "run_eval.sh", ["small_base", "aime26"], "'aime26'", "math500"),
    launcher("run_eval.sh with a broken seed", "run_eval.sh", ["small_base", "small", "1", "one"], "'one'"),
    launcher("run_eval.sh: no merged model", "run_eval.sh", ["small_opsd", "small"], "no merged model", "train.sh", code=3, DRY_RUN="0", OUTPUT_ROOT="/nowhere"),
    launcher("ablation.sh of an unknown cell", "ablation.sh", ["small", "diagonal"], "'diagonal'", "flat_global"),
    launcher("reproduce_paper.sh with SEEDS=one", "reproduce_paper.sh", [], "'one'", SEEDS="one"),
    launcher("reproduce_paper.sh without the hmmt25 file", "reproduce_paper.sh", [], "/nowhere", "data/README.md", code=3, DRY_RUN="0", HMMT25_PARQUET_PATH="/nowhere"),
]  # fmt: skip


# -- running them --------------------------------------------------------------------------------------------


def entry_point(program: str) -> Callable[[list[str]], int | None]:
    if program != "prepare_hmmt25":
        return importlib.import_module(program).main
    spec = importlib.util.spec_from_file_location(program, ROOT / "data" / "prepare_hmmt25.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def run_case(case: Case, world: World) -> tuple[int, str]:
    """(exit code, what was written to stderr)."""
    argv = case.argv(world)
    if case.settings is not None:
        from tests.launchers.test_launchers import SETTINGS

        environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        command = ["bash", str(ROOT / "launchers" / case.program), *argv]
        done = subprocess.run(
            command, env=environment | case.settings, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stderr
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        main = entry_point(case.program)
        if case.circumstance is not None:
            case.circumstance(patch)
        with contextlib.redirect_stdout(io.StringIO()):
            code = run_cli(lambda: main(argv))
    return code, said.getvalue()


def error_line(said: str) -> str:
    """The one line that begins with `error:`, whatever progress bars and log lines precede it."""
    (line,) = [line for line in said.split("\n") if line.startswith("error:")]
    return line


# -- the table -----------------------------------------------------------------------------------------------


def row(case: Case, world: World, line: str) -> str:
    text = line.removeprefix("error: ")
    for place, name in ((world.new, "."), (world.root, "."), (ROOT, ".")):
        text = text.replace(str(place), name)
    text = re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;")
    program = case.program if case.settings is not None else f"{case.program.replace('.', '/')}.py"
    return f"| {case.name} | {program} | {case.code} | {text} |"


def table() -> str:
    """Every case with what it says on this machine."""
    lines = ["| mistake | program | exit code | message |", "| --- | --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as folder:
        world = build_world(Path(folder))
        for number, case in enumerate(CASES):
            new = Path(folder) / f"case-{number}"
            new.mkdir()
            fresh = replace(world, new=new)
            lines.append(row(case, fresh, error_line(run_case(case, fresh)[1])))
    return "\n".join(lines)


def main() -> int:
    if sys.argv[1:] != ["--write"]:
        print(table())
        return 0
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
