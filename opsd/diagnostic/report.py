"""Write the diagnostic's report in Markdown; its sentences are derived from the analysis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from opsd.diagnostic.schedule import SHOWN_AT
from opsd.errors import printable

if TYPE_CHECKING:
    from opsd.diagnostic.analysis import Analysis, Row, Subset
    from opsd.diagnostic.config import BranchConfig
    from opsd.diagnostic.schedule import ScheduleFit


def report(analysis: Analysis, config: BranchConfig, facts: dict[str, Any]) -> str:
    """Return the whole report.

    Args:
        facts: `student`, `teacher`, `dataset`, `command`, `versions`: what was measured, with what.
    """
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    parts = [
        "# Branch viability\n",
        _setting(analysis, config, facts),
        "![viability along the spine](viability_vs_position.png)\n",
        _reading(analysis.subsets[0]),
        _definitions(config),
        *(_subset(subset) for subset in analysis.subsets),
        _curve(analysis),
        _ranks(analysis),
        *([_schedules(analysis)] if config.suggest_schedule else ()),
        f"## Made with\n\n```\n{printable(facts['command'])}\n```\n\n{_cell(versions)}\n",
    ]
    return "\n".join(parts)


def _cell(text: object) -> str:
    return printable(text, 300).replace("|", "\\|").replace("`", "'")


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def _setting(analysis: Analysis, config: BranchConfig, facts: dict[str, Any]) -> str:
    everything = analysis.subsets[0]
    return (
        f"Student: `{_cell(facts['student'])}`. Teacher: `{_cell(facts['teacher'])}`, which also sees the "
        f"reference solution. Data: `{_cell(facts['dataset'])}`.\n\n"
        f"{everything.problems} problems, one spine each (temperature {config.rollout_temperature:g}, top_p "
        f"{config.rollout_top_p:g}, top_k {config.rollout_top_k}, at most {config.max_new_tokens} tokens; "
        f"{analysis.spine_success:.0%} of the spines end right); {config.num_positions} forks a spine, the "
        f"teacher's top {config.top_k} tokens at each: {everything.branches} branches, "
        f"{config.continuations} continuations of each and of each fork's control. "
        f"{analysis.truncated:.1%} of the forced continuations were cut at the limit. Entropies, "
        f"probabilities and KL at temperature {config.score_temperature:g}.\n"
    )


def _verdict(row: Row, which: str) -> str:
    estimate = getattr(row, which)
    if estimate.value is None or estimate.low is None:
        return "cannot be told"
    if estimate.low > 0.5:
        return "predicts it"
    return "predicts the opposite" if estimate.high < 0.5 else "is not told apart from chance"


def _reading(subset: Subset) -> str:
    position = subset.rows[0]
    lines = [
        "## What it says\n",
        f"- Relative position {_verdict(position, 'absolute')}: AUROC for absolute viability "
        f"{position.absolute.text()} (the paper on Qwen3-4B: 0.83 [0.66, 0.95]).",
        f"- Against the unforced control, relative position {_verdict(position, 'relative')}: AUROC for "
        f"relative viability {position.relative.text()}.",
    ]
    for which in ("absolute", "relative"):
        known = [row for row in subset.rows if getattr(row, which).value is not None]
        if known:
            best = max(known, key=lambda row: abs(getattr(row, which).value - 0.5))
            lines.append(
                f"- Farthest from chance for {which} viability: {best.predictor.label}, "
                f"{getattr(best, which).text()} (the largest of {len(known)}, so partly by selection)."
            )
    return "\n".join(lines) + "\n"


def _definitions(config: BranchConfig) -> str:
    return (
        "## Definitions\n\n"
        f"A branch is **viable** if at least {config.viable_share:.0%} of its {config.continuations} "
        "continuations recover the reference answer. **Relative viability** compares it with its control, as "
        "many continuations of the same prefix with nothing forced: positive if it succeeds more often, "
        "negative if less often; ties are left out, since near the end of a spine both succeed always and "
        "that says nothing about the forced token. *Graded* is the probability that, of two branches, the "
        "one with the larger difference to its control has the larger predictor; it uses every branch. All "
        "three are 0.5 for a predictor of nothing. The direction in which each predictor is read (+ a "
        "higher value, − a lower value speaks for viability) was fixed beforehand; below 0.5 the opposite "
        "holds. Brackets: 95 % percentile intervals over "
        f"{config.resamples} resamples of the problems. Shares of {config.continuations} continuations are "
        "noisy, which pulls the relative AUROCs towards 0.5.\n"
    )


def _subset(subset: Subset) -> str:
    head = f"## AUROC: {subset.name}\n\n"
    if not subset.branches:
        return f"{head}No branches.\n"
    summary = (
        f"{subset.branches} branches of {subset.problems} problems, {subset.viable:.0%} viable, "
        f"{subset.ties:.0%} tied with their control.\n\n"
    )
    header = ("predictor", "read as", "absolute viability", "relative viability", "relative, graded")
    rows = [
        (
            row.predictor.label,
            "+" if row.predictor.higher_is_viable else "−",
            *(estimate.text() for estimate in (row.absolute, row.relative, row.graded)),
        )
        for row in subset.rows
    ]
    return head + summary + _table(header, rows)


def _curve(analysis: Analysis) -> str:
    header = ("relative position", "branches", "forced: share that recovers", "control", "difference")
    return "## Along the spine\n\n" + _table(
        header,
        [
            (
                f"{p.low:.1f} to {p.high:.1f}",
                p.branches,
                p.success.text(),
                p.control.text(),
                p.difference.text(),
            )
            for p in analysis.curve
        ],
    )


def _ranks(analysis: Analysis) -> str:
    header = (
        "rank",
        "branches",
        "mean teacher probability",
        "share that recovers",
        "difference to the control",
    )
    return "## By the teacher's rank\n\n" + _table(
        header,
        [
            (rank, count, f"{probability:.3f}", success.text(), difference.text())
            for rank, count, probability, success, difference in analysis.by_rank
        ],
    )


def _schedules(analysis: Analysis) -> str:
    fits = {name: fit for name, fit in analysis.schedules.items() if fit is not None}
    header = ("fitted to", "w_min", "τ", "s", "variance explained", *(f"w({f:g})" for f in SHOWN_AT))
    rows = [
        (
            f"{name} viability",
            *(parameter.text() for parameter in (fit.w_min, fit.tau, fit.s)),
            f"{fit.explained:.0%}",
            *(weight.text() for weight in fit.weights),
        )
        for name, fit in fits.items()
    ]
    verdicts = [
        _schedule_verdict(name, fits[name])
        if name in fits
        else f"- **{name}**: nothing to fit (no success, or forks in fewer than four bins)."
        for name in analysis.schedules
    ]
    return (
        "## A schedule from these curves\n\n"
        "w(f) = w_min + (1 − w_min)·σ((f − τ)/s), fitted by weighted least squares to the success of the "
        "branches in bins of f (absolute), or to that success as a share of the control's (relative). A "
        "branch counts with the teacher's probability of its token; the curve's scale is free.\n\n"
        f"{_table(header, rows)}\n" + "\n".join(verdicts) + "\n"
    )


def _schedule_verdict(name: str, fit: ScheduleFit) -> str:
    open_questions = fit.undetermined()
    if not open_questions:
        return (
            f"- **{name}**: determined by these data. `--position_w_min {fit.w_min.value:.2f} "
            f"--position_tau {fit.tau.value:.2f} --position_s {fit.s.value:.2f}`"
        )
    return (
        f"- **{name}**: these {fit.problems} problems do not determine the schedule. Open: "
        f"{'; '.join(open_questions)}. The fitted curve explains {fit.explained:.0%} of the variance between "
        "bins; take it for no recommendation."
    )
