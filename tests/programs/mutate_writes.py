"""Remove each fsync, rename and deletion in turn: the tests of the writes must fail without any of them.

    python -m tests.programs.mutate_writes

Each mutant is a copy of the repository in which one statement is `pass`. Prints a line a mutant; exit code 1
where the tests pass without a statement.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CALLS = {
    "_fsync", "fsync", "fsync_tree", "flush", "replace", "rmtree", "unlink", "sync", "truncate",
    "remove_partials",
}  # fmt: skip
FILES = ("files.py", "checkpoints.py", "evaluation/journal.py")
TESTS = ("tests/test_files.py", "tests/evaluation/test_journal.py")


def statements(source: str) -> list[ast.Expr]:
    """Return the statements of `source` that are a call of CALLS."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr))
    calls = [(node, node.value.func) for node in nodes if isinstance(node.value, ast.Call)]
    found = [node for node, name in calls if getattr(name, "attr", getattr(name, "id", None)) in CALLS]
    return sorted(found, key=lambda node: node.lineno)


def without(source: str, node: ast.Expr) -> str:
    """Return `source` with `pass` in the place of `node`."""
    lines = source.splitlines(keepends=True)
    first, last = lines[node.lineno - 1], lines[node.end_lineno - 1]
    lines[node.lineno - 1 : node.end_lineno] = [
        first.encode()[: node.col_offset].decode() + "pass" + last.encode()[node.end_col_offset :].decode()
    ]
    return "".join(lines)


def passes(copy: Path) -> bool:
    """Return whether the tests pass in `copy`."""
    command = [sys.executable, "-m", "pytest", *TESTS, "-q", "-x", "-n", "0"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def main() -> int:
    survivors, count = [], 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        skipped = shutil.ignore_patterns(".*", "__pycache__", "outputs", "eval_results", "docs", "golden")
        shutil.copytree(ROOT, copy, ignore=skipped)
        if not passes(copy):
            raise SystemExit("the tests fail without a mutation")
        for name in FILES:
            source = (ROOT / "opsd" / name).read_text(encoding="utf-8")
            for node in statements(source):
                call = ast.unparse(node)
                place = f"opsd/{name}:{node.lineno} {call}"
                (copy / "opsd" / name).write_text(without(source, node), encoding="utf-8")
                survived, count = passes(copy), count + 1
                survivors += [place] if survived else []
                print(f"{'SURVIVED' if survived else 'caught  '} {place}", flush=True)
            (copy / "opsd" / name).write_text(source, encoding="utf-8")
    print(f"{count} mutants, {len(survivors)} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
