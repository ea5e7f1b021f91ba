"""Seeds derived by a hash, so that every sample has its own and can be drawn again alone.

vLLM gives sample j of a request with n samples and seed s the seed s + j, so that runs with consecutive seeds
share almost all of their samples; hashed seeds do not.
"""

from __future__ import annotations

import hashlib
import json


def hashed_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2**63) that depends on every part and on their order."""
    digest = hashlib.blake2b(json.dumps(parts, ensure_ascii=True).encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rollout_seed(*, seed: int, step: int, problem: int) -> int:
    """Return the seed of the completion sampled for dataset row `problem` at optimizer step `step`."""
    return hashed_seed("rollout", seed, step, problem)


def evaluation_seed(*, seed: int, problem_id: int | str, sample: int) -> int:
    """Return the seed of sample number `sample` of a benchmark problem in the evaluation with seed `seed`."""
    return hashed_seed("evaluation", seed, str(problem_id), sample)
