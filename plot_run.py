"""Draw what training runs logged: loss, divergence, entropies, lengths, gradient norm, each method's metrics.

    python plot_run.py outputs/small_pwopsd
    python plot_run.py outputs/small_opsd outputs/small_pwopsd --smooth 5 --output outputs/opsd_pwopsd.png

Reads the run's metrics.jsonl, finished or in progress; several runs overlay, a colour each. Writes
metrics.png into the folder of a single run, or --output (.png, .pdf or .svg), and prints its name. Exit
codes: 0 done, 2 a wrong argument, 3 an unknown folder or a missing, empty or damaged metrics.jsonl.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from opsd.errors import OneLineParser, UsageError, printable, run_cli
from opsd.report.plots import check_picture
from opsd.report.run_plots import draw, load_runs


def main(argv: list[str] | None = None) -> int:
    """Draw the runs that the command line names."""
    parser = OneLineParser(
        prog="plot_run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a training run")
    parser.add_argument("--output", type=Path, help="picture to write; needed with several runs")
    parser.add_argument("--smooth", type=int, default=1, help="running mean over so many logged steps")
    args = parser.parse_args(argv)
    if args.smooth < 1:
        raise UsageError(f"--smooth is {args.smooth}, but must be at least 1")
    if args.output is None and len(args.runs) > 1:
        raise UsageError("several runs in one picture need --output, a file that ends in .png, .pdf or .svg")
    output = args.output or args.runs[0] / "metrics.png"
    check_picture(output)
    draw(load_runs(args.runs), output, smooth=args.smooth)
    print(printable(output))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
