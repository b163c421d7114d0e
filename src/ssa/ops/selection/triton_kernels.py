"""Block selection in Triton: pooled keys, log-sum-exp over blocks, scores with chunk maxima, exact top-k.

Score of block n for KV head g at token t (paper section 3), with c = scale * log2(e):

    L[t, h]    = log2 sum_{n complete at t} 2^(c q_h . kbar_n)
    score[t,n] = sum_{h in group g} 2^(c q_h . kbar_n - L[t, h])

Two passes over the blocks recompute the dot products instead of storing a [T, H, blocks] tensor. Scores go to a slab
that holds a bounded number of tokens; beside it the maximum of every CS blocks. The k best scores lie in the k chunks
with the largest maxima (ties: the lower chunk), so the top-k reads k * CS scores per row, not all of them.

All tiles lie inside one document, so the document is a scalar of the program and no row sees another's keys.

Shapes: t/BT tokens of a tile, n/BN blocks of a tile, d/DP head dim (padded to a power of two), g query heads of a
group.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(float("-inf"))
LARGE = tl.constexpr(2.0**100)  # a sum below it has not overflowed


@triton.jit(do_not_specialize=["num_blocks"])
def pool_kernel(
    k_ptr,  # [N, K, D]
    pooled_ptr,  # [blocks, K, D]
    block_start_ptr,  # [blocks + 1]
    k_row,
    k_head,
    K,
    num_blocks,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Mean key of a block: float32 sum token after token, one division, one rounding (the specification's order)."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    head = tl.program_id(1)
    d = tl.arange(0, DP)
    exists = block < num_blocks
    start = tl.load(block_start_ptr + block, mask=exists, other=0)
    end = tl.load(block_start_ptr + block + 1, mask=exists, other=0)
    total_nd = tl.zeros([BLOCKS, DP], tl.float32)
    for i in range(S):
        row = start + i
        x_nd = tl.load(
            k_ptr + row.to(tl.int64)[:, None] * k_row + head * k_head + d[None, :],
            mask=(row < end)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        total_nd += x_nd.to(tl.float32)
    count = tl.maximum(end - start, 1).to(tl.float32)
    mean_nd = tl.div_rn(total_nd, tl.broadcast_to(count[:, None], [BLOCKS, DP]))
    out = (block.to(tl.int64) * K + head)[:, None] * D + d[None, :]
    tl.store(pooled_ptr + out, mean_nd.to(pooled_ptr.dtype.element_ty), mask=exists[:, None] & (d < D)[None, :])


@triton.jit
def _tile(tile, tile_start_ptr, starts_ptr, first_block_ptr):
    """First flat row of a tile of tokens, how many it has, its first position and its document's first block."""
    row = tl.load(tile_start_ptr + tile)
    rows = tl.load(tile_start_ptr + tile + 1) - row
    position = row - tl.load(starts_ptr + row).to(tl.int32)
    return row, rows, position, tl.load(first_block_ptr + row)


@triton.jit
def _masked_logits(q_td, keys, n0, most, complete, stride, c, D: tl.constexpr, DP: tl.constexpr):
    """``c q . kbar`` of 16 blocks from ``n0``; -inf where a block is not complete at a token."""
    block, d = n0 + tl.arange(0, 16), tl.arange(0, DP)
    k_nd = tl.load(
        keys + block.to(tl.int64)[:, None] * stride + d[None, :],
        mask=(block < most)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    s_tn = tl.dot(q_td, tl.trans(k_nd), input_precision="ieee") * c
    return tl.where(block[None, :] < complete[:, None], s_tn, NOTHING)


@triton.jit(do_not_specialize=["num_tiles", "N"])
def lse_kernel(
    q_ptr,  # [N, H, D]
    pooled_ptr,  # [blocks, K, D]
    lse_ptr,  # [H, N] float32, base 2; +inf where no block is complete, so that 2^(s - L) = 0
    tile_start_ptr,
    starts_ptr,
    first_block_ptr,
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

    The sum is taken relative to the largest logit of the document's first 16 blocks, not to a running maximum. Only a
    row whose sum leaves the range of float32 that way is done again, with the maximum.
    """
    head = tl.program_id(1)
    kv_head = head // G
    row0, rows, position0, first_block = _tile(
        num_tiles - 1 - tl.program_id(0), tile_start_ptr, starts_ptr, first_block_ptr
    )
    t, d = tl.arange(0, BT), tl.arange(0, DP)
    row = row0.to(tl.int64) + t
    q_td = tl.load(
        q_ptr + row[:, None] * q_row + head * q_head + d[None, :],
        mask=(t < rows)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    complete = (position0 + t + 1) // S
    least, most = (position0 + 1) // S, (position0 + rows) // S  # of the tile's first and last token
    interior = least // BN * BN  # up to here every token sees every block
    stride = K * D
    keys = pooled_ptr + (first_block.to(tl.int64) * K + kv_head) * D
    m = tl.ceil(tl.max(_masked_logits(q_td, keys, 0, most, complete, stride, c, D, DP), 1))
    m = tl.where(complete > 0, m, 0.0)
    n = tl.arange(0, BN)
    l = tl.zeros([BT], tl.float32)
    for n0 in range(0, interior, BN):
        k_nd = tl.load(keys + (n0 + n).to(tl.int64)[:, None] * stride + d[None, :], mask=(d < D)[None, :], other=0.0)
        s_tn = tl.dot(q_td, tl.trans(k_nd), input_precision="ieee")
        l += tl.sum(tl.exp2(s_tn * c - m[:, None]), 1)
    for n0 in range(interior, most, 16):
        x_tn = _masked_logits(q_td, keys, n0, most, complete, stride, c, D, DP)
        l += tl.sum(tl.exp2(x_tn - m[:, None]), 1)
    out = lse_ptr + head.to(tl.int64) * N + row
    fits = (l < LARGE) & ((l > 0) | (complete == 0))
    tl.store(out, tl.where(complete > 0, m + tl.log2(l), float("inf")), mask=(t < rows) & fits)
    if tl.min(fits.to(tl.int32)) == 0:
        top = tl.full([BT], -1e30, tl.float32)
        for n0 in range(0, most, 16):
            top = tl.maximum(top, tl.max(_masked_logits(q_td, keys, n0, most, complete, stride, c, D, DP), 1))
        l = tl.zeros([BT], tl.float32)
        for n0 in range(0, most, 16):
            l += tl.sum(tl.exp2(_masked_logits(q_td, keys, n0, most, complete, stride, c, D, DP) - top[:, None]), 1)
        tl.store(out, top + tl.log2(l), mask=(t < rows) & (fits == 0))


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
    k_nd = tl.load(
        pooled_ptr + ((first_block + block).to(tl.int64) * K + kv_head)[:, None] * D + d[None, :],
        mask=(block < most)[:, None] & (d < D)[None, :],
        other=0.0,
    )
    score_tn = tl.zeros([BT, BN], tl.float32)
    live_td = (t < rows)[:, None] & (d < D)[None, :]
    lse_ptr += (kv_head * G).to(tl.int64) * N + row
    lse = tl.load(lse_ptr, mask=t < rows, other=float("inf"))
    for g in range(G):
        q_td = tl.load(q_ptr + row[:, None] * q_row + (kv_head * G + g) * q_head + d[None, :], mask=live_td, other=0.0)
        next_lse = tl.load(lse_ptr + tl.minimum(g + 1, G - 1).to(tl.int64) * N, mask=t < rows, other=float("inf"))
        score_tn += tl.exp2(tl.dot(q_td, tl.trans(k_nd), input_precision="ieee") * c - lse[:, None])
        lse = next_lse
    slab_row = ((row - slab_row0) * K + kv_head) * NC
    tl.store(score_ptr + slab_row[:, None] + block[None, :], score_tn, mask=(t < rows)[:, None])
    end = (position0 + t) // S + 1 - local_blocks
    candidate = (block[None, :] >= first_blocks) & (block[None, :] < end[:, None])
    key_tn = tl.where(candidate, _key(score_tn), 0)
    chunk_max = tl.max(tl.reshape(key_tn, [BT, BN // CS, CS]), 2)
    chunk = tl.program_id(0) * (BN // CS) + tl.arange(0, BN // CS)
    tl.store(chunk_max_ptr + (slab_row // CS)[:, None] + chunk[None, :], chunk_max, mask=(t < rows)[:, None])


@triton.jit
def _key(score):
    """Order-preserving integer of a score: the bits of a non-negative float, plus 1 so that 0 means "nothing"."""
    return tl.maximum(score.to(tl.int32, bitcast=True), 0) + 1


@triton.jit
def _count(key, threshold):
    return tl.sum((key >= threshold).to(tl.int32))


@triton.jit
def _least(key, highest):
    """The smallest positive key; ``highest`` if there is none."""
    return tl.min(tl.where(key > 0, key, highest))


@triton.jit
def _largest(key, need, highest, least):
    """Mask of the ``need`` largest positive keys, ties to the lower position.

    ``highest`` is the largest key; ``need`` keys, or all positive ones, reach ``least``. Searches the largest threshold
    that ``need`` keys reach, bit by bit from the highest in which the two differ, until exactly ``need`` keys reach it
    or all bits are known.
    """
    differ = highest ^ least
    shift = tl.where(differ > 0, (differ.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126, 0)  # may be 1 too many
    threshold = tl.where(shift < 31, (highest >> shift) << shift, 0)
    count = _count(key, tl.maximum(threshold, 1))
    while (shift > 0) & (count != need):
        shift -= 1
        higher = threshold + (1 << shift)
        n = _count(key, higher)
        enough = n >= need
        threshold = tl.where(enough, higher, threshold)
        count = tl.where(enough, n, count)
    above = key > threshold
    equal = (key == threshold) & (key > 0)
    rank = tl.cumsum(equal.to(tl.int32)) - 1
    return above | (equal & (rank < need - tl.sum(above.to(tl.int32))))


@triton.jit
def _best_of_chunks(
    score_ptr, chunk_max_ptr, scratch, lo, hi, need, NCH: tl.constexpr, CS: tl.constexpr, KP: tl.constexpr
):
    """Blocks ``[KP * CS]`` in ``[lo, hi)``, their keys, and the mask of the ``need`` best (``need <= KP``).

    ``scratch`` has at least ``need`` integers that nobody else uses; it carries the chosen chunks across lanes.
    """
    first = lo // CS
    chunks = tl.where(hi > lo, (hi - 1) // CS - first + 1, 0)
    j = tl.arange(0, NCH)
    largest = tl.load(chunk_max_ptr + first + j, mask=j < chunks, other=0)
    highest = tl.max(largest)
    chosen = _largest(largest, tl.minimum(chunks, need), highest, _least(largest, highest))
    reached = _least(tl.where(chosen, largest, 0), highest)  # by one block of every chosen chunk
    tl.store(scratch + tl.cumsum(chosen.to(tl.int32)) - 1, first + j, mask=chosen)
    tl.debug_barrier()
    e = tl.arange(0, KP * CS)
    listed = e // CS < tl.sum(chosen.to(tl.int32))
    block = tl.load(scratch + e // CS, mask=listed, other=0) * CS + e % CS
    valid = listed & (block >= lo) & (block < hi)
    key = tl.where(valid, _key(tl.load(score_ptr + block, mask=valid, other=0.0)), 0)
    tl.debug_barrier()
    least = tl.where(chunks >= need, reached, tl.minimum(highest, 1))
    return block, key, _largest(key, tl.minimum(tl.maximum(hi - lo, 0), need), highest, least)


@triton.jit
def _emit(out, forced_first, block, taken, own, local_blocks, k, KP2: tl.constexpr):
    """Write ``0..forced_first-1``, the taken blocks, the local blocks up to the own one, then -1: ascending."""
    count = tl.sum(taken.to(tl.int32))
    slot = tl.arange(0, KP2)
    local = tl.minimum(own + 1 - forced_first, local_blocks)
    begin = forced_first + count
    fixed = tl.where(slot < forced_first, slot, tl.where(slot < begin + local, own + 1 - local + slot - begin, -1))
    tl.store(out + slot, fixed, mask=(slot < k) & ((slot < forced_first) | (slot >= begin)))
    tl.store(out + forced_first + tl.cumsum(taken.to(tl.int32)) - 1, block, mask=taken)


@triton.jit(do_not_specialize=["slab_row0", "k", "first_blocks", "local_blocks"])
def select_kernel(
    score_ptr,  # [tokens of the slab, K, NC]
    chunk_max_ptr,  # [tokens of the slab, K, NC / CS]
    indices_ptr,  # [N, K, k] int32
    starts_ptr,
    slab_row0,
    K,
    NC,
    k,
    first_blocks,
    local_blocks,
    S: tl.constexpr,
    NCH: tl.constexpr,
    CS: tl.constexpr,
    KP: tl.constexpr,
    KP2: tl.constexpr,
):
    """Exact top-k of one row: forced blocks, then the best of the candidates between them."""
    kv_head = tl.program_id(1)
    slab_row = (tl.program_id(0).to(tl.int64) * K + kv_head) * NC
    row = slab_row0 + tl.program_id(0)
    own = (row - tl.load(starts_ptr + row).to(tl.int32)) // S
    out = indices_ptr + (row.to(tl.int64) * K + kv_head) * k
    forced_first = tl.minimum(first_blocks, own + 1)
    lo, hi = first_blocks, own + 1 - local_blocks
    block, _, taken = _best_of_chunks(
        score_ptr + slab_row, chunk_max_ptr + slab_row // CS, out, lo, hi, k - first_blocks - local_blocks, NCH, CS, KP
    )
    _emit(out, forced_first, block, taken, own, local_blocks, k, KP2)


@triton.jit
def _emit_official(
    score_row,
    chunk_row,
    out,
    own,
    k,
    S: tl.constexpr,
    NCH: tl.constexpr,
    CS: tl.constexpr,
    KP: tl.constexpr,
    KP2: tl.constexpr,
):
    """Top-k under the published merge: of the earlier chunks of S blocks only the S/2 best survive, and of the newest
    S/2 with the own block; a query whose blocks fit in one chunk of S sees no merge. Needs k <= S <= KP * CS."""
    newest = own // S * S
    need_old = tl.where(newest > 0, S // 2, 0)
    scratch = tl.minimum(
        need_old, k
    )  # k slots of scratch: more chunks than k cannot hold a survivor of the final top-k
    old, old_key, old_kept = _best_of_chunks(score_row, chunk_row, out, 0, newest, scratch, NCH, CS, KP)
    j = tl.arange(0, S)
    new = newest + j
    new_key = tl.where(new < own, _key(tl.load(score_row + new, mask=new < own, other=0.0)), 0)
    highest = tl.max(new_key)
    room = tl.minimum(own - newest, tl.where(newest > 0, S // 2 - 1, S))
    new_kept = _largest(new_key, room, highest, _least(new_key, highest))
    old_key = tl.where(old_kept, old_key, 0)
    new_key = tl.where(new_kept, new_key, 0)
    kept = tl.sum(old_kept.to(tl.int32)) + tl.sum(new_kept.to(tl.int32))
    need = tl.minimum(kept, k - 1)
    threshold = tl.zeros([], tl.int32)
    for i in range(31):
        candidate = threshold | (1 << (30 - i))
        found = tl.sum((old_key >= candidate).to(tl.int32)) + tl.sum((new_key >= candidate).to(tl.int32))
        threshold = tl.where(found >= need, candidate, threshold)
    old_above, new_above = old_key > threshold, new_key > threshold
    room = need - tl.sum(old_above.to(tl.int32)) - tl.sum(new_above.to(tl.int32))
    old_equal = (old_key == threshold) & (old_key > 0)
    new_equal = (new_key == threshold) & (new_key > 0)
    ties = tl.sum(old_equal.to(tl.int32))
    old_taken = old_above | (old_equal & (tl.cumsum(old_equal.to(tl.int32)) - 1 < room))
    new_taken = new_above | (new_equal & (tl.cumsum(new_equal.to(tl.int32)) - 1 + ties < room))
    tl.debug_barrier()
    count = tl.sum(old_taken.to(tl.int32))
    total = count + tl.sum(new_taken.to(tl.int32))
    slot = tl.arange(0, KP2)
    tl.store(out + slot, tl.where(slot == total, own, -1), mask=(slot < k) & (slot >= total))
    tl.store(out + tl.cumsum(old_taken.to(tl.int32)) - 1, old, mask=old_taken)
    tl.store(out + count + tl.cumsum(new_taken.to(tl.int32)) - 1, new, mask=new_taken)


@triton.jit(do_not_specialize=["slab_row0", "k"])
def select_official_kernel(
    score_ptr,
    chunk_max_ptr,
    indices_ptr,
    starts_ptr,
    slab_row0,
    K,
    NC,
    k,
    S: tl.constexpr,
    NCH: tl.constexpr,
    CS: tl.constexpr,
    KP: tl.constexpr,
    KP2: tl.constexpr,
):
    """One row of :func:`_emit_official`."""
    kv_head = tl.program_id(1)
    slab_row = (tl.program_id(0).to(tl.int64) * K + kv_head) * NC
    row = slab_row0 + tl.program_id(0)
    own = (row - tl.load(starts_ptr + row).to(tl.int32)) // S
    out = indices_ptr + (row.to(tl.int64) * K + kv_head) * k
    _emit_official(score_ptr + slab_row, chunk_max_ptr + slab_row // CS, out, own, k, S, NCH, CS, KP, KP2)
