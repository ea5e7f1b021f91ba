"""What a vLLM engine is built from: where it runs, its arguments, its adapter; what to say when it fails."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist

from opsd.errors import ArtefactError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# The ranks that vLLM has kernels for; an adapter of another rank uses the next larger one.
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_CPU_KV_BYTES = 1 << 30

Placement = Literal["uni", "external_launcher", "mp"]


def require_vllm() -> None:
    """Raise UsageError, naming what to install, where vLLM is missing."""
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "vLLM is not installed: `pip install -r requirements.txt` on a machine with a GPU, "
            "`python3 launchers/install.py --with-vllm` without one; or sample with transformers "
            "(--rollout hf, --engine hf)"
        )


def local_model(name: str, revision: str | None) -> str:
    """Return `name` as vLLM takes it: for a hub revision its own folder, so that no other is loaded.

    Raises:
        ArtefactError: the revision cannot be downloaded.
    """
    from opsd.models import model_folder

    return name if revision is None else str(model_folder(name, revision))


def on_cpu() -> bool:
    """Whether the installed vLLM runs on the CPU."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def placement(tensor_parallel_size: int) -> Placement:
    """Where the engine's workers run.

    "uni": in this process alone. "external_launcher": in the processes that a launcher started, this one
    among them, in groups of `tensor_parallel_size` neighbouring ranks; every rank builds its engine at the
    same time. "mp": in child processes of vLLM's own.

    Raises:
        UsageError: the ranks cannot be divided into such groups.
    """
    if tensor_parallel_size < 1:
        raise UsageError(f"the tensor parallel size is {tensor_parallel_size}, but must be at least 1")
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks == 1:
        return "uni" if tensor_parallel_size == 1 else "mp"
    if ranks % tensor_parallel_size:
        raise UsageError(
            f"{ranks} ranks cannot be divided into groups of {tensor_parallel_size} that share an engine: "
            f"choose a tensor parallel size that divides {ranks}"
        )
    return "external_launcher"


def launcher_environment() -> dict[str, str]:
    """RANK and LOCAL_RANK as vLLM's external launcher reads them, where the launcher did not set them."""
    rank = dist.get_rank()
    local = torch.cuda.current_device() if torch.cuda.is_available() else rank
    return {"RANK": os.environ.get("RANK", str(rank)), "LOCAL_RANK": os.environ.get("LOCAL_RANK", str(local))}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter folder and the rank that the engine reserves for it."""

    path: str
    max_rank: int


def read_adapter(folder: str, max_lora_rank: int | None) -> Adapter:
    """The adapter in `folder`, checked before the engine is built.

    Raises:
        ArtefactError: the folder holds no LoRA adapter, or one that vLLM would apply wrongly or not at all.
        UsageError: `max_lora_rank` is smaller than the adapter's rank.
    """
    path = Path(folder)
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{folder} holds no readable adapter_config.json: {error}") from error
    if not any((path / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
        raise ArtefactError(f"{folder} holds no adapter weights (adapter_model.safetensors)")
    if config.get("peft_type") != "LORA":
        raise ArtefactError(
            f"{folder} is a {config.get('peft_type')} adapter; vLLM evaluates LoRA: merge it instead"
        )
    # vLLM reads one rank and one alpha from the configuration and ignores the per-module ones.
    for key in ("rank_pattern", "alpha_pattern", "use_dora", "modules_to_save"):
        if config.get(key):
            raise ArtefactError(
                f"{folder} sets {key}, which vLLM does not apply: evaluate the merged checkpoint"
            )
    rank = int(config["r"])
    if rank > _LORA_RANKS[-1]:
        raise ArtefactError(f"{folder} has rank {rank}; vLLM goes up to {_LORA_RANKS[-1]}: merge it instead")
    if max_lora_rank is not None and max_lora_rank < rank:
        raise UsageError(f"max_lora_rank is {max_lora_rank}, but the adapter in {folder} has rank {rank}")
    wanted = max(rank, max_lora_rank or rank)
    return Adapter(
        str(path.resolve()), next(size for size in _LORA_RANKS if size >= min(wanted, _LORA_RANKS[-1]))
    )


def model_dtype(dtype: str, config: PreTrainedConfig) -> str:
    """vLLM's dtype argument. "auto" is the checkpoint's own; vLLM's would turn float32 into bfloat16."""
    own = getattr(config, "dtype", None)
    if dtype != "auto" or own is None:
        return dtype
    return str(own).removeprefix("torch.")


def cpu_arguments() -> dict[str, Any]:
    """What differs without a GPU: no graphs (compiling takes half a minute), 1 GiB of cache unless set, and
    prompts that enter a step whole: to take a part of one, vLLM turns back the random generator of a seeded
    request, which PyTorch's CPU generator refuses, and the engine dies.

    Raises:
        UsageError: VLLM_CPU_KVCACHE_SPACE is not a whole number of GiB.
    """
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")
    if space and not space.isdigit():
        raise UsageError(f"VLLM_CPU_KVCACHE_SPACE is {space!r}, but must be a whole number of GiB")
    arguments: dict[str, Any] = {"enforce_eager": True, "enable_chunked_prefill": False}
    return arguments if space else arguments | {"kv_cache_memory_bytes": _CPU_KV_BYTES}


def worker_cores(workers: int) -> str:
    """Divide this process's cores among `workers` processes, as VLLM_CPU_OMP_THREADS_BIND takes them.

    Left to itself, vLLM gives each worker a NUMA node and refuses to start where there are fewer nodes.

    Raises:
        UsageError: there are fewer cores than workers.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < workers:
        raise UsageError(
            f"the tensor parallel size is {workers}, but this process may use only {len(cores)} CPU cores; "
            "without a GPU every worker needs one"
        )
    return "|".join(",".join(map(str, cores[worker::workers])) for worker in range(workers))


def remedy(*, cpu: bool, gpu_memory_utilization: float, max_model_len: int, max_num_seqs: int | None) -> str:
    """Which settings to change when the engine fails, with their present values."""
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE") or "1"
    memory = (
        f"VLLM_CPU_KVCACHE_SPACE (now {space} GiB"
        if cpu
        else f"gpu_memory_utilization (now {gpu_memory_utilization}"
    )
    # Only training has a flag for the sequences in flight; without it there is nothing to lower.
    sequences = "" if max_num_seqs is None else f"max_num_seqs (now {max_num_seqs}), "
    return (
        f"lower {memory}; raise it if the key-value cache is too small for one sequence), {sequences}"
        f"or max_model_len (now {max_model_len}), which is the longest prompt and its new tokens"
    )
