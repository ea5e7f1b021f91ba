"""python bench/paper_verdict.py: what the paper's own means and deviations can and cannot show.

An estimate from `opsd/report/paper_numbers.json`. Its assumptions: the three evaluations of a cell are
independent; on one benchmark every method of a model has the same deviation (pooled over them, since a
deviation of three values is itself uncertain by half); problems and checkpoints are fixed. A new set of
problems and another training seed would add to every standard error, so the intervals are the shortest that
these numbers allow. Quantiles: Student's t with Satterthwaite's degrees of freedom.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from opsd.report.intervals import POWER, t_quantile
from opsd.report.markdown import markdown_table

ROOT = Path(__file__).resolve().parent.parent
EVALUATIONS = 3
REFERENCE = "opsd"


def verdicts(numbers: dict) -> list[list[str]]:
    """Return a row for each method against REFERENCE, on the mean of the benchmarks, in points."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in numbers["rows"]):
        rows = [row for row in numbers["rows"] if row["model"] == model]
        deviations = np.array([[deviation for _, deviation in row["cells"]] for row in rows])
        pooled = (deviations**2).mean(0)
        # The difference of two means of EVALUATIONS values, averaged over the benchmarks.
        error = math.sqrt(2 * pooled.sum() / EVALUATIONS) / len(pooled)
        freedom = pooled.sum() ** 2 / (pooled**2 / (len(rows) * (EVALUATIONS - 1))).sum()
        half = float(t_quantile(freedom)) * error
        reach = half + NormalDist().inv_cdf(POWER) * error
        reference = next(row for row in rows if row["method"] == REFERENCE)
        for row in (row for row in rows if row is not reference):
            gap = row["mean"] - reference["mean"]
            verdict = "not resolved" if abs(gap) <= half else "better" if gap > 0 else "worse"
            needed = math.ceil(EVALUATIONS * (reach / gap) ** 2)
            interval = f"[{gap - half:+.2f}, {gap + half:+.2f}]"
            line = [model, f"{row['title']} against {reference['title']}", f"{gap:+.2f}", interval, verdict]
            lines.append([*line, f"{reach:.2f}", "—" if abs(gap) > half else str(needed)])
    return lines


def main() -> int:
    numbers = json.loads((ROOT / "opsd" / "report" / "paper_numbers.json").read_text("utf-8"))
    header = ["model", "pair", "difference", "95 %, samples alone", "verdict", "detectable at 80 %"]
    header.append("evaluations of 12 samples a method that would resolve it")
    print(markdown_table(header, verdicts(numbers)), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
