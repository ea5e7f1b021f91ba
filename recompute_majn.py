"""python recompute_majn.py [--regrade] [--apply] ['eval_results/*.json']

Votes again over the stored answers of result files, of this project or of the authors' release, and prints
one row for each file: Maj@n as stored and as recomputed. Stored verdicts on single samples stay as they are;
the last column but one counts those that the grader now gives otherwise.

--regrade also extracts the answers from the stored generations and grades them again: `predicted_answer`,
`formatted` and `correct` of a sample and all aggregates are corrected, and the table shows Avg@n too.

--apply writes the new values, atomically, and keeps the old ones: `majority_vote_before_recompute`,
`majority_vote_correct_before_recompute` in a problem, `<key>_before_regrade` in a sample and `regraded` at
the top. Applying twice changes nothing more. A damaged or foreign file is reported and skipped; the exit code
is then 1.
"""

from __future__ import annotations

import argparse
import glob
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from opsd.errors import ArtefactError, OneLineParser, UsageError, printable, run_cli
from opsd.evaluation.grading import (
    DEFAULT_TIME_LIMIT_S,
    NO_ANSWER,
    Grader,
    Killed,
    ProblemGrade,
    extract_boxed,
)
from opsd.evaluation.results import aggregate, ground_truth, load_result, predicted_answer, write_result

DEFAULT_PATTERN = "eval_results/*.json"
BEFORE = "majority_vote_before_recompute"
PROBLEM_BEFORE = "majority_vote_correct_before_recompute"
SAMPLE_BEFORE = "_before_regrade"
VOTE_FIGURES = ("majority_vote_at_n", "majority_vote_at_n_pct")
FIGURES = (
    "pass_at_n", "pass_at_n_pct", "average_at_n", "average_at_n_pct", *VOTE_FIGURES, "formatted_count",
    "format_rate",
)  # fmt: skip
COLUMNS = ("file", "problems", "Maj@n old", "Maj@n new", "votes changed", "verdicts that differ", "killed")
REGRADE_COLUMNS = ("Avg@n old", "Avg@n new")
SHOWN_KILLS = 10

Answers = list[list[str | None]]  # by problem and sample, None = unformatted


def answers_of(result: dict[str, Any], *, regrade: bool, path: Path | str) -> Answers:
    """Return the stored answers, or with `regrade` those that the stored generations hold.

    Raises:
        ArtefactError: `regrade` and a generation's text is missing.
    """
    if not regrade:
        return [[predicted_answer(g) for g in record["generations"]] for record in result["results"]]
    for record in result["results"]:
        if not all(isinstance(g.get("full_generation"), str) for g in record["generations"]):
            raise ArtefactError(
                f"{path}: problem {record.get('problem_id')} has a generation without `full_generation`, "
                "which --regrade reads; vote again without --regrade"
            )
    return [
        [extract_boxed(g["full_generation"]) for g in record["generations"]] for record in result["results"]
    ]


def apply_votes(result: dict[str, Any], grades: list[ProblemGrade]) -> bool:
    """Put the new votes into `result`, in place. Returns whether anything changed."""
    changed = False
    for record, grade in zip(result["results"], grades, strict=True):
        if record.get("majority_vote_correct") != grade.majority_correct:
            record.setdefault(PROBLEM_BEFORE, record.get("majority_vote_correct"))
            record["majority_vote_correct"] = grade.majority_correct
            changed = True
    figures = aggregate(result["results"])
    if not all(_close(result.get(name), figures[name]) for name in VOTE_FIGURES):
        result.setdefault(BEFORE, {name: result.get(name) for name in VOTE_FIGURES})
        result.update({name: figures[name] for name in VOTE_FIGURES})
        changed = True
    return changed


def apply_regrade(
    result: dict[str, Any], answers: Answers, grades: list[ProblemGrade], limits: dict[str, Any]
) -> bool:
    """Put answers, verdicts, votes, aggregates and the grader's `limits` into `result`, in place.

    Returns:
        Whether anything changed.
    """
    before = {name: result.get(name) for name in (*FIGURES, "grading")}
    changed = before["grading"] != limits
    for record, texts, grade in zip(result["results"], answers, grades, strict=True):
        for generation, text, correct in zip(record["generations"], texts, grade.correct, strict=True):
            answer = NO_ANSWER if text is None else text
            new = {"predicted_answer": answer, "formatted": text is not None, "correct": correct}
            for name in [name for name, value in new.items() if generation.get(name) != value]:
                # Some files leave out `formatted`, which then has no value to keep.
                if name in generation:
                    generation.setdefault(name + SAMPLE_BEFORE, generation[name])
                generation[name] = new[name]
                changed = True
        counts = {"num_correct": grade.num_correct, "pass_at_n": any(grade.correct)}
        changed |= any(record.get(name) != value for name, value in counts.items())
        record.update(counts)
    changed |= apply_votes(result, grades)
    figures = aggregate(result["results"])
    changed |= not all(_close(result.get(name), figures[name]) for name in FIGURES)
    if changed:
        first = (result.get("regraded") or {}).get("before", before)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        result.update({name: figures[name] for name in FIGURES})
        result.update(grading=limits, regraded={"date": date, **limits, "before": first})
    return changed


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _close(old: Any, new: float) -> bool:
    # Files differ in the last digits of a percentage, which is no change.
    return _is_number(old) and abs(old - new) <= 0.005


def recompute(path: Path, grader: Grader, *, regrade: bool, apply: bool) -> list[str]:
    """Grade and vote again over one file, rewrite it with `apply`, and return its row of the table."""
    result = load_result(path)
    stored = {name: result.get(name) for name in FIGURES}
    records = result["results"]
    answers = answers_of(result, regrade=regrade, path=path)
    killed_before = len(grader.killed)
    grades = grader.grade(list(zip(map(ground_truth, records), answers, strict=True)))
    votes = [grade.majority_correct for grade in grades]
    votes_changed = sum(
        r.get("majority_vote_correct") != vote for r, vote in zip(records, votes, strict=True)
    )
    verdicts = [correct for grade in grades for correct in grade.correct]
    old_verdicts = [generation["correct"] for record in records for generation in record["generations"]]
    differing = sum(old != new for old, new in zip(old_verdicts, verdicts, strict=True))
    if regrade:
        changed = apply_regrade(result, answers, grades, grader.limits(since=killed_before))
    else:
        changed = apply_votes(result, grades)
    if apply and changed:
        # A link stays a link; the file that it points to is rewritten.
        write_result(path.resolve(), result)
    percents = [stored["majority_vote_at_n_pct"], 100 * sum(votes) / len(votes)]
    if regrade:
        percents += [stored["average_at_n_pct"], 100 * sum(verdicts) / len(verdicts)]
    shown = [f"{value:.2f}" if _is_number(value) else "—" for value in percents]
    counts = [votes_changed, differing, len(grader.killed) - killed_before]
    name = printable(path).replace("|", "\\|")
    return [name, str(len(records)), *shown[:2], *map(str, counts), *shown[2:]]


def killed_line(killed: list[Killed], time_limit_s: float) -> str:
    """Return a line that says what was killed."""
    items = [
        " against ".join(printable(t, 60) for t in (k.gold, k.predicted) if t is not None) for k in killed
    ]
    more = f" and {len(items) - SHOWN_KILLS} more" if len(items) > SHOWN_KILLS else ""
    return (
        f"{len(items)} killed at {time_limit_s:g} s of CPU time or by the memory limit, taken as unequal: "
        f"{'; '.join(items[:SHOWN_KILLS])}{more}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = OneLineParser(
        prog="recompute_majn.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pattern", nargs="?", default=DEFAULT_PATTERN, metavar="PATTERN", help="%(default)s")
    parser.add_argument("--regrade", action="store_true", help="grade the stored generations again")
    parser.add_argument("--apply", action="store_true", help="rewrite the files (default: only print)")
    parser.add_argument("--workers", type=int, default=None, help="grading processes (default: all cores)")
    parser.add_argument("--time_limit_s", type=float, default=DEFAULT_TIME_LIMIT_S)
    args = parser.parse_args(argv)
    paths = [Path(name) for name in sorted(glob.glob(args.pattern, recursive=True)) if Path(name).is_file()]
    if not paths:
        raise UsageError(f"no file matches {args.pattern!r}")
    columns = COLUMNS + REGRADE_COLUMNS * args.regrade
    rows, failed = [columns, ("---",) * len(columns)], 0
    with Grader(workers=args.workers, time_limit_s=args.time_limit_s) as grader:
        for path in tqdm(paths, unit="file", disable=not sys.stderr.isatty()):
            try:
                rows.append(recompute(path, grader, regrade=args.regrade, apply=args.apply))
            except (ArtefactError, OSError) as error:
                failed += 1
                tqdm.write(f"skipped: {printable(error)}", file=sys.stderr)
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    if grader.killed:
        print(killed_line(grader.killed, args.time_limit_s))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
