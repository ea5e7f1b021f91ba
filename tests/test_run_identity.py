"""opsd/run_identity.py: what a run was, and which merged folders are complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import merge_lora
from opsd import files
from opsd import run_identity as m
from opsd.arguments import MethodArguments, parse_arguments
from opsd.diagnostic.config import BranchConfig
from opsd.errors import ArtefactError
from opsd.evaluation.config import EvalConfig
from opsd.evaluation.model import check_model
from opsd.evaluation.results import REGIME_FIELDS
from tests.test_merge_lora import scale_weights, tiny_base, train_nothing

ARGUMENTS = {
    "method": "pwopsd", "run_name": "qwen3_4b_base_pwopsd", "model_name_or_path": "Qwen/Qwen3-4B",
    "train_dataset": "train.jsonl", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
    "seed": 42, "data_seed": None, "learning_rate": 5e-6, "position_global_reduction": False,
    "report_to": "none", "output_dir": Path("outputs/x"), "hub_token": "hf_very_secret",
    "max_grad_norm": float("inf"),
}  # fmt: skip


def a_manifest(**arguments):
    """Return the manifest of a run with ARGUMENTS, except for these."""
    return m.run_manifest(
        m.plain(ARGUMENTS | arguments),
        base_revision="abc123",
        base_weights=None,
        dataset_rows=10,
        dataset_sha256="0" * 64,
        world_size=4,
    )


def merged_folder(folder: Path, **arguments) -> Path:
    folder.mkdir()
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"w" * 1000)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"v" * 500)
    for name in ("config.json", "tokenizer.json", "README.md"):
        (folder / name).write_text("{}")
    files.atomic_write_json(folder / "manifest.json", a_manifest(**arguments))
    m.write_sentinel(folder, base_model="Qwen/Qwen3-4B", adapter="a", adapter_step=100)
    return folder


def test_a_manifest_survives_writing_and_hides_secrets(tmp_path, monkeypatch):
    command = ["train.py", "--hub_token", "hf_x", "--wandb_api_key=k", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", command)
    written = a_manifest()
    files.atomic_write_json(tmp_path / "manifest.json", written)
    read = m.read_manifest(tmp_path)
    assert read == written
    assert read["effective_batch"] == 32
    expected = {"learning_rate": 5e-6, "output_dir": "outputs/x", "max_grad_norm": "inf", "hub_token": None}
    assert expected.items() <= read["arguments"].items()
    assert read["command"][2:] == ["--hub_token", "***", "--wandb_api_key=***", "--seed", "1"]
    assert read["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    text = (tmp_path / "manifest.json").read_text()
    assert "hf_very_secret" not in text
    assert "hf_x" not in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no run manifest at"),
        ('{"run_name": "x"', "not valid JSON"),
        ("[]", "holds a list"),
        ('{"run_name": 3}', "'run_name' is 3"),
        ("[" * 100_000, "not valid JSON"),
        ("\xff\xfe", "not valid JSON"),
    ],
)
def test_bad_manifests_are_refused(tmp_path, text, words):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text, "latin-1")
    with pytest.raises(ArtefactError, match=words):
        m.read_manifest(tmp_path)


def test_fingerprint_depends_on_rows_order_and_columns_alone():
    rows = [{"problem": "1+1", "solution": "2", "extra": 1}, {"problem": "2+2", "solution": "4"}]
    # By hand: the column names, then one JSON line a row.
    stated = b'["problem", "solution"]["1+1", "2"]\n["2+2", "4"]\n'
    assert m.dataset_fingerprint(iter(rows)) == hashlib.sha256(stated).hexdigest()
    moved = [{"problem": "1+12", "solution": ""}, rows[1]]
    found = {m.dataset_fingerprint(some) for some in (rows, rows[::-1], moved)}
    assert len(found | {m.dataset_fingerprint(rows, columns=("solution", "problem"))}) == 4


def test_git_state(tmp_path):
    assert m.git_state(tmp_path) == {"commit": None, "dirty": None}
    (tmp_path / "a").write_text("1")
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init"], ["add", "a"], [*identity, "commit", "-m", "one"], ["tag", "v1"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "notes.txt").write_text("beside the code")
    clean = m.git_state(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert m.git_state(tmp_path) == clean | {"dirty": True}


FLAGS = ["--method", "pwopsd", "--model_name_or_path", "Qwen/Qwen3-4B", "--output_dir", "outputs/x"]


@pytest.fixture(scope="module")
def every_argument() -> dict[str, object]:
    """Every argument of ea_opsd_train.py's parser with its value in a run with the defaults."""
    return m.run_arguments(*parse_arguments([*FLAGS, "--use_cpu", "True"]))


def test_every_argument_may_change_or_may_not(tmp_path, every_argument):
    """Resume, checkpoint and --check agree about each; an argument that is new may not change."""
    arguments = every_argument | {"never_heard_of": 1}
    manifest = a_manifest(**arguments)
    folder = merged_folder(tmp_path / "m", **arguments)
    assert manifest["arguments"] == arguments | {"hub_token": None}
    m.check_merged(folder, expected_arguments=arguments)
    free = {"training": m.MAY_CHANGE["training"] | m.BY_CONTENT, "check": m.MAY_CHANGE["training"]}
    assert free["training"] <= every_argument.keys(), "a renamed argument must not stay in the table"
    for name in arguments:
        changed = arguments | {name: "another value"}
        differing = m.differences(m.identity(manifest), m.identity(manifest | {"arguments": changed}))
        assert [line.split(":")[0] for line in differing] == [name] * (name not in free["training"])
        if name in free["check"] | {"model_name_or_path"}:
            m.check_merged(folder, expected_arguments=changed)
            continue
        with pytest.raises(ArtefactError, match=f"{name} is .*, expected 'another value'") as raised:
            m.check_merged(folder, expected_arguments=changed)
        assert not isinstance(raised.value, m.IncompleteMergeError)


def test_what_decides_the_numbers_is_not_in_the_table(every_argument):
    method = {field.name for field in fields(MethodArguments)}
    others = {"max_steps", "dtype", "bf16", "lora_target_modules", "adam_beta2", "seed", "warmup_steps"}
    others |= {"dataset_revision", "rollout_top_k", "per_device_train_batch_size", "max_length"}
    assert method | others <= every_argument.keys() - m.MAY_CHANGE["training"] - m.BY_CONTENT


def test_evaluation_and_diagnostic_share_the_table():
    """Each of their arguments is in the regime or in the table, and no argument that is gone stays there."""
    evaluation, diagnostic = ({field.name for field in fields(c)} for c in (EvalConfig, BranchConfig))
    assert evaluation - set(REGIME_FIELDS) == m.MAY_CHANGE["evaluation"]
    assert m.MAY_CHANGE["diagnostic"] <= diagnostic - {"seed", "max_new_tokens"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ([], None),
        (["--learning_rate", "0.000005", "--report_to", "tensorboard", "--jsd_token_clip=0.050"], None),
        (["--lora_target_modules", "q_proj", "v_proj"], r"lora_target_modules is \['q_proj', 'k_proj'"),
        (["--adam_beta2", "0.95"], "adam_beta2 is 0.999, expected 0.95"),
        (["--dataset_revision", "v2"], "dataset_revision is None, expected 'v2'"),
    ],
)
def test_check_reads_the_launchers_complete_command_line(tmp_path, every_argument, changed, words):
    folder = str(merged_folder(tmp_path / "m", **every_argument))
    check = ["--check", folder, "--base_model", "Qwen/Qwen3-4B", "--step", "100", "--", *FLAGS, *changed]
    if words is None:
        assert merge_lora.main(check) == 0
    else:
        with pytest.raises(ArtefactError, match=words):
            merge_lora.main(check)


def test_check_compares_the_content_of_local_data(tmp_path, every_argument):
    data, row = tmp_path / "rows.jsonl", {"problem": "1+1", "solution": "2"}
    data.write_text(json.dumps(row))
    folder = merged_folder(tmp_path / "m", **every_argument | {"train_dataset": str(data)})
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest.replace("0" * 64, m.dataset_fingerprint([row])))
    check = ["--check", str(folder), "--", *FLAGS, "--train_dataset", str(data)]
    assert merge_lora.main(check) == 0
    data.write_text(json.dumps(row | {"solution": "3"}))
    with pytest.raises(ArtefactError, match=r"data is '.*', expected '.*'"):
        merge_lora.main(check)


def relist(change):
    """Return a damage that changes the sentinel's list of files."""

    def damage(folder: Path) -> None:
        sentinel = json.loads((folder / ".ready_for_eval").read_text())
        change(sentinel["files"])
        (folder / ".ready_for_eval").write_text(json.dumps(sentinel))

    return damage


SHARD = "model-0000{}-of-00002.safetensors"
DAMAGE = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), "it does not exist"),
    "no sentinel": (lambda f: (f / ".ready_for_eval").unlink(), "no sentinel"),
    "torn sentinel": (lambda f: os.truncate(f / ".ready_for_eval", 100), "not valid JSON"),
    "touched sentinel": (lambda f: (f / ".ready_for_eval").write_text("{}"), "is no sentinel"),
    "no shard": (lambda f: (f / SHARD.format(2)).unlink(), "00002.safetensors is missing"),
    "cut shard": (lambda f: os.truncate(f / SHARD.format(1), 999), "999 bytes instead of 1000"),
    "other bytes": (lambda f: (f / SHARD.format(1)).write_bytes(b"x" * 1000), "SHA-256 of model-00001"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "no run manifest"),
    "torn manifest": (lambda f: os.truncate(f / "manifest.json", 50), "not valid JSON"),
    "a path outside": (relist(lambda fs: fs.update({"../x": fs["README.md"]})), "lists '../x', which is not"),
    "an absolute path": (relist(lambda fs: fs.update({"/etc/x": fs["README.md"]})), "lists '/etc/x', which"),
    "no hash listed": (relist(lambda fs: fs["README.md"].pop("sha256")), "README.md.* not a file's entry"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_incomplete_folders_are_not_taken_for_another_runs(tmp_path, name):
    damage, words = DAMAGE[name]
    folder = merged_folder(tmp_path / "m")
    damage(folder)
    if name == "other bytes":
        m.check_merged(folder)
    with pytest.raises(m.IncompleteMergeError, match=words):
        m.check_merged(folder, hashes=True)


def test_identity_is_the_weights_not_the_notes(tmp_path):
    one = m.read_sentinel(merged_folder(tmp_path / "one"))["identity"]
    assert m.read_sentinel(merged_folder(tmp_path / "two", run_name="other"))["identity"] == one
    (tmp_path / "two" / "config.json").write_text('{"rope": 1}')
    sentinel = m.write_sentinel(tmp_path / "two", base_model="x", adapter="a", adapter_step=1)
    assert sentinel["identity"] != one


CACHED = "/home/x/.cache/huggingface/hub/models--Qwen--Qwen3-4B/snapshots/1cfa9a7"


@pytest.mark.parametrize(
    ("recorded", "given", "same"),
    [
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B", True),
        ("Qwen/Qwen3-4B", CACHED, True),
        ("{}/base", "{}/link", True),
        ("/gone/testbed/base_model", "/here/testbed/base_model", True),
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-8B", False),
        ("Qwen/Qwen3-8B", CACHED, False),
        ("/gone/a/base_model", "/gone/b/base_model", False),
        ("{}/base", "{}", False),
    ],
)
def test_two_names_of_one_model(tmp_path, recorded, given, same):
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    names = [name.format(tmp_path) for name in (recorded, given)]
    assert m.same_source(*names) is m.same_source(*names[::-1]) is same
    assert bool(m.base_differences({"base_model": names[0]}, names[1])) is not same


def test_checking_needs_no_torch():
    code = "import sys, merge_lora; sys.exit(bool({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


@pytest.fixture
def hashed(tmp_path, monkeypatch) -> list[str]:
    """The names of the files that were really read, with an empty cache that keeps new files too."""
    read, real = [], files.file_sha256
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_SETTLED_SECONDS", -1.0)
    monkeypatch.setattr(files, "file_sha256", lambda path: (read.append(path.name), real(path))[1])
    return read


def test_weights_are_hashed_once_until_they_change(tmp_path, hashed):
    folder = tmp_path / "base"
    folder.mkdir()
    shards = [folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for shard in shards:
        shard.write_bytes(shard.name.encode() * 2**16)
    first = m.model_sha256(folder)
    by_hand = "\n".join(f"{p.name} {hashlib.sha256(p.read_bytes()).hexdigest()}" for p in shards)
    assert first == hashlib.sha256(by_hand.encode()).hexdigest()
    assert m.model_sha256(folder) == first
    assert hashed == [shard.name for shard in shards], "the second time from the cache"
    (tmp_path / "link").symlink_to(folder)
    assert m.model_sha256(tmp_path / "link") == first
    assert len(hashed) == 2
    assert sorted(folder.iterdir()) == shards, "nothing is written into the model's folder"
    # One bit, the size and even the time stamp as before: the inode's change time tells.
    before = shards[1].stat()
    content = bytearray(shards[1].read_bytes())
    content[-1] ^= 1
    shards[1].write_bytes(content)
    os.utime(shards[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert m.model_sha256(folder) != first
    with pytest.raises(ArtefactError, match=r"no model\*\.safetensors"):
        m.model_sha256(tmp_path)


@pytest.mark.parametrize("cache", ["damaged", "a file in its place", "of a file that just changed"])
def test_without_a_usable_cache_the_weights_are_hashed_again(tmp_path, hashed, monkeypatch, cache):
    (tmp_path / "model.safetensors").write_bytes(b"w" * 2**20)
    if cache == "a file in its place":
        (tmp_path / "cache").touch()
    if cache == "of a file that just changed":
        monkeypatch.setattr(files, "_SETTLED_SECONDS", 1e9)
    first = m.model_sha256(tmp_path)
    for entry in (tmp_path / "cache").glob("pwopsd/*"):
        entry.write_text("{")
    assert m.model_sha256(tmp_path) == first
    assert len(hashed) == 2


def test_an_evaluation_is_of_the_weights_wherever_they_lie(tmp_path):
    base = tiny_base(tmp_path / "base")
    adapter = train_nothing(base, tmp_path / "run")
    merged = tmp_path / "run_merged"
    merge_lora.merge(str(base), adapter, merged)

    def facts(model: Path, **more):
        return check_model(EvalConfig(base_model=str(model), dataset="", output="", max_model_len=64, **more))

    moved = shutil.copytree(base, tmp_path / "elsewhere")
    assert facts(base).identity == facts(moved).identity
    assert facts(merged).identity == facts(shutil.move(merged, tmp_path / "there")).identity
    assert facts(moved, adapter=str(adapter)).adapter_identity
    scale_weights(moved)
    assert facts(base).identity != facts(moved).identity
    with pytest.raises(ArtefactError, match=r"another base model.*SHA-256"):
        facts(moved, adapter=str(adapter))
    scale_weights(tmp_path / "there")
    with pytest.raises(ArtefactError, match=r"the SHA-256 of model\.safetensors is not"):
        facts(tmp_path / "there")
