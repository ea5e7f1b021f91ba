"""The journal of an evaluation: finished samples on disk as they finish, so that a killed run can be resumed.

A JSONL file. Each line is `{"crc32": "xxxxxxxx", "data": {...}}`, the checksum over the bytes of `data`; the
first line's data is the header with the regime. A kill loses at most the line being written, a power cut what
was written since the last synchronisation. A last line without its newline is dropped and its sample drawn
again; a kill explains no other damage, which is therefore an error.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opsd.errors import ArtefactError, UsageError, printable
from opsd.files import lock_file

FORMAT = 1
SYNC_LINES = 64
SYNC_SECONDS = 5.0


def encode_line(data: Mapping[str, Any]) -> bytes:
    """Return `data` as one line of the journal, checksum first, newline last."""
    payload = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")
    return b'{"crc32":"%08x","data":%b}\n' % (zlib.crc32(payload), payload)


def decode_line(line: bytes) -> dict[str, Any] | None:
    """Return the data of a line that `encode_line` wrote; None for another."""
    payload = line[len(b'{"crc32":"xxxxxxxx","data":') : -2]
    intact = line == b'{"crc32":"%08x","data":%b}\n' % (zlib.crc32(payload), payload)
    return json.loads(payload) if intact else None


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the data of every complete line, and their bytes; ArtefactError names one that is damaged."""
    found, intact = [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            data = decode_line(line)
            if data is None:
                raise ArtefactError(
                    f"line {number} of the journal {path} is damaged (its checksum does not match), which a "
                    f"killed run does not explain; to keep what precedes it: head -n {number - 1} JOURNAL > "
                    "REPAIRED, move it into place and run again, or delete the journal to start over"
                )
            intact += len(line)
            found.append(data)
    return found, intact


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a phrase per field that differs between two regimes, a missing field included.

    Where both state `model_identity`, the path of the model (`base_model`) does not matter.
    """
    absent, names = "(absent)", old.keys() | new.keys()
    if None not in (old.get("model_identity"), new.get("model_identity")):
        names.discard("base_model")
    return [
        f"{name}: {printable(old.get(name, absent), 120)} there, {printable(new.get(name, absent), 120)} now"
        for name in sorted(names)
        if old.get(name, absent) != new.get(name, absent)
    ]


class Journal:
    """A journal open for appending, new or continued, locked against a second writer. A context manager.

    Args:
        regime: what must be equal for two runs to be the same run; JSON values.

    Attributes:
        records: what the file held when it was opened, without the header, in the order written.
        dropped_bytes: length of the torn last line that was cut off.

    Raises:
        UsageError: another process writes this journal, or another regime's run did; its fields are named.
        ArtefactError: the file is damaged, or not a journal.
    """

    def __init__(self, path: Path | str, regime: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.regime = json.loads(json.dumps(regime))  # as it reads back: tuples are lists, keys are strings
        self.records: list[dict[str, Any]] = []
        self._unsynced, self._synced_at = 0, time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        busy = f"another process is writing the journal {path}; wait for it, or choose another --output"
        self._file = lock_file(self.path, busy=busy)
        try:
            self._load()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one finished sample. It survives a kill of this process from here on."""
        self._write(record)
        self._unsynced += 1
        if self._unsynced >= SYNC_LINES or time.monotonic() - self._synced_at >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Make everything appended so far survive a power cut."""
        os.fsync(self._file.fileno())
        self._unsynced, self._synced_at = 0, time.monotonic()

    def close(self) -> None:
        """Synchronise and release the lock; harmless when closed already."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def remove(self) -> None:
        """Delete the file, whose samples are in a result by now, and release the lock."""
        self.path.unlink(missing_ok=True)
        self.close()

    def _write(self, data: Mapping[str, Any]) -> None:
        self._file.write(encode_line(data))
        self._file.flush()

    def _load(self) -> None:
        lines, intact = read_lines(self.path)
        self.dropped_bytes = os.path.getsize(self.path) - intact
        if self.dropped_bytes:
            os.truncate(self.path, intact)
        if not lines:
            self._write({"format": FORMAT, "regime": self.regime})  # synchronised with the first sample
            return
        header, *self.records = lines
        if header.get("format") != FORMAT or not isinstance(header.get("regime"), dict):
            raise ArtefactError(
                f"{self.path} does not begin with the header of an evaluation journal of format {FORMAT}; "
                "delete it, or choose another --output"
            )
        if different := differences(header["regime"], self.regime):
            raise UsageError(
                f"the journal {self.path} belongs to another run: {'; '.join(different)}. Repeat that run's "
                "settings to resume it, choose another --output, or delete the journal"
            )
