"""Evaluate a model on a benchmark: prompts -> samples (journalled as they finish) -> grades -> result.

    result = evaluate(EvalConfig(base_model="Qwen/Qwen3-4B", dataset="aime25", output="results/x.json"))

The same call resumes a killed run from the journal beside the output, to the result of the uninterrupted run
(apart from `date` and `timing`), since every sample has its own seed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from opsd.errors import ArtefactError, UsageError
from opsd.evaluation.benchmarks import Problem, fingerprint, load_benchmark
from opsd.evaluation.config import EvalConfig, check_config, check_output
from opsd.evaluation.grading import Grader
from opsd.evaluation.journal import Journal, differences
from opsd.evaluation.model import ModelFacts, build_engine, check_model
from opsd.evaluation.results import REGIME_FIELDS, build_result, load_result, set_aside, write_result
from opsd.evaluation.scoreboard import Scoreboard
from opsd.files import remove_partials
from opsd.models import load_tokenizer
from opsd.prompts import (
    encode_evaluation,
    encode_student,
    encode_teacher,
    evaluation_message,
    student_message,
    teacher_message,
)
from opsd.rollout.engine import Completion, Request
from opsd.run_identity import versions
from opsd.seeds import evaluation_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is known before the first sample: problems, their prompts (token ids), model, regime, source."""

    config: EvalConfig
    problems: list[Problem]
    prompts: list[list[int]]
    tokenizer: PreTrainedTokenizerBase
    facts: ModelFacts
    regime: dict[str, Any]
    source: str


def evaluate(config: EvalConfig, *, replace: bool = False, show: bool = True) -> dict[str, Any]:
    """Run one evaluation, write its result and return it; a finished result of this run is returned as is.

    Args:
        replace: rename another run's result at `config.output` instead of raising.
        show: whether to draw a progress bar on stderr.

    Raises:
        UsageError: a setting is out of range, the prompts do not fit, or the output has the journal or
            (without `replace`) the result of another run.
        ArtefactError: model, adapter, benchmark or journal is missing or damaged; memory is exhausted. What
            was sampled so far stays in the journal.
    """
    check_config(config)
    check_output(config)
    plan = prepare(config)
    if (result := existing_result(plan, replace=replace)) is not None:
        # A kill between writing the result and deleting its journal leaves the journal behind. One of another
        # run, or in use, stays.
        with contextlib.suppress(UsageError, ArtefactError):
            if config.journal_path.exists():
                Journal(config.journal_path, plan.regime).remove()
        return result
    started = time.monotonic()
    with Journal(config.journal_path, plan.regime) as journal:
        # Whoever held the lock until now may have finished this very run.
        result = existing_result(plan, replace=replace)
        if result is None:
            if journal.dropped_bytes:
                logger.warning("dropped the torn last line of %s", journal.path)
            result = _sample_and_grade(plan, journal, show=show, started=started)
            remove_partials(Path(config.output))
            write_result(config.output, result)
        journal.remove()
    return result


def prepare(config: EvalConfig) -> Plan:
    """Check model and benchmark, encode the prompts, and check that prompt and completion fit.

    Raises:
        UsageError, ArtefactError: see `evaluate`.
    """
    benchmark = load_benchmark(config.dataset, dataset_path=config.dataset_path)
    problems = benchmark.problems[: config.num_samples]
    facts = check_model(config)
    tokenizer = load_tokenizer(
        config.base_model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    prompts = [_encode(tokenizer, problem, config, benchmark.source) for problem in problems]
    longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
    if len(prompts[longest]) + config.max_new_tokens > facts.max_model_len:
        raise UsageError(
            f"problem {problems[longest].problem_id} has a prompt of {len(prompts[longest])} tokens, with "
            f"--max_new_tokens {config.max_new_tokens} over the model length {facts.max_model_len}; lower "
            "--max_new_tokens or raise --max_model_len as far as the model allows"
        )
    adapter = "" if facts.adapter_identity is None else f"+adapter:{facts.adapter_identity}"
    dtype = "" if config.dtype == "auto" else f"+dtype:{config.dtype}"
    teacher = config.prompt == "teacher"
    styles = {"evaluation": evaluation_message("{problem}"), "student": student_message("{problem}")}
    styles["teacher"] = teacher_message("{problem}", "{solution}")
    values = {
        **vars(config),
        "model_identity": facts.identity + adapter + dtype,
        "dataset_fingerprint": fingerprint(benchmark.problems, solutions=teacher),
        "prompt_style": styles[config.prompt],
        "enable_thinking": config.enable_thinking and config.prompt != "student",
        "num_problems": len(problems),
    }
    regime = {name: values[name] for name in REGIME_FIELDS}
    return Plan(config, problems, prompts, tokenizer, facts, regime, benchmark.source)


def _encode(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, config: EvalConfig, source: str
) -> list[int]:
    """Return the tokens of the prompt that `config` asks for."""
    if config.prompt == "student":
        return encode_student(tokenizer, problem.problem)
    if config.prompt == "evaluation":
        return encode_evaluation(tokenizer, problem.problem, enable_thinking=config.enable_thinking)
    if problem.solution is None:
        raise ArtefactError(
            f"row {problem.problem_id} of {source} has no `solution`, which the teacher reads; give "
            "--dataset_path a file with that column, or leave --prompt out"
        )
    return encode_teacher(tokenizer, problem.problem, problem.solution)


def existing_result(plan: Plan, *, replace: bool) -> dict[str, Any] | None:
    """Return the finished result at the output if it is this very run's; None if there is none (any more).

    Raises:
        UsageError: another run's result (every differing field is named) or a damaged one is there and
            `replace` is off, or it has more problems than this run.
    """
    output, problems = Path(plan.config.output), 0
    if not output.exists():
        return None
    try:
        result = load_result(output)
        problems = result["num_problems"]
        found = {name: result[name] for name in REGIME_FIELDS if name in result}
        reason = "; ".join(differences(found, plan.regime))
        if not reason:
            return result
    except ArtefactError as error:
        reason = str(error)
    if not replace:
        raise UsageError(
            f"{output} is not this run's result ({reason}); choose another --output, move it away, or give "
            "--replace to have it renamed"
        )
    if problems > plan.regime["num_problems"]:
        raise UsageError(
            f"{output} has {problems} problems, which a run of {plan.regime['num_problems']} does not "
            "replace; choose another --output"
        )
    logger.warning("%s is not this run's result (%s); it is kept as %s", output, reason, set_aside(output))
    return None


def _sample_and_grade(plan: Plan, journal: Journal, *, show: bool, started: float) -> dict[str, Any]:
    config = plan.config
    engines = {record["engine"] for record in journal.records}
    if engines - {config.engine}:
        logger.warning("samples of engine %s are continued with %s", sorted(engines), config.engine)
    resumed = journal.records
    with (
        Grader(workers=config.grading_workers, time_limit_s=config.time_limit) as grader,
        Scoreboard(plan.problems, val_n=config.val_n, grader=grader, resumed=resumed, show=show) as board,
    ):
        if board.missing():
            engines.add(config.engine)
            _sample(plan, journal, board)
        journal.sync()
        results = board.finish()
    tokens = [generation["tokens"] for record in results for generation in record["generations"]]
    return build_result(
        regime=plan.regime,
        results=results,
        engine="+".join(sorted(engines)),
        max_model_len=plan.facts.max_model_len,
        mean_completion_tokens=sum(tokens) / len(tokens),
        dataset_source=plan.source,
        adapter=config.adapter,
        dtype=config.dtype,
        prompt=config.prompt,
        revision=config.revision,
        training_run=plan.facts.manifest,
        grading=grader.limits(),
        versions=versions(),
        timing={
            "seconds": round(time.monotonic() - started, 1),
            "resumed_samples": board.resumed,
            "host": os.uname().nodename,
        },
    )


def _sample(plan: Plan, journal: Journal, board: Scoreboard) -> None:
    """Draw every sample that `board` lacks; each goes into the journal as it finishes."""
    config, pending = plan.config, board.missing()
    requests = []
    for problem, number in pending:
        identifier = plan.problems[problem].problem_id
        seed = evaluation_seed(seed=config.seed, problem_id=identifier, sample=number)
        requests.append(Request(plan.prompts[problem], seed))

    def finish(index: int, completion: Completion) -> None:
        record = {
            "problem": pending[index][0],
            "sample": pending[index][1],
            "engine": config.engine,
            "tokens": len(completion.token_ids),
            "truncated": completion.truncated,
            "text": plan.tokenizer.decode(completion.token_ids, skip_special_tokens=True),
        }
        journal.append(record)
        board.add(record)

    try:
        engine = build_engine(config, plan.facts, plan.tokenizer)
        try:
            engine.generate(requests, config.sampling(), on_finish=finish)
        finally:
            engine.close()
    except BaseException:
        total = len(plan.problems) * config.val_n
        kept = f"{total - len(board.missing())} of {total} samples are finished and kept in {journal.path}"
        tqdm.write(f"{kept}; the same command resumes there", file=sys.stderr)
        raise
