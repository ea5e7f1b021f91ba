"""The result file of one evaluation: per-sample records first, aggregates as functions of them.

The keys are those of the authors' files (docs/evaluation.md lists them), so that files of earlier runs can be
read, graded again and put into one table with new ones. A file is written whole or not at all.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from opsd.errors import ArtefactError, UsageError
from opsd.files import atomic_write_text
from opsd.grading import NO_ANSWER, ProblemGrade

# What must be equal for two results to be the same run. Fields that a file of an earlier run lacks are not
# compared (see `regime_differences`).
REGIME_FIELDS = (
    "base_model",
    "model_identity",
    "dataset",
    "dataset_fingerprint",
    "prompt_style",
    "enable_thinking",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "max_new_tokens",
    "val_n",
    "seed",
    "num_problems",
)
# Fields of a regime that every result has, those of earlier runs included (`seed` may be null or absent).
REQUIRED_FIELDS = (
    "base_model",
    "dataset",
    "temperature",
    "top_p",
    "max_new_tokens",
    "val_n",
    "num_problems",
    "results",
)
GROUND_TRUTH_KEYS = ("ground_truth", "answer", "gt_answer")
# 500 problems x 12 samples x 38,912 tokens are below 1 GB of text.
MAX_RESULT_BYTES = 4 * 2**30
LENGTH_TAG = "38k"
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


# -- building ------------------------------------------------------------------------------------------------


def problem_record(
    *,
    problem_id: int | str,
    problem: str,
    ground_truth: str,
    texts: Sequence[str],
    predicted: Sequence[str | None],
    truncated: Sequence[bool],
    grade: ProblemGrade,
) -> dict[str, Any]:
    """One entry of `results`.

    Args:
        texts: the full generation of each sample, in order of sampling.
        predicted: its answer, None when it is unformatted.
        truncated: whether it was cut at max_new_tokens.
        grade: verdicts and vote of the same samples.
    """
    generations = [
        {
            "predicted_answer": NO_ANSWER if answer is None else answer,
            "full_generation": text,
            "correct": correct,
            "formatted": answer is not None,
            "truncated": cut,
        }
        for text, answer, cut, correct in zip(texts, predicted, truncated, grade.correct, strict=True)
    ]
    return {
        "problem_id": problem_id,
        "problem": problem,
        "ground_truth": ground_truth,
        "val_n": len(generations),
        "generations": generations,
        "num_correct": grade.num_correct,
        "pass_at_n": grade.passed,
        "majority_vote_correct": grade.majority_correct,
    }


def aggregate(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The top-level figures of `results`.

    `pass_at_n`, `average_at_n`, `majority_vote_at_n`, `format_rate` and `truncation_share` are shares in
    [0, 1]; the `_pct` keys are the same in percent. Avg@n is the share of correct samples, Pass@n the share
    of problems with one, Maj@n the share of problems whose vote is correct.
    """
    generations = [generation for record in results for generation in record["generations"]]
    problems, samples = len(results), len(generations)

    def share(count: int, total: int) -> float:
        return count / total if total else 0.0

    passed = share(sum(bool(record["pass_at_n"]) for record in results), problems)
    average = share(sum(bool(generation["correct"]) for generation in generations), samples)
    majority = share(sum(bool(record["majority_vote_correct"]) for record in results), problems)
    formatted = sum(predicted_answer(generation) is not None for generation in generations)
    return {
        "num_problems": problems,
        "total_solutions": samples,
        "pass_at_n": passed,
        "pass_at_n_pct": 100 * passed,
        "average_at_n": average,
        "average_at_n_pct": 100 * average,
        "majority_vote_at_n": majority,
        "majority_vote_at_n_pct": 100 * majority,
        "formatted_count": formatted,
        "format_rate": share(formatted, samples),
        "truncation_share": share(sum(bool(g.get("truncated")) for g in generations), samples),
    }


def build_result(
    *, regime: Mapping[str, Any], results: Sequence[Mapping[str, Any]], **extra: Any
) -> dict[str, Any]:
    """The whole result: regime, aggregates, then `extra` (versions, engine, grading, identity), then records.

    Args:
        regime: a value for every field of REGIME_FIELDS but num_problems, which is counted.
        results: entries from `problem_record`.
        extra: further top-level keys; they may not hide a key of the schema.

    Raises:
        ValueError: a field of the regime is missing or unknown, or an extra key hides one of the schema.
    """
    expected = set(REGIME_FIELDS) - {"num_problems"}
    if set(regime) - {"num_problems"} != expected:
        raise ValueError(f"regime has {sorted(regime)}, needs {sorted(expected)}")
    figures = aggregate(results)
    head = {name: regime[name] for name in REGIME_FIELDS if name in expected} | figures
    if hidden := sorted({*head, "results", "date"} & set(extra)):
        raise ValueError(f"extra keys hide the schema's: {hidden}")
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {**head, "date": date, **extra, "results": list(results)}


def write_result(path: Path | str, result: Mapping[str, Any]) -> None:
    """Write `result` whole. NaN and infinities raise ValueError."""
    text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
    if not _encodable(text):
        # A lone surrogate has no UTF-8 form; as an escape it survives.
        text = json.dumps(result, indent=2, ensure_ascii=True, allow_nan=False)
    atomic_write_text(path, text + "\n")


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# -- reading -------------------------------------------------------------------------------------------------


def load_result(path: Path | str) -> dict[str, Any]:
    """Read and check a result file of this project or of the authors' release.

    Raises:
        ArtefactError: it is missing, over MAX_RESULT_BYTES, torn, not strict JSON, or not a result file.
    """
    path = Path(path)
    result = _strict_json(path)
    if not isinstance(result, dict):
        raise ArtefactError(f"{path} is not a result file: its top level is not an object")
    if missing := [name for name in REQUIRED_FIELDS if name not in result]:
        raise ArtefactError(f"{path} is not a result file: it lacks {', '.join(missing)}")
    records = result["results"]
    if not isinstance(records, list) or len(records) != result["num_problems"]:
        raise ArtefactError(
            f"{path} is damaged: num_problems is {result['num_problems']!r}, but `results` holds "
            f"{len(records) if isinstance(records, list) else type(records).__name__}"
        )
    for index, record in enumerate(records):
        if problem := _fault(record):
            raise ArtefactError(f"{path} is damaged: entry {index} of `results` {problem}")
    return result


def _strict_json(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON value")

    try:
        size = path.stat().st_size
        if size > MAX_RESULT_BYTES:
            raise ArtefactError(
                f"{path} has {size:,} bytes; result files are read up to {MAX_RESULT_BYTES:,}"
            )
        return json.loads(path.read_bytes(), parse_constant=refuse)
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is damaged: {error}; move it away and evaluate again") from error


def _fault(record: Any) -> str | None:
    """What is wrong with one entry of `results`, if anything."""
    if not isinstance(record, dict) or not isinstance(record.get("generations"), list):
        return "has no list of generations"
    try:
        ground_truth(record)
    except KeyError:
        return f"has no answer as text under {', '.join(GROUND_TRUTH_KEYS)}"
    for generation in record["generations"]:
        if not isinstance(generation, dict) or not isinstance(
            generation.get("predicted_answer"), (str, type(None))
        ):
            return "has a generation without a predicted answer as text"
        if not isinstance(generation.get("correct"), bool):
            return "has a generation whose `correct` is not true or false"
    return None


def ground_truth(record: Mapping[str, Any]) -> str:
    """The gold answer of one entry of `results`, under whichever of GROUND_TRUTH_KEYS it stands."""
    for key in GROUND_TRUTH_KEYS:
        value = record.get(key)
        if isinstance(value, str):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
    raise KeyError("ground_truth")


def predicted_answer(generation: Mapping[str, Any]) -> str | None:
    """The answer of one sample, None when it is unformatted; `formatted` may be missing."""
    answer = generation.get("predicted_answer")
    if generation.get("formatted") is False or answer is None or answer == NO_ANSWER or not answer.strip():
        return None
    return answer


# -- names and regimes ---------------------------------------------------------------------------------------


def result_path(
    method_name: str, dataset: str, seed: int | None = None, *, folder: Path | str = "eval_results"
) -> Path:
    """Where the result of one cell lies: `<method_name>[_<dataset>]_38k[_seed<N>].json`.

    math500 does not stand in the name. Raises UsageError for a name that is not a plain file name.
    """
    for name in (method_name, dataset):
        if not _RUN_NAME.fullmatch(name):
            raise UsageError(f"{name!r} cannot be part of a file name; use letters, digits, '.', '_' and '-'")
    if seed is not None and seed < 0:
        raise UsageError(f"the seed must be at least 0, not {seed}")
    middle = "" if dataset == "math500" else f"_{dataset}"
    suffix = "" if seed is None else f"_seed{seed}"
    return Path(folder) / f"{method_name}{middle}_{LENGTH_TAG}{suffix}.json"


def method_name_of(path: Path | str, dataset: str) -> str | None:
    """The `<method_name>` in the name of a result file of `dataset`; None when the name has another form."""
    match = re.fullmatch(rf"(.+)_{LENGTH_TAG}(?:_seed\d+)?\.json", Path(path).name)
    if match is None:
        return None
    return match[1] if dataset == "math500" else match[1].removesuffix(f"_{dataset}")


def regime_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of REGIME_FIELDS that `result` states."""
    return {name: result[name] for name in REGIME_FIELDS if name in result}


def regime_differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], *, ignore: Sequence[str] = ()
) -> list[str]:
    """A line `field: ours != theirs` for every regime field that differs.

    Both may be whole results or regimes. A field that only one of them states is passed over, because files
    of earlier runs lack some; but a seed that is absent is no seed. Numbers are compared as numbers; -1 and 0
    both mean that top_k is off.
    """
    differences = []
    for name in REGIME_FIELDS:
        if name in ignore or (name != "seed" and (name not in ours or name not in theirs)):
            continue
        a, b = ours.get(name), theirs.get(name)
        if _canonical(name, a) != _canonical(name, b):
            differences.append(f"{name}: {a!r} != {b!r}")
    return differences


def _canonical(name: str, value: Any) -> Any:
    if name == "top_k" and value in (-1, None):
        return 0
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return value


def set_aside(path: Path | str) -> Path:
    """Rename `path` to a free name `<stem>.aside-<N>.json.old` beside it and return that name."""
    path = Path(path)
    for number in range(1, 10_000):
        target = path.with_name(f"{path.stem}.aside-{number}{path.suffix}.old")
        try:
            # A hard link fails where the name is taken, so that two processes never choose the same.
            os.link(path, target)
        except FileExistsError:
            continue
        path.unlink()
        return target
    raise ArtefactError(f"{path.parent} holds 9,999 files set aside for {path.name}; move some of them away")
