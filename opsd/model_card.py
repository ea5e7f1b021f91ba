"""The README.md of a merged folder: what was trained, on what, how, and how to check it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from opsd.errors import printable

_ARGUMENTS = (
    "learning_rate", "max_steps", "lora_r", "lora_alpha", "temperature", "position_w_min", "position_tau",
    "position_s", "position_global_reduction", "loss_scope", "rollout", "max_completion_length", "seed",
)  # fmt: skip
_TEMPLATE = """---
library_name: transformers
base_model: {base}
tags: [on-policy-self-distillation, math, {method}]
---

# {title}

LoRA adapter merged into its base model: W + (alpha / r) B A, formed in float32 and cast once. Loads in
transformers (AutoModelForCausalLM) and vLLM. The base model's licence applies.

| | |
| --- | --- |
{rows}

`manifest.json` holds every argument of the run, `.ready_for_eval` the size and SHA-256 of each file;
`python merge_lora.py --check THIS_FOLDER --hashes` compares them.
"""


def model_card(
    manifest: Mapping[str, Any], *, adapter_step: int | None, merge: Mapping[str, Any] | None = None
) -> str:
    """Return Markdown with the front matter that model hubs read, from the training run's manifest.

    `merge` says how the weights were rounded and how much of the update is left.
    """
    dataset, git = manifest["dataset"], manifest.get("git") or {}
    shown = {
        "Method": manifest["method"],
        "Base model": manifest["base_model"],
        "Base revision": manifest.get("base_revision"),
        "Optimizer steps": adapter_step,
        "Merged weights": merge and f"{merge['dtype']}, rounded to {merge['rounding']}",
        "Update kept (projection)": merge and merge["kept"],
        "Sequences per step": manifest["effective_batch"] or None,
        "Training data": dataset.get("name"),
        "Problems": dataset.get("rows"),
        "Data fingerprint (SHA-256)": dataset.get("sha256"),
        **{name: manifest["arguments"].get(name) for name in _ARGUMENTS},
        "Code": git.get("commit"),
        "Code with local changes": git.get("dirty"),
        "Trained with": ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
    }

    def cell(value: object) -> str:
        return printable(value).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")

    rows = [f"| {name} | {cell(value)} |" for name, value in shown.items() if value is not None]
    base, method = (json.dumps(manifest[key]) for key in ("base_model", "method"))
    return _TEMPLATE.format(base=base, method=method, title=cell(manifest["run_name"]), rows="\n".join(rows))
