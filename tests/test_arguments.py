"""Flags: the paper's defaults, every bound, and what is said before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from opsd.arguments import (
    BOUNDS,
    CHOICES,
    MethodArguments,
    ModelArguments,
    RolloutArguments,
    check_bounds,
    hyperparameters,
    parse_arguments,
)
from opsd.errors import UsageError, run_cli

ROOT = Path(__file__).resolve().parents[1]
MINIMAL = [
    "--method",
    "pwopsd",
    "--model_name_or_path",
    "base",
    "--output_dir",
    "outputs/some_run",
    "--use_cpu",
    "true",
]
ALL_FOUR = "choose one of opsd, eopd, reopold, pwopsd"


def refusal(*flags: str) -> str:
    """The message of the UsageError that these flags give."""
    with pytest.raises(UsageError) as caught:
        parse_arguments([*MINIMAL, *flags])
    return str(caught.value)


def test_defaults_are_the_papers(monkeypatch):
    monkeypatch.delenv("PWOPSD_TRAIN_DATASET", raising=False)
    training, method, rollout, options = parse_arguments(MINIMAL)
    assert vars(method) == {
        "method": "pwopsd",
        "temperature": 1.1,
        "jsd_token_clip": 0.05,
        "position_w_min": 0.25,
        "position_tau": 0.30,
        "position_s": 0.10,
        "position_global_reduction": False,
        "eopd_entropy_threshold": 0.8,
        "eopd_top_k": 16,
        "eopd_clip_epsilon": 0.2,
        "reopold_lambda": 0.1,
        "reopold_beta": 0.2,
        "reopold_t_switch": 50,
        "loss_scope": "micro_batch",
    }
    assert vars(hyperparameters(method)) == {
        name: value for name, value in vars(method).items() if name not in ("method", "loss_scope")
    }
    assert (rollout.rollout_temperature, rollout.rollout_top_p, rollout.rollout_top_k) == (1.1, 0.95, 20)
    assert (rollout.max_completion_length, options.max_length) == (1024, 20000)
    assert (rollout.rollout, rollout.vllm_gpu_memory_utilization) == ("vllm", 0.4)
    assert (options.lora_r, options.lora_alpha, options.lora_dropout) == (64, 128, 0.0)
    assert options.lora_target_modules == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert options.train_dataset == "siyanzhao/Openthoughts_math_30k_opsd"
    assert options.trust_remote_code is False
    assert options.skip_nonfinite == 0
    assert (training.adam_beta1, training.adam_beta2, training.weight_decay) == (0.9, 0.999, 0.0)
    assert (training.learning_rate, training.lr_scheduler_type, training.warmup_steps) == (5e-6, "linear", 0)
    assert str(getattr(training.optim, "value", training.optim)).startswith("adamw_torch")
    assert (training.max_grad_norm, training.max_steps, training.seed) == (0.1, 150, 42)
    assert (training.bf16, training.gradient_checkpointing) == (True, True)
    assert training.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (4, 2)
    assert (training.save_steps, training.save_strategy, training.logging_steps) == (25, "steps", 1)
    assert training.report_to == []
    assert training.run_name == "some_run"
    assert training.logging_nan_inf_filter is False


def outside(name: str) -> list[str]:
    """Values just outside a flag's interval, as text."""
    low, high, low_allowed, high_allowed = BOUNDS[name]
    values = ["nan", "inf"] if math.isinf(high) else ["nan", str(high) if not high_allowed else str(high + 1)]
    if not math.isinf(low):
        values.append(str(low - 1 if low_allowed else low))
    values.append("-inf")
    return values


def test_every_bound_refuses_what_lies_outside_by_name():
    for name, (low, high, *_) in BOUNDS.items():
        for text in outside(name):
            with pytest.raises(UsageError, match=rf"^--{name} .*must lie in [\[(]{low}, {high}[\])]$"):
                check_bounds({name: float(text)})


def test_every_bound_takes_its_default_and_its_closed_ends():
    defaults = {}
    for group in (MethodArguments, RolloutArguments, ModelArguments):
        defaults |= {f.name: f.default for f in dataclasses.fields(group)}
    check_bounds({name: defaults[name] for name in BOUNDS if name in defaults})
    for name, (low, high, low_allowed, high_allowed) in BOUNDS.items():
        check_bounds({name: low} if low_allowed else {})
        check_bounds({name: high} if high_allowed else {})


def test_every_numeric_flag_of_ours_has_a_bound():
    for group in (MethodArguments, RolloutArguments, ModelArguments):
        for f in dataclasses.fields(group):
            numeric = isinstance(f.default, (int, float)) and not isinstance(f.default, bool)
            assert not numeric or f.name in BOUNDS, f.name
            assert f.metadata.get("help"), f"{f.name} says what it is"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "0"], "--temperature 0.0: must lie in (0.0, inf)"),
        (["--temperature", "nan"], "--temperature nan: must lie in (0.0, inf)"),
        (["--temperature", "warm"], "argument --temperature: invalid float value: 'warm'"),
        (["--jsd_token_clip", "-0.1"], "--jsd_token_clip -0.1: must lie in [0.0, inf)"),
        (["--position_w_min", "1.5"], "--position_w_min 1.5: must lie in [0.0, 1.0]"),
        (["--position_s", "0"], "--position_s 0.0: must lie in (0.0, inf)"),
        (["--position_tau", "inf"], "--position_tau inf: must lie in (-inf, inf)"),
        (["--eopd_top_k", "0"], "--eopd_top_k 0: must lie in [1, inf)"),
        (["--reopold_lambda", "1"], "--reopold_lambda 1.0: must lie in (0.0, 1.0)"),
        (["--reopold_t_switch", "2.5"], "invalid int value: '2.5'"),
        (["--rollout_top_p", "0"], "--rollout_top_p 0.0: must lie in (0.0, 1.0]"),
        (["--max_completion_length", "0"], "--max_completion_length 0: must lie in [1, inf)"),
        (["--learning_rate", "-1"], "--learning_rate -1.0: must lie in (0.0, inf)"),
        (["--max_steps", "-1"], "--max_steps -1: must lie in [1, inf)"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0: must lie in [1, inf)"),
        (["--seed", "-1"], "--seed -1: must lie in [0, 4294967295]"),
        (["--rollout", "sglang"], "--rollout 'sglang': choose one of hf, vllm"),
        (["--loss_scope", "epoch"], "--loss_scope 'epoch': choose one of micro_batch, global"),
        (["--dtype", "float16"], "--dtype 'float16': choose one of auto, float32, bfloat16"),
        (["--max_completion_length", "20000"], "--max_completion_length 20000 leaves no room for a prompt"),
        (["--no_such_flag", "1"], "--no_such_flag"),
        (["--tempera", "1.0"], "--tempera"),
        (["--deepspeed", "x.json"], "--deepspeed is not supported"),
        (["--bf16", "false", "--fp16", "true"], "--fp16 is not supported"),
        (["--eval_strategy", "steps"], "--eval_strategy steps is not supported: there is no evaluation loop"),
        (
            ["--train_sampling_strategy", "group_by_length"],
            "--train_sampling_strategy group_by_length is not",
        ),
        (
            ["--include_num_input_tokens_seen", "true"],
            "--include_num_input_tokens_seen True is not supported",
        ),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor is not supported"),
        (["--neftune_noise_alpha", "5"], "--neftune_noise_alpha is not supported"),
    ],
)
def test_mistakes_are_named(flags, message):
    assert message in refusal(*flags)


@pytest.mark.parametrize("flag", ["--model_name_or_path", "--output_dir"])
def test_what_is_missing_is_named(flag):
    flags = [*MINIMAL]
    place = flags.index(flag)
    del flags[place : place + 2]
    with pytest.raises(UsageError, match=f"{flag} is missing: give"):
        parse_arguments(flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], f"--method is missing: {ALL_FOUR}"),
        (["--method"], f"--method is missing: {ALL_FOUR}"),
        (["--method", "--bf16"], f"--method is missing: {ALL_FOUR}"),
        (["--method", "sft"], f"--method 'sft': {ALL_FOUR}"),
        (["--method=OPSD"], f"--method 'OPSD': {ALL_FOUR}"),
        (["--temperature", "nan"], f"--method is missing: {ALL_FOUR}"),
    ],
)
def test_the_method_is_asked_for_first(flags, message, capsys):
    assert run_cli(lambda: parse_arguments(flags)) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_the_command_says_so_in_one_line_before_the_heavy_imports():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['ea_opsd_train.py', '--method', 'grpo']\n"
        "try:\n"
        "    runpy.run_path('ea_opsd_train.py', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    heavy = {'torch', 'transformers', 'peft', 'vllm', 'datasets'} & set(sys.modules)\n"
        "    print(stop.code, sorted(heavy))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "2 []\n"
    assert done.stderr == f"error: --method 'grpo': {ALL_FOUR}\n"


def test_the_plain_command_without_arguments():
    done = subprocess.run(
        [sys.executable, "ea_opsd_train.py"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: --method is missing: {ALL_FOUR}\n"


def test_one_process_over_several_gpus_is_refused():
    from opsd.training import _check_devices

    _check_devices(SimpleNamespace(n_gpu=1))
    with pytest.raises(UsageError, match="one process sees 4 GPUs; start it with accelerate launch"):
        _check_devices(SimpleNamespace(n_gpu=4))


def test_choices_and_help_know_the_same_names():
    assert CHOICES["method"] == ("opsd", "eopd", "reopold", "pwopsd")
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    assert stop.value.code == 0


def test_the_trainers_other_settings_pass():
    training, *_ = parse_arguments(
        [*MINIMAL, "--train_sampling_strategy", "sequential", "--eval_strategy", "no"]
    )
    assert training.train_sampling_strategy == "sequential"
