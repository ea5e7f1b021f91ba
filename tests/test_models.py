"""opsd/models.py: what is loaded is what the folder says, for every program, or the folder is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, normalizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

import branch_viability
import ea_opsd_train
import evaluate_math
import merge_lora
from opsd.errors import ArtefactError
from opsd.evaluation.results import load_result
from opsd.models import PROBE, check_round_trip, load_causal_lm, load_tokenizer
from opsd.prompts import encode_evaluation, encode_student, encode_teacher, render_evaluation
from tests.bad_input_cases import World, branch, build_world, evaluate, merge, train
from tests.rollout.vllm_models import config_of, needs_vllm
from tests.test_merge_lora import train_nothing
from tests.test_prompts import DEEPSEEK, OLMO3, QWEN3

BASE = Path(__file__).resolve().parent.parent / "testbed" / "base_model"
BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"


def token(content: str) -> dict:
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content} | flags


# Base model -> (architecture, the fields of its own tokenizer_config.json, chat template).
FORMS = {
    "dsr1": (
        "llama",
        {
            "add_bos_token": True, "add_eos_token": False, "bos_token": token(BOS),
            "clean_up_tokenization_spaces": False, "eos_token": token("<|im_end|>"), "legacy": True,
            "model_max_length": 16384, "pad_token": token("<|im_end|>"), "sp_model_kwargs": {},
            "unk_token": None, "tokenizer_class": "LlamaTokenizerFast",
        },
        DEEPSEEK,
    ),
    "qwen3": (
        "qwen3",
        {
            "add_bos_token": False, "add_prefix_space": False, "bos_token": None,
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "errors": "replace",
            "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "model_max_length": 131072,
            "pad_token": "<|endoftext|>", "split_special_tokens": False, "unk_token": None,
            "tokenizer_class": "Qwen2Tokenizer",
        },
        QWEN3,
    ),
    "olmo3": (
        "olmo3",
        {
            "add_prefix_space": False, "bos_token": "<|endoftext|>", "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>", "model_max_length": 65536, "pad_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>", "tokenizer_class": "GPT2Tokenizer",
        },
        OLMO3,
    ),
}  # fmt: skip
_V5 = {"backend": "tokenizers", "extra_special_tokens": ["<|im_start|>"]}
_V5 |= FORMS["olmo3"][1] | {"tokenizer_class": "TokenizersBackend"}
FORMS["olmo3-v5"] = ("olmo3", _V5, OLMO3)


def tokenizer_files(folder: Path, form: str) -> Tokenizer:
    """Write the small world's tokenizer.json beside the form's configuration; return what it holds."""
    raw = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    if form == "dsr1":
        raw.add_special_tokens([BOS])
        raw.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, raw.token_to_id(BOS))]
        )
    raw.save(str(folder / "tokenizer.json"))
    _, settings, template = FORMS[form]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    return raw


def base_of(form: str, folder: Path) -> tuple[Path, Tokenizer]:
    """A random model of the form's architecture with its tokenizer, and the tokenizer.json's content."""
    config = config_of(FORMS[form][0], False)
    folder.mkdir()
    raw = tokenizer_files(folder, form)
    config.vocab_size, config.max_position_embeddings = raw.get_vocab_size(), 2048
    config.eos_token_id = raw.token_to_id("<|im_end|>")
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0)
    model.generation_config.update(eos_token_id=config.eos_token_id, pad_token_id=0)
    model.save_pretrained(folder)
    return folder, raw


@pytest.mark.parametrize("form", FORMS)
def test_each_base_models_folder_keeps_spaces_and_has_one_beginning(form: str, tmp_path: Path) -> None:
    """DSR1's came back as 'Compute36+35'; Qwen3's ids were not tokenizer.json's."""
    folder, raw = base_of(form, tmp_path / "base")
    tokenizer = load_tokenizer(str(folder))
    problem, solution = "Compute 36+35.\n\n(a)  naïve", "It is\t71: $\\boxed{71}$."
    for ids in (
        encode_student(tokenizer, problem),
        encode_teacher(tokenizer, problem, solution),
        encode_evaluation(tokenizer, problem),
    ):
        text = tokenizer.decode(ids)
        assert problem in text
        assert ids == raw.encode(text, add_special_tokens=False).ids
        assert ids.count(raw.token_to_id(BOS)) == (form == "dsr1")
    assert (tokenizer.eos_token, tokenizer.bos_token or None) == (
        "<|im_end|>",
        {"dsr1": BOS, "qwen3": None}.get(form, "<|endoftext|>"),
    )
    own = AutoTokenizer.from_pretrained(folder)
    if own(PROBE, add_special_tokens=False)["input_ids"] != raw.encode(PROBE, add_special_tokens=False).ids:
        with pytest.raises(ArtefactError, match=r'(turns|splits) "Let x = 36\+35.* into '):
            check_round_trip(own, raw, str(folder))
    else:
        assert form.startswith("olmo3"), "transformers mends this class now: load_tokenizer may trust it"


def merged_and_judged(form: str, tmp_path: Path, engine: str) -> None:
    base, raw = base_of(form, tmp_path / "base")
    merged = tmp_path / "run_merged"
    merge_lora.merge(str(base), train_nothing(base, tmp_path / "run"), merged)
    own = AutoTokenizer.from_pretrained(merged)
    check_round_trip(own, raw, "AutoTokenizer")
    assert (own.eos_token, own.chat_template) == ("<|im_end|>", FORMS[form][2])

    (tmp_path / "sums.jsonl").write_text('{"problem": "Compute 36+35, please.", "answer": "71"}\n')
    words = {
        "base_model": merged, "dataset": "sums", "dataset_path": tmp_path / "sums.jsonl", "val_n": 1,
        "output": tmp_path / "r.json", "engine": engine, "max_new_tokens": 48, "grading_workers": 1,
        "temperature": 0.0,
    }  # fmt: skip
    assert evaluate_math.main([word for n, v in words.items() for word in (f"--{n}", str(v))]) == 0
    found = load_result(tmp_path / "r.json")["results"][0]["generations"][0]["full_generation"]
    prompt = render_evaluation(own, "Compute 36+35, please.")
    ids = torch.tensor([raw.encode(prompt, add_special_tokens=False).ids])
    model = AutoModelForCausalLM.from_pretrained(merged).eval()
    output = model.generate(ids, do_sample=False, max_new_tokens=48)[0, ids.shape[1] :]
    assert found == raw.decode(output.tolist(), skip_special_tokens=True)
    assert " " in found, "a text without spaces shows nothing"


@pytest.mark.parametrize("form", FORMS)
def test_merged_folders_are_evaluated_with_their_tokenizer_json(form: str, tmp_path: Path) -> None:
    merged_and_judged(form, tmp_path, "hf")


@pytest.mark.vllm
@needs_vllm
def test_vllm_gives_dsr1s_texts_with_their_spaces(tmp_path: Path) -> None:
    merged_and_judged("dsr1", tmp_path, "vllm")


OTHER_LETTER = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("x", "y")])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decoder": decoders.Fuse()}, "LetĠx"),
        ({"normalizer": normalizers.Replace(" ", ""), "decoder": OTHER_LETTER}, "Lety=36"),
        ({"normalizer": normalizers.Lowercase()}, "let x"),
    ],
)
def test_a_tokenizer_that_changes_texts_is_refused(tmp_path: Path, changes: dict, words: str) -> None:
    folder = shutil.copytree(BASE, tmp_path / "base")
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for name, part in changes.items():
        setattr(raw, name, part)
    raw.save(str(folder / "tokenizer.json"))
    with pytest.raises(ArtefactError, match=rf'turns "Let x .* into "{words}'):
        load_tokenizer(str(folder))


def test_a_hub_id_is_read_from_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache as a download leaves it, without a connection."""
    import huggingface_hub.constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "models--org--distill"
    (model / "snapshots").mkdir(parents=True)
    base_of("dsr1", model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    tokenizer = load_tokenizer("org/distill")
    assert tokenizer.decode(tokenizer("a b", add_special_tokens=False)["input_ids"]) == "a b"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


NORM = "model.layers.0.input_layernorm.weight"


def changed(folder: Path, change: Callable[[dict], object]) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


PROGRAMS = {
    "train": lambda w, base: ea_opsd_train.main(train(w, model_name_or_path=base)),
    "merge": lambda w, base: merge_lora.main(merge(w, "--accept_base_name", base_model=base)),
    "evaluate": lambda w, base: evaluate_math.main(evaluate(w, base_model=base)),
    "vllm": lambda w, base: evaluate_math.main(evaluate(w, base_model=base, engine="vllm")),
    "diagnostic": lambda w, base: branch_viability.main(branch(w, model_name_or_path=base, max_new_tokens=8)),
}


@pytest.mark.parametrize("program", [*PROGRAMS])
def test_every_program_refuses_a_base_that_lacks_a_tensor(
    world: World, tmp_path: Path, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers fills it with random numbers, vLLM with what the memory held."""
    if program == "vllm":
        pytest.importorskip("vllm")
        monkeypatch.setattr("opsd.rollout.vllm.VLLMEngine.__init__", lambda *_, **__: pytest.fail("started"))
    w = World(world.root, tmp_path)
    base = w.copy(world.base, lambda folder: changed(folder, lambda weights: weights.pop(NORM)))
    with pytest.raises(ArtefactError, match=rf"do not fit its config\.json: {NORM} is missing"):
        PROGRAMS[program](w, base)
    assert not list(tmp_path.glob("*_merged"))
    assert not (tmp_path / "r.json").exists()


def test_other_shapes_are_refused_and_unused_weights_named(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = shutil.copytree(world.base, tmp_path / "base")
    changed(base, lambda weights: weights.update(extra=torch.zeros(2)))
    load_causal_lm(str(base), dtype="auto")  # its LM head is tied: no file holds one
    assert "holds weights that the model does not use: extra" in caplog.text
    changed(base, lambda weights: weights.update({NORM: torch.zeros(3, 3)}))
    words = rf"{NORM} is 3 x 3, not 32, extra belongs to no part"
    for device in (None, "meta"):
        with pytest.raises(ArtefactError, match=words):
            load_causal_lm(str(base), dtype="auto", device_map=device)
