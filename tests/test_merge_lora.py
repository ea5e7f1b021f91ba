"""merge_lora.py: the merged model is the adapter's model, and no mistake leaves a part of a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import merge_lora
from opsd.arguments import parse_arguments
from opsd.checkpoints import MARKER, mark_complete
from opsd.errors import ArtefactError, UsageError
from opsd.files import PARTIAL_MARK, atomic_write_json
from opsd.run_identity import (
    MANIFEST_NAME,
    SENTINEL_NAME,
    check_merged,
    model_sha256,
    read_manifest,
    run_arguments,
    run_manifest,
)

TEMPLATE = "{% for m in messages %}<u>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
KINDS = {
    "qwen3-tied": (Qwen3Config, Qwen3ForCausalLM, True),
    "qwen3-untied": (Qwen3Config, Qwen3ForCausalLM, False),
    "llama-untied": (LlamaConfig, LlamaForCausalLM, False),
}


def tiny_base(folder: Path, kind: str = "qwen3-tied", *, dtype: torch.dtype = torch.float32, **sizes) -> Path:
    """A random base model with a tokenizer, saved in `folder`."""
    config_class, model_class, tied = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**(SIZES | sizes), tie_word_embeddings=tied)).to(dtype)
    model.generation_config.update(top_k=20, do_sample=True, eos_token_id=1)
    model.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<p>", "<e>", "<u>", "<a>", *"0123456789+-= "])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<p>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    special = {"pad_token": "<p>", "unk_token": "<p>", "eos_token": "<e>"}
    special["additional_special_tokens"] = ["<u>", "<a>"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, chat_template=TEMPLATE, **special)
    tokenizer.save_pretrained(folder)
    return folder


def train_nothing(base: Path, run: Path, *flags: str, step: int = 100, targets=TARGETS, **lora) -> Path:
    """A checkpoint as the trainer leaves it, with random matrices; returns checkpoint-<step>."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, **lora))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    checkpoint = run / f"checkpoint-{step}"
    model.save_pretrained(checkpoint)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 150}))
    for name in ("optimizer.pt", "scheduler.pt"):
        (checkpoint / name).write_bytes(b"not read by a merge")
    atomic_write_json(run / MANIFEST_NAME, manifest_of(run.name, base, *flags))
    mark_complete(checkpoint)
    return checkpoint


def manifest_of(run_name: str, base: Path, *flags: str) -> dict:
    command = ["--method", "pwopsd", "--model_name_or_path", str(base), "--output_dir", run_name, *flags]
    arguments = run_arguments(*parse_arguments([*command, "--use_cpu", "True"]))
    return run_manifest(
        arguments,
        base_revision=None,
        base_weights=model_sha256(base),
        dataset_rows=10,
        dataset_sha256=merge_lora._data_sha256(arguments) or "0" * 64,
        world_size=4,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[Path, Path]:
    """(base folder, checkpoint folder) of a tiny tied Qwen3 in float32."""
    root = tmp_path_factory.mktemp("world")
    base = tiny_base(root / "base")
    return base, train_nothing(base, root / "outputs" / "tiny_pwopsd")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_merged_logits_equal_the_adapter_models(tmp_path, kind, dtype):
    base = tiny_base(tmp_path / "base", kind, dtype=dtype)
    checkpoint = train_nothing(base, tmp_path / "run")
    merge_lora.merge(str(base), checkpoint, tmp_path / "run_merged")
    plain, second, merged = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        for folder in (base, base, tmp_path / "run_merged")
    )
    assert merged.dtype is dtype
    assert type(merged) is KINDS[kind][1]
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(second, checkpoint)
        base_logits, expected, found = (m.eval()(ids).logits.float() for m in (plain, adapted, merged))
    # bfloat16 keeps 8 bits: one rounding of W' moves a logit by about 2^-8 of the logits' spread per layer.
    tolerance, spread = 1e-5 if dtype is torch.float32 else 0.04, expected.std()
    assert (found - expected).abs().max() < tolerance * spread.clamp(min=1.0) * 3
    assert (base_logits - expected).abs().max() > 0.5 * spread, "the adapter changes nothing"


def test_merged_matrices_are_float32_sums_cast_once(tmp_path):
    base = tiny_base(tmp_path / "base", dtype=torch.bfloat16)
    checkpoint = train_nothing(base, tmp_path / "run")
    merge_lora.merge(str(base), checkpoint, tmp_path / "run_merged")
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "run_merged"))
    lora = load_file(checkpoint / "adapter_model.safetensors")
    assert old.keys() == new.keys()
    for name, weight in new.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{stem}A.weight" in lora:
            delta = lora[f"{stem}B.weight"].float() @ lora[f"{stem}A.weight"].float()
            expected = (old[name].float() + 2.0 * delta).to(torch.bfloat16)
            torch.testing.assert_close(weight.float(), expected.float(), rtol=2**-8, atol=1e-6)
        else:
            assert torch.equal(weight, old[name]), f"{name} is not adapted, yet changed"


@pytest.fixture(scope="module")
def small_update(tmp_path_factory) -> tuple[Path, Path]:
    """(bfloat16 base, checkpoint) with an update of about a tenth of the spacing of its weights."""
    root = tmp_path_factory.mktemp("small")
    base = tiny_base(root / "base", dtype=torch.bfloat16)
    checkpoint = train_nothing(base, root / "run")
    file = checkpoint / "adapter_model.safetensors"
    weights = {name: w * (7e-5 if "lora_B" in name else 1) for name, w in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    mark_complete(checkpoint)
    return base, checkpoint


def nearest_bfloat16(value: torch.Tensor) -> torch.Tensor:
    """Round float64 to eight significant bits, in float64."""
    spacing = 2.0 ** (value.abs().log2().floor() - 7)
    return (value / spacing).round() * spacing


@pytest.mark.parametrize(
    ("how", "dtype", "tolerance"),
    [
        ({}, torch.bfloat16, 0.02),
        ({"dtype": "float32"}, torch.float32, 0.001),
        ({"rounding": "stochastic", "seed": 3}, torch.bfloat16, 0.05),
    ],
    ids=["nearest", "float32", "stochastic"],
)
def test_what_is_kept_of_a_small_update(small_update, tmp_path, caplog, how, dtype, tolerance):
    base, checkpoint = small_update
    out = tmp_path / "m"
    record = merge_lora.merge(str(base), checkpoint, out, **how)["merge"]
    old, new = (load_file(folder / "model.safetensors") for folder in (base, out))
    lora = {name: weight.double() for name, weight in load_file(checkpoint / WEIGHTS).items()}
    along = size = nearest = 0.0
    for name in record["matrices"]:
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        update, before = 2 * lora[f"{stem}B.weight"] @ lora[f"{stem}A.weight"], old[name].double()
        along += ((new[name].double() - before) * update).sum().item()
        nearest += ((nearest_bfloat16(before + update) - before) * update).sum().item()
        size += update.square().sum().item()
    assert nearest / size < 0.45
    assert record["kept"] == pytest.approx(along / size, abs=1e-4)
    assert record["kept"] == pytest.approx(1 if how else nearest / size, abs=tolerance)
    assert ("--dtype float32" in caplog.text) is not bool(how)
    assert f"| Update kept (projection) | {record['kept']} |" in (out / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype is dtype, "as it is evaluated"
    asked = [word for name, value in how.items() for word in (f"--{name}", str(value))]
    assert merge_lora.main(["--check", str(out), "--hashes", *asked]) == 0
    other = ["--dtype", "auto"] if dtype is torch.float32 else ["--rounding", "stochastic", "--seed", "4"]
    with pytest.raises(ArtefactError, match="was merged otherwise: "):
        merge_lora.main(["--check", str(out), *other])


def test_stochastic_rounding_is_reproducible_and_of_bfloat16(small_update, tmp_path):
    base, checkpoint = small_update
    merged = [
        merge_lora.merge(str(base), checkpoint, tmp_path / "m", rounding="stochastic", seed=seed)["identity"]
        for seed in (3, 3, 4)
    ]
    assert merged[0] == merged[1] != merged[2]
    options = {"dtype": "float32", "rounding": "stochastic"}
    refused(UsageError, "add --dtype bfloat16", tmp_path, base, checkpoint, **options)


def test_merged_folder_is_complete_and_says_what_it_is(world, tmp_path):
    base, checkpoint = world
    out = tmp_path / "tiny_pwopsd_merged"
    merge_lora.merge(str(base), checkpoint, out)
    merged = check_merged(out, expected_base_model=str(base), hashes=True)
    assert (merged["adapter_step"], merged["base_model"]) == (100, str(base))
    assert {"python", "torch", "peft"} <= merged["versions"].keys()
    assert merged["manifest"] == read_manifest(checkpoint.parent)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    card = (out / "README.md").read_text()
    assert "| Method | pwopsd |" in card
    assert "| Optimizer steps | 100 |" in card


def test_a_merge_killed_at_its_sentinel_is_incomplete_and_merged_again(world, tmp_path, monkeypatch):
    out = tmp_path / "m"
    with monkeypatch.context() as patch:
        patch.setattr(merge_lora, "write_sentinel", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge_lora.merge(str(world[0]), world[1], out)
    written = {path.name for path in out.iterdir()}
    (out / f".{SENTINEL_NAME}{PARTIAL_MARK}1-0").write_text("{")
    assert merge_lora.main(["--check", str(out)]) == 1
    merge_lora.merge(str(world[0]), world[1], out)
    assert merge_lora.main(["--check", str(out), "--hashes"]) == 0
    assert {path.name for path in out.iterdir()} == written | {SENTINEL_NAME}, "the sentinel comes last"


def scale_weights(base: Path) -> None:
    """Another model under the same path: every weight times 1.05."""
    weights = load_file(base / "model.safetensors")
    save_file({n: 1.05 * w for n, w in weights.items()}, base / "model.safetensors", {"format": "pt"})


def third_party(checkpoint: Path, folder: Path) -> Path:
    """Copy an adapter as another project leaves it."""
    shutil.copytree(checkpoint, folder)
    for name in ("trainer_state.json", MARKER):
        (folder / name).unlink()
    return folder


def refused(error: type, words: str, tmp_path: Path, base, checkpoint, **options) -> None:
    out = tmp_path / "refused_merged"
    with pytest.raises(error, match=words):
        merge_lora.merge(str(base), checkpoint, out, **options)
    assert not out.exists()
    assert not list(tmp_path.glob(".refused*")), "a part of a folder is left"


def test_the_weights_of_the_base_decide_and_for_third_parties_its_name(world, tmp_path):
    _, checkpoint = world
    moved = tiny_base(tmp_path / "moved")
    scaled = shutil.copytree(moved, tmp_path / "scaled")
    scale_weights(scaled)
    words = "another base model.* SHA-256"
    refused(ArtefactError, words, tmp_path, scaled, checkpoint, accept_base_name=True)
    merge_lora.merge(str(moved), checkpoint, tmp_path / "m")
    check_merged(tmp_path / "m", expected_base_model=str(moved), hashes=True)
    with pytest.raises(ArtefactError, match=r"SHA-256.*scaled"):
        check_merged(tmp_path / "m", expected_base_model=str(scaled))
    theirs = third_party(checkpoint, tmp_path / "theirs")
    refused(ArtefactError, "another base model: .*base.* expected .*moved", tmp_path, moved, theirs)
    merge_lora.merge(str(moved), theirs, tmp_path / "theirs_merged", accept_base_name=True)
    merged = check_merged(tmp_path / "theirs_merged", expected_run_name="theirs")
    assert merged["adapter_step"] is None
    with pytest.raises(ArtefactError, match="method is None, expected 'pwopsd'"):
        check_merged(tmp_path / "theirs_merged", expected_arguments={"method": "pwopsd"})


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_another_configuration_or_tokenizer_is_another_base(world, tmp_path, name):
    """A position scaling or a template that was edited since the training gives another model."""
    base = shutil.copytree(world[0], tmp_path / "base")
    with open(base / name, "a") as file:
        file.write(" ")
    refused(ArtefactError, "another base model.* SHA-256", tmp_path, base, world[1])


def drop(*parts: str):
    """Return a damage that removes the matrices of layer 1's up_proj whose names hold one of `parts`."""

    def damage(path: Path) -> None:
        lost = [f"layers.1.mlp.up_proj.{part}" for part in parts]
        save_file({k: v for k, v in load_file(path).items() if not any(x in k for x in lost)}, path)

    return damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.mark.parametrize(
    ("ours", "name", "damage", "words"),
    [
        (True, WEIGHTS, Path.unlink, "has no adapter_model.safetensors"),
        (True, WEIGHTS, flip_a_bit, "SHA-256 of adapter_model.safetensors"),
        (True, CONFIG, Path.unlink, "adapter_config.json is missing"),
        (True, "trainer_state.json", Path.unlink, "trainer_state.json is missing"),
        (True, ".complete", cut, "marker is damaged"),
        (True, "../manifest.json", Path.unlink, "no manifest.json beside it"),
        # A third-party adapter has no marker that says so.
        (False, WEIGHTS, cut, "cannot be loaded"),
        (False, WEIGHTS, lambda p: p.write_bytes(b""), "cannot be loaded"),
        (False, WEIGHTS, drop("lora_B"), r"1\.mlp\.up_proj\.lora_B\.weight is missing: wrong base"),
        (False, WEIGHTS, drop("lora_A", "lora_B"), r"lora_A\.weight is missing, .*lora_B\.weight is missing"),
        (False, CONFIG, Path.unlink, "no adapter configuration"),
        (False, CONFIG, cut, "not valid JSON"),
    ],
)
def test_damaged_checkpoints_are_refused(world, tmp_path, ours, name, damage, words):
    broken = shutil.copytree(world[1].parent, tmp_path / "damaged") / world[1].name
    if not ours:
        (broken / MARKER).unlink()
        (broken.parent / "manifest.json").unlink()
    damage(broken / name)
    refused(ArtefactError, words, tmp_path, world[0], broken)


def test_a_base_without_the_adapted_layers_is_refused(world, tmp_path):
    theirs = third_party(world[1], tmp_path / "theirs")
    shallow = tiny_base(tmp_path / "shallow", num_hidden_layers=1)
    words = r"layers\.1\..* belongs to no part of the model.* wrong base model"
    refused(ArtefactError, words, tmp_path, shallow, theirs, accept_base_name=True)


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=["dora", "full"]
)
def test_more_than_plain_lora_is_refused(tmp_path, options):
    base = tiny_base(tmp_path / "base", "qwen3-untied")
    refused(UsageError, "plain LoRA", tmp_path, base, train_nothing(base, tmp_path / "run", **options))


def test_inputs_and_links_to_themselves_are_never_replaced(world, tmp_path):
    base, checkpoint = world
    (tmp_path / "link").symlink_to(tmp_path / "link")
    before = {path: path.stat().st_mtime_ns for path in base.iterdir()}
    for target in (base, base.parent, checkpoint.parent, tmp_path / "link"):
        with pytest.raises(UsageError, match=r"would replace|is no folder"):
            merge_lora.merge(str(base), checkpoint, target)
    assert before == {path: path.stat().st_mtime_ns for path in base.iterdir()}


@pytest.mark.parametrize("manifest", [None, '{"name": "an extension", "version": 3}'])
def test_a_third_party_model_folder_is_never_replaced(world, tmp_path, manifest):
    """It has the file names of a merged folder. The check before a training refuses it too."""
    base, checkpoint = world
    theirs = shutil.copytree(base, tmp_path / "x_merged")
    if manifest:
        (theirs / "manifest.json").write_text(manifest)
    before = {path.name: path.read_bytes() for path in theirs.iterdir()}
    for attempt in (
        lambda: merge_lora.merge(str(base), checkpoint, theirs),
        lambda: merge_lora.main(["--check", str(theirs)]),
    ):
        with pytest.raises(UsageError, match=r"holds a model without a manifest\.json or \.ready"):
            attempt()
    assert before == {path.name: path.read_bytes() for path in theirs.iterdir()}


@pytest.mark.parametrize("target", ["empty", "absent", "merged"])
def test_a_linked_output_stays_a_link(world, tmp_path, target):
    """`x_merged` on a big disk: the folder behind the link is filled, or replaced."""
    base, checkpoint = world
    disk, out = tmp_path / "disk" / "models", tmp_path / "x_merged"
    out.symlink_to(disk)
    if target == "empty":
        disk.mkdir(parents=True)
    if target == "merged":
        merge_lora.merge(str(base), checkpoint, disk)
        (disk / "model.safetensors").write_bytes(b"")
        (disk / "model-00001-of-00002.safetensors").write_bytes(b"left from a larger model")
        assert merge_lora.main(["--check", str(out)]) == 1
    merge_lora.merge(str(base), checkpoint, out)
    assert out.is_symlink()
    check_merged(disk, hashes=True, expected_run_name="tiny_pwopsd")
    assert [path.name for path in disk.parent.iterdir()] == ["models"]
    assert [path.name for path in disk.glob("*.safetensors")] == ["model.safetensors"]


def test_a_renamed_checkpoint_is_refused_and_one_without_its_optimizer_merged(world, tmp_path):
    run = shutil.copytree(world[1].parent, tmp_path / "run")
    (run / world[1].name / "optimizer.pt").unlink()
    merge_lora.merge(str(world[0]), run / world[1].name, tmp_path / "m")
    check_merged(tmp_path / "m", expected_run_name="tiny_pwopsd", expected_step=100)
    renamed = (run / world[1].name).rename(run / "checkpoint-75")
    refused(ArtefactError, "was saved as checkpoint-100", tmp_path, world[0], renamed)


@pytest.mark.parametrize("side", ["base", "adapter"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_merges_that_are_not_finite_are_refused(world, tmp_path, side, value):
    base = shutil.copytree(world[0], tmp_path / "base")
    checkpoint = third_party(world[1], tmp_path / "theirs")
    file = base / "model.safetensors" if side == "base" else checkpoint / WEIGHTS
    weights = load_file(file)
    weights[next(key for key in weights if "norm" in key or "up_proj.lora_B" in key)].view(-1)[3] = value
    save_file(weights, file, metadata={"format": "pt"})
    words = "not finite in .*(norm|up_proj)"
    refused(ArtefactError, words, tmp_path, base, checkpoint, accept_base_name=True)


def test_command_line(world, tmp_path, capsys):
    base, checkpoint = world
    out = str(tmp_path / "tiny_pwopsd_merged")
    with pytest.raises(UsageError, match="--adapter, --output missing"):
        merge_lora.main(["--base_model", str(base)])
    assert merge_lora.main(["--check", out]) == 1
    assert merge_lora.main(["--base_model", str(base), "--adapter", str(checkpoint), "--output", out]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    check = ["--check", out, "--run_name", "tiny_pwopsd", "--step", "100", "--base_model", str(base)]
    assert merge_lora.main([*check, "--", "--method", "pwopsd", "--position_w_min=0.250"]) == 0
    for changed, words in (
        (["--run_name", "x"], "run_name is 'tiny_pwopsd', expected 'x'"),
        (["--step", "125"], "adapter step is 100, expected 125"),
        (["--", "--method", "opsd"], "method is 'pwopsd', expected 'opsd'"),
    ):
        with pytest.raises(ArtefactError, match=words):
            merge_lora.main([*check, *changed])
