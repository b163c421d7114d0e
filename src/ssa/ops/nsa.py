"""The two further branches of the NSA baseline (paper section 5): compression and sliding window.

Plain PyTorch with PyTorch's autograd, one run of equally long documents at a time; chunks are recomputed in the
backward pass so that memory stays bounded. The selection branch is :func:`ssa.ops.sparse_attention`.

Shapes: n documents of a run, L their length, H query heads, K key-value heads, G = H/K, D head dim, M keys,
S block size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssa.documents import DocumentLayout, run_view
from ssa.ops.checks import check_positive, check_qkv, resolve_layout, resolve_scale

CHUNK_ELEMENTS = 1 << 24


def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    layout: DocumentLayout | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention over the mean keys and mean values of the blocks that are complete at the query.

    ``q [B, T, H, D]``, ``k``, ``v`` ``[B, T, K, D]`` -> ``[B, T, H, D]``; 0 where no block is complete yet.
    """
    where = "compressed_attention"
    check_qkv(where, q, k, v)
    layout, scale = resolve_layout(where, q, layout), resolve_scale(where, q, scale)
    check_positive(f"{where}.block_size", block_size)
    outputs = []
    for run in layout.runs():
        query, key, value = (run_view(x, run) for x in (q, k, v))
        blocks = run[2] // block_size
        if blocks == 0:
            outputs.append(torch.zeros_like(query).flatten(0, 1))
            continue
        pooled_k, pooled_v = (
            x[:, : blocks * block_size].unflatten(1, (blocks, block_size)).mean(2) for x in (key, value)
        )
        position, block = torch.arange(run[2], device=q.device), torch.arange(blocks, device=q.device)

        def visible(rows: slice, position: Tensor = position, block: Tensor = block) -> Tensor:
            return block < ((position[rows] + 1) // block_size)[:, None]

        outputs.append(_masked_attention(query, pooled_k, pooled_v, visible, scale).flatten(0, 1))
    return torch.cat(outputs).view_as(q)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    layout: DocumentLayout | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Causal attention over the last ``window`` tokens of the document, the query's own included.

    ``q [B, T, H, D]``, ``k``, ``v`` ``[B, T, K, D]`` -> ``[B, T, H, D]``.
    """
    where = "window_attention"
    check_qkv(where, q, k, v)
    layout, scale = resolve_layout(where, q, layout), resolve_scale(where, q, scale)
    check_positive(f"{where}.window", window)
    outputs = []
    for run in layout.runs():
        query, key, value = (run_view(x, run) for x in (q, k, v))
        outputs.append(_window_of_run(query, key, value, window, scale).flatten(0, 1))
    return torch.cat(outputs).view_as(q)


def _window_of_run(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Equally long documents ``[n, L, ...]``, cut into chunks of ``window`` queries that see their chunk and the last.

    The cost is ``2 * window`` keys per query, however long the document is.
    """
    n, length = q.shape[:2]
    size = min(window, length)
    count = -(-length // size)
    end = count * size - length
    q = F.pad(q, (0, 0, 0, 0, 0, end)).unflatten(1, (count, size)).flatten(0, 1)  # [n * count, size, H, D]
    chunks = [F.pad(x, (0, 0, 0, 0, size, end)).unflatten(1, (count + 1, size)) for x in (k, v)]
    k, v = (torch.cat([x[:, :-1], x[:, 1:]], 2).flatten(0, 1) for x in chunks)  # [n * count, 2 * size, K, D]
    place = torch.arange(2 * size, device=q.device) - size  # of a key, seen from its chunk's first query
    first = (torch.arange(n * count, device=q.device) % count == 0)[:, None, None, None, None]

    def visible(rows: slice) -> Tensor:
        distance = torch.arange(size, device=q.device)[rows, None] - place
        return ((distance >= 0) & (distance < window)) & ((place >= 0) | ~first)  # [n * count, 1, 1, rows, 2 * size]

    return _masked_attention(q, k, v, visible, scale).unflatten(0, (n, count)).flatten(1, 2)[:, :length]


# query rows -> bool [rows, M], or with leading dimensions; made per chunk, so that no [L, M] tensor exists
Visible = Callable[[slice], Tensor]


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float) -> Tensor:
    """``q [n, L, H, D]`` over ``k, v [n, M, K, D]`` where ``visible``; rows that see nothing give 0."""
    n, L, H, _ = q.shape
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return _fused_attention(q, k, v, visible(slice(0, L)), scale)
    step = max(1, CHUNK_ELEMENTS // (n * H * k.shape[1]))
    chunks = []
    for first in range(0, L, step):
        part = slice(first, first + step)
        if step >= L:
            return _masked_chunk(q, k, v, visible, part, scale)
        chunks.append(checkpoint(_masked_chunk, q[:, part], k, v, visible, part, scale, use_reentrant=False))
    return torch.cat(chunks, 1)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same through PyTorch's attention with a mask, in one kernel where it has one: a GPU in low precision.

    Args:
        mask: bool ``[L, M]`` or ``[n, 1, 1, L, M]``.
    """
    H = q.shape[2]
    mask = mask.view(-1, 1, *mask.shape[-2:])  # [n or 1, 1, L, M]
    sees = mask.any(-1, keepdim=True)
    mask = mask | ~sees  # a softmax over nothing is NaN; its row becomes 0 below
    q, k, v = (x.repeat_interleave(H // x.shape[2], 2).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return (out * sees).transpose(1, 2)


def _masked_chunk(q: Tensor, k: Tensor, v: Tensor, visible: Visible, rows: slice, scale: float) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    query = q.to(wide).unflatten(2, (k.shape[2], -1))
    logits = torch.einsum("nckgd,nmkd->nkgcm", query, k.to(wide)) * scale
    mask = visible(rows)
    sees = mask.any(-1, keepdim=True)
    logits = logits.masked_fill(sees & ~mask, float("-inf"))  # a row that sees nothing stays finite, then becomes 0
    probability = logits.softmax(-1) * sees
    return torch.einsum("nkgcm,nmkd->nckgd", probability, v.to(wide)).flatten(2, 3).to(q.dtype)
