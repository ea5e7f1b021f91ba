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
# Not compared: the marker has hashes of files with times in them; nothing reads the pickled arguments.
SKIPPED = (".complete", "training_args.bin", "output.log")
# Entries that are times, or the commit, as somebody may commit meanwhile; and every time/….
TIMES = ("created", "resumed", "git", "merged", "date", "timing")


@dataclass
class Program:
    """One of the three: its name, folder -> its command, folder -> what passes for finished and is not."""

    name: str
    job: Callable[[Path], Job]
    faults: Callable[[Path], list[str]]
    seconds: float = 0.0  # of a run that is not killed
    kills: int = 0
    differences: list[str] = field(default_factory=list)


def without_times(value: object) -> object:
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if k not in TIMES and not k.startswith("time/")}
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
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in SKIPPED]
    return {str(path.relative_to(folder)): comparable(path, folder) for path in paths}


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


def programs(world: Path) -> list[Program]:
    """Return the three on the small world; merging and evaluation take the undisturbed training's run."""
    rows = forked_runs.write_rows(world / "rows.jsonl", 12)
    adapter, merged = world / "training" / "run" / f"checkpoint-{STEPS}", world / "merging" / "run_merged"

    def job(program: str, argv: Callable[[Path], list[str]]) -> Callable[[Path], Job]:
        return lambda folder: Job(program, argv(folder), str(folder / "output.log"))

    flags = {"max_steps": STEPS, "run_name": "small_pwopsd"}
    train = job("ea_opsd_train", lambda f: forked_runs.train_argv(BASE, rows, f / "run", **flags))
    merge = job("merge_lora", lambda f: forked_runs.merge_argv(adapter, f / "run_merged"))
    few = {"num_samples": 6, "hf_batch_size": 1}
    evaluate = job(
        "evaluate_math", lambda f: forked_runs.evaluate_argv(merged, rows, f / "result.json", **few)
    )
    return [
        Program("training", train, training_faults),
        Program("merging", merge, merging_faults),
        Program("evaluation", evaluate, lambda f: refusals(f.glob("*.json"), load_result)),
    ]


def undisturbed(program: Program, folder: Path) -> dict[str, object]:
    """Return the contents of a run that is not killed; it must finish."""
    folder.mkdir()
    started = time.monotonic()
    code = run(program.job(folder))
    program.seconds = time.monotonic() - started
    if code:
        raise SystemExit(f"{program.name} ended with {code}:\n{(folder / 'output.log').read_text()[-3000:]}")
    return contents_of(folder)


def kill_until_done(program: Program, folder: Path, expected: dict, rng: random.Random, most: int) -> None:
    """Kill one run at least once where it lives long enough, at most `most` times, and finish it."""
    folder.mkdir()
    code, kills = None, 0
    while code != 0:
        again = kills < most and (kills == 0 or rng.random() < AGAIN)
        delay = rng.uniform(0, program.seconds) if again else None
        code = run(program.job(folder), kill_after=delay)
        if code == -signal.SIGKILL:
            kills += 1
            program.differences += program.faults(folder)
        elif code:
            words = (folder / "output.log").read_text()[-2000:]
            program.differences.append(f"{folder.name} ended with {code} after {kills} kills: {words}")
            return
    program.kills += kills
    found = contents_of(folder)
    names = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
    program.differences += [f"{folder.name}: {name} differs after {kills} kills" for name in sorted(names)]


def report(tried: list[Program], seconds: float) -> str:
    """Return the Markdown table."""
    lines = ["| program | kills | undisturbed run, s | differences |", "| --- | --- | --- | --- |"]
    lines += [f"| {p.name} | {p.kills} | {p.seconds:.2f} | {len(p.differences)} |" for p in tried]
    differences = [f"- {words}" for p in tried for words in p.differences]
    kills = sum(p.kills for p in tried)
    lines += ["", f"{kills} kills, {len(differences)} differences, {seconds / 60:.1f} minutes."]
    lines += [f"Load average of the last 15 minutes: {os.getloadavg()[2]:.1f} on {os.cpu_count()} cores."]
    return "\n".join([*lines, *differences])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each program (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    args = parser.parse_args(argv)
    forked_runs.import_everything()
    rng, started = random.Random(args.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kill_runs-") as name:
        world = Path(name)
        tried = programs(world)
        for program in tried:
            expected = undisturbed(program, world / program.name)
            for number in range(100 * args.kills):
                if program.kills >= args.kills:
                    break
                folder = world / f"{program.name}-{number}"
                kill_until_done(program, folder, expected, rng, args.kills - program.kills)
                shutil.rmtree(folder)
                print(f"{program.name}: {program.kills} of {args.kills} kills", file=sys.stderr)
    print(report(tried, time.monotonic() - started))
    return 1 if any(program.differences for program in tried) else 0


if __name__ == "__main__":
    raise SystemExit(main())
