"""The two kinds of failure a user can cause, and how the command line reports them.

Every entry script ends with `raise SystemExit(run_cli(main))`: a `UsageError` prints one line and exits 2, an
`ArtefactError` prints one line and exits 3, and anything else is a defect of this project and keeps its
traceback.
"""

from __future__ import annotations

import argparse
import errno
import sys
import unicodedata
from collections.abc import Callable

# Refusals of the operating system that the user can mend, whatever was being written or read.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


class UsageError(Exception):
    """A flag, argument or environment variable is wrong. The message names the value and the remedy."""

    exit_code = 2


class ArtefactError(Exception):
    """A file, folder, model or dataset is missing or invalid. The message names it and the remedy."""

    exit_code = 3


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaint is a `UsageError`, one line, instead of the usage of every flag."""

    def error(self, message: str) -> None:
        raise UsageError(f"{message}; {self.prog} --help lists the flags")


def printable(text: object, limit: int = 2000) -> str:
    """`text` with control characters escaped, so that data can neither move the cursor nor forge a line.

    Tabs and newlines become visible escapes too; text longer than `limit` characters is cut with its length
    stated.
    """
    string = str(text)
    cut = string if len(string) <= limit else f"{string[:limit]}… ({len(string)} characters)"
    return "".join(
        char.encode("unicode_escape").decode("ascii")
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else char
        for char in cut
    )


def refuse_unasked_code(name: str, error: Exception) -> None:
    """Raise UsageError where `error` is transformers' refusal to run code that the model `name` ships."""
    if "trust_remote_code" in str(error):
        raise UsageError(f"{name!r} ships code of its own; read it, then add --trust_remote_code") from error


def run_cli(main: Callable[[], int | None]) -> int:
    """Run an entry point and turn the user's mistakes into one line on stderr and an exit code.

    Returns the exit code: what `main` returns (None counts as 0), 2 for a `UsageError`, 3 for an
    `ArtefactError` or where the disk is full or permission is missing, 130 for an interrupt from the
    keyboard.
    """
    try:
        return main() or 0
    except (UsageError, ArtefactError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        where = printable(error.filename) if error.filename else "the system does not say where"
        if error.errno in NO_ROOM:
            print(
                f"error: the disk is full ({where}); free some and run the same command again",
                file=sys.stderr,
            )
        elif error.errno in NO_PERMISSION:
            print(f"error: no permission ({where}): {error.strerror}; choose another place", file=sys.stderr)
        else:
            raise
        return ArtefactError.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
