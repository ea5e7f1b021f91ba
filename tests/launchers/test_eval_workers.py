"""eval_workers.sh: which worker evaluates what on which GPU, failures, interrupts, progress."""

from __future__ import annotations

import os
import pty
import shlex
import signal
import subprocess
from pathlib import Path

from tests.evaluation import test_run_eval
from tests.evaluation.test_run_eval import runs, wait_for

checkout = test_run_eval.checkout
CELLS = "small_base small 1\n\n# a comment\nsmall_base small_hard\n"
# Stands in for evaluate_math.py: records its devices, waits until two have started, ends.
PAIR = """
import os, pathlib, time
# A relative path of the caller's holds in every working directory.
assert pathlib.Path(os.environ["HMMT25_PARQUET_PATH"]).is_file()
label, devices = os.environ["HOSTLABEL"], os.environ.get("CUDA_VISIBLE_DEVICES")
pathlib.Path(f"started-{label}").write_text(str(devices))
while len(list(pathlib.Path().glob("started-*"))) < 2:
    time.sleep(0.02)
"""


def start(root: Path, *arguments: str, cells: str = CELLS, stderr: int = subprocess.PIPE, **settings: str):
    (root / "cells").write_text(cells)
    own = {"CUDA_VISIBLE_DEVICES": "", "TENSOR_PARALLEL": "", "WORKERS": ""}
    return subprocess.Popen(
        ["bash", str(root / "launchers" / "eval_workers.sh"), *arguments],
        stdin=(root / "cells").open(),
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=test_run_eval.environment(**own | settings),
        text=True,
        cwd=root.parent,
    )


def test_a_failed_cell_is_named_and_stops_no_other(checkout):
    workers = start(checkout, cells="small_base small 1\nsmall_opsd small 1\nsmall_base small_hard\n")
    _, err = workers.communicate(timeout=120)
    assert workers.returncode == 1
    assert len(runs(checkout)) == 2
    lines = err.splitlines()
    assert sum("of 3 cells, worker1: " in line for line in lines) == 3
    assert lines[-2].startswith("  small_opsd small seed 1: exit code 3 (no merged model at ")
    assert lines[-1] == "error: 1 of 3 cells failed (listed above)"
    assert len(lines) == 5, "a line for each finished cell, and no other"


def test_each_worker_has_its_own_gpus(checkout):
    (checkout / "evaluate_math.py").write_text(PAIR)
    gpus = {"CUDA_VISIBLE_DEVICES": "3,GPU-a,5,7,9", "TENSOR_PARALLEL": "2"}
    (checkout.parent / "hmmt.parquet").touch()
    workers = start(checkout, ENGINE="vllm", HOSTLABEL="node", HMMT25_PARQUET_PATH="hmmt.parquet", **gpus)
    _, err = workers.communicate(timeout=120)
    assert workers.returncode == 0, err
    started = {path.name: path.read_text() for path in checkout.glob("started-*")}
    assert started == {"started-node1": "3,GPU-a", "started-node2": "5,7"}
    printed = start(checkout, "--", "--top_p", "0.9", DRY_RUN="1", ENGINE="vllm", **gpus)
    out, _ = printed.communicate(timeout=120)
    words = [shlex.split(line) for line in out.splitlines()]
    assert [line[0] for line in words] == ["CUDA_VISIBLE_DEVICES=3,GPU-a", "CUDA_VISIBLE_DEVICES=5,7"]
    assert all(line[-2:] == ["--top_p", "0.9"] for line in words)
    assert [line[line.index("--seed") + 1] for line in words] == ["1", "0"]


def test_an_interrupt_ends_the_evaluations_too(checkout):
    workers = start(checkout, WORKERS="2", HOLD="1")
    wait_for(lambda: len(runs(checkout)) == 2)
    # A job in the background of a script inherits that SIGINT is ignored.
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    workers.send_signal(signal.SIGTERM if ignored else signal.SIGINT)
    _, err = workers.communicate(timeout=120)
    assert workers.returncode == 130
    assert "the same command continues from here" in err
    for run in runs(checkout):
        state = Path(f"/proc/{run['pid']}/stat")
        assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_cell_of_another_start_is_waited_for_at_the_end(checkout):
    first = start(checkout, HOLD="1", cells="small_base small 1\n")
    wait_for(lambda: runs(checkout))
    second = start(checkout)
    wait_for(lambda: len(runs(checkout)) == 2)  # the second cell, although the first is taken
    (checkout / "go").touch()
    _, err = second.communicate(timeout=120)
    assert first.wait(120) == second.returncode == 0
    assert err.splitlines()[-1].endswith("2 of 2 cells, worker1: small_base small seed 1: done")
    first.communicate()


def test_a_terminal_shows_a_line_per_worker(checkout):
    ours, theirs = pty.openpty()
    workers = start(checkout, WORKERS="2", HOLD="1", stderr=theirs)
    os.close(theirs)
    wait_for(lambda: len(runs(checkout)) == 2)
    shown = ""
    lines = ("worker1 small_base small seed 1: to std", "worker2 small_base small_hard: to")
    while not all(line in shown for line in lines):
        shown += os.read(ours, 4096).decode()
    (checkout / "go").touch()
    assert workers.wait(120) == 0
    os.close(ours)
