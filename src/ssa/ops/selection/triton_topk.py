"""Exact top-k of a row of scores in Triton, in two levels: the chunks with the largest maxima, then their scores.

The k best scores lie in the k chunks with the largest maxima (ties: the lower chunk), so a row reads k * CS scores, not
all of them. Scores are non-negative float32, compared through their bits; ties go to the lower block.

Shapes: n candidates, d/DP head dim (padded to a power of two), g query heads of a group.
"""

from __future__ import annotations

import triton
import triton.language as tl

TINY = tl.constexpr(2.0**-100)  # a score below it may have lost digits


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
def _search(key, need, highest, least):
    """The largest threshold found that ``need`` positive keys reach, or all of them, and how many reach it.

    ``highest`` is the largest key; ``need`` keys, or all positive ones, reach ``least``. Searches two bits at a time
    from the highest in which the two differ, until exactly ``need`` keys reach the threshold or all bits are known.
    Three counts of up to 1023 keys share an integer, and so one reduction.
    """
    differ = highest ^ least
    shift = tl.where(differ > 0, (differ.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126, 0)  # may be 1 too many
    threshold = tl.where(shift < 31, (highest >> shift) << shift, 0)
    count = _count(key, tl.maximum(threshold, 1))
    while (shift > 0) & (count != need):
        if key.numel <= 1023:
            shift = tl.maximum(shift - 2, 0)
            first, second, third = threshold + (1 << shift), threshold + (2 << shift), threshold + (3 << shift)
            one, two, three = (key >= first).to(tl.int32), (key >= second).to(tl.int32), (key >= third).to(tl.int32)
            counts = tl.sum(one + (two << 10) + (three << 20))
            n1, n2, n3 = counts & 1023, (counts >> 10) & 1023, counts >> 20
            count = tl.where(n3 >= need, n3, tl.where(n2 >= need, n2, tl.where(n1 >= need, n1, count)))
            reached = tl.where(n3 >= need, third, tl.where(n2 >= need, second, tl.where(n1 >= need, first, threshold)))
            threshold = reached
        else:
            shift -= 1
            higher = threshold + (1 << shift)
            n = _count(key, higher)
            count, threshold = tl.where(n >= need, n, count), tl.where(n >= need, higher, threshold)
    return tl.maximum(threshold, 1), count


@triton.jit
def _place(mask):
    """Of each element that is set, how many before it are; row by row, which is cheaper than one scan over all."""
    if len(mask.shape) == 1:
        place = tl.cumsum(mask.to(tl.int32)) - 1
    else:
        in_row = tl.sum(mask.to(tl.int32), 1)
        place = (tl.cumsum(in_row) - in_row)[:, None] + tl.cumsum(mask.to(tl.int32), 1) - 1
    return place


@triton.jit
def _largest(key, need, highest, least):
    """Mask of the ``need`` largest positive keys, ties to the lower position; ``highest``, ``least``: see `_search`."""
    threshold, count = _search(key, need, highest, least)
    taken = key >= threshold
    if count > need:  # equal keys
        above = key > threshold
        equal = key == threshold
        taken = above | (equal & (_place(equal) < need - tl.sum(above.to(tl.int32))))
    return taken


@triton.jit
def _in_best_chunks(
    score_ptr, chunk_max_ptr, scratch, lo, hi, need, NCH: tl.constexpr, CS: tl.constexpr, KP: tl.constexpr
):
    """Blocks ``[KP, CS]`` in ``[lo, hi)`` of the chunks with the ``need`` largest maxima, and their keys; the largest
    key and one that ``need`` keys reach, or all positive ones; the maxima of all chunks.

    ``scratch`` has at least ``need`` integers that nobody else uses; it carries the chosen chunks across lanes.
    """
    first = lo // CS
    chunks = tl.where(hi > lo, (hi - 1) // CS - first + 1, 0)
    j, slot = tl.arange(0, NCH), tl.arange(0, KP)
    maxima = tl.load(chunk_max_ptr + first + j, mask=j < chunks, other=0)
    highest = tl.max(maxima)
    chosen = _largest(maxima, tl.minimum(chunks, need), highest, _least(maxima, highest))
    reached = _least(tl.where(chosen, maxima, 0), highest)  # by one block of every chosen chunk
    tl.store(scratch + _place(chosen), first + j, mask=chosen)
    tl.debug_barrier()
    chunk = tl.load(scratch + slot, mask=slot < tl.minimum(chunks, need), other=hi)  # `hi` is beyond the last
    block = chunk[:, None] * CS + tl.arange(0, CS)[None, :]
    valid = (block >= lo) & (block < hi)
    key = tl.where(valid, _key(tl.load(score_ptr + block, mask=valid, other=0.0)), 0)
    tl.debug_barrier()
    return block, key, highest, tl.where(chunks >= need, reached, tl.minimum(highest, 1)), maxima


@triton.jit
def _best_of_chunks(
    score_ptr, chunk_max_ptr, scratch, lo, hi, need, NCH: tl.constexpr, CS: tl.constexpr, KP: tl.constexpr
):
    """Blocks ``[KP, CS]`` in ``[lo, hi)``, their keys, and the mask of the ``need`` best (``need <= KP``)."""
    block, key, highest, least, _ = _in_best_chunks(score_ptr, chunk_max_ptr, scratch, lo, hi, need, NCH, CS, KP)
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
    tl.store(out + forced_first + _place(taken), block, mask=taken)


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
def _score_of(key):
    """The score behind a key."""
    return tl.maximum(key - 1, 0).to(tl.float32, bitcast=True)


@triton.jit
def _list_candidates(score_row, chunk_row, maxima, lo, hi, threshold, NCH: tl.constexpr, CS: tl.constexpr):
    """Write the blocks in ``[lo, hi)`` whose key reaches ``threshold`` over the row's scores, ascending; their number.

    The list of chunks that hold one goes over the row's chunk maxima. Both lists stay behind what is still to be read.
    """
    AT_A_TIME: tl.constexpr = 128 // CS
    holds, j = maxima >= threshold, tl.arange(0, NCH)
    tl.store(chunk_row + _place(holds), lo // CS + j, mask=holds)
    tl.debug_barrier()
    listed, found = tl.sum(holds.to(tl.int32)), tl.zeros([], tl.int32)
    slot, column = tl.arange(0, AT_A_TIME), tl.arange(0, CS)
    for i in range(0, listed, AT_A_TIME):
        chunk = tl.load(chunk_row + i + slot, mask=i + slot < listed, other=hi)
        block = chunk[:, None] * CS + column[None, :]
        valid = (block >= lo) & (block < hi)
        reaches = valid & (_key(tl.load(score_row + block, mask=valid, other=0.0)) >= threshold)
        tl.debug_barrier()
        tl.store(score_row.to(tl.pointer_type(tl.int32)) + found + _place(reaches), block, mask=reaches)
        found += tl.sum(reaches.to(tl.int32))
    tl.debug_barrier()
    return found


@triton.jit
def _best_of_list(
    listed_ptr,
    found,
    out,
    need,
    q_gd,
    lse_g,
    keys,
    stride,
    c,
    D: tl.constexpr,
    DP: tl.constexpr,
    CT: tl.constexpr,
):
    """Write the ``need`` of the ``found`` listed blocks with the best true scores to ``out``, ascending; their number.

    Takes CT blocks at a time: the best so far, then as many new ones as fit; ``need < CT``.
    """
    e, d = tl.arange(0, CT), tl.arange(0, DP)
    taken, kept = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    while taken < found:
        size = kept + tl.minimum(CT - kept, found - taken)
        block = tl.load(out + e, mask=e < kept, other=0)
        block += tl.load(listed_ptr + taken + e - kept, mask=(e >= kept) & (e < size), other=0)
        k_nd = tl.load(
            keys + block.to(tl.int64)[:, None] * stride + d[None, :],
            mask=(e < size)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        s_gn = tl.dot(q_gd, tl.trans(k_nd), input_precision="ieee") * c
        key = tl.where(e < size, _key(tl.sum(tl.exp2(s_gn - lse_g[:, None]), 0)), 0)
        highest = tl.max(key)
        best = _largest(key, tl.minimum(size, need), highest, _least(key, highest))
        tl.debug_barrier()
        tl.store(out + _place(best), block, mask=best)
        tl.debug_barrier()
        taken += size - kept
        kept = tl.sum(best.to(tl.int32))
    return kept


@triton.jit(do_not_specialize=["slab_row0", "k", "first_blocks", "local_blocks"])
def refine_kernel(
    q_ptr,  # [N, H, D]
    pooled_ptr,  # [blocks, K, D]
    lse_ptr,  # [tokens of the slab, H]: true L
    share_ptr,  # [tokens of the slab, K]: of the k-th best score under the guess, what each of the best has at least
    score_ptr,  # [tokens of the slab, K, NC]: scores under a guess of L; overwritten
    chunk_max_ptr,  # [tokens of the slab, K, NC / CS]; overwritten
    indices_ptr,  # [N, K, k] int32
    starts_ptr,
    first_block_ptr,
    slab_row0,
    q_row,
    q_head,
    K,
    NC,
    k,
    c,
    first_blocks,
    local_blocks,
    G,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    NCH: tl.constexpr,
    CS: tl.constexpr,
    KP: tl.constexpr,
    KP2: tl.constexpr,
    GP: tl.constexpr,
    CT: tl.constexpr,
):
    """Exact top-k of one row from scores under a guess: those that may be among the best are scored again."""
    kv_head, slab_row = tl.program_id(1), tl.program_id(0).to(tl.int64) * K + tl.program_id(1)
    row = slab_row0 + tl.program_id(0)
    own = (row - tl.load(starts_ptr + row).to(tl.int32)) // S
    out = indices_ptr + (row.to(tl.int64) * K + kv_head) * k
    score_row, chunk_row = score_ptr + slab_row * NC, chunk_max_ptr + slab_row * NC // CS
    forced_first = tl.minimum(first_blocks, own + 1)
    lo, hi, need = first_blocks, own + 1 - local_blocks, k - first_blocks - local_blocks
    slot = tl.arange(0, KP)
    if (hi - lo <= need) | (need == 0):
        _emit(out, forced_first, lo + slot, slot < tl.minimum(hi - lo, need), own, local_blocks, k, KP2)
    else:
        g, d = tl.arange(0, GP), tl.arange(0, DP)
        head = kv_head * G + g
        of_head = tl.program_id(0).to(tl.int64) * K * G + head
        lse_g = tl.load(lse_ptr + of_head, mask=g < G, other=float("inf"))
        q_gd = tl.load(
            q_ptr + row.to(tl.int64) * q_row + head[:, None] * q_head + d[None, :],
            mask=(g < G)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        _, key, highest, least, maxima = _in_best_chunks(score_row, chunk_row, out, lo, hi, need, NCH, CS, KP)
        bound, _ = _search(key, need, highest, least)  # at most the score of the last of the best under the guess
        score, share = _score_of(bound), tl.load(share_ptr + slab_row)
        threshold = _key(tl.where(score > TINY, score * share, 0.0))
        found = _list_candidates(score_row, chunk_row, maxima, lo, hi, threshold, NCH, CS)
        keys = pooled_ptr + (tl.load(first_block_ptr + row).to(tl.int64) * K + kv_head) * D
        listed = score_row.to(tl.pointer_type(tl.int32))
        kept = _best_of_list(listed, found, out, need, q_gd, lse_g, keys, K * D, c, D, DP, CT)
        block = tl.load(out + slot, mask=slot < kept, other=0)
        tl.debug_barrier()
        _emit(out, forced_first, block, slot < kept, own, local_blocks, k, KP2)


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
    old_taken = old_above | (old_equal & (_place(old_equal) < room))
    new_taken = new_above | (new_equal & (_place(new_equal) + ties < room))
    tl.debug_barrier()
    count = tl.sum(old_taken.to(tl.int32))
    total = count + tl.sum(new_taken.to(tl.int32))
    slot = tl.arange(0, KP2)
    tl.store(out + slot, tl.where(slot == total, own, -1), mask=(slot < k) & (slot >= total))
    tl.store(out + _place(old_taken), old, mask=old_taken)
    tl.store(out + count + _place(new_taken), new, mask=new_taken)


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
