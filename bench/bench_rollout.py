"""Time the rollout engines in one run: `python bench/bench_rollout.py [--model FOLDER] [--batches 32 256]`

The same requests, as in training: the student's prompts of the small world, temperature 1.1, top_p 0.95,
top_k 20, a rank-64 adapter on all seven matrices. transformers samples with the adapter unmerged, `batch`
completions at a time; vLLM has up to `batch` completions in flight and gets merged weights, or the adapter,
before every call. The engines take turns; the best of --repeats counts. Prints Markdown: tokens per second
of wall time and, without a GPU, of processor time (which other work on the machine disturbs less) with its
ratio, vLLM's load and push times, and the bytes pushed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


class Clock:
    """Wall and processor seconds of a block."""

    def __enter__(self) -> Clock:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu

    def __str__(self) -> str:
        return f"{1000 * self.wall:.0f} ms ({1000 * self.cpu:.0f} ms of a processor)"


@dataclass(order=True)
class Rollout:
    """One generate call."""

    seconds: float
    wall: float
    tokens: int


def adapted_model(name: str, rank: int) -> Any:
    """Load the model in its own dtype with a random adapter, on the GPU where there is one."""
    import torch
    from peft import LoraConfig, get_peft_model

    from opsd.arguments import LORA_TARGETS
    from opsd.models import load_causal_lm, load_config

    base = load_causal_lm(name, dtype=load_config(name).get_text_config().dtype or torch.float32)
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:  # small enough that the completions stay ordinary ones
            parameter.data = torch.randn(parameter.shape, generator=generator) * 1e-4
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def requests_of(tokenizer: Any, count: int) -> list[Any]:
    """Return the first `count` problems of the small world with the seeds of a first step."""
    from opsd.prompts import encode_student
    from opsd.rollout.engine import Request
    from opsd.seeds import rollout_seed

    lines = (ROOT / "testbed" / "data" / "train.jsonl").read_text("utf-8").splitlines()[:count]
    prompts = [encode_student(tokenizer, json.loads(line)["problem"]) for line in lines]
    return [Request(ids, rollout_seed(seed=42, step=0, problem=i)) for i, ids in enumerate(prompts)]


def roll_out(engine: Any, requests: list[Any], sampling: Any, *, on_gpu: bool) -> Rollout:
    with Clock() as clock:
        completions = engine.generate(requests, sampling)
    tokens = sum(len(completion.token_ids) for completion in completions)
    return Rollout(clock.wall if on_gpu else clock.cpu, clock.wall, tokens)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=str(ROOT / "testbed" / "base_model"))
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--new_tokens", type=int, default=160)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gpu_memory_utilization", type=float, default=0.4)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read once, when torch is imported
    with Clock() as imports:
        import torch
        import vllm

        from opsd.models import load_tokenizer
        from opsd.rollout.engine import Sampling
        from opsd.rollout.hf import HFEngine
        from opsd.rollout.vllm import VLLMEngine
        from opsd.rollout.vllm_push import PushReport, pushed_weights
    torch.set_num_threads(args.threads)
    on_gpu = torch.cuda.is_available()
    tokenizer, model = load_tokenizer(args.model), adapted_model(args.model, args.rank)
    requests = requests_of(tokenizer, max(args.batches))
    sampling = Sampling(temperature=1.1, top_p=0.95, top_k=20, max_new_tokens=args.new_tokens)
    longest = max(len(request.prompt_ids) for request in requests)

    where = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU"
    print(f"{where}, {args.threads} thread(s), torch {torch.__version__}, vllm {vllm.__version__}\n")
    counted = "wall" if on_gpu else "processor"
    print(f"| batch | engine | tokens | tokens/s (wall) | tokens/s ({counted}) | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    ranks = {"vLLM, merged weights": None, "vLLM, adapter": args.rank}
    loads: list[Clock] = []
    pushes: dict[str, list[Clock]] = {name: [] for name in ranks}
    for batch in args.batches:
        samplers: dict[str, Any] = {"transformers": HFEngine(model, tokenizer, batch_size=batch)}
        for name, rank in ranks.items():
            with Clock() as load:
                samplers[name] = VLLMEngine(
                    args.model,
                    max_model_len=longest + args.new_tokens,
                    max_num_seqs=batch,
                    gpu_memory_utilization=args.gpu_memory_utilization,
                    pushed_rank=rank,
                )
            loads.append(load)
        found: dict[str, list[Rollout]] = {name: [] for name in samplers}
        for sampler in samplers.values():  # the first call of a shape chooses kernels
            sampler.generate(requests[:batch], sampling)
        for _ in range(args.repeats):
            for name in ranks:
                with Clock() as push:
                    samplers[name].push_weights(model)
                pushes[name].append(push)
            for name, sampler in samplers.items():
                found[name].append(roll_out(sampler, requests[:batch], sampling, on_gpu=on_gpu))
        best = {name: min(rollouts) for name, rollouts in found.items()}
        reference = best["transformers"].tokens / best["transformers"].seconds
        for name, one in best.items():
            rate = one.tokens / one.seconds
            wall = one.tokens / min(rollout.wall for rollout in found[name])
            print(f"| {batch} | {name} | {one.tokens} | {wall:.0f} | {rate:.0f} | {rate / reference:.2f} |")
        for name in ranks:
            samplers[name].close()
    print(f"\nimport of torch and vLLM: {imports}")
    print(f"load of an engine: {'; '.join(map(str, loads))}")
    itemsize = model.get_base_model().dtype.itemsize
    size = {
        "vLLM, merged weights": sum(weight.nbytes for _, weight in pushed_weights(model, PushReport())),
        "vLLM, adapter": sum(p.numel() * itemsize for name, p in model.named_parameters() if "lora_" in name),
    }
    for name, times in pushes.items():
        middle = statistics.median_low([push.cpu for push in times])
        median = next(push for push in times if push.cpu == middle)
        print(f"push, {name}: {size[name] / 1e6:.2f} MB, median of {len(times)}: {median}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
