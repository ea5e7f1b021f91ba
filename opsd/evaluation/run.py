"""Evaluate a model on a benchmark: prompts -> samples (journalled as they finish) -> grades -> result.

    result = evaluate(EvalConfig(base_model="Qwen/Qwen3-4B", dataset="aime25", output="results/x.json"))

A run that was killed is continued by calling it again: finished samples are taken from the journal beside the
output, and since every sample has its own seed, the result is the one that the uninterrupted run gives (apart
from `date` and `timing`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsd.errors import ArtefactError, UsageError
from opsd.evaluation.benchmarks import LoadedBenchmark, Problem, load_benchmark
from opsd.evaluation.config import EvalConfig, check_config
from opsd.evaluation.grading import Grader
from opsd.evaluation.journal import Journal
from opsd.evaluation.model import ModelFacts, build_engine, check_model
from opsd.evaluation.results import (
    REGIME_FIELDS,
    build_result,
    load_result,
    regime_differences,
    set_aside,
    write_result,
)
from opsd.evaluation.scoreboard import Scoreboard
from opsd.files import remove_partials
from opsd.models import load_tokenizer
from opsd.prompts import encode_evaluation, evaluation_message
from opsd.provenance import versions
from opsd.rollout.engine import Completion, Request
from opsd.seeds import evaluation_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """All that is settled before the first sample: problems, prompts (token ids) and the run's regime."""

    config: EvalConfig
    benchmark: LoadedBenchmark
    problems: list[Problem]
    prompts: list[list[int]]
    facts: ModelFacts
    regime: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase


def evaluate(config: EvalConfig, *, replace: bool = False, show: bool = True) -> dict[str, Any]:
    """Run one evaluation to its end and write its result; a finished result of this run is returned as is.

    Args:
        replace: set a result of another run that stands at `config.output` aside under a new name.
        show: whether to draw a progress bar on stderr.

    Returns:
        The result, as `opsd.evaluation.results.load_result` reads it back.

    Raises:
        UsageError: a setting is out of range, the prompts do not fit, another run's journal or (without
            `replace`) result stands at the output.
        ArtefactError: model, adapter, benchmark or journal is missing or damaged; memory is exhausted. What
            was sampled so far stays in the journal.
    """
    check_config(config)
    plan = prepare(config)
    output = Path(config.output)
    finished = existing_result(output, plan.regime, replace=replace)
    if finished is not None:
        _remove_useless_journal(config, plan.regime)
        return finished
    started = time.monotonic()
    with Journal(config.journal_path, plan.regime) as journal:
        # Whoever held the lock until now may have finished this very run.
        finished = existing_result(output, plan.regime, replace=replace)
        if finished is not None:
            journal.remove()
            return finished
        if journal.dropped_bytes:
            logger.warning("dropped the torn last line of %s (%d bytes)", journal.path, journal.dropped_bytes)
        result = _sample_and_grade(plan, journal, show=show, started=started)
        remove_partials(output)
        write_result(output, result)
        journal.remove()
    return result


def prepare(config: EvalConfig) -> Plan:
    """Check model and benchmark, render the prompts, and check that prompt and completion fit.

    Raises:
        UsageError, ArtefactError: see `evaluate`.
    """
    benchmark = load_benchmark(config.dataset, dataset_path=config.dataset_path)
    problems = benchmark.problems[: config.num_samples]
    facts = check_model(config)
    tokenizer = load_tokenizer(
        config.base_model, revision=config.revision, trust_remote_code=config.trust_remote_code
    )
    prompts = [
        encode_evaluation(tokenizer, problem.problem, enable_thinking=config.enable_thinking)
        for problem in problems
    ]
    longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
    needed = len(prompts[longest]) + config.max_new_tokens
    if needed > facts.max_model_len:
        raise UsageError(
            f"problem {problems[longest].problem_id} has a prompt of {len(prompts[longest])} tokens, with "
            f"--max_new_tokens {config.max_new_tokens} over the model length {facts.max_model_len}; lower "
            "--max_new_tokens or raise --max_model_len as far as the model allows"
        )
    regime = regime_of_run(config, benchmark, facts, num_problems=len(problems))
    return Plan(config, benchmark, problems, prompts, facts, regime, tokenizer)


def regime_of_run(
    config: EvalConfig, benchmark: LoadedBenchmark, facts: ModelFacts, *, num_problems: int
) -> dict[str, Any]:
    """A value for each of REGIME_FIELDS: what must be equal for two results to be the same run."""
    identity = facts.identity
    if facts.adapter_identity is not None:
        identity = f"{identity}+adapter:{facts.adapter_identity}"
    values = {
        **config.as_dict(),
        "model_identity": identity,
        "dataset_fingerprint": benchmark.fingerprint,
        "prompt_style": evaluation_message("{problem}"),
        "num_problems": num_problems,
    }
    return {name: values[name] for name in REGIME_FIELDS}


def existing_result(output: Path, regime: dict[str, Any], *, replace: bool) -> dict[str, Any] | None:
    """Return the finished result at `output` if it is this very run's; None if there is none (any more).

    Raises:
        UsageError: another run's result, or a damaged one, stands there and `replace` is off, or it has more
            problems than this run. Every differing field is named.
    """
    if not output.exists():
        return None
    problems = 0
    try:
        result = load_result(output)
        problems = result["num_problems"]
        different = [f"{name}: (absent) there" for name in REGIME_FIELDS if name not in result]
        different += regime_differences(regime, result)
    except ArtefactError as error:
        different = [str(error)]
    if not different:
        return result
    reason = "; ".join(different)
    if not replace:
        raise UsageError(
            f"{output} is not this run's result ({reason}); choose another --output, move it away, or give "
            "--replace to have it set aside under a new name"
        )
    if problems > regime["num_problems"]:
        raise UsageError(
            f"{output} has {problems} problems, which a run of {regime['num_problems']} does not replace; "
            "choose another --output"
        )
    logger.warning("%s is not this run's result (%s); it is kept as %s", output, reason, set_aside(output))
    return None


def _remove_useless_journal(config: EvalConfig, regime: dict[str, Any]) -> None:
    """A kill between writing the result and deleting its journal leaves a journal that nobody needs."""
    if config.journal_path.exists():
        # Another run's journal, or one in use, is not ours to delete.
        with contextlib.suppress(UsageError, ArtefactError), Journal(config.journal_path, regime) as journal:
            journal.remove()


def sample(
    plan: Plan, pending: Sequence[tuple[int, int]], on_sample: Callable[[dict[str, Any]], None]
) -> None:
    """Draw the `pending` (problem, sample) pairs; `on_sample` gets each journal record as it finishes."""
    config = plan.config
    requests = [
        Request(
            plan.prompts[problem],
            evaluation_seed(seed=config.seed, problem_id=plan.problems[problem].problem_id, sample=number),
        )
        for problem, number in pending
    ]

    def finish(index: int, completion: Completion) -> None:
        problem, number = pending[index]
        on_sample(
            {
                "problem": problem,
                "sample": number,
                "engine": config.engine,
                "tokens": len(completion.token_ids),
                "truncated": completion.truncated,
                "text": plan.tokenizer.decode(completion.token_ids, skip_special_tokens=True),
            }
        )

    engine = build_engine(config, plan.facts, plan.tokenizer)
    try:
        engine.generate(requests, config.sampling(), on_finish=finish)
    finally:
        engine.close()


def _sample_and_grade(plan: Plan, journal: Journal, *, show: bool, started: float) -> dict[str, Any]:
    config = plan.config
    grader = Grader(workers=config.grading_workers, time_limit_s=config.time_limit)
    with grader, Scoreboard(plan.problems, val_n=config.val_n, grader=grader, show=show) as board:
        engines = {record["engine"] for record in journal.records}
        resumed = sum(board.add(record, resumed=True) for record in journal.records)
        if engines - {config.engine}:
            logger.warning("samples of engine %s are continued with %s", sorted(engines), config.engine)
        pending = board.missing()

        def keep(record: dict[str, Any]) -> None:
            journal.append(record)
            board.add(record)

        if pending:
            engines.add(config.engine)
            try:
                sample(plan, pending, keep)
            except BaseException:
                total = len(plan.problems) * config.val_n
                board.write(
                    f"{total - len(board.missing())} of {total} samples are finished and kept in "
                    f"{journal.path}; the same command continues from there"
                )
                raise
        journal.sync()
        results = board.finish()
        extra = _facts_of_run(plan, grader, sorted(engines), results)
    timing = {
        "seconds": round(time.monotonic() - started, 1),
        "resumed_samples": resumed,
        "host": os.uname().nodename,
    }
    return build_result(regime=plan.regime, results=results, **extra, timing=timing)


def _facts_of_run(
    plan: Plan, grader: Grader, engines: list[str], results: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What the result records beside regime and figures; the same whether a run was interrupted or not."""
    tokens = [generation["tokens"] for record in results for generation in record["generations"]]
    return {
        "engine": "+".join(engines),
        "max_model_len": plan.facts.max_model_len,
        "mean_completion_tokens": sum(tokens) / len(tokens),
        "dataset_source": plan.benchmark.source,
        "adapter": plan.config.adapter,
        "revision": plan.config.revision,
        "training_run": plan.facts.manifest,
        "grading": grader.limits(),
        "versions": versions(),
    }
