"""python testbed/compare.py BASE.json TRAINED.json

Show what training has changed: two result files of the same benchmark and sampling, side by side.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# Where two files may differ and still be compared: what was evaluated.
OF_THE_MODEL = ("base_model", "model_identity")
RESAMPLES = 2000


def shares(result: Mapping[str, Any]) -> np.ndarray:
    """Return the [P] share of right samples of each problem."""
    return np.array([record["num_correct"] / record["val_n"] for record in result["results"]])


def difference_interval(
    base: np.ndarray, trained: np.ndarray, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean difference of two [P] shares, in points."""
    difference = 100 * (trained - base)
    draw = np.random.default_rng(0).integers(0, len(difference), (resamples, len(difference)))
    low, high = np.percentile(difference[draw].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def table(base: Mapping[str, Any], trained: Mapping[str, Any]) -> str:
    """Return the comparison as text."""
    n = base["val_n"]
    rows = [("", f"Avg@{n}", f"Pass@{n}", f"Maj@{n}", "in \\boxed{}", "cut off", "tokens")]
    for name, result in (("base", base), ("trained", trained)):
        rows.append(
            (
                name,
                *(
                    f"{result[key]:.1f} %"
                    for key in ("average_at_n_pct", "pass_at_n_pct", "majority_vote_at_n_pct")
                ),
                f"{result['format_rate']:.1f} %",
                f"{100 * result['truncation_share']:.1f} %",
                f"{result['mean_completion_tokens']:.0f}",
            )
        )
    lines = ["".join(f"{cell:>12}" for cell in row) for row in rows]
    low, high = difference_interval(shares(base), shares(trained))
    gain = trained["average_at_n_pct"] - base["average_at_n_pct"]
    return "\n".join(
        [
            "",
            f"Held-out problems of {base['dataset']}: {base['num_problems']} problems x {n} samples each, "
            f"temperature {base['temperature']:g}, top_p {base['top_p']:g}",
            "",
            *lines,
            "",
            f"Right answers: {base['average_at_n_pct']:.1f} % -> {trained['average_at_n_pct']:.1f} %, "
            f"{gain:+.1f} points (95 % interval over problems {low:+.1f} to {high:+.1f})",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Print the comparison. UsageError where the files are of different benchmarks or sampling."""
    from opsd.errors import UsageError
    from opsd.evaluation.results import load_result, regime_differences

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[2])
    parser.add_argument("base", type=Path)
    parser.add_argument("trained", type=Path)
    arguments = parser.parse_args(argv)
    base, trained = load_result(arguments.base), load_result(arguments.trained)
    different = regime_differences(base, trained, ignore=OF_THE_MODEL)
    if different:
        raise UsageError(f"the two files cannot be compared: {'; '.join(different)}")
    print(table(base, trained))
    return 0


def _run() -> int:
    sys.path.insert(0, str(ROOT))
    from opsd.errors import run_cli

    return run_cli(main)


if __name__ == "__main__":
    raise SystemExit(_run())
