"""Alter one formula at a time and see the tests of the objectives fail.

    python tests/programs/mutate_objectives.py [--only NAME ...] [--list]

Each mutant is a copy of opsd/, tests/ and bench/ in a temporary folder with one change in opsd/objectives.py
or opsd/token_stats.py; tests/test_objectives.py and tests/test_token_stats.py run there until the first
failure. A mutant whose tests still pass has survived: the tests do not hold that formula. Prints a Markdown
table; exit code 1 when a mutant survives, does not apply any more, or its tests end for another reason than
a failed one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# Imported once, here: every mutant's tests run in a fork that has them already.
import hypothesis  # noqa: F401
import numpy  # noqa: F401
import pytest
import torch  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("opsd", "tests", "bench", "pyproject.toml")
TESTS = ("tests/test_objectives.py", "tests/test_token_stats.py")
OBJECTIVES, STATS = "opsd/objectives.py", "opsd/token_stats.py"


@dataclass(frozen=True)
class Mutant:
    """One altered formula: what is wrong in it, the file, the text in it and the replacement."""

    name: str
    path: str
    old: str
    new: str


# Name of a mutant: (text that occurs exactly once in the file, what replaces it).
IN_STATS = {
    "clip after the sum": (
        'values["clipped_divergence"] = entries.clamp_(max=clip).sum(-1)',
        'values["clipped_divergence"] = entries.sum(-1).clamp(max=clip)',
    ),
    "a clipped entry keeps its gradient": (
        "teacher_probs.addcmul_(teacher_probs, cut, value=-1.0)",
        "teacher_probs.addcmul_(teacher_probs, cut, value=-0.0)",
    ),
    "reverse instead of forward divergence": (
        "torch.sub(teacher_log, student_log, out=teacher_log)",
        "torch.sub(student_log, teacher_log, out=teacher_log)",
    ),
    "the teacher without temperature": (
        "space.log_softmax(teacher_logits.mul_(inverse_temperature)",
        "space.log_softmax(teacher_logits.mul_(1.0)",
    ),
    "no 1/T in the gradient": ("student_probs.mul_(inverse_temperature)", "student_probs.mul_(1.0)"),
    "top k not renormalised": (
        "top_log = torch.log_softmax(top_log, dim=-1)  # renormalised over the teacher's own top k",
        "top_log = top_log * 1.0",
    ),
    "one token fewer in the top k": (
        "_largest(teacher_log, config.top_k)",
        "_largest(teacher_log, config.top_k - 1)",
    ),
    "sampled log-probability pushed the wrong way": (
        'student_probs.scatter_add_(1, picked, slopes["student_logprob"].unsqueeze(1))',
        'student_probs.scatter_add_(1, picked, -slopes["student_logprob"].unsqueeze(1))',
    ),
}
IN_OBJECTIVES = {
    "weights start at w_min = 0": (
        "return hyper.position_w_min + (1.0 - hyper.position_w_min) * gate",
        "return (1.0 - hyper.position_w_min) * gate",
    ),
    "weights exceed 1": (
        "return hyper.position_w_min + (1.0 - hyper.position_w_min) * gate",
        "return hyper.position_w_min + gate",
    ),
    "tau with the wrong sign": (
        "- hyper.position_tau) / hyper.position_s",
        "+ hyper.position_tau) / hyper.position_s",
    ),
    "s multiplies": ("- hyper.position_tau) / hyper.position_s", "- hyper.position_tau) * hyper.position_s"),
    "f_t = i / L without the half": ("(index.double() - 0.5)", "index.double()"),
    "pwopsd as a mean over all tokens": (
        "    if not hyper.position_global_reduction:\n        weighted",
        "    if False:\n        weighted",
    ),
    "sequences without a token counted": ("(lengths > 0).sum()", "(lengths >= 0).sum()"),
    "global reduction ignored in the count": (
        "return lengths.sum() if hyper.position_global_reduction else (lengths > 0).sum()",
        "return (lengths > 0).sum()",
    ),
    "token mean becomes a sum": (
        "return Reduction(batch.stats.term.sum(), _count_tokens(batch.lengths, hyper))",
        "return Reduction(batch.stats.term.sum(), _count_tokens(batch.lengths, hyper) * 0)",
    ),
    "advantage with the wrong sign": (
        "advantage = (stats.teacher_logprob - stats.student_logprob).detach()",
        "advantage = (stats.student_logprob - stats.teacher_logprob).detach()",
    ),
    "gradient through the advantage": (
        "advantage = (stats.teacher_logprob - stats.student_logprob).detach()",
        "advantage = stats.teacher_logprob - stats.student_logprob",
    ),
    "gate below the entropy threshold": (
        "gate = (stats.teacher_entropy > hyper.eopd_entropy_threshold)",
        "gate = (stats.teacher_entropy < hyper.eopd_entropy_threshold)",
    ),
    "gate on the student's entropy": (
        "gate = (stats.teacher_entropy > hyper.eopd_entropy_threshold)",
        "gate = (stats.student_entropy > hyper.eopd_entropy_threshold)",
    ),
    "floor log(λ / (1 − λ))": (
        "return math.log(self.reopold_lambda) / (1.0 - self.reopold_lambda)",
        "return math.log(self.reopold_lambda / (1.0 - self.reopold_lambda))",
    ),
    "reward not raised to the floor": (".detach().clamp(min=hyper.reward_floor)", ".detach()"),
    "the β-quantile instead of the (1 − β)-quantile": (
        "place = (1.0 - hyper.reopold_beta) * (ordered.numel() - 1)",
        "place = hyper.reopold_beta * (ordered.numel() - 1)",
    ),
    "quantile without interpolation": (
        "return ordered[low].lerp(ordered[high], place - low)",
        "return ordered[low]",
    ),
    "refinement begins one step late": (
        "    if batch.step < hyper.reopold_t_switch:\n        return",
        "    if batch.step <= hyper.reopold_t_switch:\n        return",
    ),
    "refinement keeps the certain tokens": (
        "return stats.student_entropy >= entropy_threshold(",
        "return stats.student_entropy <= entropy_threshold(",
    ),
    "reopold divides by all tokens": (
        "return Reduction(stats.term.where(keep, 0.0).sum(), keep.sum(), metrics)",
        "return Reduction(stats.term.where(keep, 0.0).sum(), keep.sum() * 0 + keep.numel(), metrics)",
    ),
    "no protection from a count of 0": (
        "divisor.to(self.total.device).clamp(min=1)",
        "divisor.to(self.total.device)",
    ),
}
MUTANTS = tuple(
    Mutant(name, path, old, new)
    for path, mutants in ((STATS, IN_STATS), (OBJECTIVES, IN_OBJECTIVES))
    for name, (old, new) in mutants.items()
)


def apply(mutant: Mutant, folder: Path) -> str | None:
    """Write the mutant into a copy of the package; returns why it cannot be, or None."""
    path = folder / mutant.path
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        return f"its text occurs {text.count(mutant.old)} times in {mutant.path}"
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    return None


def copy_package(folder: Path) -> None:
    """What the two test files need, without caches."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)


def run_tests(folder: Path) -> tuple[int, str]:
    """pytest's exit code and the first failing test.

    The tests run in a fork of this process, which has imported everything heavy but nothing of the package.
    """
    log = folder / "pytest.log"
    child = os.fork()
    if child == 0:
        with open(log, "w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            os.chdir(folder)
            sys.path.insert(0, str(folder))
            code = pytest.main(["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *TESTS])
            sys.stdout.flush()
        os._exit(int(code))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    output = log.read_text(encoding="utf-8")
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return code, failed[0].split(" ")[1].split("::")[-1] if failed else output.strip()[-200:]


def verdict(mutant: Mutant | None) -> tuple[bool, str]:
    """(as it should be, what happened). Without a mutant the tests have to pass."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        copy_package(folder)
        reason = apply(mutant, folder) if mutant is not None else None
        if reason is not None:
            return False, f"does not apply: {reason}"
        code, first = run_tests(folder)
    if mutant is None:
        return code == 0, "pass" if code == 0 else f"fail without any change: {first}"
    if code == 1:
        return True, f"killed by `{first}`"
    return False, "SURVIVED" if code == 0 else f"pytest ended with code {code}: {first}"


def main() -> int:
    """Run the mutants; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants, by name")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(mutant.name for mutant in MUTANTS))
        return 0
    names = [mutant.name for mutant in MUTANTS]
    unknown = sorted(set(arguments.only or ()) - set(names))
    if unknown:
        parser.error(f"no mutant {', '.join(unknown)}; --list shows them")
    chosen = [mutant for mutant in MUTANTS if not arguments.only or mutant.name in arguments.only]
    # Neither this script's folder nor the checkout's may stand in for the copy.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "tests")]
    sys.dont_write_bytecode = True
    started = time.monotonic()
    print("| mutant | file | tests |\n| --- | --- | --- |", flush=True)
    right, word = verdict(None)
    print(f"| (none) | | {word} |", flush=True)
    killed = 0
    for mutant in chosen:
        fine, word = verdict(mutant)
        killed += fine
        print(f"| {mutant.name} | {Path(mutant.path).name} | {word} |", flush=True)
    print(f"\n{killed} of {len(chosen)} mutants killed in {time.monotonic() - started:.0f} s")
    return 0 if right and killed == len(chosen) else 1


if __name__ == "__main__":
    raise SystemExit(main())
