"""opsd/run_identity.py and opsd/provenance.py: what a run was, and which merged folders count as whole."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opsd import provenance
from opsd import run_identity as m
from opsd.errors import ArtefactError

ARGUMENTS = {
    "method": "pwopsd",
    "learning_rate": 5e-6,
    "position_global_reduction": False,
    "report_to": "none",
    "output_dir": Path("outputs/x"),
    "hub_token": "hf_very_secret",
    "max_grad_norm": float("inf"),
}


def a_manifest(**changes):
    values = {
        "run_name": "qwen3_4b_base_pwopsd",
        "method": "pwopsd",
        "base_model": "Qwen/Qwen3-4B",
        "base_revision": "abc123",
        "arguments": ARGUMENTS,
        "dataset": "train.jsonl",
        "dataset_rows": 10,
        "dataset_sha256": "0" * 64,
        "world_size": 4,
        "per_device_batch": 4,
        "accumulation": 2,
        "seeds": {"seed": 42},
    }
    return m.run_manifest(**(values | changes))


def merged_folder(folder: Path, **changes) -> Path:
    folder.mkdir()
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"w" * 1000)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"v" * 500)
    for name in ("config.json", "tokenizer.json", "README.md"):
        (folder / name).write_text("{}")
    m.write_manifest(folder, a_manifest(**changes))
    files = m.file_list(folder)
    m.write_sentinel(folder, base_model="Qwen/Qwen3-4B", adapter="a", adapter_step=100, files=files)
    return folder


def test_a_manifest_survives_writing_and_hides_secrets(tmp_path):
    written = a_manifest(
        command=["python", "train.py", "--hub_token", "hf_x", "--wandb_api_key=k", "--seed", "1"]
    )
    m.write_manifest(tmp_path, written)
    read = m.read_manifest(tmp_path)
    assert read == written
    assert read["effective_batch"] == 32
    assert read["arguments"]["learning_rate"] == 5e-6
    assert read["arguments"]["output_dir"] == "outputs/x"
    assert read["arguments"]["max_grad_norm"] == "inf"
    assert read["arguments"]["hub_token"] is None
    assert read["command"] == [
        "python",
        "train.py",
        "--hub_token",
        "***",
        "--wandb_api_key=***",
        "--seed",
        "1",
    ]
    assert read["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    text = (tmp_path / "manifest.json").read_text()
    assert "hf_very_secret" not in text
    assert "hf_x" not in text
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no manifest at"),
        ("", "not valid JSON"),
        ('{"run_name": "x"', "not valid JSON"),
        ("[]", "holds a list"),
        ("{}", "has no 'run_name'"),
        ('{"run_name": 3}', "'run_name' is 3"),
        ("[" * 100_000, "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_bad_manifests_are_refused(tmp_path, text, words):
    if text is not None:
        (tmp_path / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ArtefactError, match=words):
        m.read_manifest(tmp_path)


def test_huge_manifests_are_not_read(tmp_path):
    (tmp_path / "manifest.json").touch()
    os.truncate(tmp_path / "manifest.json", 2**40)
    with pytest.raises(ArtefactError, match="too large"):
        m.read_manifest(tmp_path)


def test_malformed_manifests_are_not_written(tmp_path):
    with pytest.raises(ArtefactError, match="world_size"):
        m.write_manifest(tmp_path, a_manifest() | {"world_size": True})
    assert not list(tmp_path.iterdir())


def test_fingerprint_depends_on_rows_order_and_columns_alone():
    rows = [{"problem": "1+1", "solution": "2", "extra": 1}, {"problem": "2+2", "solution": "4"}]
    same = [{"solution": "2", "problem": "1+1"}, {"problem": "2+2", "solution": "4", "extra": 9}]
    fingerprint = provenance.dataset_fingerprint(rows)
    assert fingerprint == provenance.dataset_fingerprint(iter(same))
    # By hand: the column names, then one JSON line a row.
    stated = b'["problem", "solution"]["1+1", "2"]\n["2+2", "4"]\n'
    assert fingerprint == hashlib.sha256(stated).hexdigest()
    assert fingerprint != provenance.dataset_fingerprint(rows[::-1])
    assert fingerprint != provenance.dataset_fingerprint(rows, columns=("solution", "problem"))
    moved = [{"problem": "1+12", "solution": ""}, rows[1]]
    assert fingerprint != provenance.dataset_fingerprint(moved), "a text that moves between columns"


def test_git_state(tmp_path):
    assert provenance.git_state(tmp_path) == {"commit": None, "dirty": None}

    def git(*words):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    clean = provenance.git_state(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "notes.txt").write_text("beside the code")
    assert provenance.git_state(tmp_path)["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert provenance.git_state(tmp_path) == clean | {"dirty": True}


def test_a_whole_merged_folder_passes(tmp_path):
    folder = merged_folder(tmp_path / "m")
    found = m.check_merged(
        folder,
        expected_run_name="qwen3_4b_base_pwopsd",
        expected_method="pwopsd",
        expected_base_model="Qwen/Qwen3-4B",
        expected_step=100,
        expected_arguments={
            "learning_rate": "0.000005",
            "position_global_reduction": "false",
            "max_grad_norm": "inf",
            "report_to": "wandb",
            "never_heard_of": "1",
        },
        hashes=True,
    )
    assert found["manifest"]["run_name"] == "qwen3_4b_base_pwopsd"
    assert (
        found["files"]["model-00001-of-00002.safetensors"]["sha256"]
        == hashlib.sha256(b"w" * 1000).hexdigest()
    )


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ({"expected_run_name": "x"}, "run_name is 'qwen3_4b_base_pwopsd', expected 'x'"),
        ({"expected_method": "opsd"}, "method is 'pwopsd', expected 'opsd'"),
        ({"expected_base_model": "Qwen/Qwen3-8B"}, "base model is 'Qwen/Qwen3-4B', expected 'Qwen/Qwen3-8B'"),
        ({"expected_step": 125}, "adapter step is 100, expected 125"),
        ({"expected_arguments": {"learning_rate": "1e-5"}}, "learning_rate is 5e-06, expected '1e-5'"),
        ({"expected_arguments": {"position_global_reduction": "True"}}, "position_global_reduction is False"),
    ],
)
def test_another_runs_folder_is_refused(tmp_path, expected, words):
    folder = merged_folder(tmp_path / "m")
    with pytest.raises(ArtefactError, match=words) as raised:
        m.check_merged(folder, **expected)
    assert not isinstance(raised.value, m.IncompleteMergeError)


DAMAGE = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), "no merged model"),
    "a file instead": (lambda f: (f.rename(f.with_name("gone")), f.touch()), "no merged model"),
    "no sentinel": (lambda f: (f / ".ready_for_eval").unlink(), "no sentinel"),
    "torn sentinel": (lambda f: os.truncate(f / ".ready_for_eval", 100), "not valid JSON"),
    "empty sentinel": (lambda f: os.truncate(f / ".ready_for_eval", 0), "not valid JSON"),
    "touched sentinel": (lambda f: (f / ".ready_for_eval").write_text("{}"), "not a sentinel"),
    "no shard": (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "00002.safetensors is missing"),
    "cut shard": (lambda f: os.truncate(f / "model-00001-of-00002.safetensors", 999), "999 bytes, not 1000"),
    "empty shard": (lambda f: os.truncate(f / "model-00001-of-00002.safetensors", 0), "0 bytes, not 1000"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no manifest"),
    "torn manifest": (lambda f: os.truncate(f / "manifest.json", 50), "not valid JSON"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_incomplete_folders_are_told_apart(tmp_path, name):
    damage, words = DAMAGE[name]
    folder = merged_folder(tmp_path / "m")
    damage(folder)
    with pytest.raises(m.IncompleteMergeError, match=words):
        m.check_merged(folder)


@pytest.mark.parametrize("missing", ["tokenizer.json", "model-00001-of-00002.safetensors"])
def test_a_sentinel_cannot_vouch_for_a_folder_without_tokenizer_or_weights(tmp_path, missing):
    folder = merged_folder(tmp_path / "m")
    sentinel = json.loads((folder / ".ready_for_eval").read_text())
    kept = {n: e for n, e in sentinel["files"].items() if n.split("-")[0] != missing.split("-")[0]}
    (folder / ".ready_for_eval").write_text(json.dumps(sentinel | {"files": kept}))
    with pytest.raises(m.IncompleteMergeError, match=r"holds no (tokenizer|weights)"):
        m.check_merged(folder)


def test_equal_sizes_with_other_bytes_are_found_by_hash(tmp_path):
    folder = merged_folder(tmp_path / "m")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"x" * 1000)
    m.check_merged(folder)
    with pytest.raises(m.IncompleteMergeError, match="SHA-256 of model-00001"):
        m.check_merged(folder, hashes=True)


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/model.safetensors"])
def test_a_strangers_sentinel_cannot_point_outside(tmp_path, name):
    folder = merged_folder(tmp_path / "m")
    sentinel = json.loads((folder / ".ready_for_eval").read_text())
    sentinel["files"][name] = {"bytes": 1, "sha256": "0"}
    (folder / ".ready_for_eval").write_text(json.dumps(sentinel))
    with pytest.raises(m.IncompleteMergeError, match="no file of a merged folder"):
        m.check_merged(folder)


def test_identity_is_the_weights_not_the_notes(tmp_path):
    one = m.read_sentinel(merged_folder(tmp_path / "one"))
    two = m.read_sentinel(merged_folder(tmp_path / "two", run_name="other"))
    assert one["identity"] == two["identity"]
    (tmp_path / "two" / "config.json").write_text('{"rope": 1}')
    assert m.weights_identity(m.file_list(tmp_path / "two")) != one["identity"]


def test_same_source(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    cached = "/home/x/.cache/huggingface/hub/models--Qwen--Qwen3-4B/snapshots/1cfa9a7"
    assert m.same_source("Qwen/Qwen3-4B", "Qwen/Qwen3-4B")
    assert m.same_source("Qwen/Qwen3-4B", cached)
    assert m.same_source(cached, "Qwen/Qwen3-4B")
    assert m.same_source(str(tmp_path / "base"), str(tmp_path / "link"))
    assert m.same_source("/gone/testbed/base_model", "/here/testbed/base_model")
    assert not m.same_source("Qwen/Qwen3-4B", "Qwen/Qwen3-8B")
    assert not m.same_source("Qwen/Qwen3-8B", cached)
    assert not m.same_source("/gone/a/base_model", "/gone/b/base_model")
    assert not m.same_source(str(tmp_path / "base"), str(tmp_path))


def test_checking_needs_no_torch():
    code = "import sys, merge_lora; sys.exit(bool({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_compared_arguments_are_arguments_of_the_trainer():
    """A renamed flag must not drop out of the comparison unnoticed."""
    from dataclasses import fields

    from transformers import TrainingArguments

    from opsd import arguments

    groups = (
        arguments.MethodArguments,
        arguments.RolloutArguments,
        arguments.ModelArguments,
        TrainingArguments,
    )
    known = {field.name for group in groups for field in fields(group)}
    assert set(m.CELL_ARGUMENTS) <= known
    method = {field.name for field in fields(arguments.MethodArguments)}
    assert method <= set(m.CELL_ARGUMENTS), "every number of the objective makes another experiment"
