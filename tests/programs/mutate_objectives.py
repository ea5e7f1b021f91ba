"""Alter one formula at a time and see the tests of the objectives fail.

    python tests/programs/mutate_objectives.py [--only NAME ...]

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
COPIED = ("opsd", "tests", "bench")
TESTS = ("tests/test_objectives.py", "tests/test_token_stats.py")
OBJECTIVES, STATS = "opsd/objectives.py", "opsd/token_stats.py"


@dataclass(frozen=True)
class Mutant:
    """One altered formula: what is wrong in it, the file, the text in it (once) and the replacement."""

    name: str
    path: str
    old: str
    new: str


FROM_TAU = "- hyper.position_tau) / hyper.position_s"
ADVANTAGE = "advantage = (stats.teacher_logprob - stats.student_logprob).detach()"
GATE = "gate = (stats.teacher_entropy > hyper"
FLOOR = "return math.log(self.reopold_lambda) / (1.0 - self.reopold_lambda)"
KEPT = "stats.term.where(keep, 0.0).sum(), keep.sum()"
COUNT = "return lengths.sum() if hyper.position_global_reduction else (lengths > 0).sum()"
IN_STATS = {
    "clip after the sum": ("entries.clamp_(max=clip).sum(-1)", "entries.sum(-1).clamp(max=clip)"),
    "a clipped entry keeps its gradient": (
        "(teacher_probs, cut, value=-1.0)",
        "(teacher_probs, cut, value=-0.0)",
    ),
    "reverse instead of forward divergence": (
        "torch.sub(teacher_log, student_log, out=teacher_log)",
        "torch.sub(student_log, teacher_log, out=teacher_log)",
    ),
    "the teacher without temperature": (
        "teacher_logits.mul_(inverse_temperature)",
        "teacher_logits.mul_(1.0)",
    ),
    "no 1/T in the gradient": ("student_probs.mul_(inverse_temperature)", "student_probs.mul_(1.0)"),
    "top k not renormalised": ("top_log = torch.log_softmax(top_log, dim=-1)", "top_log = top_log * 1.0"),
    "one token fewer in the top k": ("(teacher_log, config.top_k)", "(teacher_log, config.top_k - 1)"),
    "sampled log-probability pushed the wrong way": (', picked, slopes["', ', picked, -slopes["'),
}
IN_OBJECTIVES = {
    "weights start at w_min = 0": ("return hyper.position_w_min + (1.0", "return (1.0"),
    "weights exceed 1": ("+ (1.0 - hyper.position_w_min) * gate", "+ gate"),
    "tau with the wrong sign": (FROM_TAU, "+ hyper.position_tau) / hyper.position_s"),
    "s multiplies": (FROM_TAU, "- hyper.position_tau) * hyper.position_s"),
    "f_t = i / L without the half": ("(index.double() - 0.5)", "index.double()"),
    "pwopsd as a mean over all tokens": ("if not hyper.position_global_reduction:", "if False:"),
    "sequences without a token counted": ("(lengths > 0).sum()", "(lengths >= 0).sum()"),
    "global reduction ignored in the count": (COUNT, "return (lengths > 0).sum()"),
    "token mean becomes a sum": (
        "_count_tokens(batch.lengths, hyper))",
        "_count_tokens(batch.lengths, hyper) * 0)",
    ),
    "advantage with the wrong sign": (ADVANTAGE, ADVANTAGE.replace("= (", "= -(")),
    "gradient through the advantage": (ADVANTAGE, ADVANTAGE.removesuffix(".detach()")),
    "gate below the entropy threshold": (GATE, GATE.replace(">", "<")),
    "gate on the student's entropy": (GATE, GATE.replace("teacher", "student")),
    "floor log(λ / (1 − λ))": (FLOOR, "return math.log(self.reopold_lambda / (1.0 - self.reopold_lambda))"),
    "reward not raised to the floor": (".detach().clamp(min=hyper.reward_floor)", ".detach()"),
    "the β-quantile instead of the (1 − β)-quantile": ("(1.0 - hyper.reopold_beta)", "hyper.reopold_beta"),
    "quantile without interpolation": ("ordered[low].lerp(ordered[high], place - low)", "ordered[low]"),
    "refinement begins one step late": (
        "    if batch.step < hyper.reopold_t_switch:\n        return",
        "    if batch.step <= hyper.reopold_t_switch:\n        return",
    ),
    "refinement keeps the certain tokens": (">= entropy_threshold(", "<= entropy_threshold("),
    "reopold divides by all tokens": (KEPT, f"{KEPT} * 0 + keep.numel()"),
    "no protection from a count of 0": ("(self.total.device).clamp(min=1)", "(self.total.device)"),
}
MUTANTS = tuple(
    Mutant(name, path, old, new)
    for path, mutants in ((STATS, IN_STATS), (OBJECTIVES, IN_OBJECTIVES))
    for name, (old, new) in mutants.items()
)


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
    """Return (as it should be, what happened). Without a mutant the tests have to pass."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        for source in (ROOT / copied for copied in COPIED):
            shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        if mutant is not None:
            path = folder / mutant.path
            text = path.read_text(encoding="utf-8")
            if text.count(mutant.old) != 1:
                return (
                    False,
                    f"does not apply: its text occurs {text.count(mutant.old)} times in {mutant.path}",
                )
            path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        code, first = run_tests(folder)
    if mutant is None:
        return code == 0, "pass" if code == 0 else f"fail without any change: {first}"
    if code == 1:
        return True, f"killed by `{first}`"
    return False, "SURVIVED" if code == 0 else f"pytest ended with code {code}: {first}"


def main() -> int:
    """Run the mutants; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [mutant.name for mutant in MUTANTS]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help="these mutants, by name")
    chosen = parser.parse_args().only or names
    # Neither this script's folder nor the checkout's may stand in for the copy.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "tests")]
    sys.dont_write_bytecode = True
    started = time.monotonic()
    print("| mutant | file | tests |\n| --- | --- | --- |", flush=True)
    right, word = verdict(None)
    print(f"| (none) | | {word} |", flush=True)
    killed = 0
    for mutant in (mutant for mutant in MUTANTS if mutant.name in chosen):
        fine, word = verdict(mutant)
        killed += fine
        print(f"| {mutant.name} | {Path(mutant.path).name} | {word} |", flush=True)
    print(f"\n{killed} of {len(chosen)} mutants killed in {time.monotonic() - started:.0f} s")
    return 0 if right and killed == len(chosen) else 1


if __name__ == "__main__":
    raise SystemExit(main())
