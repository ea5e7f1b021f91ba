"""Every mistake of tests/bad_input_cases.py gives one clear line and the right exit code, no traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from opsd.arguments import LORA_TARGETS
from opsd.errors import run_cli
from opsd.models import load_tokenizer
from tests.bad_input_cases import (
    CASES,
    DOCUMENT,
    ROOT,
    TRAIN,
    Case,
    World,
    build_world,
    edit,
    error_line,
    run_case,
    train,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def w(world: World, tmp_path: Path) -> World:
    return replace(world, new=tmp_path)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_mistake_is_one_line_with_value_and_remedy(w: World, case: Case) -> None:
    before = {path: path.stat().st_mtime_ns for path in w.root.rglob("*") if path.is_file()}
    code, said = run_case(case, w)
    assert code == case.code, said
    assert "Traceback" not in said
    line = error_line(said)
    assert said.rstrip("\n").endswith(line), "nothing comes after it"
    for part in case.says:
        assert part in line, line
    assert len(line) < 2500
    assert before == {path: path.stat().st_mtime_ns for path in w.root.rglob("*") if path.is_file()}
    assert not list(w.new.rglob("*.partial-*")), "a temporary file is left"


def test_the_document_has_every_case() -> None:
    named = [line.split(" | ")[0].removeprefix("| ") for line in DOCUMENT.read_text("utf-8").splitlines()]
    cases = [case.name for case in CASES]
    assert [name for name in named if name in cases] == cases, "run `python -m tests.bad_input_cases --write`"


def test_every_item_of_the_audit_has_a_guard_and_tests_that_exist() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \|.*\| .+ \| (.+) \|$", text, re.MULTILINE)
    assert [int(number) for number, _ in rows][:24] == list(range(1, 25))
    for number, tests in rows:
        cited = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
        assert cited or int(number) > 24, number
        for file, name in cited:
            assert f"\ndef {name}(" in (ROOT / file).read_text("utf-8"), (file, name)


def test_a_tokenizer_without_pad_token_is_no_mistake(w: World) -> None:
    """Lengths say what is valid, so any token can pad."""
    base = w.copy(w.base, lambda f: edit(f / "tokenizer_config.json", pad_token=None))
    tokenizer = load_tokenizer(str(base))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def shell(command: str, *arguments: str) -> subprocess.CompletedProcess:
    words = ["bash", "-c", f"set -o pipefail; {command}", *arguments]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("kilobytes", "says"), [(3, "ulimit -f"), (40, "checkpoint-1"), (300, "checkpoint-1")]
)
def test_a_file_larger_than_the_shell_allows(w: World, kilobytes: int, says: str) -> None:
    """In Python's own writing, in safetensors' and in torch's, which have three words for it."""
    # -B: bytecode that Python would write is limited too.
    words = [sys.executable, "-B", "ea_opsd_train.py", *train(w, lora_r=64, save_steps=1)]
    done = shell(f'ulimit -f {kilobytes}; exec "$0" "$@"', *words)
    assert (done.returncode, "Traceback" in done.stderr) == (3, False), done.stderr
    assert says in error_line(done.stderr)
    assert "raise `ulimit -f`" in error_line(done.stderr)


@pytest.mark.parametrize("program", ["plot_run.py", "recompute_majn.py", "merge_lora.py"])
def test_output_that_nobody_reads(program: str) -> None:
    """`--help | head`: nothing on stderr, and the exit code of a process that SIGPIPE ended."""
    done = shell('env -u PYTHONUNBUFFERED "$0" "$1" --help | true', sys.executable, program)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("error", [BrokenPipeError(32, "a worker's"), FileNotFoundError(2, "not the user's")])
def test_a_defect_of_this_project_keeps_its_traceback(error: OSError) -> None:
    def broken() -> None:
        raise error

    with pytest.raises(type(error)):
        run_cli(broken)


def test_all_linear_is_pefts_keyword(w: World) -> None:
    argv = train(w, lora_target_modules="all-linear", save_steps=1)
    code, said = run_case(Case("all", TRAIN, lambda w: argv, 0, ()), w)
    assert code == 0, said
    saved = json.loads((w.new / "run" / "checkpoint-1" / "adapter_config.json").read_text())
    assert {name.split(".")[-1] for name in saved["target_modules"]} == set(LORA_TARGETS)
