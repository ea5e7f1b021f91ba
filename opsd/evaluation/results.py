"""The result file of one evaluation: per-sample records first, aggregates as functions of them.

Keys and units are those of the authors' files (docs/evaluation.md lists them), so that files of earlier runs
can be read, graded again and put into one table with new ones. `schema_version` is this project's addition:
the authors' files have none. A file is written completely or not at all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from opsd.errors import ArtefactError, printable
from opsd.evaluation.grading import NO_ANSWER, ProblemGrade
from opsd.evaluation.journal import differences
from opsd.files import atomic_write_text

# 2 has the authors' units. This project's first files state no version, hold shares under the same keys, and
# are the only ones without a version that hold FIRST_FILES_KEY.
SCHEMA_VERSION = 2
FIRST_FILES_KEY = "truncation_share"
# Types of the keys; files of earlier runs may lack those that may be null. The first table is the regime,
# which must be equal for two results to be the same run.
REGIME_FIELDS: dict[str, Any] = {
    "base_model": str,
    "model_identity": str | None,
    "dataset": str,
    "dataset_fingerprint": str | None,
    "prompt_style": str | None,
    "enable_thinking": bool | None,
    "temperature": int | float,
    "top_p": int | float,
    "top_k": int | float | None,
    "min_p": int | float | None,
    "presence_penalty": int | float | None,
    "max_new_tokens": int,
    "val_n": int,
    "seed": int | None,
    "num_problems": int,
}
FIELDS = REGIME_FIELDS | {
    "results": list,
    "schema_version": int | None,
    "grading": dict | None,
    "training_run": dict | None,
    "adapter": str | None,
    "dtype": str | None,
    "prompt": str | None,
    FIRST_FILES_KEY: int | float | None,
}
GROUND_TRUTH_KEYS = ("ground_truth", "answer", "gt_answer")


def problem_record(
    *,
    problem_id: int | str,
    problem: str,
    ground_truth: str,
    texts: Sequence[str],
    predicted: Sequence[str | None],
    truncated: Sequence[bool],
    grade: ProblemGrade,
    tokens: Sequence[int],
) -> dict[str, Any]:
    """Return one entry of `results`.

    Args:
        texts, predicted, truncated, tokens: of each sample, in order: the full generation, its answer (None
            when it is unformatted), whether it was cut at max_new_tokens, its length.
    """
    generations = [
        {
            "predicted_answer": NO_ANSWER if answer is None else answer,
            "full_generation": text,
            "correct": correct,
            "formatted": answer is not None,
            "truncated": cut,
            "tokens": length,
        }
        for text, answer, cut, length, correct in zip(
            texts, predicted, truncated, tokens, grade.correct, strict=True
        )
    ]
    return {
        "problem_id": problem_id,
        "problem": problem,
        "ground_truth": ground_truth,
        "val_n": len(generations),
        "generations": generations,
        "num_correct": grade.num_correct,
        "pass_at_n": any(grade.correct),
        "majority_vote_correct": grade.majority_correct,
    }


def aggregate(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the top-level figures of `results`.

    `pass_at_n` and `majority_vote_at_n` count problems, `average_at_n` and `formatted_count` samples; the
    `_pct` keys and `format_rate` are percent, `truncation_share` is a share in [0, 1].
    """
    generations = [generation for record in results for generation in record["generations"]]
    problems, samples = len(results), len(generations)
    passed = sum(any(g["correct"] for g in record["generations"]) for record in results)
    correct = sum(generation["correct"] for generation in generations)
    majority = sum(bool(record.get("majority_vote_correct")) for record in results)
    formatted = sum(predicted_answer(generation) is not None for generation in generations)
    return {
        "num_problems": problems,
        "total_solutions": samples,
        "pass_at_n": passed,
        "pass_at_n_pct": 100 * passed / max(problems, 1),
        "average_at_n": correct,
        "average_at_n_pct": 100 * correct / max(samples, 1),
        "majority_vote_at_n": majority,
        "majority_vote_at_n_pct": 100 * majority / max(problems, 1),
        "formatted_count": formatted,
        "format_rate": 100 * formatted / max(samples, 1),
        "truncation_share": sum(bool(g.get("truncated")) for g in generations) / max(samples, 1),
    }


def build_result(
    *, regime: Mapping[str, Any], results: Sequence[Mapping[str, Any]], **extra: Any
) -> dict[str, Any]:
    """Return the result of a `regime` (num_problems is counted) and entries from `problem_record`."""
    return {
        "schema_version": SCHEMA_VERSION,
        **{name: regime[name] for name in REGIME_FIELDS if name != "num_problems"},
        **aggregate(results),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **extra,
        "results": list(results),
    }


def write_result(path: Path | str, result: Mapping[str, Any]) -> None:
    """Write `result` completely or not at all. NaN and infinities raise ValueError."""
    text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        # A lone surrogate has no UTF-8 form; as an escape it survives.
        text = json.dumps(result, indent=2, allow_nan=False)
    atomic_write_text(path, text + "\n")


def load_result(path: Path | str) -> dict[str, Any]:
    """Read and check a result file of this project or of the authors' release.

    Counts and percentages have the units of `aggregate` whichever schema the file has.

    Raises:
        ArtefactError: it is missing, torn, not strict JSON, or not a result file.
    """
    path = Path(path)
    result = _strict_json(path)
    if not isinstance(result, dict):
        raise ArtefactError(f"{path} is not a result file: its top level is not an object")
    needed = [name for name, kind in FIELDS.items() if not isinstance(None, kind)]
    if missing := [name for name in needed if name not in result]:
        raise ArtefactError(f"{path} is not a result file: it lacks {', '.join(missing)}")
    if fault := _fault(result):
        raise ArtefactError(f"{path} is damaged: {fault}; move it away and evaluate again")
    if result.get("schema_version") is None and FIRST_FILES_KEY in result:
        _convert_shares(result)
    return result


def _strict_json(path: Path) -> Any:
    def refuse(text: str) -> NoReturn:
        raise ValueError(f"{printable(text, 40)} is not a JSON value")

    def finite(text: str) -> float:
        return float(text) if math.isfinite(float(text)) else refuse(text)

    try:
        return json.loads(path.read_bytes(), parse_constant=refuse, parse_float=finite)
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path} is damaged: {error}; move it away and evaluate again") from error


def _fault(result: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a result, if anything."""
    for name, kind in FIELDS.items():
        value = result.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind != bool | None):
            wanted = getattr(kind, "__name__", kind)
            return f"{name} is {printable(value, 60)!r}, but must be of type {wanted}"
    if (version := result.get("schema_version")) not in (None, SCHEMA_VERSION):
        return f"schema_version is {version}, but {SCHEMA_VERSION} is the newest that this checkout reads"
    killed = (result.get("grading") or {}).get("killed", 0)
    if not isinstance(killed, int):
        return f"grading.killed is {printable(killed, 60)!r}, but must be a count"
    records, val_n = result["results"], result["val_n"]
    if not records or len(records) != result["num_problems"]:
        return f"num_problems is {result['num_problems']}, but `results` holds {len(records)}"
    faults = (_record_fault(record, val_n) for record in records)
    return next((f"entry {index} of `results` {fault}" for index, fault in enumerate(faults) if fault), None)


def _record_fault(record: Any, val_n: int) -> str | None:
    """Return what is wrong with one entry of `results`, if anything."""
    if not isinstance(record, dict) or not isinstance(record.get("generations"), list):
        return "has no list of generations"
    if val_n < 1 or len(record["generations"]) != val_n:
        problem = printable(record.get("problem_id"), 60)
        return f"(problem {problem}) has {len(record['generations'])} of {val_n} generations"
    try:
        ground_truth(record)
    except KeyError:
        return f"has no answer as text or number under {', '.join(GROUND_TRUTH_KEYS)}"
    if not isinstance(record.get("majority_vote_correct"), bool | None):
        return "has a `majority_vote_correct` that is not true or false"
    for generation in record["generations"]:
        if not isinstance(generation, dict) or not isinstance(generation.get("predicted_answer"), str | None):
            return "has a generation without a predicted answer as text"
        if not isinstance(generation.get("correct"), bool):
            return "has a generation whose `correct` is not true or false"
    return None


def _convert_shares(result: dict[str, Any]) -> None:
    """Give one of this project's first files, in place, the units that `aggregate` has now."""
    counts = aggregate(result["results"])
    changed = ("pass_at_n", "average_at_n", "majority_vote_at_n", "format_rate")
    result.update({name: counts[name] for name in changed if name in result})
    before = result.get("majority_vote_before_recompute")
    if isinstance(before, dict) and isinstance(before.get("majority_vote_at_n"), (int, float)):
        before["majority_vote_at_n"] = round(before["majority_vote_at_n"] * len(result["results"]))
    result["schema_version"] = SCHEMA_VERSION


def ground_truth(record: Mapping[str, Any]) -> str:
    """Return the gold answer of one entry as text, `27.0` for the number 27.0; KeyError without one."""
    for key in GROUND_TRUTH_KEYS:
        value = record.get(key)
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return str(value)
    raise KeyError("ground_truth")


def predicted_answer(generation: Mapping[str, Any]) -> str | None:
    """Return the answer of one sample, None when it is unformatted; `formatted` may be missing."""
    answer = generation.get("predicted_answer")
    if generation.get("formatted") is False or answer is None or answer == NO_ANSWER or not answer.strip():
        return None
    return answer


def regime_differences(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], *, ignore: Sequence[str] = ()
) -> list[str]:
    """Return `differences` of two results or regimes, a phrase for every regime field that differs.

    A field that only one of them states is passed over, because files of earlier runs lack some; but a seed
    that is absent is no seed. -1 and 0 both mean that top_k is off.
    """
    stated = {name for name in REGIME_FIELDS if name in ours and name in theirs} | {"seed"}
    off = {"top_k": {-1: 0, None: 0}}
    one, other = (
        {
            name: off.get(name, {}).get(result.get(name), result.get(name))
            for name in stated.difference(ignore)
        }
        for result in (ours, theirs)
    )
    return differences(one, other)


def set_aside(path: Path | str) -> Path:
    """Rename `path` to `<stem>.aside-<UTC time>.json.old` beside it and return that name."""
    path = Path(path)
    target = path.with_name(f"{path.stem}.aside-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}{path.suffix}.old")
    return path.rename(target)
