"""fla's kernels of sparse attention as a peer: ``ssa bench --suite targets --peer peer_fla:attention``.

Needs ``pip install flash-linear-attention``. Its own top-k wants at least twice as many tokens in a block as blocks, so
it cannot choose 16 blocks of 16: the blocks are ours, and their selection is part of the time.
"""

from __future__ import annotations

from torch import Tensor

from ssa.ops import SparseSpec, select_blocks


def attention(q: Tensor, k: Tensor, v: Tensor, block_size: int, num_blocks: int) -> Tensor:
    """fla's sparse attention over the blocks that we select; ``q [B, T, H, D]``, H / K a power of two from 16."""
    from fla.ops.nsa import parallel_nsa

    indices = select_blocks(q, k, SparseSpec(block_size, num_blocks))
    out: Tensor = parallel_nsa(
        q, k, v, block_indices=indices, block_counts=num_blocks, block_size=block_size, window_size=0
    )
    return out
