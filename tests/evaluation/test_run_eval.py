"""run_eval.sh: names, refusals, the lock, what it runs. Strings of the caller's are data, never code."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from opsd.evaluation.results import load_result
from tests.evaluation import eval_world

ROOT = Path(__file__).resolve().parents[2]
# Every character that a careless shell would act upon.
HOSTILE = "a b'c\"d $(touch pwned) `touch pwned` ;*&|<>"
SETTINGS = (
    "ADAPTER BASE_MODEL_PATH CUDA_VISIBLE_DEVICES DATASET_PATH DRY_RUN ENGINE EVAL_FLAGS EVAL_ROOT "
    "MERGE_STEP HOSTLABEL MAX_MODEL_LEN MAX_NEW_TOKENS NUM_SAMPLES OUTPUT_ROOT PYTHON STACK VAL_N VENV WAIT"
)
# Stands in for evaluate_math.py: says what it was given, and finishes when it may.
RECORDER = """
import json, os, pathlib, sys, time
flags = sys.argv[1:]
output = pathlib.Path(flags[flags.index("--output") + 1])
with open("runs.jsonl", "a") as file:
    file.write(json.dumps({"pid": os.getpid(), "flags": flags, "cwd": os.getcwd()}) + "\\n")
print("to stdout"); print("to stderr", file=sys.stderr)
while os.environ.get("HOLD") and not os.path.exists("go"):
    time.sleep(0.02)
code = int(os.environ.get("CODE", "0"))
if code == 0:
    output.write_text("{}")
sys.exit(code)
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the launchers in a folder with a hostile name, with a recorder for evaluate_math.py."""
    root = tmp_path / HOSTILE.replace("/", "")
    shutil.copytree(ROOT / "launchers", root / "launchers")
    (root / "launchers" / "install.py").write_text("")
    (root / "evaluate_math.py").write_text(RECORDER)
    (root / "opsd").symlink_to(ROOT / "opsd")
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    return root


def command(root: Path, *arguments: str) -> list[str]:
    return ["bash", str(root / "launchers" / "run_eval.sh"), *arguments]


def environment(**settings: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in SETTINGS.split()} | settings


def run_eval(root: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    settings = {"env": environment(**settings), "cwd": root.parent, "timeout": 300}
    return subprocess.run(command(root, *arguments), capture_output=True, text=True, check=False, **settings)


def runs(root: Path) -> list[dict]:
    file = root / "runs.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def flag(run: dict, name: str) -> str:
    return run["flags"][run["flags"].index(f"--{name}") + 1]


def merged(root: Path, name: str, *, folder: str = "outputs") -> Path:
    path = root / folder / f"{name}_merged"
    path.mkdir(parents=True)
    (path / ".ready_for_eval").write_text("{}")
    return path


def wait_for(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.02)


def nothing_was_executed(root: Path) -> bool:
    return not list(root.parent.rglob("pwned")) and not Path("pwned").exists()


# -- names and flags -----------------------------------------------------------------------------------------


def test_the_papers_settings_are_evaluate_maths_own_defaults(checkout: Path) -> None:
    merged(checkout, "qwen3_4b_base_pwopsd")
    assert run_eval(checkout, "qwen3_4b_base_pwopsd", "aime25", "4", "1").returncode == 0
    (run,) = runs(checkout)
    flags = "--base_model outputs/qwen3_4b_base_pwopsd_merged --dataset aime25 --output "
    flags += "eval_results/qwen3_4b_base_pwopsd_aime25_38k_seed1.json --engine vllm --tensor_parallel_size 4 "
    assert " ".join(run["flags"]) == flags + "--seed 1 --replace"
    assert run["cwd"] == str(checkout)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("qwen3_4b_base", "Qwen/Qwen3-4B"),
        ("qwen3_4b_base_base", "Qwen/Qwen3-4B"),
        ("dsr1_l8b_base_x", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
        ("small", "testbed/base_model"),
        ("small_pwopsd_t3", "outputs/small_pwopsd_t3_merged"),
        ("qwen3_4b_base_opsd", "outputs/qwen3_4b_base_opsd_merged"),
    ],
)
def test_a_name_says_which_model(checkout: Path, name: str, model: str) -> None:
    words = shlex.split(run_eval(checkout, name, "aime24", DRY_RUN="1").stdout)
    assert words[words.index("--base_model") + 1] == model


@pytest.mark.parametrize(
    ("cell", "extra", "settings", "name"),
    [
        ("math500", (), {}, "38k"),
        ("hmmt25 4 0", (), {}, "hmmt25_38k_seed0"),
        ("small_hard 4 3", (), {"MAX_NEW_TOKENS": "2048"}, "small_hard_2k_seed3"),
        ("aime24", ("--max_new_tokens=160",), {"MAX_NEW_TOKENS": "2048"}, "aime24_160"),
        ("aime24", ("--max_new_tokens", "1000"), {"NUM_SAMPLES": "5"}, "aime24_1000_first5"),
        ("aime25 4 1", ("--num_samples=5",), {}, "aime25_38k_first5_seed1"),
    ],
)
def test_a_name_says_benchmark_length_part_and_seed(
    checkout: Path, cell: str, extra: tuple[str, ...], settings: dict[str, str], name: str
) -> None:
    done = run_eval(checkout, "dsr1_l8b_opsd", *cell.split(), "--", *extra, DRY_RUN="1", **settings)
    assert f" --output eval_results/dsr1_l8b_opsd_{name}.json " in done.stdout, done.stderr
    assert not (checkout / "eval_results").exists(), "a dry run does nothing"


def test_an_adapter_is_evaluated_without_its_merge(checkout: Path) -> None:
    def words(**settings: str) -> str:
        done = run_eval(checkout, "small_opsd_t3", "small", "1", "2", ADAPTER="1", DRY_RUN="1", **settings)
        return done.stdout + done.stderr

    output = "--output eval_results/small_opsd_t3_small_160_adapter_seed2.json "
    for step, settings in (("100", {}), ("50", {"MERGE_STEP": "50"})):
        flags = f"--base_model testbed/base_model --dataset small {output}--adapter "
        assert f"{flags}outputs/small_opsd_t3/checkpoint-{step} " in words(**settings)
    # The step of a merged model that is there.
    merged(checkout, "small_opsd_t3").joinpath(".ready_for_eval").write_text('{\n "adapter_step": 25,\n}')
    assert "outputs/small_opsd_t3/checkpoint-25 " in words()
    done = run_eval(checkout, "small_base", "small", ADAPTER="1")
    assert (done.returncode, runs(checkout)) == (2, [])
    assert "ADAPTER=1: small_base is the untrained model" in done.stderr


def test_strings_are_data(checkout: Path) -> None:
    merged(checkout.parent, "small_opsd", folder=f"out {HOSTILE}")
    (checkout.parent / f"rows {HOSTILE}.jsonl").write_text("")
    done = run_eval(
        checkout,
        *("small_opsd", "my.set-1", "1", "5", "--", "--revision", HOSTILE),
        VAL_N="4",
        OUTPUT_ROOT=f"out {HOSTILE}",
        EVAL_ROOT=f"results {HOSTILE}",
        DATASET_PATH=f"rows {HOSTILE}.jsonl",
        HOSTLABEL=f"../{HOSTILE}",
    )
    assert done.returncode == 0, done.stderr
    (run,) = runs(checkout)
    base = checkout.parent
    assert flag(run, "base_model") == str(base / f"out {HOSTILE}" / "small_opsd_merged")
    assert flag(run, "dataset_path") == str(base / f"rows {HOSTILE}.jsonl")
    assert flag(run, "output") == str(base / f"results {HOSTILE}" / "small_opsd_my.set-1_160_seed5.json")
    assert (flag(run, "revision"), flag(run, "val_n"), flag(run, "engine")) == (HOSTILE, "4", "hf")
    (log,) = (base / f"results {HOSTILE}" / "logs").iterdir()
    assert log.name.startswith("small_opsd_my.set-1_160_seed5_.._a_b_c_d")
    assert nothing_was_executed(checkout)


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "settings", "said"),
    [
        ("small_base", {}, "METHOD_NAME and DATASET"),
        ("small_pwopsdx small", {}, "unknown method"),
        ("small_pwopsd`touch${IFS}pwned` small", {}, "unknown method"),
        ("small_pwopsd_/../x small", {}, "'small_pwopsd_/../x' does not fit a file name"),
        ("-rf small", {}, "unknown method"),
        ("small_base aime27", {}, "unknown benchmark 'aime27'; choose from math500, aime24"),
        ("small_base ../x", {"DATASET_PATH": "x"}, "does not fit a file name"),
        ("small_base small 0", {}, "--tensor_parallel_size is 0"),
        ("small_base small 1;touch${IFS}pwned", {}, "--tensor_parallel_size"),
        ("small_base small 2", {}, "--tensor_parallel_size is 2, but --engine hf"),
        ("small_base small 1 -1", {}, "--seed is -1"),
        ("small_base small 1 1 extra", {}, "too many arguments ('extra')"),
        ("small_base small", {"ENGINE": "tgi"}, "--engine is 'tgi'"),
        ("small_base small", {"VAL_N": "many"}, "--val_n/--val-n: invalid int value: 'many'"),
        ("small_base small", {"MAX_MODEL_LEN": "0"}, "--max_model_len is 0"),
        ("small_base small", {"DATA_PARALLEL": "2"}, "DATA_PARALLEL=2: unknown"),
        ("small_base small -- --num_samples x", {}, "--num_samples"),
        ("small_base small -- --unknown", {}, "--unknown"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_2(
    checkout: Path, arguments: str, settings: dict[str, str], said: str
) -> None:
    done = run_eval(checkout, *arguments.split(), **settings)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert runs(checkout) == []
    assert not (checkout / "eval_results").exists()
    assert nothing_was_executed(checkout)


def test_without_a_merged_model_or_its_sentinel_exit_3(checkout: Path) -> None:
    for said in ("no merged model at outputs/small_opsd_merged", "has no .ready_for_eval"):
        done = run_eval(checkout, "small_opsd", "small")
        assert done.returncode == 3
        assert said in done.stderr
        (checkout / "outputs" / "small_opsd_merged").mkdir(parents=True, exist_ok=True)
    assert runs(checkout) == []


# -- running -------------------------------------------------------------------------------------------------


def test_output_goes_to_terminal_and_log_and_the_exit_code_is_the_evaluations(checkout: Path) -> None:
    done = run_eval(checkout, "small_base", "small", "1", "1", HOSTLABEL="node7")
    log = checkout / "eval_results" / "logs" / "small_base_small_160_seed1_node7.log"
    for text in (done.stdout, log.read_text()):
        assert "to stdout" in text
        assert "to stderr" in text
    assert "--base_model testbed/base_model" in log.read_text()
    run_eval(checkout, "small_base", "small", "1", "1", HOSTLABEL="node7")
    assert log.read_text().count("to stdout") == 2, "a log is continued, not overwritten"
    for code in (1, 2, 3):
        assert run_eval(checkout, "small_base", "small", "1", "1", CODE=str(code)).returncode == code
    assert log.with_name("small_base_small_160_seed1_worker.log").exists()


def start(root: Path, *arguments: str, **settings: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(root, *arguments),
        env=environment(HOLD="1", **settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


CELL = ("small_base", "small", "1", "1")


def test_a_second_worker_leaves_the_cell_alone(checkout: Path) -> None:
    first = start(checkout, *CELL)
    wait_for(lambda: runs(checkout))
    second = run_eval(checkout, *CELL)
    assert second.returncode == 0
    assert "another worker is on small_base_small_160_seed1" in second.stderr
    other = start(checkout, *CELL[:3], "2")  # another cell is free
    wait_for(lambda: len(runs(checkout)) == 2)
    (checkout / "go").touch()
    assert first.wait() == other.wait() == 0
    assert len(runs(checkout)) == 2
    assert run_eval(checkout, *CELL).returncode == 0
    assert len(runs(checkout)) == 3, "the lock went with the first worker"


@pytest.mark.parametrize("wait", ["0", "1"])
def test_a_file_system_without_locks_is_an_error_and_not_another_worker(checkout: Path, wait: str) -> None:
    """What flock exits with where the kernel answers ENOLCK or ENOSYS."""
    tool = checkout / "bin" / "flock"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nexit 71\n")
    tool.chmod(0o755)
    done = run_eval(checkout, *CELL, PATH=f"{tool.parent}:{os.environ['PATH']}", WAIT=wait)
    assert done.returncode == 3
    assert "cannot be locked (flock ended with exit code 71" in done.stderr
    assert runs(checkout) == []


def test_an_evaluation_that_outlives_its_launcher_keeps_the_lock(checkout: Path) -> None:
    first = start(checkout, *CELL)
    wait_for(lambda: runs(checkout))
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = run_eval(checkout, *CELL)
    assert second.returncode == 0
    assert "another worker" in second.stderr
    pid = runs(checkout)[0]["pid"]
    os.kill(pid, signal.SIGKILL)
    (checkout / "go").touch()
    wait_for(lambda: "another worker" not in run_eval(checkout, *CELL).stderr)


@pytest.mark.slow
def test_two_workers_and_the_real_evaluation(checkout: Path) -> None:
    (checkout / "evaluate_math.py").unlink()
    (checkout / "evaluate_math.py").symlink_to(ROOT / "evaluate_math.py")
    eval_world.make_model(checkout / "model")
    eval_world.make_problems(checkout / "rows.jsonl")
    (checkout / "launchers" / "models" / "toy.sh").write_text(
        'BASE_MODEL="$REPO_ROOT/model"\nDEVICE=cpu\nDEFAULT_ROLLOUT=hf\nEVAL_FLAGS=(--max_new_tokens 12)\n'
    )
    settings = {"DATASET_PATH": str(checkout / "rows.jsonl"), "VAL_N": "3", "OMP_NUM_THREADS": "1"}
    cell = ("toy_base", "toy", "1", "1")
    workers = [
        subprocess.Popen(
            command(checkout, *cell),
            env=environment(HOSTLABEL=f"w{number}", **settings),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for number in (1, 2)
    ]
    said = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert sum("another worker" in text for text in said) == 1
    output = checkout / "eval_results" / "toy_base_toy_12_seed1.json"
    first = load_result(output)
    assert (first["base_model"], first["seed"], first["val_n"]) == ("model", 1, 3)
    # The same command again changes nothing; another regime sets the file aside.
    assert run_eval(checkout, *cell, **settings).returncode == 0
    assert load_result(output) == first
    done = run_eval(checkout, *cell, **{**settings, "VAL_N": "2"})
    assert done.returncode == 0
    assert "val_n" in done.stdout, "what differs is named"
    assert load_result(output)["val_n"] == 2
    kept = [path for path in output.parent.iterdir() if "aside" in path.name]
    assert [json.loads(path.read_text()) for path in kept] == [first]
