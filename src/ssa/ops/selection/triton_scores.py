"""Scores of tiles of tokens and blocks in Triton, with the maxima of chunks and, under a guess of L, the sums of heads.

Shapes as in `triton_kernels.py`; r rows (token, head) of a resident tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssa.ops.selection.triton_kernels import _lse_with_maximum, _masked_logits, _summed_before, _tile
from ssa.ops.selection.triton_topk import _key

LARGE = tl.constexpr(2.0**100)  # a sum below it has not overflowed


@triton.jit
def _store_scores(
    score_tn, n0, score_ptr, chunk_max_ptr, slab_row, live, end, first_blocks, BT: tl.constexpr, BN: tl.constexpr,
    CS: tl.constexpr,
):  # fmt: skip
    """Scores of BN blocks from ``n0`` on and their maxima by chunk, over the candidates before ``end [t]``."""
    block = n0 + tl.arange(0, BN)
    tl.store(score_ptr + slab_row[:, None] + block[None, :], score_tn, mask=live[:, None])
    candidate = (block[None, :] >= first_blocks) & (block[None, :] < end[:, None])
    largest = tl.max(tl.reshape(tl.where(candidate, score_tn, -1.0), [BT, BN // CS, CS]), 2)
    chunk = n0 // CS + tl.arange(0, BN // CS)
    key = tl.where(largest >= 0, _key(largest), 0)
    tl.store(chunk_max_ptr + (slab_row // CS)[:, None] + chunk[None, :], key, mask=live[:, None])


@triton.jit(do_not_specialize=["tile0", "num_tiles", "slab_row0", "slab_rows", "N", "first_blocks", "local_blocks"])
def score_kernel(
    q_ptr,  # [N, H, D]
    pooled_ptr,  # [blocks, K, D]
    lse_ptr,  # [H, N]: L, or a guess of it
    score_ptr,  # [tokens of the slab, K, NC] float32; only columns that a top-k may read are written
    chunk_max_ptr,  # [tokens of the slab, K, NC / CS] int32: bits + 1 of the largest candidate score, 0 for none
    part_ptr,  # [NC / BN, H, tokens of the slab] float32: sums of 2^(s - L') of a tile before `_summed_before`
    tile_start_ptr,
    starts_ptr,
    first_block_ptr,
    tile0,
    num_tiles,
    slab_row0,
    slab_rows,
    q_row,
    q_head,
    N,
    K,
    NC,
    c,
    first_blocks,
    local_blocks,
    G,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    CS: tl.constexpr,
    LT: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Scores of one tile of tokens x one tile of blocks: the keys stay, the loop runs over the group's heads."""
    kv_head = tl.program_id(2)
    row0, rows, position0, first_block = _tile(
        tile0 + num_tiles - 1 - tl.program_id(1), tile_start_ptr, starts_ptr, first_block_ptr
    )
    n0 = tl.program_id(0) * BN
    most = (position0 + rows - 1) // S + 1 - local_blocks  # candidates of the tile's last token end here
    summed = n0 < _summed_before(position0, S, LT, BN)
    if SUMS:
        most = tl.where(summed, tl.maximum(most, n0 + BN), most)
    if n0 >= most:
        return
    t, d = tl.arange(0, BT), tl.arange(0, DP)
    block = n0 + tl.arange(0, BN)
    row = row0.to(tl.int64) + t
    live = t < rows
    k_nd = tl.load(
        pooled_ptr + ((first_block + block).to(tl.int64) * K + kv_head)[:, None] * D + d[None, :],
        mask=(block < most)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    head0 = (kv_head * G).to(tl.int64)
    lse_ptr += head0 * N + row
    part_head = tl.zeros([], tl.int64) + slab_rows
    part_ptr += (tl.program_id(0).to(tl.int64) * K * G + head0) * part_head + row - slab_row0
    score_tn = tl.zeros([BT, BN], tl.float32)
    live_td = live[:, None] & (d < D)[None, :]
    lse = tl.load(lse_ptr, mask=live, other=float("inf"))
    for g in range(G):
        q_td = tl.load(q_ptr + row[:, None] * q_row + (kv_head * G + g) * q_head + d[None, :], mask=live_td, other=0.0)
        next_lse = tl.load(lse_ptr + tl.minimum(g + 1, G - 1).to(tl.int64) * N, mask=live, other=float("inf"))
        e_tn = tl.exp2(tl.dot(q_td, tl.trans(k_nd), input_precision="ieee") * c - lse[:, None])
        score_tn += e_tn
        if SUMS:
            if summed:
                tl.store(part_ptr, tl.sum(e_tn, 1), mask=live)
            part_ptr += part_head
        lse = next_lse
    slab_row = ((row - slab_row0) * K + kv_head) * NC
    end = (position0 + t) // S + 1 - local_blocks
    _store_scores(score_tn, n0, score_ptr, chunk_max_ptr, slab_row, live, end, first_blocks, BT, BN, CS)


@triton.jit
def _by_thread(e_rn):
    """Sums ``[r, 4]`` over the blocks that a thread of a matrix product holds of a row: no thread asks another."""
    M: tl.constexpr = e_rn.shape[0]
    BN: tl.constexpr = e_rn.shape[1]
    return tl.sum(tl.sum(tl.reshape(e_rn, [M, BN // 8, 4, 2]), 3), 1)


@triton.jit
def _resident_lse(
    q_rd, keys, complete, least, most, stride, c, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """L of the rows of a tile, whose tokens see ``least`` to ``most`` blocks whole.

    Sums are relative to the largest logit of the first blocks and of the last that all see, not to a running maximum.
    Only a tile with a row whose sum leaves the range of float32 that way is done again.
    """
    M: tl.constexpr = q_rd.shape[0]
    n, d = tl.arange(0, BN), tl.arange(0, DP)
    block = tl.where(n < BN // 2, n, tl.maximum(least - BN, 0) + n)
    m = tl.max(_masked_logits(q_rd, keys, block, complete, most, stride, c, D, DP), 1)
    m = tl.where(complete > 0, tl.ceil(m), 0.0)
    sums, full = tl.zeros([M, 4], tl.float32), least // BN * BN
    for n0 in range(0, full, BN):
        k_nd = tl.load(keys + (n0 + n).to(tl.int64)[:, None] * stride + d[None, :], mask=(d < D)[None, :], other=0.0)
        sums += _by_thread(tl.exp2(tl.dot(q_rd, tl.trans(k_nd), input_precision="ieee") * c - m[:, None]))
    for n0 in range(full, most, BN):
        rest = _masked_logits(q_rd, keys, n0 + n, complete, most, stride, c, D, DP)
        sums += _by_thread(tl.exp2(rest - m[:, None]))
    l = tl.sum(sums, 1)
    lse = tl.where(complete > 0, m + tl.log2(l), float("inf"))
    fits = (l < LARGE) & ((l > 0) | (complete == 0))
    if tl.min(fits.to(tl.int32)) == 0:
        again = _lse_with_maximum(q_rd, keys, complete, most, stride, c, D, DP, M)
        lse = tl.where(fits, lse, tl.where(complete > 0, again, float("inf")))
    return lse


@triton.jit(do_not_specialize=["tile0", "num_tiles", "slab_row0", "slab_rows", "N", "first_blocks", "local_blocks"])
def resident_score_kernel(
    q_ptr,  # [N, H, D]
    pooled_ptr,  # [blocks, K, D]
    lse_ptr,  # [H, N]: a guess of L, with GUESS
    score_ptr,  # [tokens of the slab, K, NC] float32
    chunk_max_ptr,  # [tokens of the slab, K, NC / CS] int32
    part_ptr,  # [H, tokens of the slab] float32: sums of 2^(s - L') over the blocks before `_summed_before`, with GUESS
    tile_start_ptr,
    starts_ptr,
    first_block_ptr,
    tile0,
    num_tiles,
    slab_row0,
    slab_rows,
    q_row,
    q_head,
    N,
    K,
    NC,
    c,
    first_blocks,
    local_blocks,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    CS: tl.constexpr,
    LT: tl.constexpr,
    GUESS: tl.constexpr,
    G: tl.constexpr,
):
    """L, unless a guess is given, and what `score_kernel` computes, with the queries of all heads in shared memory: the loop runs over the blocks.

    A row's number is made of (a quarter of the heads, 16 rows for every warp: G/4 heads, 64/G tokens). So a thread of
    the matrix product holds most heads of its tokens, and sums over heads and over blocks stay in registers.
    """
    kv_head = tl.program_id(1)
    row0, rows, position0, first_block = _tile(
        tile0 + num_tiles - 1 - tl.program_id(0), tile_start_ptr, starts_ptr, first_block_ptr
    )
    HL: tl.constexpr = G // 4
    TL: tl.constexpr = 64 // G
    TH: tl.constexpr = BT // TL
    before = _summed_before(position0, S, LT, BN)
    most = (position0 + rows - 1) // S + 1 - local_blocks  # candidates of the tile's last token end here
    if GUESS:
        most = tl.maximum(most, before)
    r, n, d, t = tl.arange(0, BT * G), tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, BT)
    head = kv_head * G + r // (16 * TH) * HL + r // TL % HL
    of_tile = r // 16 % TH * TL + r % TL
    row, live = row0.to(tl.int64) + of_tile, of_tile < rows
    q_rd = tl.load(
        q_ptr + row[:, None] * q_row + head[:, None] * q_head + d[None, :],
        mask=live[:, None] & (d < D)[None, :],
        other=0.0,
    )
    keys = pooled_ptr + (first_block.to(tl.int64) * K + kv_head) * D
    if GUESS:
        lse = tl.load(lse_ptr + head.to(tl.int64) * N + row, mask=live, other=float("inf"))
    else:
        complete, least, seen = (position0 + of_tile + 1) // S, (position0 + 1) // S, (position0 + rows) // S
        lse = _resident_lse(q_rd, keys, complete, least, seen, K * D, c, D, DP, BN)
    slab_row = ((row0.to(tl.int64) + t - slab_row0) * K + kv_head) * NC
    end = (position0 + t) // S + 1 - local_blocks
    sums = tl.zeros([BT * G, 4], tl.float32)  # by the four threads that share a row
    for n0 in range(0, most, BN):
        block = n0 + n
        k_nd = tl.load(
            keys + block.to(tl.int64)[:, None] * (K * D) + d[None, :],
            mask=(block < most)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        e_rn = tl.exp2(tl.dot(q_rd, tl.trans(k_nd), input_precision="ieee") * c - lse[:, None])
        if GUESS:
            sums += tl.where(n0 < before, _by_thread(e_rn), 0.0)
        score_tn = tl.reshape(tl.sum(tl.sum(tl.reshape(e_rn, [4, TH, HL, TL, BN]), 0), 1), [BT, BN])
        _store_scores(score_tn, n0, score_ptr, chunk_max_ptr, slab_row, t < rows, end, first_blocks, BT, BN, CS)
    if GUESS:
        part = head * (tl.zeros([], tl.int64) + slab_rows) + row - slab_row0
        tl.store(part_ptr + part, tl.sum(sums, 1), mask=live)
