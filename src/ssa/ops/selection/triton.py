"""Block selection on the GPU: launches of :mod:`ssa.ops.selection.triton_kernels` as one custom operation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.ops.selection.triton_kernels import (
    lse_kernel,
    pool_kernel,
    score_kernel,
    select_kernel,
    select_official_kernel,
)
from ssa.ops.spec import SparseSpec
from ssa.ops.triton_support import LOG2E, capability, ceil_div, flat, next_power_of_two

SLAB_ELEMENTS = 1 << 26  # float32 scores held at a time: 256 MiB
GRID_LIMIT = 65535  # largest second or third dimension of a CUDA grid
CHUNK_INTEGERS = 5  # per slab in `_slabs`


class TileConfig(NamedTuple):
    """Tile of tokens x blocks, warps and pipeline stages of a kernel."""

    tokens: int
    blocks: int
    warps: int
    stages: int


def lse_config(D: int, device_capability: tuple[int, int]) -> TileConfig:
    """Measured on an H200 (docs/kernels.md); smaller tiles where shared memory is smaller or rows are longer."""
    if D > 128:
        return TileConfig(64, 32, 4, 2)
    if device_capability < (9, 0):
        return TileConfig(64, 64, 4, 2)
    return TileConfig(128, 64, 4, 2) if D <= 64 else TileConfig(128, 128, 8, 3)


def score_config(D: int, device_capability: tuple[int, int]) -> TileConfig:
    """As :func:`lse_config`; the token tile of both kernels may differ."""
    if D > 128:
        return TileConfig(64, 64, 4, 2)
    if device_capability < (9, 0):
        return TileConfig(64, 64, 4, 2)
    return TileConfig(64, 64, 4, 3) if D <= 64 else TileConfig(128, 64, 8, 3)


def select_blocks(q: Tensor, k: Tensor, spec: SparseSpec, layout: DocumentLayout, scale: float) -> Tensor:
    """See :func:`ssa.ops.select_blocks`."""
    where = capability(q.device.index)
    lse, score = lse_config(q.shape[3], where), score_config(q.shape[3], where)
    grid = layout.block_grid(spec.block_size, q.device)
    return _select_blocks(
        q,
        k,
        grid.block_start,
        grid.first_block,
        layout.starts(q.device),
        layout.block_grid(lse.tokens, q.device).block_start,
        layout.block_grid(score.tokens, q.device).block_start,
        _slabs(layout, spec.block_size, k.shape[2], score),
        spec.block_size,
        spec.num_blocks,
        spec.first_blocks,
        spec.local_blocks,
        spec.rule == "official",
        scale,
    )


@lru_cache(maxsize=64)
def _slabs(layout: DocumentLayout, S: int, K: int, config: TileConfig) -> tuple[int, ...]:
    """The batch cut into slabs: per slab its first tile, tiles, first row, rows, and blocks that its rows may see.

    The first integer is the width NC of the slab, a multiple of the block tile.
    """
    start = layout.block_grid(config.tokens).block_start.long()
    first_row, end_row = start[:-1], start[1:]
    seen = (end_row - layout.starts().view(-1)[first_row] + S - 1) // S  # blocks up to each tile's last token
    width = ceil_div(layout.max_length, S * config.blocks) * config.blocks
    rows_at_most = max(config.tokens, SLAB_ELEMENTS // (K * width))
    plan, tile, tiles = [width], 0, len(first_row)
    while tile < tiles:
        row = int(first_row[tile])
        after = int(torch.searchsorted(end_row, row + rows_at_most, right=True))
        after = min(max(after, tile + 1), tile + GRID_LIMIT)
        plan += [tile, after - tile, row, int(end_row[after - 1]) - row, int(seen[tile:after].max())]
        tile = after
    return tuple(plan)


@torch.library.custom_op("ssa::select_blocks", mutates_args=())
def _select_blocks(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,  # [B, T, K, D]
    block_start: Tensor,  # [blocks + 1]
    first_block: Tensor,  # [N]
    starts: Tensor,  # [B, T]
    lse_tiles: Tensor,  # [tiles + 1]
    score_tiles: Tensor,
    slabs: Sequence[int],
    block_size: int,
    num_blocks: int,
    first_blocks: int,
    local_blocks: int,
    official: bool,
    scale: float,
) -> Tensor:
    B, T, H, D = q.shape
    K, N, S = k.shape[2], B * T, block_size
    q_, k_ = flat(q), flat(k)
    where = capability(q.device.index)
    DP, c, G = max(16, next_power_of_two(D)), scale * LOG2E, H // K
    blocks = block_start.numel() - 1

    pooled = torch.empty(blocks, K, D, dtype=k.dtype, device=k.device)
    pool_kernel[(ceil_div(blocks, 8), K)](
        k_, pooled, block_start, k_.stride(0), k_.stride(1), K, blocks, D, DP, S, 8, num_warps=4
    )

    config = lse_config(D, where)
    tiles = lse_tiles.numel() - 1
    lse = torch.empty(H, N, dtype=torch.float32, device=q.device)
    lse_kernel[(tiles, H)](
        q_, pooled, lse, lse_tiles, starts, first_block, tiles, q_.stride(0), q_.stride(1), N, K, c, G,
        D, DP, S, config.tokens, config.blocks, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip

    config = score_config(D, where)
    width, chunk = slabs[0], chunk_blocks(slabs[0], S, official)
    plans = [slabs[i : i + CHUNK_INTEGERS] for i in range(1, len(slabs), CHUNK_INTEGERS)]
    rows_at_most = max(plan[3] for plan in plans)
    score = torch.empty(rows_at_most, K, width, dtype=torch.float32, device=q.device)
    chunk_max = torch.empty(rows_at_most, K, width // chunk, dtype=torch.int32, device=q.device)
    out = torch.empty(B, T, K, num_blocks, dtype=torch.int32, device=q.device)
    free = num_blocks - first_blocks - local_blocks if not official else min(S // 2, num_blocks)
    KP = max(next_power_of_two(free), S // chunk if official else 1)
    for tile, tiles, row, rows, seen in plans:
        score_kernel[(ceil_div(seen, config.blocks), tiles, K)](
            q_, pooled, lse, score, chunk_max, score_tiles, starts, first_block, tile, tiles, row,
            q_.stride(0), q_.stride(1), N, K, width, c, first_blocks, local_blocks, G,
            D, DP, S, config.tokens, config.blocks, chunk, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        chunks = max(4, next_power_of_two(ceil_div(seen, chunk)))
        shape = (S, chunks, chunk, KP, next_power_of_two(num_blocks))
        warps = min(8, max(1, max(chunks, KP * chunk) // 1024))
        if official:
            select_official_kernel[(rows, K)](
                score, chunk_max, out, starts, row, K, width, num_blocks, *shape, num_warps=warps
            )
        else:
            select_kernel[(rows, K)](
                score, chunk_max, out, starts, row, K, width, num_blocks, first_blocks, local_blocks, *shape,
                num_warps=warps,
            )  # fmt: skip
    return out


@_select_blocks.register_fake
def _(q, k, block_start, first_block, starts, lse_tiles, score_tiles, slabs, block_size, num_blocks, *_rest):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:2], k.shape[2], num_blocks, dtype=torch.int32)


def chunk_blocks(width: int, S: int, official: bool) -> int:
    """Blocks per chunk maximum: about ``sqrt(width / k)`` balances both levels. The published merge needs chunks that
    do not straddle its own (of S blocks)."""
    size = 8 if width <= 512 else 16 if width <= 4096 else 32
    return min(size, S) if official else size
