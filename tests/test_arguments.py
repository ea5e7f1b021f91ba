"""Flags: the paper's defaults, every bound, and what is said before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from opsd.arguments import GROUPS, TRAINER_DEFAULTS, TRAINER_RANGES, parse_arguments
from opsd.errors import UsageError, run_cli
from opsd.objectives import METHODS, Hyperparameters
from opsd.options import Range, check_range

ROOT = Path(__file__).resolve().parents[1]
MINIMAL = shlex.split(
    "--method pwopsd --model_name_or_path base --output_dir outputs/some_run --use_cpu true"
)
FOUR = "one of opsd, eopd, reopold, pwopsd"


def test_defaults_are_the_papers(monkeypatch):
    monkeypatch.delenv("PWOPSD_TRAIN_DATASET", raising=False)
    training, method, rollout, options = parse_arguments(MINIMAL)
    assert vars(method) == {
        "method": "pwopsd", "temperature": 1.1, "jsd_token_clip": 0.05, "loss_scope": "micro_batch",
        "divergence_clip_scope": "entry",
        "position_w_min": 0.25, "position_tau": 0.30, "position_s": 0.10, "position_global_reduction": False,
        "eopd_entropy_threshold": 0.8, "eopd_top_k": 16, "eopd_clip_epsilon": 0.2,
        "reopold_lambda": 0.1, "reopold_beta": 0.2, "reopold_t_switch": 50,
    }  # fmt: skip
    assert isinstance(method, Hyperparameters), "the objective's numbers have one home"
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


FIELDS = {f.name: f for group in GROUPS for f in dataclasses.fields(group)}
RANGES = TRAINER_RANGES | {name: f.metadata["range"] for name, f in FIELDS.items() if f.metadata["range"]}


def outside(allowed: Range) -> list[float]:
    """Values just outside an interval."""
    below = allowed.low if allowed.low_open else allowed.low - 1
    return [math.nan, math.inf, -math.inf, below, allowed.high if allowed.high_open else allowed.high + 1]


def test_every_range_refuses_what_lies_outside_and_takes_what_lies_inside():
    for name, allowed in RANGES.items():
        for value in outside(allowed):
            wanted = "finite" if math.isinf(value) else re.escape(str(allowed))
            with pytest.raises(UsageError, match=rf"^--{name} is {value}, but must be {wanted}$"):
                check_range(name, value, allowed)
        for value, is_open in ((allowed.low, allowed.low_open), (allowed.high, allowed.high_open)):
            if math.isfinite(value) and not is_open:
                check_range(name, value, allowed)
        check_range(name, (TRAINER_DEFAULTS | {n: f.default for n, f in FIELDS.items()}).get(name), allowed)
    for name, f in FIELDS.items():
        assert f.metadata["help"], name
        assert f.metadata["range"] or type(f.default) not in (int, float), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--temperature nan", "--temperature is nan, but must be more than 0"),
        ("--temperature warm", "argument --temperature: invalid float value: 'warm'"),
        ("--position_tau inf", "--position_tau is inf, but must be finite"),
        ("--reopold_lambda 1", "--reopold_lambda is 1.0, but must be in (0, 1)"),
        ("--reopold_t_switch 2.5", "invalid int value: '2.5'"),
        ("--seed -1", "--seed is -1, but must be in [0, 4294967295]"),
        ("--rollout sglang", "--rollout is 'sglang', but must be one of hf, vllm"),
        ("--divergence_clip_scope row", "--divergence_clip_scope is 'row', but must be one of entry, token"),
        ("--loss_scope epoch", "--loss_scope is 'epoch', but must be one of micro_batch, global"),
        ("--max_completion_length 20000", "--max_completion_length 20000 leaves no room for a prompt"),
        ("--no_such_flag 1", "--no_such_flag"),
        ("--tempera 1.0", "--tempera"),
        ("--deepspeed x.json", "--deepspeed is not supported"),
        ("--bf16 false --fp16 true", "--fp16 is not supported"),
        ("--eval_strategy steps", "--eval_strategy steps is not supported: there is no evaluation loop"),
        ("--train_sampling_strategy group_by_length", "--train_sampling_strategy group_by_length is not"),
        ("--include_num_input_tokens_seen true", "--include_num_input_tokens_seen True is not supported"),
    ],
)
def test_mistakes_are_named(flags, message):
    with pytest.raises(UsageError) as caught:
        parse_arguments([*MINIMAL, *flags.split()])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], f"--method is missing: choose {FOUR}"),
        (["--method", "--bf16"], f"--method is missing: choose {FOUR}"),
        (["--method=OPSD"], f"--method is 'OPSD', but must be {FOUR}"),
        (["--temperature", "1"], f"--method is missing: choose {FOUR}"),
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
    assert done.stderr == f"error: --method is 'grpo', but must be {FOUR}\n"


def test_one_process_over_several_gpus_is_refused():
    from opsd.training import _check_devices

    _check_devices(SimpleNamespace(n_gpu=1))
    with pytest.raises(UsageError, match="one process sees 4 GPUs; start it with accelerate launch"):
        _check_devices(SimpleNamespace(n_gpu=4))


def test_help_and_the_names_of_the_methods():
    assert FIELDS["method"].metadata["choices"] == tuple(METHODS) == ("opsd", "eopd", "reopold", "pwopsd")
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    assert stop.value.code == 0
    flags = "--train_sampling_strategy sequential --eval_strategy no"
    assert parse_arguments([*MINIMAL, *flags.split()])[0].train_sampling_strategy == "sequential"
