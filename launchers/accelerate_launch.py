"""Run `accelerate launch` and keep the exit code: `python launchers/accelerate_launch.py --config_file F …`

accelerate answers any failing rank with its own traceback and exit code 1. This program prints one line about
the rank that failed first and returns its exit code: a wrong flag stays 2, a missing file 3.
"""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    args = launch_command_parser().parse_args(argv)
    try:
        launch_command(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        print(f"error: rank {rank} {how}; its own message is above. All ranks have ended.", file=sys.stderr)
        return 128 - code if code < 0 else code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
