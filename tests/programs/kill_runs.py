"""Kill training, merging and evaluation at random moments and see that nothing comes of it:

    python tests/programs/kill_runs.py [--kills 20] [--seed 0]

Each of the three is killed `--kills` times (SIGKILL to its whole process group), at moments drawn uniformly
over the time that an undisturbed run takes behind its imports, and started again until it finishes; the
restart may be killed too. Then its artefacts must equal the undisturbed run's, and nothing temporary may be
left. After every single kill nothing may pass for finished that is not: a sentinel stands in a whole merged
folder only, a result file is whole, a checkpoint that counts is whole. Prints a report in Markdown; exit code
1 for any difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opsd.checkpoints import checkpoints, incompleteness
from opsd.errors import ArtefactError
from opsd.evaluation.results import load_result
from opsd.files import PARTIAL_MARK
from opsd.run_identity import SENTINEL_NAME, check_merged
from tests.programs.forked_runs import Job, import_everything, run, train_argv

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "testbed" / "base_model"
STEPS = 3
# A restart is killed again this often, so that some runs are killed several times.
AGAIN = 0.3


@dataclass(frozen=True)
class Program:
    """One of the three.

    Attributes:
        name: as in the report.
        job: folder -> the command that works in it.
        contents: folder -> what must be equal, by name.
        faults: folder -> what passes for finished there and is not.
    """

    name: str
    job: Callable[[Path], Job]
    contents: Callable[[Path], dict[str, object]]
    faults: Callable[[Path], list[str]]


@dataclass
class Tally:
    """What one program's kills came to."""

    seconds: float
    runs: int = 0
    kills: int = 0
    delays: list[float] = field(default_factory=list)
    with_leftovers: int = 0
    differences: list[str] = field(default_factory=list)


# -- what must be equal --------------------------------------------------------------------------------------


def files_below(folder: Path) -> dict[str, Path]:
    """Every file of a run by its name relative to `folder`, the log of its output left out."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "output.log")
    return {str(path.relative_to(folder)): path for path in paths}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def without(value: object, *names: str) -> object:
    """`value` with the keys `names` left out wherever they stand."""
    if isinstance(value, dict):
        return {key: without(inner, *names) for key, inner in value.items() if key not in names}
    return [without(inner, *names) for inner in value] if isinstance(value, list) else value


def comparable(path: Path, folder: Path) -> object:
    """A file's content without its times and its folder's name; the bytes' hash where it has neither."""
    if path.name == "manifest.json":
        text = path.read_text().replace(str(folder), "FOLDER")
        # The code's commit is that of the start, and somebody may commit while this runs.
        return without(json.loads(text), "created", "resumed", "git")
    if path.name == SENTINEL_NAME:
        sentinel = without(json.loads(path.read_text()), "merged")
        sentinel["files"]["manifest.json"] = None  # it has the times of the training in it
        return sentinel
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]
    if path.name == "trainer_state.json":
        state = json.loads(path.read_text())
        state["log_history"] = [
            {key: value for key, value in row.items() if not key.startswith("time/")}
            for row in state["log_history"]
        ]
        return state
    return digest(path)


def contents_of(folder: Path) -> dict[str, object]:
    """All files of a run. A checkpoint's marker holds sizes, and the times in trainer_state.json vary in
    length; the Trainer's pickled arguments are read by nobody."""
    skipped = (".complete", "training_args.bin")
    files = files_below(folder)
    return {name: comparable(path, folder) for name, path in files.items() if path.name not in skipped}


def result_of(folder: Path) -> dict[str, object]:
    files = files_below(folder)
    return {name: without(json.loads(path.read_text()), "date", "timing") for name, path in files.items()}


# -- what must not pass for finished -------------------------------------------------------------------------


def training_faults(folder: Path) -> list[str]:
    whole = [path for _, path in checkpoints(folder / "run") if incompleteness(path) is None]
    return [
        f"{path.name} counts as whole without {name}"
        for path in whole
        for name in ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")
        if not (path / name).is_file()
    ]


def merging_faults(folder: Path) -> list[str]:
    faults = []
    for sentinel in folder.rglob(SENTINEL_NAME):
        if PARTIAL_MARK in sentinel.parent.name:
            faults.append(f"a sentinel in {sentinel.parent.name}")
            continue
        try:
            check_merged(sentinel.parent, hashes=True)
        except ArtefactError as error:
            faults.append(f"a sentinel in a folder that is not whole: {error}")
    return faults


def evaluation_faults(folder: Path) -> list[str]:
    faults = []
    for path in folder.glob("*.json"):
        try:
            load_result(path)
        except ArtefactError as error:
            faults.append(f"{path.name} passes for a result: {error}")
    return faults


# -- the programs --------------------------------------------------------------------------------------------


def programs(world: Path) -> list[Program]:
    """The three, on the small world's model; merging and evaluation take the undisturbed training's run."""
    rows = world / "rows.jsonl"
    with open(ROOT / "testbed" / "data" / "train.jsonl", encoding="utf-8") as file:
        rows.write_text("".join(next(file) for _ in range(12)), encoding="utf-8")
    adapter = world / "training" / "run" / f"checkpoint-{STEPS}"

    def train(folder: Path) -> Job:
        argv = train_argv(BASE, rows, folder / "run", max_steps=STEPS, run_name="small_pwopsd")
        return Job("ea_opsd_train", argv, str(folder / "output.log"))

    def merge(folder: Path) -> Job:
        argv = ["--base_model", str(BASE), "--adapter", str(adapter), "--output", str(folder / "run_merged")]
        return Job("merge_lora", argv, str(folder / "output.log"))

    def evaluate(folder: Path) -> Job:
        flags = {
            "base_model": world / "merging" / "run_merged", "dataset": "sums", "dataset_path": rows,
            "output": folder / "result.json", "engine": "hf", "val_n": 2, "num_samples": 6,
            "max_new_tokens": 24, "hf_batch_size": 1, "grading_workers": 1,
        }  # fmt: skip
        argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return Job("evaluate_math", argv, str(folder / "output.log"))

    return [
        Program("training", train, contents_of, training_faults),
        Program("merging", merge, contents_of, merging_faults),
        Program("evaluation", evaluate, result_of, evaluation_faults),
    ]


def undisturbed(program: Program, folder: Path) -> tuple[float, dict[str, object]]:
    """(seconds, contents) of a run that nobody kills; it must finish."""
    folder.mkdir()
    started = time.monotonic()
    code = run(program.job(folder))
    seconds = time.monotonic() - started
    if code:
        raise SystemExit(f"{program.name} ended with {code}:\n{(folder / 'output.log').read_text()[-3000:]}")
    return seconds, program.contents(folder)


def kill_until_done(
    program: Program, folder: Path, tally: Tally, expected: dict, rng: random.Random, most: int
) -> None:
    """One run: killed at least once where it lives long enough, at most `most` times, then finished."""
    folder.mkdir()
    code, kills = None, 0
    while code != 0:
        again = kills < most and (kills == 0 or rng.random() < AGAIN)
        delay = rng.uniform(0, tally.seconds) if again else None
        code = run(program.job(folder), kill_after=delay)
        if code == -signal.SIGKILL:
            kills += 1
            tally.delays.append(delay)
            tally.differences += program.faults(folder)
            tally.with_leftovers += any(PARTIAL_MARK in name for name in files_below(folder))
        elif code:
            words = (folder / "output.log").read_text()[-2000:]
            tally.differences.append(f"{folder.name} ended with {code} after {kills} kills: {words}")
            return
    tally.kills += kills
    tally.runs += kills > 0
    found = program.contents(folder)
    differing = [
        name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)
    ]
    tally.differences += [f"{folder.name}: {name} differs after {kills} kills" for name in differing]
    tally.differences += [
        f"{folder.name}: {name} is left" for name in files_below(folder) if PARTIAL_MARK in name
    ]


def report(tallies: dict[str, Tally], seconds: float) -> str:
    """The Markdown table."""
    lines = [
        "| program | kills | runs | undisturbed run, s | kill moments, s | kills that left a temporary file "
        "| differences |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, tally in tallies.items():
        moments = f"{min(tally.delays):.2f} to {max(tally.delays):.2f}" if tally.delays else "—"
        lines.append(
            f"| {name} | {tally.kills} | {tally.runs} | {tally.seconds:.2f} | {moments} "
            f"| {tally.with_leftovers} | {len(tally.differences)} |"
        )
    kills = sum(tally.kills for tally in tallies.values())
    differences = [words for tally in tallies.values() for words in tally.differences]
    lines += ["", f"{kills} kills, {len(differences)} differences, {seconds / 60:.1f} minutes."]
    return "\n".join([*lines, *(f"- {words}" for words in differences)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each program (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    args = parser.parse_args(argv)
    import_everything()
    rng, started = random.Random(args.seed), time.monotonic()
    tallies: dict[str, Tally] = {}
    world = Path(tempfile.mkdtemp(prefix="kill_runs-"))
    try:
        for program in programs(world):
            seconds, expected = undisturbed(program, world / program.name)
            tally = tallies[program.name] = Tally(seconds)
            for number in range(100 * args.kills):
                if tally.kills >= args.kills:
                    break
                folder = world / f"{program.name}-{number}"
                kill_until_done(program, folder, tally, expected, rng, args.kills - tally.kills)
                shutil.rmtree(folder)
                print(
                    f"{program.name}: {tally.kills} kills, {len(tally.differences)} differences",
                    file=sys.stderr,
                )
    finally:
        shutil.rmtree(world)
    print(report(tallies, time.monotonic() - started))
    return 1 if any(tally.differences for tally in tallies.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
