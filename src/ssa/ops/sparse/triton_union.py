"""Union lists: which blocks a tile of neighbouring tokens reads, and which of its tokens read each.

Neighbouring tokens choose nearly the same blocks, so a tile that loads the union once moves far fewer bytes than its
tokens one by one. For each (tile, KV head) the kernel writes the union in ascending order: first key row and a bit mask
over the tile's tokens. Tiles lie inside one document.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["slots"])
def union_kernel(
    indices_ptr,  # [N, K, slots], any order, -1 for nothing
    union_row_ptr,  # [tiles, K, TT * SP + PAD] int32: first key row of each block
    union_mask_ptr,  # [tiles, K, TT * SP + PAD] int32: bit i for token i of the tile
    union_count_ptr,  # [2, tiles + 1, K] int32: length of each tile's list; of the list before it in its document, or 0
    tile_start_ptr,  # [tiles + 1]
    starts_ptr,  # [N], first row of each token's document
    K,
    slots,
    S: tl.constexpr,
    TT: tl.constexpr,
    SP: tl.constexpr,
    PAD: tl.constexpr,
):
    """Sort (block, token) pairs, then merge equal blocks. The output rows carry values between lanes meanwhile.

    PAD entries that no token reads follow the union, so that its readers need not test where it ends. Each program also
    writes its count for the tile behind it.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    row0 = tl.load(tile_start_ptr + tile)
    rows = tl.load(tile_start_ptr + tile + 1) - row0
    NOTHING: tl.constexpr = 2147483647
    SIZE: tl.constexpr = TT * SP
    e = tl.arange(0, SIZE)
    token, slot = e // SP, e % SP
    block = tl.load(
        indices_ptr + ((row0 + token).to(tl.int64) * K + head) * slots + slot,
        mask=(token < rows) & (slot < slots),
        other=-1,
    ).to(tl.int32)
    pair = tl.sort(tl.where(block >= 0, block * TT + token, NOTHING))
    out_row = union_row_ptr + (tile.to(tl.int64) * K + head) * (SIZE + PAD)
    out_mask = union_mask_ptr + (tile.to(tl.int64) * K + head) * (SIZE + PAD)
    tl.store(out_row + e, pair)
    tl.debug_barrier()
    before = tl.load(out_row + e - 1, mask=e > 0, other=0)
    after = tl.load(out_row + e + 1, mask=e < SIZE - 1, other=NOTHING)
    tl.debug_barrier()
    valid = pair != NOTHING
    block = pair // TT
    first = valid & ((e == 0) | (before // TT != block))
    last = valid & ((after == NOTHING) | (after // TT != block))
    rank = tl.cumsum(first.to(tl.int32)) - 1
    bits = tl.cumsum(tl.where(valid, 1 << (pair % TT), 0))  # wraps around; differences stay right
    tl.store(out_mask + rank, bits, mask=last)
    tl.debug_barrier()
    earlier = tl.load(out_mask + rank - 1, mask=last & (rank > 0), other=0)
    tl.debug_barrier()
    tl.store(out_mask + rank, bits - earlier, mask=last)
    tl.store(out_row + rank, tl.load(starts_ptr + row0).to(tl.int32) + block * S, mask=first)
    count = tl.sum(first.to(tl.int32))
    tl.debug_barrier()
    pad = count + tl.arange(0, PAD)
    tl.store(out_row + pad, tl.zeros([PAD], tl.int32) + row0)
    tl.store(out_mask + pad, tl.zeros([PAD], tl.int32))
    tl.store(union_count_ptr + tile * K + head, count)
    tiles = tl.num_programs(0)
    before = union_count_ptr + (tiles + 1) * K + head
    next_row = tl.load(tile_start_ptr + tile + 1)
    last = tile == tiles - 1
    next_start = tl.load(starts_ptr + tl.where(last, row0, next_row))
    tl.store(before + (tile + 1) * K, tl.where(last | (next_start != tl.load(starts_ptr + row0)), 0, count))
    if tile == 0:
        tl.store(before, 0)
