"""NSA's two further branches against a cache: compression and sliding window. Plain PyTorch, as in ``ssa.ops.nsa``.

Conventions as in :mod:`ssa.ops.decode.api`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssa.ops.checks import resolve_scale
from ssa.ops.decode.reference import attend, query_positions


@torch.no_grad()
def compressed_decode_attention(
    q: Tensor, pooled_k: Tensor, pooled_v: Tensor, lengths: Tensor, block_size: int, *, starts: Tensor | None = None
) -> Tensor:
    """:func:`ssa.ops.compressed_attention` of new tokens ``q [B, N, H, D]`` over mean keys and values ``[B, P, K, D]``.

    Returns ``[B, N, H, D]``; 0 where no block is complete yet.
    """
    position = query_positions(lengths, starts, q.shape[1])
    block = torch.arange(pooled_k.shape[1], device=q.device)
    scale = resolve_scale("compressed_decode_attention", q, None)
    complete = block < ((position + 1) // block_size)[..., None]  # [B, N, P]
    return torch.stack([attend(*x, scale)[0] for x in zip(q, pooled_k, pooled_v, complete, strict=True)])


@torch.no_grad()
def window_decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, window: int, *, starts: Tensor | None = None
) -> Tensor:
    """:func:`ssa.ops.window_attention` of new tokens ``q [B, N, H, D]`` over a cache ``k, v [B, C, K, D]``.

    Reads the ``window + N - 1`` rows that some query sees. Returns ``[B, N, H, D]``.
    """
    N, width = q.shape[1], min(k.shape[1], window + q.shape[1] - 1)
    first = (lengths.long() - width).clamp(min=0)[:, None]
    rows = (first + torch.arange(width, device=q.device))[..., None, None].expand(-1, -1, *k.shape[2:])
    k, v = k.gather(1, rows), v.gather(1, rows)
    position = query_positions(lengths, starts, N)
    scale = resolve_scale("window_decode_attention", q, None)
    place = rows[:, :, 0, 0] - (0 if starts is None else starts[:, None])  # [B, width], in the sequence
    distance = position[..., None] - place[:, None]
    seen = (distance >= 0) & (distance < window) & (place >= 0)[:, None]
    return torch.stack([attend(*x, scale)[0] for x in zip(q, k, v, seen, strict=True)])
