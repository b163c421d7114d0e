"""Block selection on the GPU: launches of :mod:`ssa.ops.selection.triton_kernels` as one custom operation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.ops.selection.triton_kernels import lse_kernel, normalise_kernel, pool_kernel, score_kernel
from ssa.ops.selection.triton_topk import refine_kernel, select_kernel, select_official_kernel
from ssa.ops.spec import SparseSpec
from ssa.ops.triton_support import (
    LOG2E,
    Launch,
    Launcher,
    capability,
    ceil_div,
    layout_of,
    next_power_of_two,
    on_device,
    rows,
)

SLAB_ELEMENTS = 1 << 27  # float32 scores held at a time: 512 MiB
GRID_LIMIT = 65535  # largest second or third dimension of a CUDA grid
SLAB_INTEGERS = 5  # per slab in `_slabs`
COARSE_BLOCKS = 8  # blocks behind one key of a guess
ONE_PASS_TOKENS = 65536  # longest document of a batch from which one pass is taken (docs/kernels.md)


class TileConfig(NamedTuple):
    """Tile of tokens x blocks and how its kernel is launched."""

    tokens: int
    blocks: int
    how: Launch


@cache
def lse_config(D: int, device_capability: tuple[int, int], guess: bool) -> TileConfig:
    """Measured on an H200 (docs/kernels.md); smaller tiles where shared memory is smaller or rows are longer."""
    if D > 128 or device_capability < (9, 0):
        return TileConfig(64, 32 if D > 128 else 64, Launch(4, 2))
    if guess:
        return TileConfig(128, 32, Launch(4, 3))
    return TileConfig(128, 64, Launch(4, 3, 96) if D <= 64 else Launch(4, 2))


@cache
def score_config(D: int, device_capability: tuple[int, int], guess: bool) -> TileConfig:
    """As :func:`lse_config`. More blocks with a guess: fewer sums beside the scores."""
    if D > 128 or device_capability < (9, 0):
        return TileConfig(64, 64, Launch(4, 2))
    if guess:
        return TileConfig(64, 128, Launch(4, 3, 168) if D <= 64 else Launch(4, 2))
    return TileConfig(64, 64, Launch(4, 3, 96) if D <= 64 else Launch(4, 2))


@cache
def refine_config(D: int, free: int) -> tuple[int, int | None]:
    """Blocks scored again at a time, of which ``free`` are kept; registers per thread."""
    return max(32, 2 * next_power_of_two(free)), 64 if D <= 64 and free <= 16 else None


def select_blocks(q: Tensor, k: Tensor, spec: SparseSpec, layout: DocumentLayout, scale: float) -> Tensor:
    """See :func:`ssa.ops.select_blocks`."""
    return torch.ops.ssa.select_blocks(
        q,
        k,
        layout.lengths,
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


def _select(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,  # [B, T, K, D]
    lengths: Sequence[int],
    block_size: int,
    num_blocks: int,
    first_blocks: int,
    local_blocks: int,
    official: bool,
    scale: float,
) -> Tensor:
    B, T, H, D = q.shape
    K, N, S, device = k.shape[2], B * T, block_size, q.device
    layout = layout_of(tuple(lengths), B, T)
    guess = not official and layout.max_length >= ONE_PASS_TOKENS
    grid, coarse_grid, starts = (
        layout.block_grid(S, device),
        layout.block_grid(S * COARSE_BLOCKS, device),
        layout.starts(device),
    )
    (q, q_stride), (k, k_stride) = rows(q), rows(k)
    where = capability(device.index)
    DP, c, G = max(16, next_power_of_two(D)), scale * LOG2E, H // K
    launch = Launcher(device, q.dtype, H, K, D, q_stride, k_stride)
    first_block, chunks = grid.first_block, coarse_grid.num_blocks
    pooled = torch.empty(grid.num_blocks, K, D, dtype=k.dtype, device=device)
    coarse = torch.empty(chunks, K, D, dtype=k.dtype, device=device)
    arguments: tuple[Any, ...] = (
        k, pooled, coarse, coarse_grid.block_start, starts, first_block, *k_stride, K, chunks,
    )  # fmt: skip
    launch(pool_kernel, (chunks, K, 1), arguments, (D, DP, S, COARSE_BLOCKS), Launch(4))

    first, config = lse_config(D, where, guess), score_config(D, where, guess)
    assert first.tokens % config.tokens == 0  # both agree on what `score_kernel` sums
    tile_start = layout.block_grid(first.tokens, device).block_start
    tiles = tile_start.numel() - 1
    lse = torch.empty(H, N, dtype=torch.float32, device=device)
    edge = torch.empty_like(lse) if guess else lse  # else unused, as below
    arguments = (
        q, pooled, coarse, lse, edge, tile_start, starts, first_block, coarse_grid.first_block, tiles, *q_stride, N, K,
        c, G,
    )  # fmt: skip
    constants: tuple[Any, ...] = (D, DP, S, first.tokens, first.blocks, COARSE_BLOCKS, guess, config.blocks)
    launch(lse_kernel, (tiles, H, 1), arguments, constants, first.how)

    tile_start = layout.block_grid(config.tokens, device).block_start
    slabs = _slabs(layout, S, K, config)
    width, chunk = slabs[0], chunk_blocks(slabs[0], S, official)
    plans = [slabs[i : i + SLAB_INTEGERS] for i in range(1, len(slabs), SLAB_INTEGERS)]
    rows_at_most = max(plan[3] for plan in plans)
    score = torch.empty(rows_at_most, K, width, dtype=torch.float32, device=device)
    chunk_max = torch.empty(rows_at_most, K, width // chunk, dtype=torch.int32, device=device)
    part = true_lse = off = lse
    if guess:
        part = torch.empty(width // config.blocks, H, rows_at_most, dtype=torch.float32, device=device)
        true_lse, off = torch.empty(2, rows_at_most, H, dtype=torch.float32, device=device)
    out = torch.empty(B, T, K, num_blocks, dtype=torch.int32, device=device)
    free = num_blocks - first_blocks - local_blocks if not official else min(S // 2, num_blocks)
    KP = max(next_power_of_two(free), S // chunk if official else 1)
    tile_constants = (D, DP, S, config.tokens, config.blocks)
    KP2, GP = next_power_of_two(num_blocks), max(16, next_power_of_two(G))
    for tile, tiles, row, count, seen in plans:
        size = (ceil_div(seen, config.blocks), tiles, K)
        arguments = (
            q, pooled, lse, score, chunk_max, part, tile_start, starts, first_block, tile, tiles, row, rows_at_most,
            *q_stride, N, K, width, c, first_blocks, local_blocks, G,
        )  # fmt: skip
        launch(score_kernel, size, arguments, (*tile_constants, chunk, first.tokens, guess), config.how)
        NCH = max(4, next_power_of_two(ceil_div(seen, chunk)))
        warps, constants = min(8, max(1, max(NCH, KP * chunk) // 1024)), (NCH, chunk, KP, KP2)
        if guess:
            arguments = (
                q, pooled, lse, edge, part, true_lse, off, tile_start, starts, first_block, tile, row, rows_at_most,
                *q_stride, N, K, c, G,
            )  # fmt: skip
            launch(normalise_kernel, (tiles, H, 1), arguments, (*tile_constants, first.tokens), Launch(4))
            arguments = (
                q, pooled, true_lse, off, score, chunk_max, out, starts, first_block, row, *q_stride, K, width,
                num_blocks, c, first_blocks, local_blocks, G,
            )  # fmt: skip
            CT, registers = refine_config(D, free)
            launch(refine_kernel, (count, K, 1), arguments, (D, DP, S, *constants, GP, CT), Launch(warps, 2, registers))
        else:
            forced = () if official else (first_blocks, local_blocks)
            arguments = (score, chunk_max, out, starts, row, K, width, num_blocks, *forced)
            kernel = select_official_kernel if official else select_kernel
            launch(kernel, (count, K, 1), arguments, (S, *constants), Launch(warps))
    return out


def _select_on_its_device(q: Tensor, *rest: Any) -> Tensor:
    with on_device(q):
        return _select(q, *rest)


def _select_fake(q: Tensor, k: Tensor, lengths: Sequence[int], block_size: int, num_blocks: int, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:2], k.shape[2], num_blocks, dtype=torch.int32)


LIBRARY = torch.library.Library("ssa", "FRAGMENT")  # cheaper per call than `custom_op`
LIBRARY.define(
    "select_blocks(Tensor q, Tensor k, int[] lengths, int block_size, int num_blocks, int first_blocks, "
    "int local_blocks, bool official, float scale) -> Tensor"
)
LIBRARY.impl("select_blocks", _select_on_its_device, "CompositeExplicitAutograd")
torch.library.register_fake("ssa::select_blocks", _select_fake, lib=LIBRARY)


def chunk_blocks(width: int, S: int, official: bool) -> int:
    """Blocks per chunk maximum: about ``sqrt(width / k)`` balances both levels. The published merge needs chunks that
    do not straddle its own (of S blocks)."""
    size = 8 if width <= 512 else 16 if width <= 4096 else 32
    return min(size, S) if official else size
