"""The official SSA operation as a peer: ``ssa bench --suite targets --peer peer_official:attention``.

Needs its package on the path; benchmarks/README.md says how to get it. Its top-k is not a top-k (docs/deviations.md),
so it is compared in time only.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, block_size: int, num_blocks: int) -> Tensor:
    """Sparse attention with selection, as the official model calls it; ``q [B, T, H, D]``, H / K a multiple of 16."""
    from native_sparse_attention.ops.parallel import parallel_nsa

    gate = torch.ones(q.shape[:3], dtype=q.dtype, device=q.device)
    out: Tensor = parallel_nsa(
        q, k, v, g_cmp=0, g_slc=gate, g_swa=0, block_counts=num_blocks, block_size=block_size, window_size=0
    )[0]
    return out
