"""docs/extending.md: its diffs apply, and the launchers and the tests know what they add."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launchers.test_launchers import METHODS, ROOT, launch

PAGE = (ROOT / "docs" / "extending.md").read_text("utf-8")


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the code with the page's three diffs."""
    root = tmp_path_factory.mktemp("extended")
    for name in ("launchers", "opsd", "tests", "testbed"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    diffs = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
    assert len(diffs) == 3
    command = ["git", "apply", "--unidiff-zero", "-"]
    for diff in diffs:
        done = subprocess.run(command, cwd=root, input=diff, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("train.sh", "small reverse_kl", "--method reverse_kl"),
        ("run_eval.sh", "small_base small_train", "--dataset small_train"),
        ("train.sh", "qwen3_8b pwopsd", "--model_name_or_path Qwen/Qwen3-8B"),
        ("run_eval.sh", "qwen3_8b_reverse_kl small_train", "outputs/qwen3_8b_reverse_kl_merged"),
    ],
)
def test_the_launchers_know_the_additions(extended, script, arguments, words):
    done = launch(script, *arguments.split(), root=extended, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    assert words in done.stdout


@pytest.mark.slow
def test_the_added_method_passes_its_test(extended):
    command = [sys.executable, "-m", "pytest", "tests/test_objectives.py", "-k", "plain_loops or no_valid"]
    done = subprocess.run(command, cwd=extended, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout
    assert f"{1 + 2 * (len(METHODS) + 1)} passed" in done.stdout, "the added method is not tested"
