"""Run a diagnostic: check, sample, grade, analyse, write."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from opsd.diagnostic.analysis import Analysis, analyse, branch_table
from opsd.diagnostic.config import BranchConfig
from opsd.diagnostic.model import ModelBackend
from opsd.diagnostic.plot import draw
from opsd.diagnostic.report import report
from opsd.diagnostic.sampling import Plan, Sampler, grade_branches
from opsd.diagnostic.spines import load_problems
from opsd.errors import UsageError
from opsd.evaluation.config import EvalConfig
from opsd.evaluation.grading import Grader
from opsd.evaluation.journal import Journal
from opsd.evaluation.model import check_model
from opsd.files import atomic_write_bytes, atomic_write_text
from opsd.models import load_config, load_tokenizer
from opsd.run_identity import MAY_CHANGE, dataset_fingerprint

logger = logging.getLogger(__name__)


def diagnose(config: BranchConfig, *, command: Sequence[str] = ()) -> Analysis:
    """Run the diagnostic and write its files. A killed run is resumed; a finished one is analysed again.

    Raises:
        UsageError: prompts do not fit the model, or the journal is another run's.
        ArtefactError: model, adapter, data or journal is missing or damaged.
    """
    load = {"revision": config.model_revision, "trust_remote_code": config.trust_remote_code}
    model_config = load_config(config.model_name_or_path, **load)
    tokenizer = load_tokenizer(config.model_name_or_path, **load)
    problems = load_problems(config.dataset, tokenizer, num_problems=config.num_problems)
    # A fork near a spine's end leaves a continuation all of its limit: student prompt + spine + continuation.
    longest = max(len(p.student_ids) + 2 * config.max_new_tokens for p in problems)
    scored = max(len(p.teacher_ids) + config.max_new_tokens for p in problems)
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and max(longest, scored) > positions:
        raise UsageError(
            f"the longest prompt with a spine and a continuation of --max_new_tokens {config.max_new_tokens} "
            f"takes {max(longest, scored)} tokens, but {config.model_name_or_path!r} has {positions} "
            "positions; lower --max_new_tokens"
        )
    # Student and teacher by content: hashes of their files.
    checked = {"base_model": config.model_name_or_path, "adapter": config.adapter, **load}
    model = check_model(EvalConfig(dataset="", output="", **checked))
    columns = ("problem", "answer", "teacher")
    data = ({"problem": p.problem, "answer": p.answer, "teacher": p.teacher_ids} for p in problems)
    regime = {
        "model": model.identity,
        "adapter": model.adapter_identity,
        "data": dataset_fingerprint(data, columns=columns),
        **{name: v for name, v in asdict(config).items() if name not in MAY_CHANGE["diagnostic"]},
    }
    make_backend = partial(ModelBackend, config, tokenizer, longest=longest)
    return carry_out(Plan(config, problems, tokenizer, regime), make_backend, command)


def carry_out(plan: Plan, make_backend: Callable[[], ModelBackend], command: Sequence[str] = ()) -> Analysis:
    """Sample what the journal lacks, grade, analyse and write branches, picture and report."""
    config, folder = plan.config, Path(plan.config.output_dir)
    with Journal(folder / "journal.jsonl", plan.regime) as journal:
        if journal.dropped_bytes:
            logger.warning("dropped the torn last line of %s (%d bytes)", journal.path, journal.dropped_bytes)
        backend = make_backend()
        try:
            branches = Sampler(plan, journal, backend).run()
        finally:
            backend.close()
        with Grader(workers=config.grading_workers) as grader:
            verdicts = grade_branches(branches, plan.problems, grader)
        table = branch_table(branches, plan.problems, verdicts, plan.tokenizer, config)
        analysis = analyse(table, config)
        atomic_write_text(folder / "branches.csv", table.to_csv(index=False))
        atomic_write_bytes(folder / "branches.parquet", table.to_parquet(index=False))
        draw(analysis, folder / "viability_vs_position.png", top_k=config.top_k)
        # The report is last: where it is, all is there.
        command = shlex.join(["python", "branch_viability.py", *command])
        atomic_write_text(folder / "report.md", report(analysis, config, command))
    return analysis
