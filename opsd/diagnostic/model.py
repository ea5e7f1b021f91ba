"""Student and teacher of the diagnostic: one network, sampled by an engine and scored after both prompts."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from opsd.batch import role_batch
from opsd.diagnostic.config import BranchConfig
from opsd.diagnostic.spines import BranchProblem, Fork, score_forks
from opsd.head import attach_hidden_forward, check_head, head_of
from opsd.models import load_adapter, load_causal_lm
from opsd.rollout.vllm_setup import local_model, require_vllm

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from opsd.head import Head
    from opsd.rollout.engine import Engine

PADDING_RATIO = 1.25


class ModelBackend:
    """Sample and score with a real model: the student with its adapter, the teacher with the adapter off.

    Without an adapter, student and teacher are the same network. With --engine hf one model, loaded when it
    is needed, samples and scores. With --engine vllm the engine samples requests of up to `longest` tokens; a
    second copy of the model in transformers scores the spines and is freed again.
    """

    def __init__(self, config: BranchConfig, tokenizer: PreTrainedTokenizerBase, *, longest: int) -> None:
        if config.engine == "vllm":
            require_vllm()
        self.config, self.tokenizer, self.longest = config, tokenizer, longest
        self._engine: Engine | None = None
        self._model: PreTrainedModel | PeftModel | None = None
        self._head: Head | None = None

    def engine(self) -> Engine:
        """Return the student's sampler, built at the first call."""
        self._engine = self._engine or self._build_engine()
        return self._engine

    def score(
        self, problems: Sequence[BranchProblem], spines: Sequence[list[int]], offsets: Sequence[list[int]]
    ) -> list[list[Fork]]:
        """Return each spine's forks. One backbone pass a role; only forks' positions meet the LM head."""
        model, config = self._loaded_model(), self.config
        adapted = hasattr(model, "get_base_model")
        if self._head is None:
            base = model.get_base_model() if adapted else model
            model.eval().requires_grad_(False)
            head = head_of(base)
            attach_hidden_forward(base)
            check_head(base, head)
            self._head = head
        rows, start = [], 0
        for spine, some in zip(spines, offsets, strict=True):
            rows += [start + offset for offset in some]
            start += len(spine)
        student = self._hidden([p.student_ids for p in problems], spines, rows)
        with model.disable_adapter() if adapted else contextlib.nullcontext():
            teacher = self._hidden([p.teacher_ids for p in problems], spines, rows)
        settings = {"head": self._head, "temperature": config.score_temperature, "top_k": config.top_k}
        forks = iter(score_forks(student, teacher, [o for some in offsets for o in some], **settings))
        return [[next(forks) for _ in some] for some in offsets]

    @torch.inference_mode()
    def _hidden(self, prompts: list[list[int]], spines: Sequence[list[int]], rows: list[int]) -> Tensor:
        """Return the final hidden states [K, H] at K rows of the concatenated spines."""
        model = self._loaded_model()
        layout = {"pad_id": self.tokenizer.pad_token_id or 0, "max_padding_ratio": PADDING_RATIO}
        batch = role_batch(prompts, spines, device=model.device, **layout)
        return batch.hidden_states(model)[torch.tensor(rows, device=model.device)]

    def scoring_done(self) -> None:
        """Free the copy that only scores."""
        if self.config.engine == "vllm":
            self._free_model()

    def close(self) -> None:
        """Release engine and model."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        self._free_model()

    def _free_model(self) -> None:
        self._model = self._head = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _build_engine(self) -> Engine:
        # One engine's packages need not be installed for the other.
        if self.config.engine == "hf":
            from opsd.rollout.hf import HFEngine

            return HFEngine(self._loaded_model(), self.tokenizer, batch_size=self.config.hf_batch_size)
        from opsd.rollout.vllm import VLLMEngine

        # Prefix caching is vLLM's default: the continuations of a fork share prompt and spine prefix.
        names = "tensor_parallel_size", "gpu_memory_utilization", "dtype", "adapter", "trust_remote_code"
        settings = {name: getattr(self.config, name) for name in names}
        folder = local_model(self.config.model_name_or_path, self.config.model_revision)
        return VLLMEngine(folder, max_model_len=self.longest, **settings)

    def _loaded_model(self) -> PreTrainedModel | PeftModel:
        if self._model is None:
            config = self.config
            dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
            load = {"revision": config.model_revision, "trust_remote_code": config.trust_remote_code}
            model = load_causal_lm(config.model_name_or_path, dtype=dtype, **load)
            model = load_adapter(model, config.adapter) if config.adapter is not None else model
            self._model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        return self._model
