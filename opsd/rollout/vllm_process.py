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
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

if TYPE_CHECKING:
    from vllm import LLM

# Without warnings of what this project does on purpose (a seed that is restored, a tokenizer that is not
# needed, threads that stay as they are) and the 30 kB that a dying engine logs before it says why.
LOG_LEVELS = {
    "vllm": logging.WARNING,
    "vllm.logging_utils.dump_input": logging.CRITICAL,
    "vllm.engine.arg_utils": logging.ERROR,
    "vllm.renderers.base": logging.ERROR,
    "vllm.v1.worker.cpu_worker": logging.ERROR,
    "vllm.v1.worker.gpu_model_runner": logging.ERROR,
    "vllm.model_executor.model_loader.reload.layerwise": logging.ERROR,
}

State = tuple[Callable[[], Any], Callable[[Any], object]]  # how to read a piece of state and how to write it


def _attribute(owner: Any, name: str) -> State:
    return (lambda: getattr(owner, name)), (lambda value: setattr(owner, name, value))


# State of which the engine has a value of its own. vLLM's CPU worker replaces three of torch's functions; the
# thread count is set through the function below the one that it replaces.
_SWAPPED: tuple[State, ...] = (
    _attribute(torch, "set_num_threads"),
    _attribute(torch.accelerator, "synchronize"),
    _attribute(torch.accelerator, "empty_cache"),
    (torch.get_num_threads, torch._C.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (logging.getLogRecordFactory, logging.setLogRecordFactory),
)
# State that is only restored.
_RESTORED: tuple[State, ...] = (
    (np.random.get_state, np.random.set_state),
    (random.getstate, random.setstate),
    (torch.get_rng_state, torch.set_rng_state),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (lambda: logging.getLogger("httpx").level, logging.getLogger("httpx").setLevel),
    (lambda: logging.root.level, logging.root.setLevel),
    (lambda: [*logging.root.handlers], lambda handlers: setattr(logging.root, "handlers", handlers)),
    # Setting the cores may be forbidden.
    (lambda: os.sched_getaffinity(0), lambda c: os.sched_getaffinity(0) == c or os.sched_setaffinity(0, c)),
    (gc.get_freeze_count, lambda count: count or gc.unfreeze()),
)
_RESTORED_CUDA: tuple[State, ...] = (
    (torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all),
    (torch.cuda.current_device, torch.cuda.set_device),
)


class EngineState:
    """One engine's values of the process state, separate from the caller's.

    Within `with state.active():` the engine has the environment variables and values of `_SWAPPED` that it
    left last, at first `environment`. Afterwards these and `_RESTORED` are as they were for the caller.

    The engines of a process share the values of `_SWAPPED`: vLLM's CPU attention gives wrong results,
    silently, to an engine that runs with another thread count than an earlier one did.
    """

    alive: ClassVar[set[int]] = set()  # engines of this process, which share vLLM's process groups
    _engines: ClassVar[list[Any] | None] = None  # a value for each of _SWAPPED

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._changes: dict[str, str | None] = dict(environment)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Switch to the engine's state, and back on exit."""
        states = (*_SWAPPED, *_RESTORED, *(_RESTORED_CUDA if torch.cuda.is_initialized() else ()))
        callers, before = [read() for read, _ in states], dict(os.environ)
        _set_environment(before | self._changes)
        for (_, write), value in zip(_SWAPPED, EngineState._engines or callers, strict=False):
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
            for (_, write), value in zip(states, callers, strict=True):
                write(value)


def _set_environment(wanted: Mapping[str, str | None]) -> None:
    for name in os.environ.keys() | wanted.keys():
        value = wanted.get(name)
        if value is None:
            os.environ.pop(name, None)
        elif os.environ.get(name) != value:
            os.environ[name] = value


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


def destroy_groups(*, group_is_callers: bool) -> None:
    """Destroy vLLM's process groups, except the caller's default group and those of another engine here."""
    from vllm import envs
    from vllm.distributed import parallel_state

    envs.disable_envs_cache()
    if not EngineState.alive:
        parallel_state.destroy_model_parallel()
        if group_is_callers:
            if parallel_state._WORLD is not None:
                parallel_state._WORLD.destroy()
            parallel_state._WORLD = parallel_state._NODE_COUNT = None
        else:
            parallel_state.destroy_distributed_environment()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def shut_down(llm: LLM, state: EngineState, *, group_is_callers: bool) -> None:
    """Shut an engine down with `destroy_groups`, where vLLM itself would destroy the default group."""
    from vllm.v1.engine import core

    EngineState.alive.discard(id(state))
    module: Any = core
    original = module.cleanup_dist_env_and_memory
    module.cleanup_dist_env_and_memory = lambda *_: destroy_groups(group_is_callers=group_is_callers)
    try:
        with state.active():
            llm.llm_engine.engine_core.shutdown()
    finally:
        module.cleanup_dist_env_and_memory = original
