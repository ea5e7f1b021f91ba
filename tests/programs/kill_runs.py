"""Kill training, merging and evaluation at random moments and compare with undisturbed runs.

    python tests/programs/kill_runs.py [--kills 20] [--seed 0]

Each of the three is killed `--kills` times (SIGKILL to its process group), at moments drawn uniformly over
the time that an undisturbed run takes after its imports, and started again until it finishes; the restart may
be killed too. Then its artefacts must equal the undisturbed run's, and nothing temporary may be left. After
every kill nothing may pass for finished that is not: only a complete merged folder has a sentinel, and every
result file and every checkpoint with a marker is complete. Prints a report in Markdown; exit code 1 for any
difference.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from opsd.checkpoints import checkpoints, incompleteness
from opsd.errors import ArtefactError
from opsd.evaluation.results import load_result
from opsd.files import PARTIAL_MARK, file_sha256
from opsd.run_identity import SENTINEL_NAME, check_merged
from tests.programs import forked_runs
from tests.programs.forked_runs import BASE, Job, run

STEPS = 3
# A restart is killed again with this probability.
AGAIN = 0.3


@dataclass(frozen=True)
class Program:
    """One of the three: its name, folder -> its command, folder -> what passes for finished and is not."""

    name: str
    job: Callable[[Path], Job]
    faults: Callable[[Path], list[str]]


@dataclass
class Tally:
    """The outcome of one program's kills."""

    seconds: float
    runs: int = 0
    kills: int = 0
    delays: list[float] = field(default_factory=list)
    with_leftovers: int = 0
    differences: list[str] = field(default_factory=list)


# -- what must be equal --------------------------------------------------------------------------------------


def files_below(folder: Path) -> dict[str, Path]:
    """Return every file of a run but its log by its name relative to `folder`."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "output.log")
    return {str(path.relative_to(folder)): path for path in paths}


def without_times(value: object) -> object:
    """Return a JSON value without its times, and without the commit, as somebody may commit meanwhile."""
    left_out = ("created", "resumed", "git", "merged", "date", "timing")
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in left_out and not k.startswith("time/")}
        return {key: without_times(inner) for key, inner in kept.items()}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def comparable(path: Path, folder: Path) -> object:
    """Return a file's content without its times and its folder's name; its hash where it has neither."""
    if path.name == "metrics.jsonl":
        return [without_times(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name in ("manifest.json", "trainer_state.json", "result.json", SENTINEL_NAME):
        value = without_times(json.loads(path.read_text().replace(str(folder), "FOLDER")))
        if path.name == SENTINEL_NAME:
            value["files"]["manifest.json"] = None  # its hash is over the training's times
        return value
    return file_sha256(path)


def contents_of(folder: Path) -> dict[str, object]:
    """Return the content of every file of a run that has to be equal, by name."""
    # The marker has hashes of files with times in them; nothing reads the Trainer's pickled arguments.
    skipped = (".complete", "training_args.bin")
    return {n: comparable(p, folder) for n, p in files_below(folder).items() if p.name not in skipped}


# -- what must not pass for finished -------------------------------------------------------------------------


def training_faults(folder: Path) -> list[str]:
    complete = [path for _, path in checkpoints(folder / "run") if incompleteness(path, hashes=True) is None]
    needed = ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")
    lacking = [(path.name, name) for path in complete for name in needed if not (path / name).is_file()]
    return [f"{checkpoint} counts as complete without {name}" for checkpoint, name in lacking]


def refusals(paths: Iterable[Path], check: Callable[[Path], object]) -> list[str]:
    """Return the reasons for which `check` refuses some of `paths`."""
    found = []
    for path in paths:
        try:
            check(path)
        except ArtefactError as error:
            found.append(f"{path.name} passes for finished: {error}")
    return found


def merging_faults(folder: Path) -> list[str]:
    marked = [sentinel.parent for sentinel in folder.rglob(SENTINEL_NAME)]
    temporary = [f"a sentinel in {path.name}" for path in marked if PARTIAL_MARK in path.name]
    finished = [path for path in marked if PARTIAL_MARK not in path.name]
    return temporary + refusals(finished, lambda path: check_merged(path, hashes=True))


def evaluation_faults(folder: Path) -> list[str]:
    return refusals(folder.glob("*.json"), load_result)


# -- the programs --------------------------------------------------------------------------------------------


def programs(world: Path) -> list[Program]:
    """Return the three on the small world; merging and evaluation take the undisturbed training's run."""
    rows = forked_runs.write_rows(world / "rows.jsonl", 12)
    adapter, merged = world / "training" / "run" / f"checkpoint-{STEPS}", world / "merging" / "run_merged"

    def train(folder: Path) -> Job:
        argv = forked_runs.train_argv(BASE, rows, folder / "run", max_steps=STEPS, run_name="small_pwopsd")
        return Job("ea_opsd_train", argv, str(folder / "output.log"))

    def merge(folder: Path) -> Job:
        return Job(
            "merge_lora", forked_runs.merge_argv(adapter, folder / "run_merged"), str(folder / "output.log")
        )

    def evaluate(folder: Path) -> Job:
        argv = forked_runs.evaluate_argv(merged, rows, folder / "result.json", num_samples=6, hf_batch_size=1)
        return Job("evaluate_math", argv, str(folder / "output.log"))

    return [
        Program("training", train, training_faults),
        Program("merging", merge, merging_faults),
        Program("evaluation", evaluate, evaluation_faults),
    ]


def undisturbed(program: Program, folder: Path) -> tuple[float, dict[str, object]]:
    """Return (seconds, contents) of a run that is not killed; it must finish."""
    folder.mkdir()
    started = time.monotonic()
    code = run(program.job(folder))
    seconds = time.monotonic() - started
    if code:
        raise SystemExit(f"{program.name} ended with {code}:\n{(folder / 'output.log').read_text()[-3000:]}")
    return seconds, contents_of(folder)


def kill_until_done(
    program: Program, folder: Path, tally: Tally, expected: dict, rng: random.Random, most: int
) -> None:
    """Kill one run at least once where it lives long enough, at most `most` times, and finish it."""
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
    found = contents_of(folder)
    names = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
    tally.differences += [f"{folder.name}: {name} differs after {kills} kills" for name in sorted(names)]


def report(tallies: dict[str, Tally], seconds: float) -> str:
    """Return the Markdown table."""
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
    lines += [f"Load average of the last 15 minutes: {os.getloadavg()[2]:.1f} on {os.cpu_count()} cores."]
    return "\n".join([*lines, *(f"- {words}" for words in differences)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each program (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    args = parser.parse_args(argv)
    forked_runs.import_everything()
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
                print(f"{program.name}: {tally.kills} of {args.kills} kills", file=sys.stderr)
    finally:
        shutil.rmtree(world)
    print(report(tallies, time.monotonic() - started))
    return 1 if any(tally.differences for tally in tallies.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
