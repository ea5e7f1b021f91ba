"""Arguments of a vLLM engine: its model, adapter rank, CPU settings, advice on failure."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from opsd.checkpoints import CONFIG_NAME, read_adapter
from opsd.errors import ArtefactError, UsageError
from opsd.run_identity import read_json_object

# The ranks that vLLM has kernels for; an adapter of another rank uses the next larger one.
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def require_vllm() -> None:
    """Raise UsageError, which says what to install, where vLLM is missing."""
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
    from opsd.models import model_folder  # imports transformers, which a check for vLLM does not need

    return name if revision is None else str(model_folder(name, revision))


def lora_rank(folder: str) -> int:
    """Return the rank of the LoRA adapter in `folder`.

    Raises:
        ArtefactError: the folder holds no complete LoRA adapter, or one that vLLM would apply wrongly.
    """
    adapter = read_adapter(folder)
    config = read_json_object(adapter.path / CONFIG_NAME, what="adapter configuration", fields={"r": int})
    # vLLM reads one rank and one alpha from the configuration and ignores those of single modules.
    for key in ("rank_pattern", "alpha_pattern", "use_dora", "modules_to_save"):
        if config.get(key):
            raise ArtefactError(
                f"{folder} sets {key}, which vLLM does not apply; evaluate the merged checkpoint"
            )
    return config["r"]


def reserved_rank(rank: int) -> int:
    """Return the rank that the engine reserves for adapters of `rank`.

    Raises:
        UsageError: vLLM has no kernels for a rank that large.
    """
    if rank > _LORA_RANKS[-1]:
        raise UsageError(
            f"the adapter's rank is {rank}, but vLLM takes {_LORA_RANKS[-1]} at most; use merged weights"
        )
    return next(size for size in _LORA_RANKS if size >= rank)


def cpu_arguments() -> dict[str, Any]:
    """Return the engine arguments that differ without a GPU.

    No graphs: compiling takes half a minute. No chunked prefill: to split a prompt over steps, vLLM turns
    back the random generator of a seeded request, which PyTorch's CPU generator refuses; the engine dies.

    Raises:
        UsageError: VLLM_CPU_KVCACHE_SPACE is not a whole number of GiB.
    """
    space = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")
    if space and not space.isdigit():
        raise UsageError(f"VLLM_CPU_KVCACHE_SPACE is {space!r}, but must be a whole number of GiB")
    arguments: dict[str, Any] = {"enforce_eager": True, "enable_chunked_prefill": False}
    return arguments if space else arguments | {"kv_cache_memory_bytes": 1 << 30}


def worker_cores(workers: int) -> str:
    """Divide this process's cores among `workers` processes, as VLLM_CPU_OMP_THREADS_BIND takes them.

    By default vLLM gives each worker a NUMA node and refuses to start where there are fewer nodes.

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


def remedy(arguments: dict[str, Any], *, cpu: bool) -> str:
    """Say which of the engine's arguments to change when it fails, with their present values."""
    memory = f"gpu_memory_utilization (now {arguments['gpu_memory_utilization']}"
    if cpu:
        memory = f"VLLM_CPU_KVCACHE_SPACE (now {os.environ.get('VLLM_CPU_KVCACHE_SPACE') or '1'} GiB"
    # Only training has a flag for max_num_seqs.
    sequences = f"max_num_seqs (now {arguments['max_num_seqs']}), " if arguments["max_num_seqs"] else ""
    return (
        f"lower {memory}; raise it if the key-value cache is too small for one sequence), {sequences}"
        f"or max_model_len (now {arguments['max_model_len']}), which is the longest prompt and its new tokens"
    )
