"""Every mistake of tests/bad_input_cases.py gives one clear line and the right exit code, no traceback."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bad_input_cases import (
    CASES,
    DOCUMENT,
    ROOT,
    Case,
    World,
    build_world,
    error_line,
    run_case,
    train,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_mistake_is_one_line_with_value_and_remedy(whole: World, tmp_path: Path, case: Case) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.root.rglob("*") if path.is_file()}
    code, said = run_case(case, replace(whole, new=tmp_path))
    assert code == case.code, said
    assert "Traceback" not in said
    line = error_line(said)
    assert said.rstrip("\n").endswith(line), "nothing comes after it"
    for part in case.says:
        assert part in line, line
    assert len(line) < 2500
    assert before == {path: path.stat().st_mtime_ns for path in whole.root.rglob("*") if path.is_file()}
    assert not list(tmp_path.rglob("*.partial-*")), "a temporary file is left"


def test_the_document_has_every_case() -> None:
    assert len(CASES) >= 60
    assert len({case.name for case in CASES}) == len(CASES)
    text = DOCUMENT.read_text(encoding="utf-8")
    for case in CASES:
        assert f"\n| {case.name} | " in text, "run `python -m tests.bad_input_cases --write`"


def test_a_tokenizer_without_pad_token_is_no_mistake(whole: World, tmp_path: Path) -> None:
    """Lengths say what is valid, so any token can pad."""
    from opsd.models import load_tokenizer
    from tests.bad_input_cases import edit

    world = replace(whole, new=tmp_path)
    base = world.copy(world.base, lambda f: edit(f / "tokenizer_config.json", pad_token=None))
    tokenizer = load_tokenizer(str(base))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_disk_that_fills_up_while_a_checkpoint_is_saved(whole: World, tmp_path: Path) -> None:
    """A real one: 300 KB, the checkpoint needs more."""
    libc = ctypes.CDLL(None, use_errno=True)
    small = tmp_path / "small"
    small.mkdir()
    if libc.mount(b"none", os.fsencode(small), b"tmpfs", 0, b"size=300k"):
        pytest.skip("needs the right to mount a file system of 300 KB")
    try:
        world = replace(whole, new=tmp_path)
        argv = lambda w: train(w, output_dir=small / "run", lora_r=64, save_steps=1)  # noqa: E731
        code, said = run_case(Case("full", "ea_opsd_train", argv, 3, ()), world)
        assert code == 3, said
        assert "Traceback" not in said
        assert "checkpoint-1 was not written; free some space and run the same command" in error_line(said)
    finally:
        libc.umount2(os.fsencode(small), 2)


def test_a_wrong_method_is_told_before_the_heavy_imports() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "ea_opsd_train.py"), "--method", "sft"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "error: --method is 'sft'" in done.stderr
    assert "transformers" not in done.stderr
    assert " torch" not in done.stderr


def test_a_defect_of_ours_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    from opsd.errors import run_cli

    def broken() -> None:
        raise FileNotFoundError(2, "not the user's")

    with pytest.raises(FileNotFoundError):
        run_cli(broken)
