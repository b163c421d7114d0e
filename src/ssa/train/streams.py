"""Which attention stream a training step runs: a pure function, so that ranks, resumes and recomputation agree."""

from __future__ import annotations

import struct
from hashlib import blake2b
from typing import Literal

Stream = Literal["full", "sparse"]


def draw_sample_seed(seed: int, step: int) -> int:
    """Seed of the query rows that a sparse step aligns, below ``2**63``; a pure function as :func:`draw_stream`.

    All ranks use the same, so that each computes as much as the others; their documents differ.
    """
    digest = blake2b(struct.pack("<qq", seed, step), digest_size=8, person=b"ssa.sample").digest()
    return int.from_bytes(digest, "little") >> 1


def draw_stream(seed: int, step: int, full_probability: float) -> Stream:
    """The main stream of an optimiser step (paper Algorithm 1).

    No generator state exists: the same arguments give the same answer in any process, in any order.
    The methods are its limits: probability 1 (full attention) is always ``"full"``, 0 (MoBA, NSA) always ``"sparse"``.

    Args:
        seed: seed of the run, ``0 <= seed < 2**63``.
        step: optimiser step.
        full_probability: chance of ``"full"``, in [0, 1].
    """
    digest = blake2b(struct.pack("<qq", seed, step), digest_size=8, person=b"ssa.stream").digest()
    return "full" if int.from_bytes(digest, "little") < full_probability * 2.0**64 else "sparse"
