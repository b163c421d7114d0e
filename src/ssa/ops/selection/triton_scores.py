"""Scores of tiles of tokens and blocks in Triton, with the maxima of chunks and, under a guess of L, the sums of heads.

`score_kernel` serves all shapes and reads queries from memory for every tile of blocks. `resident_score_kernel` keeps
those of all heads of a group in shared memory, and takes L and its guess on the way.

Shapes as in `triton_kernels.py`; r rows (token, head) of a resident tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssa.ops.selection.triton_kernels import (
    LARGE,
    NOTHING,
    _lse_with_maximum,
    _masked_logits,
    _tile,
)
from ssa.ops.selection.triton_topk import _key

CREDIBLE = tl.constexpr(2.0**60)  # a guess that is off by more says nothing
ROUNDING = tl.constexpr(2.0**-12)  # of a score, in base-2 logarithms, and of its logits relative to their size:
ROUNDING_OF_LOGITS = tl.constexpr(2.0**-16)


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


@triton.jit(do_not_specialize=["tile0", "num_tiles", "slab_row0", "N", "first_blocks", "local_blocks"])
def score_kernel(
    q_ptr,  # [N, H, D]
    pooled_ptr,  # [blocks, K, D]
    lse_ptr,  # [H, N]
    score_ptr,  # [tokens of the slab, K, NC] float32; only columns that a top-k may read are written
    chunk_max_ptr,  # [tokens of the slab, K, NC / CS] int32: bits + 1 of the largest candidate score, 0 for none
    tile_start_ptr,
    starts_ptr,
    first_block_ptr,
    tile0,
    num_tiles,
    slab_row0,
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
):
    """Scores of one tile of tokens x one tile of blocks: the keys stay, the loop runs over the group's heads."""
    kv_head = tl.program_id(2)
    row0, rows, position0, first_block = _tile(
        tile0 + num_tiles - 1 - tl.program_id(1), tile_start_ptr, starts_ptr, first_block_ptr
    )
    n0 = tl.program_id(0) * BN
    most = (position0 + rows - 1) // S + 1 - local_blocks  # candidates of the tile's last token end here
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
    score_tn = tl.zeros([BT, BN], tl.float32)
    live_td = live[:, None] & (d < D)[None, :]
    lse = tl.load(lse_ptr, mask=live, other=float("inf"))
    for g in range(G):
        q_td = tl.load(q_ptr + row[:, None] * q_row + (kv_head * G + g) * q_head + d[None, :], mask=live_td, other=0.0)
        next_lse = tl.load(lse_ptr + tl.minimum(g + 1, G - 1).to(tl.int64) * N, mask=live, other=float("inf"))
        score_tn += tl.exp2(tl.dot(q_td, tl.trans(k_nd), input_precision="ieee") * c - lse[:, None])
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
def _reference(q_rd, keys, complete, least, most, stride, c, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr):
    """What sums of a row are relative to: its largest logit of the first BN / 2 blocks and of the last that all see.
    With it the exponentials of these blocks."""
    n = tl.arange(0, BN)
    block = tl.where(n < BN // 2, n, tl.maximum(least - BN, 0) + n)
    x_rn = _masked_logits(q_rd, keys, block, complete, most, stride, c, D, DP)
    m = tl.where(complete > 0, tl.ceil(tl.max(x_rn, 1)), 0.0)
    return m, tl.exp2(x_rn - m[:, None])


@triton.jit
def _rest(
    q_rd, keys, m, begin, complete, most, stride, c, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Sum of the blocks from ``begin`` on that each row sees whole."""
    sums = tl.zeros([q_rd.shape[0], 4], tl.float32)
    for n0 in range(begin, most, BN):
        x_rn = _masked_logits(q_rd, keys, n0 + tl.arange(0, BN), complete, most, stride, c, D, DP)
        sums += _by_thread(tl.exp2(x_rn - m[:, None]))
    return tl.sum(sums, 1)


@triton.jit
def _resident_lse(
    q_rd, keys, complete, least, most, stride, c, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """L of the rows of a tile, whose first and last token see ``least`` and ``most`` blocks whole.

    Only a tile with a row whose sum leaves the range of float32 is done again, with a running maximum.
    """
    M: tl.constexpr = q_rd.shape[0]
    n, d = tl.arange(0, BN), tl.arange(0, DP)
    m, _ = _reference(q_rd, keys, complete, least, most, stride, c, D, DP, BN)
    sums, full = tl.zeros([M, 4], tl.float32), least // BN * BN
    for n0 in range(0, full, BN):
        k_nd = tl.load(keys + (n0 + n).to(tl.int64)[:, None] * stride + d[None, :], mask=(d < D)[None, :], other=0.0)
        sums += _by_thread(tl.exp2(tl.dot(q_rd, tl.trans(k_nd), input_precision="ieee") * c - m[:, None]))
    l = tl.sum(sums, 1) + _rest(q_rd, keys, m, full, complete, most, stride, c, D, DP, BN)
    lse = m + tl.log2(l)
    fits = (l < LARGE) & ((l > 0) | (complete == 0))
    if tl.min(fits.to(tl.int32)) == 0:
        lse = tl.where(fits, lse, _lse_with_maximum(q_rd, keys, complete, most, stride, c, D, DP, M))
    return tl.where(complete > 0, lse, float("inf"))


@triton.jit
def _resident_guess(
    q_rd, keys, coarse, complete, least, most, stride, c, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """A guess of L: the first BN / 2 blocks and those after the last chunk of R that all see whole are taken one by
    one; between them counts R times the mean key of each chunk."""
    n, d = tl.arange(0, BN), tl.arange(0, DP)
    tl.static_assert(BN // 2 % R == 0)
    m, e_rn = _reference(q_rd, keys, complete, least, most, stride, c, D, DP, BN)
    tail = least // R * R
    first = tl.sum(tl.where((n < BN // 2) & (n < tail), e_rn, 0.0), 1)
    sums, end = tl.zeros([q_rd.shape[0], 4], tl.float32), tail // R
    for n0 in range(BN // 2 // R, end, BN):
        chunk = n0 + n
        k_nd = tl.load(
            coarse + chunk.to(tl.int64)[:, None] * stride + d[None, :],
            mask=(chunk < end)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        x_rn = tl.dot(q_rd, tl.trans(k_nd), input_precision="ieee") * c - m[:, None]
        sums += _by_thread(tl.exp2(tl.where((chunk < end)[None, :], x_rn, NOTHING)))
    l = first + R * tl.sum(sums, 1) + _rest(q_rd, keys, m, tail, complete, most, stride, c, D, DP, BN)
    guess = m + tl.log2(tl.minimum(tl.maximum(l, 1 / LARGE), LARGE))
    return tl.where(complete > 0, guess, float("inf"))


@triton.jit
def _weights(q_rd, keys, block, most, lse, stride, c, D: tl.constexpr, DP: tl.constexpr):
    """``2^(s - L) [r, n]`` of blocks before ``most``."""
    d = tl.arange(0, DP)
    k_nd = tl.load(
        keys + block.to(tl.int64)[:, None] * stride + d[None, :],
        mask=(block < most)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    return tl.exp2(tl.dot(q_rd, tl.trans(k_nd), input_precision="ieee") * c - lse[:, None])


@triton.jit
def _over_heads(e_rn, BT: tl.constexpr, G: tl.constexpr):
    """Sums ``[t, n]`` over the heads of each token, by the numbers of the rows (`resident_score_kernel`)."""
    BN: tl.constexpr = e_rn.shape[1]
    e = tl.reshape(e_rn, [4, BT * G // 64, G // 4, 64 // G, BN])
    return tl.reshape(tl.sum(tl.sum(e, 0), 1), [BT, BN])


@triton.jit
def _largest_of_heads(x_r, BT: tl.constexpr, G: tl.constexpr):
    """Maxima ``[t]`` over the heads of each token, as `_over_heads`."""
    x = tl.reshape(x_r, [4, BT * G // 64, G // 4, 64 // G])
    return tl.reshape(tl.max(tl.max(x, 0), 1), [BT])


@triton.jit(do_not_specialize=["tile0", "num_tiles", "slab_row0", "first_blocks", "local_blocks"])
def resident_score_kernel(
    q_ptr,  # [N, H, D]
    pooled_ptr,  # [blocks, K, D]
    coarse_ptr,  # [chunks, K, D]
    score_ptr,  # [tokens of the slab, K, NC] float32
    chunk_max_ptr,  # [tokens of the slab, K, NC / CS] int32
    lse_ptr,  # [tokens of the slab, H]: L; with GUESS, as is the next
    share_ptr,  # [tokens of the slab, K]: what a score of the k-th best under the guess may lose by it, at most
    tile_start_ptr,
    starts_ptr,
    first_block_ptr,
    first_chunk_ptr,
    tile0,
    num_tiles,
    slab_row0,
    q_row,
    q_head,
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
    R: tl.constexpr,
    GUESS: tl.constexpr,
    G: tl.constexpr,
):
    """Scores of one tile of tokens under L or, with GUESS, under a guess of L, and then L by the same exponentials.

    The queries of all heads stay in shared memory, and the loops run over the blocks. A row's number is made of (a
    quarter of the heads, 16 rows for every warp: G/4 heads, 64/G tokens). So a thread of the matrix product holds most
    heads of its tokens, and sums over heads and over blocks stay in registers.
    """
    kv_head = tl.program_id(1)
    row0, rows, position0, first_block = _tile(
        tile0 + num_tiles - 1 - tl.program_id(0), tile_start_ptr, starts_ptr, first_block_ptr
    )
    HEADS: tl.constexpr = G // 4
    TOKENS: tl.constexpr = 64 // G
    r, n, d, t = tl.arange(0, BT * G), tl.arange(0, BN), tl.arange(0, DP), tl.arange(0, BT)
    of_tile = r // 16 % (BT // TOKENS) * TOKENS + r % TOKENS
    head = kv_head * G + r // (16 * BT // TOKENS) * HEADS + r // TOKENS % HEADS
    row, live = row0.to(tl.int64) + of_tile, of_tile < rows
    q_rd = tl.load(
        q_ptr + row[:, None] * q_row + head[:, None] * q_head + d[None, :],
        mask=live[:, None] & (d < D)[None, :],
        other=0.0,
    )
    stride = K * D
    keys = pooled_ptr + (first_block.to(tl.int64) * K + kv_head) * D
    complete, least, seen = (position0 + of_tile + 1) // S, (position0 + 1) // S, (position0 + rows) // S
    end = (position0 + t) // S + 1 - local_blocks
    most = (position0 + rows - 1) // S + 1 - local_blocks  # candidates of the tile's last token end here
    slab_row = ((row0.to(tl.int64) + t - slab_row0) * K + kv_head) * NC
    if GUESS:
        coarse = coarse_ptr + (tl.load(first_chunk_ptr + row0).to(tl.int64) * K + kv_head) * D
        lse = _resident_guess(q_rd, keys, coarse, complete, least, seen, stride, c, D, DP, BN, R)
        sums = tl.zeros([BT * G, 4], tl.float32)
        most, full = tl.maximum(most, seen), least // BN * BN
    else:
        lse = _resident_lse(q_rd, keys, complete, least, seen, stride, c, D, DP, BN)
        full = most
    for n0 in range(0, full, BN):
        e_rn = _weights(q_rd, keys, n0 + n, most, lse, stride, c, D, DP)
        if GUESS:
            sums += _by_thread(e_rn)
        score_tn = _over_heads(e_rn, BT, G)
        _store_scores(score_tn, n0, score_ptr, chunk_max_ptr, slab_row, t < rows, end, first_blocks, BT, BN, CS)
    if GUESS:
        for n0 in range(full, most, BN):
            e_rn = _weights(q_rd, keys, n0 + n, most, lse, stride, c, D, DP)
            sums += _by_thread(tl.where((n0 + n)[None, :] < complete[:, None], e_rn, 0.0))
            score_tn = _over_heads(e_rn, BT, G)
            _store_scores(score_tn, n0, score_ptr, chunk_max_ptr, slab_row, t < rows, end, first_blocks, BT, BN, CS)
        l = tl.sum(sums, 1)
        credible = ((l < CREDIBLE) & (l > 1 / CREDIBLE)) | (complete == 0)
        off = tl.where(credible, tl.log2(tl.where((complete > 0) & credible, l, 1.0)), float("inf"))  # L - L'
        true = lse + off
        if tl.min(credible.to(tl.int32)) == 0:
            again = _lse_with_maximum(q_rd, keys, complete, seen, stride, c, D, DP, BT * G)
            true = tl.where(credible, true, again)
        tl.store(lse_ptr + (row - slab_row0) * K * G + head, true, mask=live)
        most, size = _largest_of_heads(off, BT, G), _largest_of_heads(tl.abs(true), BT, G)
        share = tl.exp2(-_largest_of_heads(-off, BT, G) - most - ROUNDING - ROUNDING_OF_LOGITS * size)
        share = tl.where(most < float("inf"), share, 0.0)
        tl.store(share_ptr + (row0.to(tl.int64) + t - slab_row0) * K + kv_head, share, mask=t < rows)
