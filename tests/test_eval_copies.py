"""Data parallel evaluation: the result of one process, whatever becomes of a copy or of the parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from opsd import eval_copies
from opsd.errors import ArtefactError, UsageError
from opsd.eval_config import EvalConfig
from opsd.eval_copies import absorb_leftovers, copy_journal, device_slices
from opsd.evaluation import evaluate
from opsd.journal import Journal
from opsd.results import load_result
from tests import eval_world
from tests.test_evaluate import command_of, config_of, lines_in, wait_until, without_timing, world

__all__ = ["world"]

# Long enough that a kill falls into the middle: 120 samples, one at a time.
MANY = {"val_n": 20, "hf_batch_size": 1, "data_parallel_size": 2, "temperature": 1.1}


@pytest.fixture(scope="module")
def reference(world: Path) -> dict[str, Any]:
    single = config_of(world, world / "single.json", **{**MANY, "data_parallel_size": 1, "hf_batch_size": 40})
    return evaluate(single, show=False)


@pytest.fixture
def config(world: Path, tmp_path: Path) -> EvalConfig:
    return config_of(world, tmp_path / "out" / "r.json", **MANY)


@pytest.mark.slow
def test_a_killed_copy_is_named_and_the_rest_is_kept(
    config: EvalConfig, reference: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    started: list[eval_copies.Copy] = []
    start = eval_copies._start

    def remember(*arguments: Any) -> eval_copies.Copy:
        started.append(start(*arguments))
        return started[-1]

    monkeypatch.setattr(eval_copies, "_start", remember)

    def kill_second() -> None:
        held = False
        while len(started) < 2 or lines_in(copy_journal(config, 1)) < 6:
            # On a busy machine the first would be done before the second has begun.
            if not held and started and lines_in(copy_journal(config, 0)) >= 1:
                started[0].process.send_signal(signal.SIGSTOP)
                held = True
            time.sleep(0.02)
        started[1].process.kill()
        if held:
            time.sleep(0.5)
            started[0].process.send_signal(signal.SIGCONT)

    killer = threading.Thread(target=kill_second)
    killer.start()
    with pytest.raises(ArtefactError, match=r"copy 1 \(process \d+\) was killed by signal 9"):
        evaluate(config, show=False)
    killer.join()
    assert "1 copies go on" in capsys.readouterr().err
    kept = lines_in(config.journal_path) - 1
    assert 60 + 5 <= kept < 120, "the other copy finished its 60"
    assert not list(config.journal_path.parent.glob("*.copy*.jsonl"))
    result = evaluate(replace(config, data_parallel_size=1), show=False)
    assert result["timing"]["resumed_samples"] == kept
    assert without_timing(result) == without_timing(reference)


def copies_of(parent: int) -> list[int]:
    """The parent's copies that run, in the order of their start."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(pid) for pid in children if b"opsd.eval_copies" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
def test_a_killed_parent_takes_its_copies_along_and_loses_nothing(
    config: EvalConfig, reference: dict[str, Any]
) -> None:
    process = subprocess.Popen(
        command_of(config), env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: len(copies_of(process.pid)) == 2, process)
    copies = copies_of(process.pid)
    for number, pid in enumerate(copies):
        # Held at its fifth line, so that the faster one cannot be done before the slower one has begun.
        wait_until(lambda number=number: lines_in(copy_journal(config, number)) >= 5, process)
        os.kill(pid, signal.SIGSTOP)
    assert len(copies_of(process.pid)) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    for pid in copies:
        os.kill(pid, signal.SIGCONT)
    while any(Path(f"/proc/{pid}").exists() for pid in copies):
        time.sleep(0.02)
    assert copy_journal(config, 0).exists()
    result = evaluate(config, show=False)  # two copies again
    assert result["timing"]["resumed_samples"] >= 8
    assert without_timing(result) == without_timing(reference)
    assert [file.name for file in Path(config.output).parent.iterdir()] == ["r.json"]
    assert load_result(config.output) == result


def record(problem: int, sample: int) -> dict[str, Any]:
    return {
        "problem": problem,
        "sample": sample,
        "text": "x",
        "truncated": False,
        "tokens": 1,
        "engine": "hf",
    }


def test_leftovers_of_copies_are_absorbed_once(tmp_path: Path) -> None:
    config = EvalConfig(base_model="m", dataset="d", output=str(tmp_path / "r[1].json"))
    regime = {"seed": 0}
    for number, samples in enumerate([(0, 1), (1, 2)]):
        with Journal(copy_journal(config, number), regime) as journal:
            journal.extend(record(0, sample) for sample in samples)
    with open(copy_journal(config, 1), "ab") as file:
        file.write(b'{"crc32":"torn')
    with Journal(config.journal_path, regime) as journal:
        journal.append(record(5, 5))
    with Journal(config.journal_path, regime) as journal:
        absorb_leftovers(journal)
        assert [(r["problem"], r["sample"]) for r in journal.records] == [(5, 5), (0, 0), (0, 1), (0, 2)]
    assert list(tmp_path.iterdir()) == [config.journal_path]
    with Journal(config.journal_path, regime) as journal:
        assert len(journal.records) == 4


def test_a_copy_of_an_earlier_run_at_work_is_waited_for_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_copies, "ORPHAN_SECONDS", 0.1)
    config = EvalConfig(base_model="m", dataset="d", output=str(tmp_path / "r.json"))
    with (
        Journal(config.journal_path, {}) as journal,
        Journal(copy_journal(config, 0), {}),
        pytest.raises(UsageError, match="still writes"),
    ):
        absorb_leftovers(journal)


@contextlib.contextmanager
def gpus(monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None) -> Iterator[None]:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    yield


@pytest.mark.parametrize(
    ("count", "visible", "copies", "each", "expected"),
    [
        (0, None, 3, 1, [None, None, None]),
        (4, None, 2, 2, ["0,1", "2,3"]),
        (4, "7,5,3,1", 2, 1, ["7", "5"]),
        (2, "GPU-aa,GPU-bb", 2, 1, ["GPU-aa", "GPU-bb"]),
    ],
)
def test_each_copy_gets_gpus_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    visible: str | None,
    copies: int,
    each: int,
    expected: list[str | None],
) -> None:
    with gpus(monkeypatch, count, visible):
        assert device_slices(copies, each) == expected


def test_more_gpus_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with gpus(monkeypatch, 4, None), pytest.raises(UsageError, match=r"needs 6 GPUs, but 4 are visible"):
        device_slices(3, 2)


def test_a_copy_is_not_started_by_hand() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "opsd.eval_copies"],
        cwd=Path(__file__).resolve().parents[1],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "--data_parallel_size" in done.stderr


def test_the_world_has_enough_samples_to_share() -> None:
    assert eval_world.PROBLEMS * MANY["val_n"] == 120
