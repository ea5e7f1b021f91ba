"""Third-party files and strings are data: nothing is unpickled or run, nothing controls terminal or table."""

from __future__ import annotations

import ast
import errno
import fcntl
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ea_opsd_train
import evaluate_math
import merge_lora
import recompute_majn
import summarize_results
from opsd import files
from opsd.checkpoints import mark_complete
from opsd.errors import ArtefactError, UsageError, printable, run_cli
from opsd.evaluation.grading import Grader
from opsd.evaluation.results import load_result
from opsd.model_card import model_card
from opsd.training import LOCK_NAME
from tests.bad_input_cases import World, a_result, build_world, evaluate, merge, ships_code, train
from tests.launchers.test_launchers import LAUNCHERS, SETTINGS

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = ("*.py", "opsd/**/*.py", "launchers/*.py", "data/*.py", "testbed/*.py", "bench/*.py")
SOURCES = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
HOSTILE = "a b'c\"d $(touch pwned) `touch pwned` ;&|*<>\n--rm -rf"
# Clears the screen, sets the window's title, overwrites the line, ends a table row, hides text.
CONTROL = "\x1b[2J\x1b]0;title\x07\r| x | y |\n‮\u2028\x9b31m\x00"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def w(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """The world with a folder of this test, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    return replace(world, new=tmp_path)


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(word.value) for word in call.keywords if word.arg == name), None)


def test_nothing_in_the_source_unpickles_evaluates_or_shells_out() -> None:
    """One file loads models: another would not know what transformers gets wrong (opsd/models.py)."""
    assert len(SOURCES) > 80
    forbidden = {"eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads"}
    forbidden |= {"marshal.loads", "joblib.load", "yaml.load", "yaml.unsafe_load", "__import__"}
    loaders = set()
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name, place = ast.unparse(call.func), f"{path.name}:{call.lineno}"
            assert name not in forbidden, place
            assert keyword(call, "shell") in (None, "False"), place
            assert keyword(call, "allow_pickle") in (None, "False"), place
            if name == "torch.load":
                assert keyword(call, "weights_only") == "True", place
            if name.endswith(".from_pretrained"):
                loaders.add(path.relative_to(ROOT).as_posix())
                # Without it transformers asks the terminal.
                asked = keyword(call, "trust_remote_code") == "trust_remote_code"
                assert asked or not name.startswith("Auto"), place
            if name == "AutoModelForCausalLM.from_pretrained":
                assert keyword(call, "use_safetensors") == "True", place
    assert loaders == {"opsd/models.py"}


class Bomb:
    """Writes `pwned` into the working directory where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_third_party_checkpoint_is_not_unpickled(
    w: World, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = w.root / "trained"
    if not run.exists():
        assert ea_opsd_train.main(train(w, output_dir=run, max_steps=2, save_steps=1)) == 0
    copy = w.copy(run, lambda folder: shutil.rmtree(folder / "checkpoint-2"))
    torch.save({"state": Bomb()}, copy / "checkpoint-1" / name)
    mark_complete(copy / "checkpoint-1")
    argv = train(w, output_dir=copy, max_steps=2, save_steps=1, resume_from_checkpoint="auto")
    assert run_cli(lambda: ea_opsd_train.main(argv)) == 3
    assert "holds more than tensors and numbers" in capsys.readouterr().err
    assert not (w.new / "pwned").exists()


def programs(w: World, base: Path) -> list[tuple]:
    """Return the three that load a base model, with their command lines for this one."""
    return [
        (ea_opsd_train.main, train(w, model_name_or_path=base)),
        (merge_lora.main, merge(w, "--accept_base_name", base_model=base)),
        (evaluate_math.main, evaluate(w, base_model=base)),
    ]


def test_pickled_weights_are_not_loaded(w: World) -> None:
    def pickled(folder: Path, name: str, instead: str) -> None:
        (folder / name).unlink()
        (folder / instead).write_bytes(pickle.dumps(Bomb()))

    base = w.copy(w.base, lambda f: pickled(f, "model.safetensors", "pytorch_model.bin"))
    names = "adapter_model.safetensors", "adapter_model.bin"
    checkpoint = w.copy(w.run, lambda f: pickled(f / "checkpoint-100", *names)) / "checkpoint-100"
    adapters = [
        (merge_lora.main, merge(w, adapter=checkpoint)),
        (evaluate_math.main, evaluate(w, adapter=checkpoint)),
    ]
    for main, argv in programs(w, base) + adapters:
        with pytest.raises(ArtefactError):
            main(argv)
    assert not (w.new / "pwned").exists()


def test_code_that_a_model_ships_does_not_run_unasked(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks the terminal"))
    for main, argv in programs(w, w.copy(w.base, ships_code)):
        # The code itself would end the process with SystemExit.
        with pytest.raises((ArtefactError, UsageError), match=r"trust_remote_code|code of its own"):
            main(argv)


def test_answers_are_never_run(w: World) -> None:
    call = "__import__('os').system('touch pwned')"
    answers = [call, f"${call}$", "(lambda: open('pwned', 'w'))()", "\\write18{touch pwned}"]
    with Grader(workers=1) as grader:
        (grade,) = grader.grade([("2", [*answers, "\\input{/etc/passwd}", "{{ ''.__class__ }}", "2"])])
    assert grade.correct == [False] * 6 + [True]
    assert not list(w.new.iterdir())


def test_two_bare_starts_do_not_share_a_run(w: World) -> None:
    run = w.new / "run"
    run.mkdir()
    # train.sh locks the folder itself, which is another lock.
    launcher = os.open(run, os.O_RDONLY)
    fcntl.flock(launcher, fcntl.LOCK_EX)
    words = "another process is training"
    with files.lock_file(run / LOCK_NAME, busy=""), pytest.raises(UsageError, match=words):
        ea_opsd_train.main(train(w))
    assert [path.name for path in run.iterdir()] == [LOCK_NAME]
    assert ea_opsd_train.main(train(w)) == 0
    assert not (run / LOCK_NAME).exists()
    os.close(launcher)


def test_a_file_system_without_locks_is_an_error(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(ArtefactError, match=r"cannot be locked \(.*\), so two processes could write there"):
        ea_opsd_train.main(train(w))


def test_partial_files_of_other_hosts_are_left_until_they_are_old(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    nobody = subprocess.Popen(["true"])
    nobody.wait()
    host = files.partial_name(target).name.split(files.PARTIAL_MARK)[1].split("-")[0]

    def leave(owner: str, *, days: float = 0) -> Path:
        path = tmp_path / f".{target.name}{files.PARTIAL_MARK}{owner}"
        path.touch()
        os.utime(path, (path.stat().st_mtime - days * 86400,) * 2)
        return path

    killed = [leave(f"{host}-{nobody.pid}-a"), leave("17-c", days=2)]
    killed.append(leave(f"feedbeef-{os.getppid()}-b", days=2))
    alive = [leave(f"{host}-{os.getppid()}-d"), leave(f"feedbeef-{nobody.pid}-e"), leave(f"{nobody.pid}-f")]
    assert sorted(files.remove_partials(target)) == sorted(killed)
    assert all(path.exists() for path in alive)


def is_harmless(text: str) -> bool:
    """No control or invisible formatting character but the line break."""
    return not [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text())
def test_printable_has_one_line_and_no_control_character(text: str) -> None:
    shown = printable(text)
    assert is_harmless(shown)
    assert "\n" not in shown
    if is_harmless(text) and "\n" not in text and len(text) <= 2000:
        assert shown == text


def hostile_result(folder: Path) -> Path:
    """Write a valid result in which every string is hostile, its own name included."""
    result = a_result()
    result["base_model"] = result["dataset"] = f"set{CONTROL}"
    (record,) = result["results"]
    record |= {"problem": CONTROL, "ground_truth": CONTROL}
    record["generations"][0] |= {"predicted_answer": f"1{CONTROL}", "full_generation": CONTROL}
    name = f"=cmd{CONTROL}&%_#${{}}~^\\end{{tabular}}_38k_seed0.json"
    path = folder / name.translate({ord(forbidden): None for forbidden in "\x00\n/"})
    path.write_text(json.dumps(result))
    return path


@pytest.mark.parametrize("form", ["md", "csv", "latex"])
def test_summaries_of_hostile_results_stay_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    hostile_result(tmp_path)
    assert summarize_results.main([str(tmp_path / "*.json"), "--format", form]) == 0
    shown = capsys.readouterr().out
    assert "cmd" in shown
    assert is_harmless(shown)
    lines = shown.split("\n")
    if form == "md":
        rows = [line for line in lines if line.startswith("|")]
        widths = [line.replace("\\|", "").count("|") for line in rows]
        assert len(set(widths)) == 1, "no name makes cells of its own"
    elif form == "csv":
        assert all(line.split(",")[1].strip('"').startswith("'=") for line in lines[1:] if line)
    else:
        body = [line for line in lines if not line.startswith("%")]
        assert sum("\\end{tabular}" in line for line in body) == sum("\\begin{tabular}" in x for x in body)
        assert "\\textbackslash x1b[2J" in shown, "what looks like a command is text"


def test_recounts_of_hostile_results_stay_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = hostile_result(tmp_path)
    (tmp_path / f"torn{CONTROL}.json".replace("\x00", "")).write_text("{")
    assert recompute_majn.main([str(tmp_path / "*.json"), "--apply", "--workers", "1"]) == 1
    shown = capsys.readouterr()
    assert is_harmless(shown.out)
    assert is_harmless(shown.err)
    assert len([line for line in shown.out.split("\n") if line.startswith("|")]) == 3
    assert load_result(path)["results"][0]["problem"] == CONTROL, "the file keeps what it held"


def test_a_model_card_of_hostile_names_stays_one(world: World) -> None:
    manifest = json.loads((world.run / "manifest.json").read_text())
    hostile = {**manifest, "run_name": f"x{CONTROL}", "method": CONTROL, "base_model": f"---\n{CONTROL}"}
    card = model_card(hostile | {"dataset": {"name": CONTROL, "rows": 1, "sha256": "0"}}, adapter_step=1)
    assert is_harmless(card)
    assert card.count("\n---\n") == 1, "the front matter ends where it should"
    rows = [line.replace("\\|", "") for line in card.split("\n") if line.startswith("|")]
    assert {row.count("|") for row in rows} == {3}


RECORDER = """
import json, sys
with open({log!r}, "a") as file:
    file.write(json.dumps(sys.argv) + "\\n")
sys.exit(1 if "--check" in sys.argv else 0)
"""


def start(script: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS} | settings
    command = ["bash", str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert is_harmless(done.stderr)
    return done


def test_train_sh_hands_every_string_on_as_it_is(w: World) -> None:
    """Spaces, quotes, substitutions, line breaks and dashes in folders, data and flags."""
    root = w.new / HOSTILE.replace("/", "")
    shutil.copytree(LAUNCHERS, root / "launchers")
    (root / "launchers" / "install.py").write_text("")
    for name in ("ea_opsd_train.py", "merge_lora.py"):
        (root / name).write_text(RECORDER.format(log=str(w.new / "log.jsonl")))
    python = root / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    outputs = w.new / f"out {HOSTILE}"
    (outputs / "small_opsd_merged").mkdir(parents=True)
    settings = {"OUTPUT_ROOT": str(outputs), "BASE_MODEL_PATH": HOSTILE}
    done = start(root / "launchers" / "train.sh", "small", "opsd", "--train_dataset", HOSTILE, **settings)
    assert done.returncode == 0, done.stderr
    check, trained, merged = [json.loads(line) for line in (w.new / "log.jsonl").read_text().splitlines()]
    assert check[check.index("--check") + 1] == str(outputs / "small_opsd_merged")
    assert trained[trained.index("--output_dir") + 1] == str(outputs / "small_opsd")
    assert trained[trained.index("--model_name_or_path") + 1] == HOSTILE
    assert trained[-2:] == ["--train_dataset", HOSTILE]
    assert merged[merged.index("--output") + 1] == str(outputs / "small_opsd_merged")
    assert not list(w.new.rglob("pwned"))
    assert all(line.startswith("[") for line in done.stderr.splitlines()), "no name forges a line"


@pytest.mark.parametrize("name", ["-rf", "--help", "a/b", ".hidden", "a\nb", "a\x1b[2J", "x_merged"])
def test_run_names_that_could_be_something_else_are_refused(name: str) -> None:
    done = start(LAUNCHERS / "train.sh", "small", "opsd", RUN_NAME=name, DRY_RUN="1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: RUN_NAME=")
    assert len(done.stderr.splitlines()) == 1
