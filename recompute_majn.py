"""python recompute_majn.py [--apply] ['eval_results/*.json']

Votes again over the stored answers of result files, of this project or of the authors' release, and prints
one row for each file: Maj@n as stored and as recomputed. With --apply the file is rewritten whole with the
new vote; what stood there before is kept under `majority_vote_before_recompute` and, in each problem whose
vote changes, under `majority_vote_correct_before_recompute`. Applying twice changes nothing more.

Stored verdicts on single samples are left as they are; the last column but one counts those that the grader
now gives otherwise. A damaged or foreign file is reported and skipped, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import glob
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from opsd.errors import ArtefactError, OneLineParser, UsageError, printable, run_cli
from opsd.evaluation.grading import DEFAULT_TIME_LIMIT_S, Grader, ProblemGrade
from opsd.evaluation.results import ground_truth, load_result, predicted_answer, write_result

DEFAULT_PATTERN = "eval_results/*.json"
BEFORE = "majority_vote_before_recompute"
PROBLEM_BEFORE = "majority_vote_correct_before_recompute"
COUNT, PERCENT = "majority_vote_at_n", "majority_vote_at_n_pct"


@dataclass(frozen=True)
class Recount:
    """Old and new Maj@n of one file in percent (old is None where the file has none), and what differs."""

    problems: int
    old_pct: float | None
    new_pct: float
    changed_problems: int
    differing_verdicts: int
    killed: int


def recount(result: dict[str, Any], grader: Grader) -> tuple[Recount, list[ProblemGrade]]:
    """Grade and vote again over the stored answers of `result`."""
    records = result["results"]
    killed = len(grader.killed)
    grades = grader.grade(
        [(ground_truth(record), [predicted_answer(g) for g in record["generations"]]) for record in records]
    )
    votes = [grade.majority_correct for grade in grades]
    differing = sum(
        generation["correct"] != correct
        for record, grade in zip(records, grades, strict=True)
        for generation, correct in zip(record["generations"], grade.correct, strict=True)
    )
    changed = sum(
        record.get("majority_vote_correct") != vote for record, vote in zip(records, votes, strict=True)
    )
    new_pct = 100 * sum(votes) / len(votes) if votes else 0.0
    return Recount(
        len(records), _old_pct(result), new_pct, changed, differing, len(grader.killed) - killed
    ), grades


def _old_pct(result: dict[str, Any]) -> float | None:
    value = result.get(PERCENT)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def apply_recount(result: dict[str, Any], grades: list[ProblemGrade]) -> bool:
    """Put the new vote into `result`, in place. Returns whether anything changed."""
    changed = False
    for record, grade in zip(result["results"], grades, strict=True):
        if record.get("majority_vote_correct") != grade.majority_correct:
            record.setdefault(PROBLEM_BEFORE, record.get("majority_vote_correct"))
            record["majority_vote_correct"] = grade.majority_correct
            changed = True
    count, problems = sum(grade.majority_correct for grade in grades), len(grades)
    new = {COUNT: count, PERCENT: 100 * count / max(problems, 1)}
    # Files differ in the last digits of a percentage, which is no change of the vote.
    if any(not _close(result.get(key), value) for key, value in new.items()):
        result.setdefault(BEFORE, {key: result.get(key) for key in new})
        result.update(new)
        changed = True
    return changed


def _close(old: Any, new: float) -> bool:
    return isinstance(old, (int, float)) and not isinstance(old, bool) and abs(old - new) <= 0.005


def table(rows: list[tuple[Path, Recount]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| file | problems | Maj@n old | Maj@n new | votes changed | verdicts that differ | killed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for path, row in rows:
        old = "—" if row.old_pct is None else f"{row.old_pct:.2f}"
        name = printable(path).replace("|", "\\|")
        lines.append(
            f"| {name} | {row.problems} | {old} | {row.new_pct:.2f} | {row.changed_problems} | "
            f"{row.differing_verdicts} | {row.killed} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(
        prog="recompute_majn.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pattern", nargs="?", default=DEFAULT_PATTERN, metavar="PATTERN", help="%(default)s")
    parser.add_argument("--apply", action="store_true", help="rewrite the files (default: only print)")
    parser.add_argument("--workers", type=int, default=None, help="grading processes (default: all cores)")
    parser.add_argument("--time_limit_s", type=float, default=DEFAULT_TIME_LIMIT_S)
    args = parser.parse_args(argv)
    paths = [Path(name) for name in sorted(glob.glob(args.pattern, recursive=True)) if Path(name).is_file()]
    if not paths:
        raise UsageError(f"no file matches {args.pattern!r}")
    rows, failed = [], 0
    with Grader(workers=args.workers, time_limit_s=args.time_limit_s) as grader:
        for path in tqdm(paths, unit="file", disable=not sys.stderr.isatty()):
            try:
                result = load_result(path)
                row, grades = recount(result, grader)
                rows.append((path, row))
                if args.apply and apply_recount(result, grades):
                    # A link stays a link; the file it names is the one that is rewritten.
                    write_result(path.resolve(), result)
            except (ArtefactError, OSError) as error:
                failed += 1
                tqdm.write(f"skipped: {printable(error)}", file=sys.stderr)
    print(table(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
