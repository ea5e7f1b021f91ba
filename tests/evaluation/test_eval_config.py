"""The flags of evaluate_math.py: the paper's values as defaults, bounds checked where a value enters."""

from __future__ import annotations

from pathlib import Path

import pytest

import evaluate_math
from opsd.errors import UsageError, run_cli
from opsd.evaluation.config import EvalConfig, check_output, parse_config

NEEDED = ["--base_model", "m", "--dataset", "aime25", "--output", "r.json"]


def parsed(*more: str) -> EvalConfig:
    return parse_config([*NEEDED, *more])[0]


def test_the_defaults_are_the_papers():
    config = parsed()
    # Section 5 of the protocol.
    assert config.val_n == 12
    assert (config.temperature, config.top_p, config.top_k) == (1.0, 0.95, 0)
    assert (config.min_p, config.presence_penalty) == (0.0, 0.0)
    assert config.enable_thinking is True
    assert config.max_new_tokens == 38912
    assert config.engine == "vllm"
    assert config.time_limit == 5.0
    assert (config.num_samples, config.adapter, config.seed) == (None, None, 0)


def test_flags_reach_the_settings():
    config = parsed(
        *("--adapter", "a", "--num_samples", "5", "--engine", "vllm", "--tensor_parallel_size", "2"),
        *("--top_k", "-1", "--no_thinking", "--dataset_path", "d.jsonl"),
    )
    assert (config.adapter, config.num_samples, config.dataset_path) == ("a", 5, "d.jsonl")
    assert config.tensor_parallel_size == 2
    # vLLM's and the authors' spelling of "off".
    assert (config.top_k, config.enable_thinking) == (0, False)
    assert parsed("--temperature", "0").temperature == 0  # greedy
    assert parse_config(NEEDED)[1] is False
    assert parse_config([*NEEDED, "--replace"])[1] is True
    assert config.journal_path == Path("r.json.journal.jsonl")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--num_samples 0", "--num_samples is 0"),
        ("--temperature -0.1", "temperature"),
        ("--top_p 1.5", "top_p"),
        ("--top_k -2", "top_k"),
        ("--min_p 1.5", "min_p"),
        ("--max_new_tokens 0", "max_new_tokens"),
        ("--max_model_len 0", "--max_model_len is 0"),
        ("--tensor_parallel_size 0", "--tensor_parallel_size is 0"),
        ("--gpu_memory_utilization 0", "--gpu_memory_utilization is 0"),
        ("--gpu_memory_utilization 1.1", "--gpu_memory_utilization is 1.1"),
        ("--time_limit 0", "--time_limit is 0"),
        ("--time_limit inf", "--time_limit is inf"),
        ("--time_limit nan", "--time_limit is nan"),
        ("--grading_workers 0", "--grading_workers is 0"),
        ("--engine hf --tensor_parallel_size 2", "--tensor_parallel_size is 2, but --engine hf"),
        ("--temp 1", "--temp"),
        ("--dtype float16", "--dtype is 'float16'"),
        ("--prompt teacher --no_thinking", "--no_thinking is given, but the teacher thinks"),
        ("--data_parallel_size 2", "unrecognized arguments: --data_parallel_size"),
    ],
)
def test_a_wrong_flag_is_one_line_and_exit_2(flags, named, capsys):
    assert run_cli(lambda: evaluate_math.main([*NEEDED, *flags.split()])) == 2
    error = capsys.readouterr().err
    assert named in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("missing", ["--base_model", "--dataset", "--output"])
def test_what_must_be_given(missing):
    at = NEEDED.index(missing)
    with pytest.raises(UsageError, match=missing):
        parse_config(NEEDED[:at] + NEEDED[at + 2 :])


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UsageError, match="is a file"):
        check_output(parsed("--output", str(tmp_path / "file" / "r.json")))
    with pytest.raises(UsageError, match="is a folder"):
        check_output(parsed("--output", str(tmp_path / "folder.json")))
