"""Every write on disk: a kill or a power cut at any of its system calls leaves the old or the new state.

`python -m tests.test_files WAY FAILURE FOLDER` is the child program: it performs one way of writing in
FOLDER/<k> for every k and ends with SIGKILL at call k, so that this process can read what is left.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from opsd import checkpoints, files
from opsd.evaluation.journal import Journal
from opsd.run_identity import MANIFEST_NAME, SENTINEL_NAME, read_sentinel, write_sentinel

ROOT = Path(__file__).resolve().parents[1]
# Path and shutil call these through the module, so that patching the module is enough.
CALLS = ("fsync", "replace", "rename", "unlink", "rmdir")
FAILURES = ("kill", "power cut")


@dataclass(frozen=True)
class Way:
    """One way of writing: make the old state in an empty folder, make the new one, read the state."""

    prepare: Callable[[Path], object]
    write: Callable[[Path], object]
    read: Callable[[Path], object]
    allowed: tuple[object, ...]  # what a reader may see after a failure, old first and new last
    first: int = 0  # the state that a kill at the first call leaves; a power cut there leaves the old one


def _tree(folder: Path, text: str) -> None:
    (folder / "sub").mkdir(parents=True)
    for name in ("a.bin", "sub/b.bin"):
        (folder / name).write_text(text)


def _replace_folder(folder: Path) -> None:
    with files.atomic_directory(folder / "model") as temporary:
        _tree(temporary, "new")


def _read_folder(folder: Path) -> object:
    model = folder / "model"
    return {p.name: p.read_text() for p in model.rglob("*.bin")} if model.exists() else None


def _checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "sub").mkdir(parents=True)
    for name in (*checkpoints.REQUIRED, "sub/more.bin"):
        (checkpoint / name).write_bytes(b"x" * 10)
    return checkpoint


def _save(folder: Path) -> None:
    checkpoints.remove_incomplete(folder)
    if not _complete(folder):
        checkpoints.mark_complete(_checkpoint(folder, 1))


def _run(folder: Path) -> None:
    manifest: dict = {name: {} for name in ("arguments", "versions", "dataset", "seeds")}
    manifest |= dict.fromkeys(("run_name", "base_model", "method"), "x")
    manifest |= {"world_size": 1, "effective_batch": 1}
    files.atomic_write_json(folder / MANIFEST_NAME, manifest)


def _run_of_two(folder: Path) -> None:
    _run(folder)
    for step in (1, 2):
        checkpoints.mark_complete(_checkpoint(folder, step))


def _complete(folder: Path) -> list[str]:
    """Return the complete checkpoints; a marker beside other contents is not one of the allowed states."""
    found = [path for _, path in checkpoints.checkpoints(folder) if not checkpoints.incompleteness(path)]
    return [path.name if (path / "sub/more.bin").read_bytes() == b"x" * 10 else "torn" for path in found]


def _sentinel(folder: Path) -> None:
    write_sentinel(folder, base_model="m", adapter="a", adapter_step=1)


def _read_sentinel(folder: Path) -> bool:
    return (folder / SENTINEL_NAME).exists() and read_sentinel(folder)["adapter_step"] == 1


def _journal(folder: Path, *numbers: int) -> None:
    with Journal(folder / "j.jsonl", {"seed": 1}) as journal:
        for number in numbers:
            journal.append({"n": number})


def _append(folder: Path) -> None:
    """Finish samples 1 and 2, whichever of them the journal lacks."""
    with Journal(folder / "j.jsonl", {"seed": 1}) as journal:
        for record in [{"n": n} for n in (1, 2) if {"n": n} not in journal.records]:
            journal.append(record)
            journal.sync()


def _read_journal(folder: Path) -> list[int]:
    with Journal(folder / "j.jsonl", {"seed": 1}) as journal:
        return [record["n"] for record in journal.records]


def _finish(folder: Path) -> None:
    with Journal(folder / "j.jsonl", {"seed": 1}) as journal:
        files.atomic_write_text(folder / "result", "new")
        journal.remove()


def _read_finish(folder: Path) -> str:
    """Where the samples are: in the journal, in the result, or in both."""
    result, journal = (folder / "result").exists(), (folder / "j.jsonl").exists()
    if result:
        return "both" if journal else (folder / "result").read_text()
    return "journal" if _read_journal(folder) == [1] else "lost"


def _read_text(folder: Path) -> str | None:
    return (folder / "f").read_text() if (folder / "f").exists() else None


# Path as the preparation: start from an empty folder.
FOLDERS = ({"a.bin": "old", "b.bin": "old"}, {"a.bin": "new", "b.bin": "new"})
WAYS = {
    "a new file": Way(Path, lambda f: files.atomic_write_text(f / "f", "new"), _read_text, (None, "new")),
    "a replaced file": Way(
        lambda f: (f / "f").write_text("old"),
        lambda f: files.atomic_write_json(f / "f", 5),
        _read_text,
        ("old", "5\n"),
    ),
    "a new folder": Way(Path, _replace_folder, _read_folder, (None, FOLDERS[1])),
    # Two renames replace a folder: between them there is none, which a reader takes for unfinished.
    "a replaced folder": Way(
        lambda f: _tree(f / "model", "old"), _replace_folder, _read_folder, (FOLDERS[0], None, FOLDERS[1])
    ),
    "a marked checkpoint": Way(_run, _save, _complete, ([], ["checkpoint-1"])),
    "rotated checkpoints": Way(
        _run_of_two,
        lambda f: (checkpoints.rotate(f, 1), checkpoints.remove_incomplete(f)),
        _complete,
        (["checkpoint-1", "checkpoint-2"], ["checkpoint-2"]),
    ),
    "a sentinel": Way(lambda f: _tree(f / "merged", "x"), _sentinel, _read_sentinel, (False, True)),
    # A kill loses no sample that was appended.
    "a journal": Way(_journal, _append, _read_journal, ([], [1], [1, 2]), first=1),
    "a result after its journal": Way(
        lambda f: _journal(f, 1), _finish, _read_finish, ("journal", "both", "new")
    ),
}


class Disk:
    """Record the calls of CALLS, and what of `folder` a power cut would leave of each file's contents.

    `events` are (call, path below the folder, `~` for a temporary name); call `die_at` ends this process.
    """

    def __init__(self, folder: Path, die_at: int = -1, failure: str = "kill") -> None:
        self.folder, self.die_at, self.failure = folder, die_at, failure
        self.events: list[tuple[str, str]] = []
        self.synced = {path.stat().st_ino: path.read_bytes() for path in self.files()}
        self.unsynced_at_rename: list[str] = []

    def files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def lost(self, below: Path) -> list[Path]:
        """The files of `below` whose contents a power cut would lose."""
        paths = [path for path in self.files() if path == below or below in path.parents]
        return [path for path in paths if self.synced.get(path.stat().st_ino, b"") != path.read_bytes()]

    def install(self, setattr_: Callable[[object, str, object], object]) -> None:
        for name in CALLS:
            setattr_(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(target: object, *rest: object, **more: object) -> object:
            if len(self.events) == self.die_at:
                self._die()
            if name == "fsync":
                path = Path(os.readlink(f"/proc/self/fd/{target}"))
                if path.is_file():
                    self.synced[path.stat().st_ino] = path.read_bytes()
            else:
                base = f"/proc/self/fd/{more['dir_fd']}" if more.get("dir_fd") is not None else "."
                path = Path(os.path.realpath(base), os.fspath(rest[0] if name == "replace" else target))
            if name == "replace" and files.PARTIAL_MARK not in path.name:
                self.unsynced_at_rename += [lost.name for lost in self.lost(Path(target))]
            self.events.append((name, self._name(path)))
            return real(target, *rest, **more)

        return call

    def _name(self, path: Path) -> str:
        parts = path.relative_to(self.folder).parts
        return "/".join("~" if files.PARTIAL_MARK in part else part for part in parts) or "."

    def _die(self) -> None:
        if self.failure == "power cut":
            for path in self.lost(self.folder):
                path.write_bytes(self.synced.get(path.stat().st_ino, b""))
        os.kill(os.getpid(), signal.SIGKILL)


def fail_everywhere(way: Way, failure: str, folder: Path) -> int:
    """End a process at each call of `way`, in folders 0, 1, …; returns the number of kills."""
    for k in range(200):
        (folder / str(k)).mkdir()
        way.prepare(folder / str(k))
        if (child := os.fork()) == 0:
            Disk(folder / str(k), k, failure).install(setattr)
            way.write(folder / str(k))
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            return k
    raise AssertionError("no end")


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", WAYS)
def test_a_failure_at_any_call_leaves_the_old_or_the_new(tmp_path: Path, name: str, failure: str) -> None:
    way = WAYS[name]
    command = [sys.executable, "-m", "tests.test_files", name, failure, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    kills, seen = int(done.stdout), []
    for k in range(kills + 1):
        folder = tmp_path / str(k)
        state = way.read(folder)
        assert state in way.allowed, k
        seen.append(way.allowed.index(state))
        # The next run: it removes what was left, does the same again, and ends as if never killed.
        if "folder" not in name:  # atomic_directory removes leftovers itself
            files.remove_all_partials(folder)
        way.write(folder)
        assert way.read(folder) == way.allowed[-1], k
        assert not list(folder.rglob(f"*{files.PARTIAL_MARK}*"))
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (way.first if failure == "kill" else 0, len(way.allowed) - 1)
    assert kills >= 2


def trace(way: Way, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    way.prepare(folder)
    disk = Disk(folder)
    with monkeypatch.context() as patch:
        disk.install(patch.setattr)
        way.write(folder)
    return disk


@pytest.mark.parametrize("name", WAYS)
def test_contents_and_folders_are_synced_before_their_name_and_names_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    disk = trace(WAYS[name], tmp_path, monkeypatch)
    assert disk.unsynced_at_rename == []
    assert [path.name for path in disk.lost(tmp_path)] == []
    for at, (call, path) in enumerate(disk.events):
        if call == "replace" and "~" not in path:
            assert ("fsync", str(Path(path).parent)) in disk.events[at:], path
    if name in ("a new folder", "a replaced folder", "a marked checkpoint"):
        top, last = ("checkpoint-1", ".complete") if "marked" in name else ("~", "")
        at = next(
            k for k, (call, path) in enumerate(disk.events) if call == "replace" and path.endswith(last)
        )
        assert {("fsync", top), ("fsync", f"{top}/sub")} <= set(disk.events[:at])


def test_the_marker_goes_before_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rotate = Way(_run_of_two, lambda folder: checkpoints.rotate(folder, 1), _complete, ())
    events = trace(rotate, tmp_path, monkeypatch).events
    assert not (tmp_path / "checkpoint-1").exists()
    removed = [path for call, path in events if call in ("unlink", "rmdir")]
    assert removed[0].endswith(checkpoints.MARKER)
    assert len(removed) > len(checkpoints.REQUIRED)


@pytest.mark.parametrize("name", ["a new file", "a replaced file", "a new folder", "a replaced folder"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_error_leaves_the_old_and_nothing_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: str
) -> None:
    way = WAYS[name]
    way.prepare(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space"):
            way.write(tmp_path)
    assert way.read(tmp_path) == way.allowed[0]
    assert not list(tmp_path.rglob(f"*{files.PARTIAL_MARK}*"))


if __name__ == "__main__":
    print(json.dumps(fail_everywhere(WAYS[sys.argv[1]], sys.argv[2], Path(sys.argv[3]))))
