"""Decoding in Triton, the short way: scores, exact top-k and attention of a row in one launch after the scoring.

Serves small budgets (:data:`ssa.ops.decode.triton.FEW`). The programs of a row share its blocks and leave, for every
tile, the KP best in order. Whoever of them arrives last merges these lists and attends: at batch 1 the launches and
the dependent reads take the time, and both are few here. Lists are written and merged in a fixed order, so reruns are
bitwise equal whoever is last. A program that attends holds registers that leave room for few others, so this is for
rows of few tiles a processor.

The key of a block is its score's bits above its inverted number (below 0 where it is no candidate): no two are equal,
ties go to the lower block, and all comparisons are of integers. Ranks are counts of larger keys: one comparison of all
pairs instead of a search. They are summed over the first axis, which the compiler gives to single threads.

Shapes: as in :mod:`ssa.ops.decode.triton_kernels`; KB slots of a row's list of blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssa.ops.decode.triton_kernels import LN2, NOTHING, _attend_tile, _begin, _group, _place, _share, _total

LOW = tl.constexpr(0x7FFFFFFF)
ABSENT_RANK = tl.constexpr(1 << 20)
ABSENT = tl.constexpr(-(1 << 62))  # below every key of a block


@triton.jit
def _logits(logits, tile, last, complete, G, NC, GP: tl.constexpr, BN: tl.constexpr):
    """Logits ``[GP, BN]`` of a tile before ``last``."""
    g, n = tl.arange(0, GP), tile * BN + tl.arange(0, BN)
    there = (g < G)[:, None] & (n < tl.minimum(complete, last * BN))[None, :]
    return tl.load(logits + g[:, None] * NC + n[None, :], mask=there, other=NOTHING)


@triton.jit
def _list_best(s_gn, lists, tile, lse_g, lo, hi, G, GP: tl.constexpr, BN: tl.constexpr, KP: tl.constexpr):
    """Scores of a tile, summed over the heads; its KP largest keys, in order. Candidates are in ``[lo, hi)``."""
    g, i = tl.arange(0, GP), tl.arange(0, BN)
    n = tile * BN + i
    term_gn = tl.where((g < G)[:, None], tl.exp2(s_gn - lse_g[:, None]), 0.0)
    candidate_n = (n >= lo) & (n < hi)
    bits_n = tl.sum(tl.where(candidate_n[None, :], term_gn, -1.0), 0).to(tl.int32, bitcast=True).to(tl.int64) << 32
    near_n = bits_n | (i ^ (BN - 1)).to(tl.int64)  # of the tile's blocks: what the compiler keeps of it is 32 bits
    rank_n = tl.sum((near_n[:, None] > near_n[None, :]).to(tl.int32), 0)
    tl.store(lists + tile * KP + rank_n, bits_n | (n ^ LOW).to(tl.int64), mask=rank_n < KP)


@triton.jit
def _merge(lists, total, need, NL: tl.constexpr, UB: tl.constexpr, KP: tl.constexpr):
    """The ``need < KP`` largest keys of ``total`` lists: blocks ``[KP * KP / 2]``, and ranks, large for the others.

    An entry i of the list with the j-th largest head has at least i + j larger ones. The triangle of those that can
    win is folded into a rectangle: line a holds list a, and behind it list ``need - a``.
    """
    t, u = tl.arange(0, NL), tl.arange(0, UB)
    head_t = tl.load(lists + t * KP, mask=t < total, other=ABSENT)
    rank_t = tl.zeros([NL], tl.int32)
    for u0 in range(0, NL, UB):
        x = u0 + u
        head_u = tl.load(lists + x * KP, mask=x < total, other=ABSENT)
        rank_t += tl.sum((head_u[:, None] > head_t[None, :]).to(tl.int32), 0)
    a, b = tl.arange(0, KP // 2), tl.arange(0, KP)
    upper_a = tl.sum(tl.where(rank_t[:, None] == a[None, :], t[:, None], 0), 0)
    lower_a = tl.sum(tl.where(rank_t[:, None] == need - a[None, :], t[:, None], 0), 0)
    a3, b3, is_upper = a[None, :, None], b[None, None, :], (tl.arange(0, 2) == 0)[:, None, None]
    i_xab = tl.where(is_upper, b3, b3 - need + a3)
    upper = (b3 < need - a3) & (2 * a3 <= need) & (a3 < total)
    lower = (i_xab >= 0) & (i_xab < a3) & (2 * a3 < need) & (need - a3 < total)
    real_xab = tl.where(is_upper, upper, lower)
    list_xab = tl.where(is_upper, upper_a[None, :, None], lower_a[None, :, None])
    key_xab = tl.load(lists + list_xab * KP + i_xab, mask=real_xab, other=ABSENT)
    key_e = tl.reshape(tl.max(key_xab, 0), [KP * KP // 2])  # one of both is there, or none
    rank_e = tl.sum((key_e[:, None] > key_e[None, :]).to(tl.int32), 0)
    return ((key_e & LOW) ^ LOW).to(tl.int32), tl.where((key_e >= 0) & (rank_e < need), rank_e, ABSENT_RANK)


@triton.jit
def _all_blocks(block_e, rank_e, need, first_blocks, local_blocks, own, KB: tl.constexpr):
    """Blocks of a row ``[KB]``: the first, the best from the best one on, the local ones up to the own, then -1."""
    s = tl.arange(0, KB)
    forced = tl.minimum(first_blocks, own + 1)
    local = tl.minimum(own + 1 - forced, local_blocks)
    begin = forced + tl.minimum(need, tl.maximum(own + 1 - local_blocks - first_blocks, 0))  # every candidate has a key
    best_s = tl.sum(tl.where((forced + rank_e)[:, None] == s[None, :], block_e[:, None], 0), 0)
    rest_s = tl.where(s < begin + local, own + 1 - local + s - begin, -1)
    return tl.where(s < forced, s, tl.where(s < begin, best_s, rest_s))


@triton.jit
def _ascending(block_s, KB: tl.constexpr):
    """The blocks in ascending order, -1 last."""
    s = tl.arange(0, KB)
    key_s = tl.where(block_s < 0, s + (LOW - KB), block_s)
    place_s = tl.sum((key_s[:, None] < key_s[None, :]).to(tl.int32), 0)
    return tl.sum(tl.where(place_s[:, None] == s[None, :], block_s[:, None], 0), 0)


@triton.jit
def _finish(
    q_ptr, k_ptr, v_ptr, indices_ptr, out_ptr, lse_ptr, lists, row, head, sequence, start, position, tiles,
    N, K, G, k, first_blocks, local_blocks, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row,
    v_head, c,
    D: tl.constexpr, DP: tl.constexpr, S: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, NL: tl.constexpr,
    UB: tl.constexpr, KP: tl.constexpr, KB: tl.constexpr, ATTEND: tl.constexpr,
):  # fmt: skip
    """Merge a row's lists; write its blocks, or attend over them."""
    own = tl.where(position < 0, -1, position // S)
    h, d, s = tl.arange(0, M), tl.arange(0, DP), tl.arange(0, KB)
    live = (h < G)[:, None] & (d < D)[None, :]
    if ATTEND:  # early: it waits for nothing
        q_md = _group(q_ptr, sequence, row % N, head, G, q_batch, q_row, q_head, D, DP, M)
    need = k - first_blocks - local_blocks
    block_e, rank_e = _merge(lists, tiles, need, NL, UB, KP)
    block_s = _all_blocks(block_e, rank_e, need, first_blocks, local_blocks, own, KB)
    if not ATTEND:
        tl.store(indices_ptr + (row.to(tl.int64) * K + head) * k + s, _ascending(block_s, KB), mask=s < k)
    else:
        keys = k_ptr + sequence.to(tl.int64) * k_batch + start.to(tl.int64) * k_row + head * k_head
        values = v_ptr + sequence.to(tl.int64) * v_batch + start.to(tl.int64) * v_row + head * v_head
        m = tl.full([M], NOTHING, tl.float32)
        l = tl.zeros([M], tl.float32)
        o_md = tl.zeros([M, DP], tl.float32)
        for begin in tl.static_range(0, KB * S, BK):
            e = begin + tl.arange(0, BK)
            block_e = tl.sum(tl.where(s[:, None] == (e // S)[None, :], block_s[:, None], 0), 0)
            place = block_e * S + e % S
            real = (block_e >= 0) & (place <= position)
            at = place.to(tl.int64)[:, None]
            loaded = real[:, None] & (d < D)[None, :]
            v_nd = tl.load(values + at * v_row + d[None, :], mask=loaded, other=0.0)
            k_nd = tl.load(keys + at * k_row + d[None, :], mask=loaded, other=0.0)
            m, l, o_md = _attend_tile(q_md, k_nd, v_nd, real[None, :], m, l, o_md, c, True)
        seen = l > 0
        o_md = o_md / tl.where(seen, l, 1.0)[:, None]
        lse_m = tl.where(seen, m + tl.log2(tl.where(seen, l, 1.0)), NOTHING)
        place = (row.to(tl.int64) * K + head) * G
        tl.store(out_ptr + (place + h)[:, None] * D + d[None, :], o_md.to(out_ptr.dtype.element_ty), mask=live)
        tl.store(lse_ptr + place + h, lse_m * LN2, mask=h < G)


@triton.jit(do_not_specialize=["row0", "rows", "N", "splits", "parts", "NC", "k", "first_blocks", "local_blocks"])
def choose_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    starts_ptr,
    indices_ptr,  # [R, K, k] int32; written unless ATTEND
    out_ptr,  # [R, H, D]
    lse_ptr,  # [R, H] float32, natural
    float_ptr,  # of score_kernel
    long_ptr,  # int64: arrived programs of a row [rows, K], zeroed by score_kernel; lists [rows, K, NC / BN, KP]
    row0,
    rows,
    N,
    K,
    G,
    splits,
    parts,  # programs of a row
    NC,
    k,
    first_blocks,
    local_blocks,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    c,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    GP: tl.constexpr,
    M: tl.constexpr,
    BT: tl.constexpr,  # tile of score_kernel
    BN: tl.constexpr,
    BK: tl.constexpr,
    SP: tl.constexpr,
    NL: tl.constexpr,
    UB: tl.constexpr,
    KP: tl.constexpr,
    KB: tl.constexpr,
    ATTEND: tl.constexpr,
    STARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Scores and lists of a row's part; the last program of the row merges, and attends over the blocks."""
    part = tl.program_id(0) % parts
    pair = tl.program_id(0) // parts
    head = pair % K
    row = row0 + pair // K
    sequence, start, position = _place(row, lengths_ptr, starts_ptr, N, STARTS)  # score_kernel found them written
    _begin(PDL)
    own = tl.where(position < 0, -1, position // S)
    complete = tl.maximum(position + 1, 0) // S
    tiles = tl.cdiv(complete, BN)
    wide = pair.to(tl.int64)
    lists = long_ptr + rows.to(tl.int64) * K + wide * (NC // BN) * KP
    first, last, working = _share(tiles, part, parts)
    if (first >= last) & (part > 0):
        return
    g, i = tl.arange(0, GP), tl.arange(0, SP)
    _, _, used = _share(tl.cdiv(complete, BT), 0, splits)
    logits = float_ptr + wide * G * NC
    s_gn = _logits(logits, first, last, complete, G, NC, GP, BN)  # early: these reads do not wait for the next ones
    partial = float_ptr + rows.to(tl.int64) * K * G * NC + (wide * splits + i)[:, None] * 2 * GP + g[None, :]
    m_ig = tl.load(partial, mask=(i < used)[:, None], other=NOTHING)
    l_ig = tl.load(partial + GP, mask=(i < used)[:, None], other=0.0)
    lse_g = _total(m_ig, l_ig)
    hi = own + 1 - local_blocks
    for tile in range(first, last):
        next_gn = _logits(logits, tile + 1, last, complete, G, NC, GP, BN)
        _list_best(s_gn, lists, tile, lse_g, first_blocks, hi, G, GP, BN, KP)
        s_gn = next_gn
    tl.debug_barrier()  # the program's lists are written, then it arrives
    if tl.atomic_add(long_ptr + pair, 1, sem="acq_rel") < tl.maximum(working, 1) - 1:
        return
    tl.debug_barrier()
    _finish(
        q_ptr, k_ptr, v_ptr, indices_ptr, out_ptr, lse_ptr, lists, row, head, sequence, start, position, tiles,
        N, K, G, k, first_blocks, local_blocks, q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row,
        v_head, c, D, DP, S, M, BK, NL, UB, KP, KB, ATTEND,
    )  # fmt: skip
