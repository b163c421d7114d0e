"""Decoding in plain PyTorch: the specification.

Sparse decoding gathers the chosen blocks only; slabs of queries bound the memory, so that a long chunk of new tokens
needs no ``[N, C]`` matrix. On a CPU, where reading ``lengths`` is free, unused capacity is left out of every product.

Shapes: B sequences, N newest tokens, C cache rows, L used cache rows, H query heads, K key-value heads, G = H/K,
D head dim, P pooled blocks, M candidate blocks, S block size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ssa.ops.selection.reference import select_chunk
from ssa.ops.sparse.reference import gather_plan, masked_logits, take
from ssa.ops.spec import SparseSpec

CHUNK_ELEMENTS = 1 << 24


def query_positions(lengths: Tensor, starts: Tensor | None, new: int) -> Tensor:
    """Place of each of the ``new`` last tokens in its sequence, ``[B, new]`` int64; negative in the left padding."""
    first = lengths - new if starts is None else lengths - new - starts
    return first.long()[:, None] + torch.arange(new, device=lengths.device)


def used_rows(lengths: Tensor, rows: int) -> int:
    """Cache rows that some sequence has filled; on a GPU all ``rows``, because reading the lengths would wait."""
    return max(int(lengths.max()), 1) if lengths.device.type == "cpu" else rows


def select_blocks_cached(
    q: Tensor, pooled: Tensor, lengths: Tensor, starts: Tensor | None, spec: SparseSpec, scale: float
) -> Tensor:
    """See :func:`ssa.ops.decode.select_blocks_cached`."""
    B, N, H, _ = q.shape
    position = query_positions(lengths, starts, N)
    blocks = min(pooled.shape[1], -(-used_rows(lengths, pooled.shape[1] * spec.block_size) // spec.block_size))
    first = torch.zeros(N, dtype=torch.int64, device=q.device)
    out = torch.empty(B, N, pooled.shape[2], spec.num_blocks, dtype=torch.int32, device=q.device)
    step = max(1, CHUNK_ELEMENTS // (H * blocks))
    for row in range(B):
        means = pooled[row, :blocks].float()
        for i in range(0, N, step):
            part = slice(i, i + step)
            out[row, part] = select_chunk(q[row, part], means, first[part], position[row, part], spec, scale)
    return out


def attend_blocks_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    block_size: int,
    lengths: Tensor,
    starts: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`ssa.ops.decode.attend_blocks_cached`."""
    B, N, H, D = q.shape
    C, K = k.shape[1:3]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    position = query_positions(lengths, starts, N).view(-1)
    start = torch.arange(B, device=q.device) * C + (0 if starts is None else starts)
    padding = position < 0
    out = torch.empty(B * N, H, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B * N, H, dtype=wide, device=q.device)
    k_, v_, q_, i_ = (x.flatten(0, 1) for x in (k, v, q, indices))
    plan = gather_plan(i_, block_size, start.repeat_interleave(N), position.clamp(min=0), D)
    for chunk, entries, visible in plan:
        key, value = take(k_, entries).to(wide), take(v_, entries).to(wide)
        visible = visible & ~padding[chunk, None, None]
        logits = masked_logits(q_[chunk].unflatten(1, (K, -1)).to(wide), key, visible, scale)
        out[chunk] = (logits.softmax(-1) @ value).flatten(1, 2).to(q.dtype)
        lse[chunk] = logits.logsumexp(-1).flatten(1)
    out.masked_fill_(padding[:, None, None], 0.0)
    return out.view(B, N, H, D), lse.view(B, N, H)


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
    """See :func:`ssa.ops.decode.decode_attention`; returns output and log-sum-exp."""
    if update:
        update_pooled(pooled, k, lengths, q.shape[1], starts, spec.block_size)
    indices = select_blocks_cached(q, pooled, lengths, starts, spec, scale)
    return attend_blocks_cached(q, k, v, indices, spec.block_size, lengths, starts, scale)


def full_decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, starts: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`ssa.ops.decode.full_decode_attention`; returns output and log-sum-exp."""
    position = query_positions(lengths, starts, q.shape[1])

    def visible(row: int, key: Tensor) -> Tensor:
        return key <= position[row, :, None]

    return attend_rows(q, k, v, lengths, starts, visible, scale)


Visible = Callable[[int, Tensor], Tensor]  # (sequence, place of each key in it [L]) -> bool [N, L]


def attend_rows(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, starts: Tensor | None, visible: Visible, scale: float
) -> tuple[Tensor, Tensor]:
    """One sequence at a time, each query over the cache rows that ``visible`` grants it."""
    B, N, H, D = q.shape
    out = torch.empty(B, N, H, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, N, H, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32, device=q.device)
    for row in range(B):
        first, last = row_bounds(lengths, starts, row, k.shape[1])
        place = torch.arange(first, last, device=q.device) - (0 if starts is None else starts[row])
        seen = visible(row, place) & (place >= 0)
        step = max(1, CHUNK_ELEMENTS // (H * len(place)))
        for i in range(0, N, step):
            part = slice(i, i + step)
            out[row, part], lse[row, part] = attend(
                q[row, part], k[row, first:last], v[row, first:last], seen[part], scale
            )
    return out, lse


def row_bounds(lengths: Tensor, starts: Tensor | None, row: int, rows: int) -> tuple[int, int]:
    """First and one past the last cache row of a sequence; on a GPU all ``rows``, because asking would wait."""
    if lengths.device.type != "cpu":
        return 0, rows
    first = 0 if starts is None else int(starts[row])
    return first, max(int(lengths[row]), first + 1)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``q [c, H, D]`` over ``k, v [L, K, D]`` where ``visible [c, L]``; a query that sees nothing gives 0."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    query = q.to(wide).unflatten(1, (k.shape[1], -1))
    logits = (torch.einsum("ckgd,lkd->ckgl", query, k.to(wide)) * scale).masked_fill(
        ~visible[:, None, None], -torch.inf
    )
    probability = logits.softmax(-1).masked_fill(~visible.any(-1)[:, None, None, None], 0.0)
    value = v.to(wide).masked_fill(~visible.any(0)[:, None, None], 0.0)  # 0 times the NaN of an unused row is NaN
    out = torch.einsum("ckgl,lkd->ckgd", probability, value)
    return out.flatten(1, 2).to(q.dtype), logits.logsumexp(-1).flatten(1)


def update_pooled(pooled: Tensor, k: Tensor, lengths: Tensor, new: int, starts: Tensor | None, block_size: int) -> None:
    """See :func:`ssa.ops.decode.update_pooled`."""
    S, device = block_size, k.device
    start = torch.zeros_like(lengths) if starts is None else starts
    length = (lengths - start).long()
    before, after = (length - new).clamp(min=0) // S, length // S  # completed blocks, [B]
    if device.type == "cpu" and bool((before == after).all()):
        return
    block = before[:, None] + torch.arange((new - 1) // S + 1, device=device)  # [B, M]
    complete = block < after[:, None]
    # candidates that are not complete repeat the first one: a scatter may write a place twice, but only the same value
    block = torch.where(complete, block, before[:, None])
    complete = block < after[:, None]
    row = torch.arange(len(k), device=device)[:, None]
    first = (start[:, None] + block * S).clamp(max=k.shape[1] - 1)
    accumulate = torch.float64 if k.dtype == torch.float64 else torch.float32
    total = torch.zeros(*block.shape, *k.shape[2:], dtype=accumulate, device=device)
    for i in range(S):  # token after token, as the prefill sums
        total += k[row, (first + i).clamp(max=k.shape[1] - 1)].to(accumulate)
    mean = (total / S).to(k.dtype)
    pooled[row, block] = torch.where(complete[..., None, None], mean, pooled[row, block])
