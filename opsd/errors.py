"""The two kinds of failure that a user can cause, and how the command line reports them.

Every entry script ends with `raise SystemExit(run_cli(main))`: a `UsageError` prints one line and exits 2, an
`ArtefactError` prints one line and exits 3; anything else is a defect of this project with a traceback.
"""

from __future__ import annotations

import argparse
import errno
import os
import select
import sys
import unicodedata
from collections.abc import Callable
from typing import NoReturn

# What a parser or a chat template raises on bad content; deep nesting gives a RecursionError.
MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


class UsageError(Exception):
    """A flag, argument or environment variable is wrong. The message names the value and the remedy."""

    exit_code = 2


class ArtefactError(Exception):
    """A file, folder, model or dataset is missing or invalid. The message names it and the remedy."""

    exit_code = 3


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises a `UsageError` of one line instead of printing the usage of every flag."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help lists the flags")


def printable(text: object, limit: int = 2000) -> str:
    """Return `text` on one line, with control characters escaped, cut after `limit` characters."""
    string = str(text)
    cut = string if len(string) <= limit else f"{string[:limit]}… ({len(string)} characters)"
    unseen = {char for char in cut if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    return cut.translate({ord(char): char.encode("unicode_escape").decode("ascii") for char in unseen})


def run_cli(main: Callable[[], int | None]) -> int:
    """Run an entry point and turn the user's mistakes into one line on stderr and an exit code.

    Returns:
        What `main` returns (None counts as 0), 2 for a `UsageError`, 3 for an `ArtefactError` and what
        `disk_reason` explains, 130 for an interrupt from the keyboard, 141 without a line where nobody reads
        the output any more (`| head`).
    """
    try:
        try:
            return main() or 0
        finally:
            # What is buffered fails here rather than while the interpreter ends.
            sys.stdout.flush()
    except (UsageError, ArtefactError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno == errno.EPIPE and _reader_gone():
            return 141
        reason = disk_reason(error.errno, error.filename or "the output")
        if reason is None:
            raise
        print(f"error: {printable(reason)}", file=sys.stderr)
        return ArtefactError.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def disk_reason(number: int | None, where: object) -> str | None:
    """Return what the user can do about an error number of the operating system; None where nothing."""
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {where} was not written; free some space and run the same command again"
    if number == errno.EFBIG:
        return f"{where} or a file in it is larger than this shell allows; raise `ulimit -f` and run it again"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to read or write {where}; choose another place"
    return None


def _reader_gone() -> bool:
    """Return whether the reader of stdout or stderr has ended; redirect that stream to /dev/null then.

    A broken pipe to a worker process is another matter, and keeps its traceback.
    """
    ends = select.poll()
    for descriptor in (1, 2):
        ends.register(descriptor, 0)
    gone = [descriptor for descriptor, event in ends.poll(0) if event & select.POLLERR]
    for descriptor in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return bool(gone)
