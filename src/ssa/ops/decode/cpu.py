"""Decoding of one token on a CPU: few operations, since each takes longer to start than its work; nothing is masked,
because the lengths can be read.

Shapes: H query heads, K key-value heads, G = H/K, D head dim, P complete blocks, S block size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssa.ops.decode import reference
from ssa.ops.spec import SparseSpec


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    spec: SparseSpec,
    scale: float,
    update: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`ssa.ops.decode.decode_attention`; chunks of tokens and the official rule go to the reference."""
    if q.shape[1] != 1 or spec.rule != "exact":
        return reference.decode_attention(q, k, v, pooled, lengths, starts, spec, scale, update)
    if update:
        reference.update_pooled(pooled, k, lengths, 1, starts, spec.block_size)
    K, S = k.shape[2], spec.block_size
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=wide)
    head, token = torch.arange(K)[:, None], torch.arange(S)
    first = [0] * len(q) if starts is None else starts.tolist()
    for row, (start, length) in enumerate(zip(first, lengths.tolist(), strict=True)):
        last = length - 1 - start
        if last < 0:
            continue
        query = q[row, 0].unflatten(0, (K, -1))
        block = choose(query, pooled[row, : (last + 1) // S], last // S, spec, scale)
        seen = block.shape[1] * S - (S - 1 - last % S)  # the own block, which may not be full, is the last
        rows = (start + block[:, :, None] * S + token).flatten(1)[:, :seen]
        key, value = (_taken(x[row], rows, head).to(wide) for x in (k, v))
        logits = query.to(wide) @ key.mT * scale  # [K, G, seen]
        most = logits.amax(-1, keepdim=True)
        weight = (logits - most).exp_()
        total = weight.sum(-1, keepdim=True)
        lse[row, 0] = (most + total.log()).flatten()
        out[row, 0] = (weight @ value / total).flatten(0, 1).to(q.dtype)
    return out, lse


def _taken(x: Tensor, rows: Tensor, head: Tensor) -> Tensor:
    """Rows ``[K, n]`` of each head ``[K, 1]`` of ``x [rows, K, D]``: ``[K, n, D]``."""
    if not x.is_contiguous():
        return x[rows, head]
    return x.view(-1, x.shape[2]).index_select(0, (rows * x.shape[1] + head).flatten()).view(*rows.shape, -1)


def choose(query: Tensor, pooled: Tensor, own: int, spec: SparseSpec, scale: float) -> Tensor:
    """Blocks of one token, ascending, the own one last: int64 ``[K, at most spec.num_blocks]``.

    Args:
        query: ``[K, G, D]``; pooled: ``[P, K, D]``; own: the token's block.
    """
    K = len(query)
    if own + 1 <= spec.num_blocks:
        return torch.arange(own + 1).expand(K, -1)
    low, high = spec.first_blocks, own + 1 - spec.local_blocks
    forced = [torch.arange(low).expand(K, -1), torch.arange(high, own + 1).expand(K, -1)]
    need = spec.num_blocks - spec.first_blocks - spec.local_blocks
    if not need:
        return torch.cat(forced, 1)
    logits = query.float() @ pooled.float().permute(1, 2, 0) * scale  # [K, G, P]
    score = torch.nan_to_num(logits.softmax(-1).sum(1)[:, low:high])
    least = score.topk(need, 1).values[:, -1:]
    taken = score >= least
    if int(taken.sum()) > K * need:  # ties go to the lower block
        tied = score == least
        above = taken & ~tied
        taken = above | (tied & (tied.cumsum(1) <= need - above.sum(1, keepdim=True)))
    best = taken.nonzero()[:, 1].view(K, need) + low
    return torch.cat([forced[0], best, forced[1]], 1)
