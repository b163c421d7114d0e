"""Block selection in plain PyTorch: the specification.

Shapes: B batch, T tokens, H query heads, K key-value heads, G = H/K, D head dim, N blocks of a row, S block size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.ops.spec import SparseSpec

CHUNK_ELEMENTS = 1 << 24  # scores held at a time, so memory does not grow with T * N


def pool_keys(k: Tensor, block_size: int, layout: DocumentLayout) -> Tensor:
    """Mean key of every block, ``[blocks of the batch, K, D]``, in the dtype of ``k``.

    Summed in float32 (float64 for float64 keys) token after token and rounded once, so that every implementation
    of the same sum has the same bits. A document's short last block is averaged over the tokens it has.
    """
    grid = layout.block_grid(block_size, k.device)
    flat = k.reshape(-1, *k.shape[2:])
    start, end = grid.block_start[:-1].long(), grid.block_start[1:].long()
    accumulate = torch.float64 if k.dtype == torch.float64 else torch.float32
    total = torch.zeros(grid.num_blocks, *k.shape[2:], dtype=accumulate, device=k.device)
    for i in range(block_size):
        inside = start + i < end
        total += torch.where(inside[:, None, None], flat[(start + i).clamp(max=end - 1)].to(accumulate), 0.0)
    return (total / (end - start)[:, None, None]).to(k.dtype)


def select_blocks(q: Tensor, k: Tensor, spec: SparseSpec, layout: DocumentLayout, scale: float) -> Tensor:
    """See :func:`ssa.ops.select_blocks`."""
    B, T, H, _ = q.shape
    grid = layout.block_grid(spec.block_size, q.device)
    pooled = pool_keys(k, spec.block_size, layout).float()
    first, positions = grid.first_block.view(B, T), layout.positions(q.device)
    out = torch.empty(B, T, k.shape[2], spec.num_blocks, dtype=torch.int32, device=q.device)
    for row in range(B):
        lo, hi = grid.row_blocks[row], grid.row_blocks[row + 1]
        step = max(1, CHUNK_ELEMENTS // (H * (hi - lo)))
        for t in range(0, T, step):
            chunk = slice(t, t + step)
            out[row, chunk] = select_chunk(
                q[row, chunk], pooled[lo:hi], first[row, chunk] - lo, positions[row, chunk], spec, scale
            )
    return out


def select_chunk(q: Tensor, pooled: Tensor, first: Tensor, position: Tensor, spec: SparseSpec, scale: float) -> Tensor:
    """Selection of t queries ``q [t, H, D]`` among a row's ``pooled [N, K, D]``; ``first``, ``position`` ``[t]``."""
    S = spec.block_size
    block = torch.arange(pooled.shape[0], device=q.device) - first[:, None].long()  # [t, N] relative to the document
    own = (position // S)[:, None]
    complete = (block >= 0) & (block < (position[:, None] + 1) // S)  # also keeps the scores inside the document
    score = _scores(q, pooled, complete, scale)  # [t, K, N]
    candidate = (block >= 0) & (block <= own)
    forced = candidate & ((block < spec.first_blocks) | (block > own - spec.local_blocks))
    score = score.masked_fill(forced[:, None], float("inf")).masked_fill(~candidate[:, None], float("-inf"))
    if spec.rule == "official":
        score = _keep_official(score, block, own, S)
    top, index = score.sort(dim=-1, descending=True, stable=True)  # stable: ties go to the lower index
    k = min(spec.num_blocks, score.shape[-1])
    chosen = torch.full((*score.shape[:2], spec.num_blocks), torch.iinfo(torch.int64).max, device=q.device)
    relative = index[..., :k] - first[:, None, None]
    chosen[..., :k] = torch.where(top[..., :k] > float("-inf"), relative, chosen[..., :k])
    chosen = chosen.sort(dim=-1).values
    return torch.where(chosen <= own[..., None], chosen, -1).to(torch.int32)


def _scores(q: Tensor, pooled: Tensor, complete: Tensor, scale: float) -> Tensor:
    """Sum over each group's heads of the softmax over complete blocks: ``[t, K, N]`` float32, 0 elsewhere."""
    t, H, D = q.shape
    K = pooled.shape[1]
    logits = torch.einsum("tkgd,nkd->tkgn", q.float().view(t, K, H // K, D), pooled) * scale
    logits = logits.masked_fill(~complete[:, None, None], float("-inf"))
    return torch.nan_to_num(logits.softmax(-1)).sum(2)  # a row without complete blocks is all -inf: NaN, then 0


def _keep_official(score: Tensor, block: Tensor, own: Tensor, S: int) -> Tensor:
    """Drop what the published streaming merge drops.

    It walks over chunks of S blocks and keeps, at each merge, the S/2 best so far and the S/2 best of the new chunk.
    After the last merge that is the S/2 best of all earlier chunks and the S/2 best of the newest one. A query whose
    blocks fit in one chunk sees no merge.
    """
    newest = (block // S == own // S) & (block >= 0)
    kept = torch.zeros_like(score, dtype=torch.bool)
    for part in (newest, ~newest):
        masked = score.masked_fill(~part[:, None], float("-inf"))
        best = masked.sort(dim=-1, descending=True, stable=True).indices[..., : S // 2]
        # a part with fewer than S/2 candidates fills up with -inf entries of the other part
        kept |= torch.zeros_like(kept).scatter_(-1, best, True) & part[:, None]
    one_chunk = (own < S)[..., None]
    return score.masked_fill(~(kept | one_chunk), float("-inf"))
