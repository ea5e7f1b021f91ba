"""evaluate_math: figures, kills and resumption, refusals, adapters."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import evaluate_math
import merge_lora
from opsd.errors import ArtefactError, UsageError
from opsd.evaluation import run as evaluation
from opsd.evaluation.config import EvalConfig
from opsd.evaluation.grading import extract_boxed
from opsd.evaluation.journal import Journal, read_lines
from opsd.evaluation.results import load_result, write_result
from opsd.evaluation.run import evaluate, prepare
from opsd.prompts import student_message, teacher_message
from opsd.report.notes import Notes, missing_commands
from opsd.report.summary import build_tables, load_run, row_title
from tests.evaluation import eval_world
from tests.test_merge_lora import train_nothing

ROOT = Path(__file__).resolve().parents[2]
Result = dict[str, Any]
GENERATION_KEYS = {"predicted_answer", "full_generation", "correct", "formatted", "truncated", "tokens"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    eval_world.make_model(folder / "model")
    eval_world.make_problems(folder / "problems.jsonl")
    return folder


def config_of(world: Path, output: Path, **changes: Any) -> EvalConfig:
    places = {"base_model": str(world / "model"), "dataset_path": str(world / "problems.jsonl")}
    settings = {"dataset": "toy", "engine": "hf", "val_n": 4, "max_new_tokens": 12, "hf_batch_size": 4}
    return EvalConfig(**(places | settings | {"output": str(output), "grading_workers": 1} | changes))


def command_of(config: EvalConfig) -> list[str]:
    flags = [sys.executable, str(ROOT / "evaluate_math.py")]
    for name, value in vars(config).items():
        if value is not None and name not in ("enable_thinking", "trust_remote_code"):
            flags += [f"--{name}", str(value)]
    return flags


def run(world: Path, output: Path, *, replacing: bool = False, **changes: Any) -> Result:
    return evaluate(config_of(world, output, **changes), replace=replacing, show=False)


def without_timing(result: Result) -> Result:
    """All of a result that must not depend on when, and in how many runs, it was made."""
    return {name: value for name, value in result.items() if name not in ("date", "timing")}


@pytest.fixture(scope="module")
def reference(world: Path) -> Result:
    """The result of one uninterrupted run."""
    return run(world, world / "reference.json")


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


# -- figures -------------------------------------------------------------------------------------------------


def naive_generations(world: Path, *, seed: int = 0) -> list[list[str]]:
    """The texts that the protocol defines, one request at a time, prompts and seeds written out."""
    from transformers import AutoModelForCausalLM

    from opsd.rollout.engine import Request, Sampling
    from opsd.rollout.hf import HFEngine
    from opsd.seeds import hashed_seed

    tokenizer = eval_world.make_tokenizer()
    engine = HFEngine(AutoModelForCausalLM.from_pretrained(world / "model"), tokenizer, batch_size=1)
    sampling = Sampling(temperature=1.0, top_p=0.95, max_new_tokens=12)
    texts = []
    for index in range(eval_world.PROBLEMS):
        problem = f"what is {index}+{index % 3}?"
        prompt = (
            f"<u>{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}.<a>"
        )
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        requests = [Request(ids, hashed_seed("evaluation", seed, str(index), sample)) for sample in range(4)]
        completions = engine.generate(requests, sampling)
        texts.append([tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions])
    return texts


def test_the_result_is_what_the_protocol_defines(world: Path, reference: Result) -> None:
    texts = naive_generations(world)
    assert [[g["full_generation"] for g in r["generations"]] for r in reference["results"]] == texts
    correct, passed, formatted = 0, 0, 0
    for index, (record, samples) in enumerate(zip(reference["results"], texts, strict=True)):
        answers = [extract_boxed(text) for text in samples]
        right = [answer == str(index + index % 3) for answer in answers]
        assert [generation["correct"] for generation in record["generations"]] == right
        assert record["ground_truth"] == str(index + index % 3)
        assert record["problem_id"] == index
        assert all(set(generation) == GENERATION_KEYS for generation in record["generations"])
        correct, passed = correct + sum(right), passed + any(right)
        formatted += sum(answer is not None for answer in answers)
    assert 0 < correct < 24, "the toy world has right and wrong answers"
    assert 0 < formatted < 24, "and unformatted ones"
    assert (reference["average_at_n"], reference["pass_at_n"]) == (correct, passed)
    assert reference["formatted_count"] == formatted
    cut = [g["truncated"] for r in reference["results"] for g in r["generations"]]
    assert 0 < sum(cut) < 24
    assert reference["truncation_share"] == pytest.approx(sum(cut) / 24)
    assert load_result(world / "reference.json") == reference
    assert not (world / "reference.json.journal.jsonl").exists()


def test_seeds_are_independent_and_thinking_reaches_the_template(
    world: Path, reference: Result, tmp_path: Path
) -> None:
    for change in ({"seed": 1}, {"enable_thinking": False}):
        other = run(world, tmp_path / f"{next(iter(change))}.json", **change)
        assert other.items() >= change.items()
        for ours, theirs in zip(reference["results"], other["results"], strict=True):
            texts = {generation["full_generation"] for generation in ours["generations"]}
            assert not texts & {generation["full_generation"] for generation in theirs["generations"]}


def test_batch_size_and_problem_count_change_no_sample(
    world: Path, reference: Result, tmp_path: Path
) -> None:
    few = run(world, tmp_path / "r.json", num_samples=2, hf_batch_size=7, val_n=3)
    assert few["num_problems"] == 2
    for ours, theirs in zip(few["results"], reference["results"], strict=False):
        assert ours["generations"] == theirs["generations"][:3]


# -- kills ---------------------------------------------------------------------------------------------------

# Runs in a process of its own, forks once per moment, and kills the fork at that moment.
KILL_DRIVER = """
import os, signal, sys

def die(): os.kill(os.getpid(), signal.SIGKILL)

def arm(moment):
    from opsd import files
    from opsd.evaluation import run as evaluation
    from opsd.evaluation import journal
    written = [0]
    write = journal.Journal._write
    def counted(self, data):
        written[0] += 1  # the header is the first
        if moment == f"before line {written[0]}": die()
        if moment == f"inside line {written[0]}":
            line = journal.encode_line(data)
            self._file.write(line[: len(line) // 2]); self._file.flush(); die()
        write(self, data)
        if moment == f"after line {written[0]}": die()
    journal.Journal._write = counted
    if moment == "before the result": evaluation.write_result = lambda *a: die()
    if moment == "inside the result": files.os.replace = lambda *a: die()
    if moment == "after the result": journal.Journal.remove = lambda self: die()

if __name__ == "__main__":  # grading processes import this file too, and need none of what follows
    import torch, transformers
    from opsd.evaluation.run import evaluate, prepare
    from opsd.evaluation.config import EvalConfig
    from transformers.models.qwen3 import modeling_qwen3
    torch.set_num_threads(1)
    settings, moments = eval(sys.argv[1]), eval(sys.argv[2])
    for index, moment in enumerate(moments):
        child = os.fork()
        if child == 0:
            arm(moment)
            settings["output"] = os.path.join(sys.argv[3], str(index), "r.json")
            evaluate(EvalConfig(**settings), show=False)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
"""
# Line 1 of the journal is its header; 24 samples follow.
MOMENTS = [f"{when} line 1" for when in ("before", "inside", "after")]
MOMENTS += ["inside line 2", "after line 6", "inside line 14", "after line 25"]
MOMENTS += [f"{when} the result" for when in ("before", "inside", "after")]


@pytest.fixture(scope="module")
def killed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per moment of `MOMENTS` with what a run that was killed then left behind."""
    folder = tmp_path_factory.mktemp("killed")
    driver = folder / "driver.py"
    driver.write_text(KILL_DRIVER)
    settings = vars(config_of(world, Path("replaced.json")))
    subprocess.run(
        [sys.executable, str(driver), repr(settings), repr(MOMENTS), str(folder)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_is_finished_as_if_never_killed(
    world: Path, killed: Path, reference: Result, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = killed / str(MOMENTS.index(moment)) / "r.json"
    drawn = count_draws(monkeypatch)
    result = run(world, output)
    assert without_timing(result) == without_timing(reference)
    assert load_result(output) == result
    assert only_file(output.parent) == output, "no journal and no partial file is left"
    kept = {"after line 6": 5, "inside line 14": 12, "after line 25": 24, "after the result": 24}
    if moment in kept:
        assert len(drawn) == 24 - kept[moment], "what was finished is not drawn again"
    if "the result" in moment:
        assert drawn == []


def count_draws(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seed of every request that reaches an engine of this process from here on."""
    from opsd.rollout.hf import HFEngine

    drawn: list[int] = []
    generate = HFEngine.generate

    def counted(self: HFEngine, requests: Any, *arguments: Any, **more: Any) -> Any:
        drawn.extend(request.seed for request in requests)
        return generate(self, requests, *arguments, **more)

    monkeypatch.setattr(HFEngine, "generate", counted)
    return drawn


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    while not condition():
        assert process.poll() is None, "the process ended before the moment came"
        time.sleep(0.02)


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# -- what stands at the output already -----------------------------------------------------------------------


def forbid_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("an engine was built")

    monkeypatch.setattr(evaluation, "build_engine", refuse)


def test_the_closing_line_names_what_grading_killed(
    world: Path, reference: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(world, tmp_path / "r.json")
    items = [{"gold": "9!", "predicted": None}, {"gold": "2", "predicted": "7\n!"}]
    killed = reference["grading"] | {"killed": 2, "killed_items": items}
    Path(config.output).write_text(json.dumps(reference | {"grading": killed}))
    assert evaluate_math.main(command_of(config)[2:]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert r"2 killed in grading and counted as not equal (9!, 7\n!), in" in line


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"temperature": 0.9}, "temperature: 1.0 there, 0.9 now"),
        ({"seed": 4}, "seed: 0 there, 4 now"),
        ({"val_n": 5}, "val_n: 4 there, 5 now"),
        ({"enable_thinking": False}, "enable_thinking"),
        ({"num_samples": 5}, "num_problems"),
        ({"num_samples": 5, "replacing": True}, "has 6 problems, which a run of 5 does not replace"),
    ],
)
def test_another_runs_result_is_refused_by_field(
    world: Path, reference: Result, monkeypatch: pytest.MonkeyPatch, change: Result, named: str
) -> None:
    forbid_sampling(monkeypatch)
    with pytest.raises(UsageError, match=named):
        run(world, world / "reference.json", **change)
    assert load_result(world / "reference.json") == reference
    assert not (world / "reference.json.journal.jsonl").exists()


def test_a_moved_checkout_does_not_turn_a_finished_run_or_its_journal_into_another(
    world: Path, reference: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = interrupted(world, tmp_path / "journal.json")
    shutil.copytree(world, tmp_path / "moved")
    elsewhere = {
        "base_model": str(tmp_path / "moved" / "model"),
        "dataset_path": str(tmp_path / "moved" / "problems.jsonl"),
    }
    resumed = evaluate(replace(unfinished, **elsewhere), show=False)
    assert resumed["timing"]["resumed_samples"] == 9
    assert resumed["results"] == reference["results"]
    forbid_sampling(monkeypatch)
    assert run(world, world / "reference.json", **elsewhere) == reference


def test_a_damaged_result_is_refused_and_renamed_on_request(
    world: Path, reference: Result, tmp_path: Path
) -> None:
    output = tmp_path / "r.json"
    partial = json.dumps({k: v for k, v in reference.items() if k != "model_identity"}).encode()
    for content in (b"", b'{"val_n": 4}', partial):
        output.write_bytes(content)
        with pytest.raises(UsageError, match=r"(damaged|lacks|model_identity: \(absent\)).*--replace"):
            run(world, output)
    assert output.read_bytes() == content
    result = run(world, output, replacing=True)
    assert without_timing(result) == without_timing(reference)
    (aside,) = (file for file in tmp_path.iterdir() if file != output)
    assert aside.read_bytes() == content
    assert aside.suffix != ".json", "no reader of results takes it for one"


def stop_after(monkeypatch: pytest.MonkeyPatch, samples: int, error: BaseException) -> None:
    """Let the engine fail once so many samples have finished."""
    from opsd.rollout.hf import HFEngine

    generate = HFEngine.generate

    def failing(self: HFEngine, requests: Any, sampling: Any, *, on_finish: Any) -> Any:
        finished = []

        def finish(index: int, completion: Any) -> None:
            if len(finished) == samples:
                raise error
            finished.append(index)
            on_finish(index, completion)

        return generate(self, requests, sampling, on_finish=finish)

    monkeypatch.setattr(HFEngine, "generate", failing)


@pytest.mark.parametrize("error", [ArtefactError("out of memory; lower X"), KeyboardInterrupt()])
def test_an_engine_that_fails_keeps_what_was_finished(
    world: Path, reference: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: BaseException
) -> None:
    config = config_of(world, tmp_path / "r.json")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 9, error)
        with pytest.raises(type(error)):
            evaluate(config, show=False)
    assert "9 of 24 samples are finished and kept in" in capsys.readouterr().err
    assert not Path(config.output).exists()
    with pytest.MonkeyPatch.context() as patch:
        drawn = count_draws(patch)
        result = evaluate(config, show=False)
    assert len(drawn) == 15
    assert without_timing(result) == without_timing(reference)


def interrupted(world: Path, output: Path) -> EvalConfig:
    """A run that stopped after nine samples."""
    config = config_of(world, output)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 9, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            evaluate(config, show=False)
    return config


def test_a_torn_last_line_is_drawn_again_and_a_damaged_one_is_an_error(
    world: Path, reference: Result, tmp_path: Path
) -> None:
    config = interrupted(world, tmp_path / "r.json")
    whole = config.journal_path.read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(b'"text"') + 8] ^= 1
    config.journal_path.write_bytes(damaged)
    with pytest.raises(ArtefactError, match="line 2 of the journal"):
        evaluate(config, show=False)
    config.journal_path.write_bytes(whole[:-5])
    result = evaluate(config, show=False)
    assert result["timing"]["resumed_samples"] == 8
    assert without_timing(result) == without_timing(reference)


def test_another_engine_may_continue_and_is_recorded(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = interrupted(world, tmp_path / "r.json")
    header, *records = read_lines(config.journal_path)[0]
    config.journal_path.unlink()
    with Journal(config.journal_path, header["regime"]) as journal:
        for record in records:
            journal.append({**record, "engine": "vllm"})
    result = evaluate(config, show=False)
    assert result["engine"] == "hf+vllm"
    assert "continued with hf" in caplog.text


# -- adapters and merged folders -----------------------------------------------------------------------------


def test_an_adapter_is_evaluated_as_its_merged_model_is(
    world: Path, reference: Result, tmp_path: Path
) -> None:
    adapter = train_nothing(world / "model", tmp_path / "toy_pwopsd")
    merge_lora.merge(str(world / "model"), adapter, tmp_path / "merged")
    adapted = run(world, tmp_path / "a.json", adapter=str(adapter))
    merged = run(world, tmp_path / "m.json", base_model=str(tmp_path / "merged"))
    assert adapted["results"] == merged["results"] != reference["results"]
    assert len({result["model_identity"] for result in (adapted, merged, reference)}) == 3
    for result in (adapted, merged):
        assert result["training_run"]["run_name"] == "toy_pwopsd"
        assert result["training_run"]["adapter_step"] == 100
    assert reference["training_run"] is None
    # Neither may stand for the other: not as a finished result, not in a row of the table.
    with pytest.raises(UsageError, match="model_identity"):
        run(world, tmp_path / "m.json", adapter=str(adapter))
    names = [tmp_path / f"qwen3_4b_base_pwopsd_toy_{name}_seed0.json" for name in ("38k_adapter", "38k")]
    for name, result in zip(names, (adapted, merged), strict=True):
        write_result(name, result)
    runs = [load_run(name) for name in names]
    assert [(r.name, r.method) for r in runs] == [
        ("qwen3_4b_base_pwopsd", "pwopsd_adapter"),
        ("qwen3_4b_base_pwopsd", "pwopsd"),
    ]
    (table,) = build_tables(runs, pytest.fail)
    notes = {row_title(row): Notes(table).of(row, ["toy"]) for row in table.rows}
    assert "base and adapter, not merged" in notes["PW-OPSD (adapter)"]
    assert "base and adapter, not merged" not in notes["PW-OPSD"]
    commands = [c for c in missing_commands(table, [1]) if "pwopsd" in c]
    assert sorted(" ADAPTER=1 " in f" {c}" for c in commands) == [False, True]
    assert all(" qwen3_4b_base_pwopsd toy " in c for c in commands)


def test_the_weights_are_evaluated_in_the_dtype_asked_for(
    world: Path, reference: Result, tmp_path: Path
) -> None:
    results = {
        dtype: run(world, tmp_path / f"{dtype}.json", dtype=dtype) for dtype in ("float32", "bfloat16")
    }
    assert results["float32"]["results"] == reference["results"] != results["bfloat16"]["results"]
    assert [results[dtype]["dtype"] for dtype in results] == ["float32", "bfloat16"]
    identities = {result["model_identity"] for result in (*results.values(), reference)}
    assert len(identities) == 3


def test_the_prompts_of_training(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (world / "problems.jsonl").read_text().splitlines()]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row | {"solution": f"sum {row['answer']}"}) + "\n" for row in rows))
    model = eval_world.make_model(tmp_path / "model", positions=1024)
    places = {"base_model": str(model), "dataset_path": str(data), "val_n": 1}
    tokenizer = eval_world.make_tokenizer()
    messages = {
        "student": student_message("what is 0+0?"),
        "teacher": teacher_message("what is 0+0?", "sum 0"),
    }
    for prompt, message in messages.items():
        config = config_of(world, tmp_path / "r.json", prompt=prompt, **places)
        plan = prepare(config)
        # The student does not think in training, the teacher does.
        rendered = f"<u>{message}<a>" + "<n>" * (prompt == "student")
        assert plan.prompts[0] == tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert plan.regime["enable_thinking"] == (prompt == "teacher")
    assert evaluate_math.main(command_of(config)[2:]) == 0
    result = load_result(config.output)
    assert f"boxed {result['format_rate']:.2f} %" in capsys.readouterr().out
    assert (result["prompt"], "{solution}" in result["prompt_style"]) == ("teacher", True)
    with pytest.raises(UsageError, match=r"dataset_fingerprint.*prompt_style"):
        run(world, tmp_path / "r.json", **places)
    with pytest.raises(ArtefactError, match=r"row 0 of .* has no `solution`, which the teacher reads"):
        run(world, tmp_path / "none.json", prompt="teacher")
