"""Seeds derived by a hash, so that every sample has its own and any one can be drawn again alone.

vLLM gives sample j of a request with n samples and seed s the seed s + j, so runs with consecutive seeds
share almost all of their samples. A hash of everything that identifies a sample has no such neighbours.
"""

from __future__ import annotations

import hashlib
import json


def hashed_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on every part and on their order.

    Args:
        parts: what identifies the sample, e.g. ("rollout", run_seed, optimizer_step, problem_index).
    """
    digest = hashlib.blake2b(json.dumps(parts, ensure_ascii=True).encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rollout_seed(*, seed: int, step: int, problem: int) -> int:
    """The seed of the one completion sampled for dataset row `problem` at optimizer step `step`."""
    return hashed_seed("rollout", seed, step, problem)


def evaluation_seed(*, seed: int, problem_id: int | str, sample: int) -> int:
    """The seed of sample number `sample` of one benchmark problem in the evaluation run with seed `seed`."""
    return hashed_seed("evaluation", seed, str(problem_id), sample)
