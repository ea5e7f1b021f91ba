"""The journal: what survives a kill at any byte, what is refused, and that nothing else is ever dropped."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd import files
from opsd.errors import ArtefactError, UsageError
from opsd.evaluation import journal as journal_module
from opsd.evaluation.journal import Journal, encode_line

# A tuple is a list in JSON; None is a value.
REGIME = {"base_model": "m", "temperature": 1.0, "seed": 3, "val_n": 4, "revision": None, "ids": (1, 2)}
RECORDS = [{"problem": i, "sample": 0, "text": f"line {i}\n\u2028 \x00 é 数 {'x' * i}"} for i in range(5)]


def written(path: Path, records: list[dict] = RECORDS) -> Path:
    with Journal(path, REGIME) as journal:
        for record in records:
            journal.append(record)
    return path


def test_what_was_appended_is_read_back(tmp_path: Path) -> None:
    path = written(tmp_path / "deep" / "j.jsonl")
    lines = [json.loads(line)["data"] for line in path.read_bytes().splitlines()]
    assert (lines[0]["regime"], lines[1:]) == ({**REGIME, "ids": [1, 2]}, RECORDS), (
        "each line is JSON of its own"
    )
    with Journal(path, REGIME) as journal:
        assert journal.records == RECORDS
        assert journal.dropped_bytes == 0
        journal.append({"problem": 9})
    with Journal(path, REGIME) as journal:
        assert journal.records == [*RECORDS, {"problem": 9}]
        journal.remove()
    assert not path.exists()


def test_cut_at_every_byte_loses_the_last_line_at_most(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole.jsonl").read_bytes()
    path = tmp_path / "cut.jsonl"
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        complete = whole[:length].count(b"\n")
        with Journal(path, REGIME) as journal:
            assert journal.records == RECORDS[: max(complete - 1, 0)]
            last_newline = whole[:length].rfind(b"\n") + 1
            assert journal.dropped_bytes == length - last_newline
            journal.append({"after": "the cut"})
        with Journal(path, REGIME) as journal:
            assert journal.records == [*RECORDS[: max(complete - 1, 0)], {"after": "the cut"}]


@settings(max_examples=60, deadline=None)
@given(line=st.integers(1, 5), place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_changed_byte_in_a_complete_line_is_an_error_that_names_it(
    tmp_path_factory: pytest.TempPathFactory, line: int, place: float, value: int
) -> None:
    path = written(tmp_path_factory.mktemp("damaged") / "j.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = bytearray(lines[line])
    index = int(place * (len(damaged) - 1))
    if damaged[index] == value or value == ord("\n"):
        return
    damaged[index] = value
    lines[line] = bytes(damaged)
    path.write_bytes(b"".join(lines))
    with pytest.raises(ArtefactError, match=f"line {line + 1} of the journal"):
        Journal(path, REGIME)
    assert path.read_bytes() == b"".join(lines), "a damaged journal is left as it is"


def test_another_regime_is_refused_with_every_differing_field(tmp_path: Path) -> None:
    path = written(tmp_path / "j.jsonl")
    before = path.read_bytes()
    changed = {**REGIME, "temperature": 0.6, "top_p": 0.9}
    del changed["val_n"], changed["revision"]
    with pytest.raises(UsageError) as caught:
        Journal(path, changed)
    for phrase in (
        "temperature: 1.0 there, 0.6 now",
        "top_p: (absent) there, 0.9 now",
        "val_n: 4 there, (absent)",
        "revision: None there, (absent) now",
    ):
        assert phrase in str(caught.value)
    assert "seed" not in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b'{"results": []}\n', b"\n", encode_line({"format": 99, "regime": {}})])
def test_a_foreign_file_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(content)
    with pytest.raises(ArtefactError):
        Journal(path, REGIME)
    assert path.read_bytes() == content


def test_a_second_writer_is_refused_and_a_closed_journal_is_free(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal(path, REGIME), pytest.raises(UsageError, match="another process is writing"):
        Journal(path, REGIME)
    with Journal(path, REGIME):
        pass


def test_the_disk_is_synchronised_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(journal_module.os, "fsync", lambda fd: (synced.append(fd), fsync(fd)))
    monkeypatch.setattr(journal_module, "SYNC_SECONDS", 1e9)
    with Journal(tmp_path / "j.jsonl", REGIME) as journal:
        opening = len(synced)
        for index in range(journal_module.SYNC_LINES * 2 + 1):
            journal.append({"i": index})
        assert len(synced) == opening + 2
    assert len(synced) == opening + 3


def test_a_journal_deleted_between_open_and_lock_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "j.jsonl")
    flock, calls = files.fcntl.flock, []

    def finish_first(*arguments: object) -> None:
        if not calls:
            path.unlink()  # what the previous owner does last
        calls.append(arguments)
        flock(*arguments)

    monkeypatch.setattr(files.fcntl, "flock", finish_first)
    with Journal(path, REGIME) as journal:
        journal.append({"i": 0})
    assert len(calls) == 2
    assert len(path.read_bytes().splitlines()) == 2
