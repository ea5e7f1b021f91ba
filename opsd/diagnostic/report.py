"""Write the diagnostic's report in Markdown; its sentences are derived from the analysis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opsd.diagnostic.analysis import PREDICTORS
from opsd.diagnostic.schedule import SHOWN_AT
from opsd.errors import printable
from opsd.report.markdown import markdown_table

if TYPE_CHECKING:
    from opsd.diagnostic.analysis import Analysis, Subset
    from opsd.diagnostic.config import BranchConfig
    from opsd.diagnostic.schedule import ScheduleFit
    from opsd.diagnostic.statistics import Estimate


def report(analysis: Analysis, config: BranchConfig, facts: dict[str, Any]) -> str:
    """Return the complete report.

    Args:
        facts: `student`, `teacher`, `dataset`, `command`, `versions`: what was measured, with what.
    """
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    figures = ("success", "control", "difference")
    curve = [
        (group.label, group.branches, *(getattr(group, name).text() for name in figures))
        for group in analysis.curve
    ]
    ranks = [
        (
            group.label,
            group.branches,
            f"{group.probability:.3f}",
            group.success.text(),
            group.difference.text(),
        )
        for group in analysis.by_rank
    ]
    along = ("relative position", "branches", "forced: share that recovers", "control", "difference")
    chosen = (
        "rank",
        "branches",
        "mean teacher probability",
        "share that recovers",
        "difference to the control",
    )
    parts = [
        "# Branch viability\n",
        _setting(analysis, config, facts),
        "![viability along the spine](viability_vs_position.png)\n",
        _reading(analysis.subsets[0]),
        _definitions(config),
        *(_subset(subset) for subset in analysis.subsets),
        f"## Along the spine\n\n{markdown_table(along, curve)}",
        f"## By the teacher's rank\n\n{markdown_table(chosen, ranks)}",
        *([_schedules(analysis)] if config.suggest_schedule else ()),
        f"## Made with\n\n```\n{printable(facts['command'])}\n```\n\n{_plain(versions)}\n",
    ]
    return "\n".join(parts)


def _plain(text: object) -> str:
    return printable(text, 300).replace("|", "\\|").replace("`", "'")


def _setting(analysis: Analysis, config: BranchConfig, facts: dict[str, Any]) -> str:
    everything = analysis.subsets[0]
    return (
        f"Student: `{_plain(facts['student'])}`. Teacher: `{_plain(facts['teacher'])}`, which also sees the "
        f"reference solution. Data: `{_plain(facts['dataset'])}`.\n\n"
        f"{everything.problems} problems, one spine each (temperature {config.rollout_temperature:g}, top_p "
        f"{config.rollout_top_p:g}, top_k {config.rollout_top_k}, at most {config.max_new_tokens} tokens; "
        f"{analysis.spine_success:.0%} of the spines end right); {config.num_positions} forks a spine, the "
        f"teacher's top {config.top_k} tokens at each: {everything.branches} branches, "
        f"{config.continuations} continuations of each and of each fork's control. "
        f"{analysis.truncated:.1%} of the forced continuations were cut at the limit. Entropies, "
        f"probabilities and KL at temperature {config.score_temperature:g}.\n"
    )


def _verdict(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None:
        return "cannot be told"
    if estimate.low > 0.5:
        return "predicts it"
    return "predicts the opposite" if estimate.high < 0.5 else "is not told apart from chance"


def _reading(subset: Subset) -> str:
    position = subset.rows[0]
    lines = [
        "## What it says\n",
        f"- Relative position {_verdict(position.absolute)}: AUROC for absolute viability "
        f"{position.absolute.text()} (the paper on Qwen3-4B: 0.83 [0.66, 0.95]).",
        f"- Against the unforced control, relative position {_verdict(position.relative)}: AUROC for "
        f"relative viability {position.relative.text()}.",
    ]
    for which in ("absolute", "relative"):
        found = {row.column: getattr(row, which) for row in subset.rows}
        known = {column: estimate for column, estimate in found.items() if estimate.value is not None}
        if known:
            column = max(known, key=lambda column: abs(known[column].value - 0.5))
            lines.append(
                f"- Farthest from chance for {which} viability: {PREDICTORS[column][0]}, "
                f"{known[column].text()} (the largest of {len(known)}, so partly by selection)."
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
    rows = []
    for row in subset.rows:
        label, higher_is_viable = PREDICTORS[row.column]
        estimates = (row.absolute, row.relative, row.graded)
        rows.append((label, "+" if higher_is_viable else "−", *(each.text() for each in estimates)))
    return head + summary + markdown_table(header, rows)


def _schedules(analysis: Analysis) -> str:
    header = ("fitted to", "w_min", "τ", "s", "variance explained", *(f"w({f:g})" for f in SHOWN_AT))
    rows, verdicts = [], []
    for name, fit in analysis.schedules.items():
        verdicts.append(f"- **{name}**: {_schedule_verdict(fit)}\n")
        if fit is not None:
            parameters = [each.text(unknown="–") for each in (fit.w_min, fit.tau, fit.s)]
            weights = [each.text(unknown="–") for each in fit.weights]
            rows.append((f"{name} viability", *parameters, f"{fit.explained:.0%}", *weights))
    return (
        "## A schedule from these curves\n\n"
        "w(f) = w_min + (1 − w_min)·σ((f − τ)/s), fitted by weighted least squares to the success of the "
        "branches in bins of f (absolute), or to that success as a share of the control's (relative). A "
        "branch counts with the teacher's probability of its token; the curve's scale is free.\n\n"
        f"{markdown_table(header, rows)}\n{''.join(verdicts)}"
    )


def _schedule_verdict(fit: ScheduleFit | None) -> str:
    if fit is None:
        return "nothing to fit (no success, or forks in fewer than four bins)."
    if not (open_questions := fit.undetermined()):
        return (
            f"determined by these data. `--position_w_min {fit.w_min.value:.2f} "
            f"--position_tau {fit.tau.value:.2f} --position_s {fit.s.value:.2f}`"
        )
    return (
        f"these {fit.problems} problems do not determine the schedule. Open: {'; '.join(open_questions)}. "
        f"The fitted curve explains {fit.explained:.0%} of the variance between bins; take it for no "
        "recommendation."
    )
