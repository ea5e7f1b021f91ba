"""What vLLM does to the process that it lives in, undone.

An engine in the trainer's own process moves the global random state, sets thread counts, replaces
`torch.set_num_threads`, writes some twenty environment variables (LOCAL_WORLD_SIZE and LD_PRELOAD among
them), installs a log-record factory, freezes the garbage collector's heap, rewrites transformers' own model
class when it runs a model through its Transformers backend, and destroys the default process group when it
shuts down. Training must not notice any of this.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch

# They warn of a seed that is put back, a tokenizer that is not needed, threads that are left alone and, at
# every push, of layers that rightly received nothing.
_CHATTY = (
    "vllm.engine.arg_utils",
    "vllm.renderers.base",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.model_executor.model_loader.reload.layerwise",
)


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    return (lambda: getattr(owner, name)), (lambda value: setattr(owner, name, value))


# (read, write) of state that the engine keeps a value of its own for. vLLM's CPU worker replaces three of
# torch's functions; the thread count is set below the one that it replaces.
_SWAPPED: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    _attribute(torch, "set_num_threads"),
    _attribute(torch.accelerator, "synchronize"),
    _attribute(torch.accelerator, "empty_cache"),
    (torch.get_num_threads, torch._C.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (logging.getLogRecordFactory, logging.setLogRecordFactory),
)


def _kept_settings() -> list[Callable[[], object]]:
    """One function per piece of state that is only put back: what each calls restores it as it is now."""
    numpy_state, python_state, torch_state = np.random.get_state(), random.getstate(), torch.get_rng_state()
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    httpx_level, root_level, root_handlers = (
        logging.getLogger("httpx").level,
        logging.root.level,
        list(logging.root.handlers),
    )
    restore: list[Callable[[], object]] = [
        lambda: np.random.set_state(numpy_state),
        lambda: random.setstate(python_state),
        lambda: torch.set_rng_state(torch_state),
        lambda: torch.set_default_dtype(dtype),
        lambda: torch.set_grad_enabled(grad),
        lambda: _set_level(logging.getLogger("httpx"), httpx_level),
        lambda: _set_level(logging.root, root_level),
        lambda: logging.root.handlers.__setitem__(slice(None), root_handlers),
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        cuda_states, cuda_device = torch.cuda.get_rng_state_all(), torch.cuda.current_device()
        restore.append(lambda: torch.cuda.set_rng_state_all(cuda_states))
        restore.append(lambda: torch.cuda.set_device(cuda_device))
    if hasattr(os, "sched_getaffinity"):
        cores = os.sched_getaffinity(0)
        restore.append(lambda: os.sched_getaffinity(0) == cores or os.sched_setaffinity(0, cores))
    if gc.get_freeze_count() == 0:
        restore.append(gc.unfreeze)
    return restore


class EngineState:
    """The engine's side of the process state.

    `with state:` gives the engine its own environment variables, torch functions, thread count, matmul
    precision and log-record factory, as it left them last, and afterwards leaves the caller's exactly as they
    were, with the random state of torch (CPU and CUDA), numpy and Python, the default dtype, gradient mode,
    CUDA device, CPU affinity and the root logger.

    The engines of a process share these values: vLLM's CPU attention gives wrong results, silently, to an
    engine that runs with another thread count than an earlier one did.

    Args:
        environment: variables that hold while the engine runs.
    """

    _engines: ClassVar[list[Any] | None] = None  # a value for each of _SWAPPED

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._changes: dict[str, str | None] = dict(environment or {})
        self._stack: list[contextlib.AbstractContextManager[None]] = []

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        kept, callers, before = _kept_settings(), [read() for read, _ in _SWAPPED], dict(os.environ)
        _set_environment(before | self._changes)
        for (_, write), value in zip(_SWAPPED, EngineState._engines or callers, strict=True):
            write(value)
        entered = dict(os.environ)
        try:
            yield
        finally:
            after = dict(os.environ)
            for name in entered.keys() | after.keys():
                if entered.get(name) != after.get(name):
                    self._changes[name] = after.get(name)
            EngineState._engines = [read() for read, _ in _SWAPPED]
            _set_environment(before)
            for (_, write), value in zip(_SWAPPED, callers, strict=True):
                write(value)
            for put_back in kept:
                put_back()

    def __enter__(self) -> EngineState:
        context = self._entered()
        context.__enter__()
        self._stack.append(context)
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.pop().__exit__(*error)


def _set_environment(wanted: Mapping[str, str | None]) -> None:
    for name in os.environ.keys() | wanted.keys():
        value = wanted.get(name)
        if value is None:
            os.environ.pop(name, None)
        elif os.environ.get(name) != value:
            os.environ[name] = value


def quiet_loggers() -> None:
    """Warnings and errors only, through the caller's own logging, less what this project does on purpose."""
    logging.getLogger("vllm").setLevel(logging.WARNING)
    # An engine that dies writes all that it was computing, some 30 kB, over the line that says why.
    logging.getLogger("vllm.logging_utils.dump_input").setLevel(logging.CRITICAL)
    for name in _CHATTY:
        chatty = logging.getLogger(name)
        if _is_error not in chatty.filters:
            chatty.addFilter(_is_error)


def _set_level(named: logging.Logger, level: int) -> None:
    """Setting a level empties the caches of all loggers, so only where it is another."""
    if named.level != level:
        named.setLevel(level)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextlib.contextmanager
def private_model_classes() -> Iterator[None]:
    """Keeps vLLM's Transformers backend from rewriting the model class that the trainer uses too.

    For an architecture without a vLLM implementation of its own (Olmo3), vLLM decorates transformers' class
    in place: from then on that class cannot be built or called outside vLLM. Within this context it decorates
    and builds a subclass instead.
    """
    from transformers import AutoModel
    from vllm.model_executor.models.transformers.base import Base

    decorate = Base._decorate_cls_for_torch_compile
    registered = []

    def decorate_subclass(self: Any, cls: type, **kwargs: Any) -> None:
        own = type(cls.__name__, (cls,), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})
        decorate(self, cls=own, **kwargs)
        AutoModel.register(type(self.config), own, exist_ok=True)
        registered.append(type(self.config))

    Base._decorate_cls_for_torch_compile = decorate_subclass
    try:
        yield
    finally:
        Base._decorate_cls_for_torch_compile = decorate
        for config_class in registered:
            AutoModel._model_mapping._extra_content.pop(config_class, None)


def take_down_groups(*, group_is_callers: bool, others_alive: bool) -> None:
    """Undo vLLM's process groups, but neither the caller's default group nor those of another engine here."""
    from vllm import envs
    from vllm.distributed import parallel_state

    envs.disable_envs_cache()
    if not others_alive:
        parallel_state.destroy_model_parallel()
        if group_is_callers:
            if parallel_state._WORLD is not None:
                parallel_state._WORLD.destroy()
            parallel_state._WORLD = parallel_state._NODE_COUNT = None
        else:
            parallel_state.destroy_distributed_environment()
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def groups_taken_down_with_care(*, group_is_callers: bool, others_alive: bool) -> Iterator[None]:
    """Within it an engine's shutdown does `take_down_groups` instead of destroying the default group."""
    from vllm.v1.engine import core

    tear_down = core.cleanup_dist_env_and_memory
    core.cleanup_dist_env_and_memory = lambda *_: take_down_groups(
        group_is_callers=group_is_callers, others_alive=others_alive
    )
    try:
        yield
    finally:
        core.cleanup_dist_env_and_memory = tear_down
