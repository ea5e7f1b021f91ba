"""The README.md of a merged folder: what was trained, on what, how, and how to check it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from opsd.errors import printable

_SHOWN_ARGUMENTS = (
    "learning_rate",
    "max_steps",
    "lora_r",
    "lora_alpha",
    "temperature",
    "position_w_min",
    "position_tau",
    "position_s",
    "position_global_reduction",
    "loss_scope",
    "rollout",
    "max_completion_length",
    "seed",
)


def model_card(manifest: Mapping[str, Any], *, adapter_step: int | None) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        manifest: the training run's (opsd/run_identity.py).
        adapter_step: optimizer steps behind the merged adapter.
    """
    dataset = manifest["dataset"]
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    git = manifest.get("git") or {}
    arguments = manifest["arguments"]
    rows = [
        ("Method", manifest["method"]),
        ("Base model", manifest["base_model"]),
        ("Base revision", manifest.get("base_revision")),
        ("Optimizer steps", adapter_step),
        ("Sequences per step", manifest["effective_batch"] or None),
        ("Training data", dataset.get("name")),
        ("Problems", dataset.get("rows")),
        ("Data fingerprint (SHA-256)", dataset.get("sha256")),
        *((name, arguments[name]) for name in _SHOWN_ARGUMENTS if name in arguments),
        (
            "Code",
            git.get("commit") and f"{git['commit']}{' (with local changes)' if git.get('dirty') else ''}",
        ),
        ("Trained with", versions),
    ]
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows if value is not None)
    return f"""---
library_name: transformers
base_model: {json.dumps(str(manifest["base_model"]))}
tags: [on-policy-self-distillation, math, {json.dumps(str(manifest["method"]))}]
---

# {_cell(manifest["run_name"])}

LoRA adapter merged into its base model: W + (alpha / r) B A, formed in float32 and cast once. Loads with
`AutoModelForCausalLM.from_pretrained` and with vLLM. The base model's licence applies.

| | |
| --- | --- |
{table}

`manifest.json` holds every argument of the run, `.ready_for_eval` the size and SHA-256 of each file;
`python merge_lora.py --check THIS_FOLDER --hashes` compares them.
"""


def _cell(value: object) -> str:
    return printable(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
