"""Block-sparse attention in plain PyTorch: the specification.

Gathers the keys of the selected blocks, so time and memory follow ``T * k * S``; chunks of queries bound the memory and
the backward pass recomputes the probabilities. Low-precision inputs are computed in float32 and rounded once.

Shapes: N = B*T flat tokens, K key-value heads, G = H/K, D head dim, M = n*S gathered keys, c queries of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssa.documents import DocumentLayout

CHUNK_ELEMENTS = 1 << 22  # gathered key elements at a time: 16 MiB in float32


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int,
    layout: DocumentLayout,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`ssa.ops.sparse_attention`; returns output and log-sum-exp."""
    return _SparseAttention.apply(q, k, v, block_indices, block_size, layout, scale)


class _SparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        indices: Tensor,
        S: int,
        layout: DocumentLayout,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        out, lse = forward(q, k, v, indices, S, layout, scale)
        ctx.save_for_backward(q, k, v, indices, out)
        ctx.arguments = S, layout, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(d_out, *ctx.saved_tensors, *ctx.arguments), None, None, None, None


def forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, S: int, layout: DocumentLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Output ``[B, T, H, D]`` and log-sum-exp ``[B, T, H]``, without autograd."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    B, T, H, D = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(B, T, H, dtype=wide, device=q.device)
    q_, k_, v_, i_ = (x.contiguous().flatten(0, 1) for x in (q, k, v, indices))
    K = k.shape[2]
    for chunk, entries, visible in gather_plan(i_, S, *_places(layout, q.device), D):
        key, value = take(k_, entries).to(wide), take(v_, entries).to(wide)
        logits = masked_logits(_grouped(q_[chunk], K).to(wide), key, visible, scale)
        probability = logits.softmax(-1)  # not exp(logits - lse): a large lse has few digits after the point
        out.view(B * T, H, D)[chunk] = (probability @ value).flatten(1, 2).to(q.dtype)
        lse.view(B * T, H)[chunk] = logits.logsumexp(-1).flatten(1)
    return out, lse


def backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    out: Tensor,
    S: int,
    layout: DocumentLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k``, ``v``."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    B, T, H, D = q.shape
    K = k.shape[2]
    q_, k_, v_, i_, o_, do_ = (x.contiguous().flatten(0, 1) for x in (q, k, v, indices, out, d_out))
    dq = torch.empty(B * T, H, D, dtype=wide, device=q.device)
    dk = torch.zeros(B * T * K, D, dtype=wide, device=q.device)
    dv = torch.zeros_like(dk)
    for chunk, entries, visible in gather_plan(i_, S, *_places(layout, q.device), D):
        key, value = take(k_, entries).to(wide), take(v_, entries).to(wide)
        query, d_o, o = (_grouped(x[chunk], K).to(wide) for x in (q_, do_, o_))  # [c, K, G, D]
        logits = masked_logits(query, key, visible, scale)
        probability = logits.softmax(-1)  # [c, K, G, M]
        d_logits = probability * (d_o @ value.mT - (d_o * o).sum(-1, keepdim=True))
        dq[chunk] = ((d_logits @ key) * scale).flatten(1, 2)
        dk.index_add_(0, entries.flatten(), ((d_logits.mT @ query) * scale).flatten(0, 2))
        dv.index_add_(0, entries.flatten(), (probability.mT @ d_o).flatten(0, 2))
    return dq.view_as(q).to(q.dtype), dk.view_as(k).to(k.dtype), dv.view_as(v).to(v.dtype)


def _places(layout: DocumentLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat row of each token's document and its position in there, ``[N]`` each."""
    return layout.starts(device).view(-1), layout.positions(device).view(-1)


def gather_plan(
    indices: Tensor, S: int, start: Tensor, position: Tensor, D: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Per chunk of queries: which queries, their keys ``[c, K, M]`` as entries of the flat ``[N*K, D]``, which count.

    ``indices [N, K, n]``; ``start``, ``position`` ``[N]``: flat row where the query's document begins, place in it.
    Keys that do not count point at the query's own row: they get probability 0, and 0 times the NaN of a row that
    belongs to another document would be NaN.
    """
    N, K, n = indices.shape
    head = torch.arange(K, device=indices.device)[:, None]
    inside = torch.arange(S, device=indices.device)
    step = max(1, CHUNK_ELEMENTS // (K * n * S * D))
    for first in range(0, N, step):
        chunk = slice(first, first + step)
        block = indices[chunk].long()[..., None]  # [c, K, n, 1]
        key_position = (block * S + inside).flatten(2)  # [c, K, M] inside the document
        visible = (block >= 0).expand(-1, -1, -1, S).flatten(2) & (key_position <= position[chunk, None, None])
        rows = torch.where(visible, key_position, position[chunk, None, None]) + start[chunk, None, None]
        yield chunk, rows * K + head, visible


def take(x: Tensor, entries: Tensor) -> Tensor:
    """``x [N, K, D]`` at the flat ``entries [c, K, M]``: ``[c, K, M, D]``."""
    return x.flatten(0, 1).index_select(0, entries.flatten()).view(*entries.shape, -1)


def _grouped(x: Tensor, K: int) -> Tensor:
    """``[c, H, ...]`` to ``[c, K, G, ...]``."""
    return x.unflatten(1, (K, -1))


def masked_logits(query: Tensor, key: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Scaled logits ``[c, K, G, M]``, -inf where not visible."""
    return ((query @ key.mT) * scale).masked_fill(~visible[:, :, None], float("-inf"))
