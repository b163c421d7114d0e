"""Block selection in Triton: pooled keys, log-sum-exp over blocks, scores with chunk maxima.

Score of block n for KV head g at token t (paper section 3), with c = scale * log2(e):

    L[t, h]    = log2 sum_{n complete at t} 2^(c q_h . kbar_n)
    score[t,n] = sum_{h in group g} 2^(c q_h . kbar_n - L[t, h])

The dot products are recomputed instead of storing a [T, H, blocks] tensor, and exponentials bound the time. Two ways:

* *two passes* over the blocks: L first, then the scores.
* *one pass*: a guess L' of L from the mean key of every R blocks; then scores under the guess and, by the same
  exponentials, L, which tells how wrong the guess was. With 2^(L - L') between lo and hi for the heads of a group, a
  block's true score is its score under the guess divided by something between lo and hi. So if k blocks have a score
  under the guess of at least x, the k best have at least x lo / hi: scoring those few again (`triton_topk.py`) gives
  the same blocks as two passes. A bad guess makes that list longer, never wrong.

Scores (`triton_scores.py`) go to a slab that holds a bounded number of tokens, with the maximum of every CS blocks.

All tiles lie inside one document, so the document is a scalar of the program and no row sees another's keys.

Shapes: t/BT tokens of a tile, n/BN blocks of a tile, d/DP head dim (padded to a power of two), g query heads of a
group, R blocks of a coarse key.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(float("-inf"))
LARGE = tl.constexpr(2.0**100)  # a sum below it has not overflowed
EDGE = tl.constexpr(16)  # first blocks, and last ones, that are taken one by one


@triton.jit(do_not_specialize=["num_chunks"])
def pool_kernel(
    k_ptr,  # [N, K, D]
    pooled_ptr,  # [blocks, K, D]
    coarse_ptr,  # [chunks, K, D]; the mean key of R blocks, meaningless where a document's last has fewer
    chunk_start_ptr,  # [chunks + 1]; chunks restart with every document, as blocks do
    starts_ptr,
    first_block_ptr,
    k_row,
    k_head,
    K,
    num_chunks,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    R: tl.constexpr,
):
    """Mean key of a block: float32 sum token after token, one division, one rounding (the specification's order)."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    row0, end = tl.load(chunk_start_ptr + chunk), tl.load(chunk_start_ptr + chunk + 1)
    block0 = tl.load(first_block_ptr + row0) + (row0 - tl.load(starts_ptr + row0).to(tl.int32)) // S
    n, d = tl.arange(0, R), tl.arange(0, DP)
    start = row0 + n * S
    total_nd = tl.zeros([R, DP], tl.float32)
    for i in range(S):
        row = start + i
        x_nd = tl.load(
            k_ptr + row.to(tl.int64)[:, None] * k_row + head * k_head + d[None, :],
            mask=(row < end)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        total_nd += x_nd.to(tl.float32)
    count = tl.minimum(tl.maximum(end - start, 1), S).to(tl.float32)
    mean_nd = tl.div_rn(total_nd, tl.broadcast_to(count[:, None], [R, DP]))
    out = ((block0 + n).to(tl.int64) * K + head)[:, None] * D + d[None, :]
    tl.store(pooled_ptr + out, mean_nd.to(pooled_ptr.dtype.element_ty), mask=(start < end)[:, None] & (d < D)[None, :])
    coarse_d = tl.sum(mean_nd, 0) / R
    tl.store(coarse_ptr + (chunk.to(tl.int64) * K + head) * D + d, coarse_d.to(coarse_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _tile(tile, tile_start_ptr, starts_ptr, first_block_ptr):
    """First flat row of a tile of tokens, how many it has, its first position and its document's first block."""
    row = tl.load(tile_start_ptr + tile)
    rows = tl.load(tile_start_ptr + tile + 1) - row
    position = row - tl.load(starts_ptr + row).to(tl.int32)
    return row, rows, position, tl.load(first_block_ptr + row)


@triton.jit
def _masked_logits(q_td, keys, block, complete, most, stride, c, D: tl.constexpr, DP: tl.constexpr):
    """``c q . kbar`` of ``block [n]``; -inf where a block is not complete at a token; none is from ``most`` on."""
    d = tl.arange(0, DP)
    k_nd = tl.load(
        keys + block.to(tl.int64)[:, None] * stride + d[None, :],
        mask=(block < most)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    s_tn = tl.dot(q_td, tl.trans(k_nd), input_precision="ieee") * c
    return tl.where(block[None, :] < complete[:, None], s_tn, NOTHING)


@triton.jit
def _lse_with_maximum(q_td, keys, complete, most, stride, c, D: tl.constexpr, DP: tl.constexpr, BT: tl.constexpr):
    """L of rows with any logits, in two walks over the blocks."""
    n = tl.arange(0, 16)
    top = tl.full([BT], -1e30, tl.float32)
    for n0 in range(0, most, 16):
        top = tl.maximum(top, tl.max(_masked_logits(q_td, keys, n0 + n, complete, most, stride, c, D, DP), 1))
    l = tl.zeros([BT], tl.float32)
    for n0 in range(0, most, 16):
        x_tn = _masked_logits(q_td, keys, n0 + n, complete, most, stride, c, D, DP)
        l += tl.sum(tl.exp2(x_tn - top[:, None]), 1)
    return top + tl.log2(l)


@triton.jit(do_not_specialize=["tile0", "num_tiles", "N"])
def lse_kernel(
    q_ptr,  # [N, H, D]
    pooled_ptr,  # [blocks, K, D]
    lse_ptr,  # [H, N] float32, base 2; +inf where no block is complete, so that 2^(s - L) = 0
    tile_start_ptr,
    starts_ptr,
    first_block_ptr,
    tile0,
    num_tiles,
    q_row,
    q_head,
    N,
    K,
    c,
    G,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    """L over the blocks complete at each token; the longest tiles of a document start first.

    The first blocks and the last ones are taken one by one. Sums are relative to the largest logit of these, not to a
    running maximum. Only a row whose sum leaves the range of float32 that way is done again.
    """
    head = tl.program_id(1)
    kv_head = head // G
    tile = tile0 + num_tiles - 1 - tl.program_id(0)
    row0, rows, position0, first_block = _tile(tile, tile_start_ptr, starts_ptr, first_block_ptr)
    t, d = tl.arange(0, BT), tl.arange(0, DP)
    row = row0.to(tl.int64) + t
    q_td = tl.load(
        q_ptr + row[:, None] * q_row + head * q_head + d[None, :],
        mask=(t < rows)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    complete = (position0 + t + 1) // S
    least, most = (position0 + 1) // S, (position0 + rows) // S  # of the tile's first and last token
    stride = K * D
    keys = pooled_ptr + (first_block.to(tl.int64) * K + kv_head) * D
    tl.static_assert(EDGE // 2 + BT // S <= EDGE, "the blocks after the last whole half of an edge must fit the edge")
    j, n = tl.arange(0, 2 * EDGE), tl.arange(0, BN)
    tail = tl.maximum(least // (EDGE // 2) * (EDGE // 2), EDGE)
    x_tn = _masked_logits(q_td, keys, tl.where(j < EDGE, j, tail + j - EDGE), complete, most, stride, c, D, DP)
    m = tl.where(complete > 0, tl.ceil(tl.max(x_tn, 1)), 0.0)
    l = tl.sum(tl.exp2(x_tn - m[:, None]), 1)
    full = EDGE + (tail - EDGE) // BN * BN
    for n0 in range(EDGE, full, BN):
        k_nd = tl.load(keys + (n0 + n).to(tl.int64)[:, None] * stride + d[None, :], mask=(d < D)[None, :], other=0.0)
        s_tn = tl.dot(q_td, tl.trans(k_nd), input_precision="ieee")
        l += tl.sum(tl.exp2(s_tn * c - m[:, None]), 1)
    if full < tail:
        everyone = tl.full([BT], 0, tl.int32) + tail
        rest_tn = _masked_logits(q_td, keys, full + n, everyone, tail, stride, c, D, DP)
        l += tl.sum(tl.exp2(rest_tn - m[:, None]), 1)
    out = head.to(tl.int64) * N + row
    fits = (l < LARGE) & ((l > 0) | (complete == 0))
    tl.store(lse_ptr + out, tl.where(complete > 0, m + tl.log2(l), float("inf")), mask=(t < rows) & fits)
    if tl.min(fits.to(tl.int32)) == 0:
        again = _lse_with_maximum(q_td, keys, complete, most, stride, c, D, DP, BT)
        tl.store(lse_ptr + out, again, mask=(t < rows) & (fits == 0))
