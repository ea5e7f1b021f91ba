"""Restore the process state that vLLM changes.

An engine in the trainer's own process changes the global random state and thread counts, replaces
`torch.set_num_threads`, writes some twenty environment variables (LOCAL_WORLD_SIZE and LD_PRELOAD among
them), installs a log-record factory, freezes the garbage collector's heap, changes transformers' own model
class when it runs a model through its Transformers backend, and destroys the default process group when it
shuts down. None of this may reach the training.
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

# They warn of a seed that is restored, a tokenizer that is not needed, threads that are not changed and, at
# every push, of layers that receive nothing because they have no adapter.
_NOISY = (
    "vllm.engine.arg_utils",
    "vllm.renderers.base",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.gpu_model_runner",
    "vllm.model_executor.model_loader.reload.layerwise",
)


def _attribute(owner: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    return (lambda: getattr(owner, name)), (lambda value: setattr(owner, name, value))


# (read, write) of state of which the engine has a value of its own. vLLM's CPU worker replaces three of
# torch's functions; the thread count is set through the function below the one that it replaces.
_SWAPPED: tuple[tuple[Callable[[], Any], Callable[[Any], object]], ...] = (
    _attribute(torch, "set_num_threads"),
    _attribute(torch.accelerator, "synchronize"),
    _attribute(torch.accelerator, "empty_cache"),
    (torch.get_num_threads, torch._C.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (logging.getLogRecordFactory, logging.setLogRecordFactory),
)


def _restorers() -> list[Callable[[], object]]:
    """Return one function per piece of state that is only restored; each restores it as it is now."""
    httpx = logging.getLogger("httpx")
    kept: list[tuple[Callable[[Any], object], Any]] = [
        (np.random.set_state, np.random.get_state()),
        (random.setstate, random.getstate()),
        (torch.set_rng_state, torch.get_rng_state()),
        (torch.set_default_dtype, torch.get_default_dtype()),
        (torch.set_grad_enabled, torch.is_grad_enabled()),
        (httpx.setLevel, httpx.level),
        (logging.root.setLevel, logging.root.level),
        (lambda handlers: logging.root.handlers.__setitem__(slice(None), handlers), [*logging.root.handlers]),
    ]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        kept.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
        kept.append((torch.cuda.set_device, torch.cuda.current_device()))
    if hasattr(os, "sched_getaffinity"):
        kept.append((_set_cores, os.sched_getaffinity(0)))
    if gc.get_freeze_count() == 0:
        kept.append((lambda _: gc.unfreeze(), None))
    return [lambda write=write, value=value: write(value) for write, value in kept]


class EngineState:
    """The engine's values of the process state, separate from the caller's.

    Within `with state.active():` the engine has its own environment variables, torch functions, thread count,
    matmul precision and log-record factory, as it left them last. Afterwards the caller's are exactly as they
    were, as are the random state of torch (CPU and CUDA), numpy and Python, the default dtype, gradient mode,
    CUDA device, CPU affinity and the root logger.

    The engines of a process share these values: vLLM's CPU attention gives wrong results, silently, to an
    engine that runs with another thread count than an earlier one did.

    Args:
        environment: variables that are set while the engine runs.
    """

    _engines: ClassVar[list[Any] | None] = None  # a value for each of _SWAPPED

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._changes: dict[str, str | None] = dict(environment)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Switch to the engine's state, and back on exit."""
        restorers, callers, before = _restorers(), [read() for read, _ in _SWAPPED], dict(os.environ)
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
            for restore in restorers:
                restore()


def _set_cores(cores: set[int]) -> None:
    if os.sched_getaffinity(0) != cores:  # setting it may be forbidden
        os.sched_setaffinity(0, cores)


def _set_environment(wanted: Mapping[str, str | None]) -> None:
    for name in os.environ.keys() | wanted.keys():
        value = wanted.get(name)
        if value is None:
            os.environ.pop(name, None)
        elif os.environ.get(name) != value:
            os.environ[name] = value


def quiet_loggers() -> None:
    """Log vLLM's warnings and errors only, without those about what this project does on purpose."""
    logging.getLogger("vllm").setLevel(logging.WARNING)
    # An engine that dies logs all that it was computing, some 30 kB, before the line that says why.
    logging.getLogger("vllm.logging_utils.dump_input").setLevel(logging.CRITICAL)
    for name in _NOISY:
        logging.getLogger(name).addFilter(_is_error)  # which is added once only


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextlib.contextmanager
def private_model_classes() -> Iterator[None]:
    """Keep vLLM's Transformers backend from changing the model class that the trainer uses too.

    For an architecture without a vLLM implementation of its own (Olmo3), vLLM decorates transformers' class
    in place: from then on that class cannot be built or called outside vLLM. Within this context it decorates
    and builds a subclass instead.
    """
    from transformers import AutoModel
    from vllm.model_executor.models.transformers import base

    backend: Any = base.Base
    decorate = backend._decorate_cls_for_torch_compile
    registered = []

    def decorate_subclass(self: Any, cls: type, **kwargs: Any) -> None:
        own = type(cls.__name__, (cls,), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})
        decorate(self, cls=own, **kwargs)
        AutoModel.register(type(self.config), own, exist_ok=True)
        registered.append(type(self.config))

    backend._decorate_cls_for_torch_compile = decorate_subclass
    try:
        yield
    finally:
        backend._decorate_cls_for_torch_compile = decorate
        for config_class in registered:
            AutoModel._model_mapping._extra_content.pop(config_class, None)


def destroy_groups(*, group_is_callers: bool, others_alive: bool) -> None:
    """Destroy vLLM's process groups, except the caller's default group and those of another engine here."""
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


def shut_down(engine_core: Any, *, group_is_callers: bool, others_alive: bool) -> None:
    """Shut an engine down with `destroy_groups`, where vLLM itself would destroy the default group."""
    from vllm.v1.engine import core

    module: Any = core
    original = module.cleanup_dist_env_and_memory
    module.cleanup_dist_env_and_memory = lambda *_: destroy_groups(
        group_is_callers=group_is_callers, others_alive=others_alive
    )
    try:
        engine_core.shutdown()
    finally:
        module.cleanup_dist_env_and_memory = original
