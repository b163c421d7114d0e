"""Decoding in Triton, large batches: scores, exact top-k and attention of a row in one launch, logits in registers.

The programs of a row share its pooled keys. Each keeps the logits of its part, tells the others their maxima and sums,
and waits for theirs: then it knows the row's log-sum-exps and makes scores of its logits, which never go to memory.
Whoever arrives last selects the row's blocks and attends.

Waiting is safe. The programs of a row have neighbouring numbers and are few against what a GPU holds at a time; a GPU
starts programs in the order of their numbers; so the first row that is not done has all its programs at work, or the
next ones to start. The two counters of a row are 0 before and after: the last program sets them back.

Shapes: as in :mod:`ssa.ops.decode.triton_kernels`; TILES tiles of BN blocks are a program's part of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssa.ops.decode.triton_kernels import (
    NOTHING,
    _begin,
    _fresh_logits,
    _group,
    _means,
    _place,
    _select_and_attend,
)
from ssa.ops.selection.triton_topk import _key


@triton.jit(do_not_specialize=["row0", "rows", "N", "parts", "NC", "k", "first_blocks", "local_blocks"])
def together_kernel(
    q_ptr,  # [B, N, H, D]
    pooled_ptr,  # [B, P, K, D]; written if UPDATE
    k_ptr,  # [B, C, K, D]
    v_ptr,
    lengths_ptr,
    starts_ptr,
    indices_ptr,  # [R, K, k] int32
    out_ptr,  # [R, H, D]
    lse_ptr,  # [R, H] float32, natural
    float_ptr,  # workspace: maxima and sums [rows, K, parts, 2, GP], then scores [rows, K, NC]
    chunk_ptr,  # [rows, K, NC / CS] int32 chunk maxima
    arrived_ptr,  # [2, rows, K] int32, zero
    row0,
    rows,
    N,
    K,
    G,
    parts,  # programs of a row
    NC,
    k,
    first_blocks,
    local_blocks,
    q_batch,
    q_row,
    q_head,
    p_batch,
    p_row,
    p_head,
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
    BN: tl.constexpr,
    BK: tl.constexpr,
    TILES: tl.constexpr,
    SP: tl.constexpr,
    NCH: tl.constexpr,
    CS: tl.constexpr,
    KP: tl.constexpr,
    KP2: tl.constexpr,
    OFFICIAL: tl.constexpr,
    ATTEND: tl.constexpr,
    UPDATE: tl.constexpr,
    STARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One part of a row, and the row's blocks and attention by the program that arrives last."""
    _begin(PDL)
    part, pair = tl.program_id(0) % parts, tl.program_id(0) // parts
    head, row = pair % K, row0 + pair // K
    sequence, start, position = _place(row, lengths_ptr, starts_ptr, N, STARTS)
    complete = tl.maximum(position + 1, 0) // S
    working = tl.maximum(tl.cdiv(complete, TILES * BN), 1)
    if part >= working:
        return
    g, i = tl.arange(0, M), tl.arange(0, SP)
    q_gd = _group(q_ptr, sequence, row % N, head, G, q_batch, q_row, q_head, D, DP, M)
    means = pooled_ptr + sequence.to(tl.int64) * p_batch + head * p_head
    first = part * TILES * BN
    known, fresh_g = complete, tl.zeros([M], tl.float32)
    if UPDATE:
        known -= ((position + 1) % S == 0).to(tl.int32)
        if (known < complete) & (known >= first) & (known < first + TILES * BN):
            keys = k_ptr + sequence.to(tl.int64) * k_batch + head * k_head
            fresh_g = _fresh_logits(q_gd, keys, means, known, start, k_row, p_row, c, D, DP, S)
    m_g = tl.full([M], NOTHING, tl.float32)
    logits = ()
    next_nd = _means(means, first + tl.arange(0, BN), known, p_row, D, DP)
    for tile in tl.static_range(TILES):
        k_nd, n = next_nd, first + tile * BN + tl.arange(0, BN)
        if tile + 1 < TILES:
            next_nd = _means(means, n + BN, known, p_row, D, DP)
        s_gn = tl.where((n < known)[None, :], tl.dot(q_gd, tl.trans(k_nd), input_precision="ieee") * c, NOTHING)
        if UPDATE:
            s_gn = tl.where(((n >= known) & (n < complete))[None, :], fresh_g[:, None], s_gn)
        m_g = tl.maximum(m_g, tl.max(s_gn, 1))
        logits = logits + (s_gn,)  # noqa: RUF005  (the compiler knows no starred tuples)
    base_g = tl.where(m_g == NOTHING, 0.0, m_g)  # of no block
    l_g = tl.zeros([M], tl.float32)
    for tile in tl.static_range(TILES):
        l_g += tl.sum(tl.exp2(logits[tile] - base_g[:, None]), 1)

    pairs, wide = rows.to(tl.int64) * K, pair.to(tl.int64)
    mine = float_ptr + (wide * parts + part) * 2 * GP + g
    tl.store(mine, m_g, mask=g < GP)
    tl.store(mine + GP, l_g, mask=g < GP)
    tl.debug_barrier()  # all of it is written, then the program arrives
    tl.atomic_add(arrived_ptr + pair, 1, sem="release")
    while tl.atomic_add(arrived_ptr + pair, 0, sem="acquire") < working:
        pass
    tl.debug_barrier()
    theirs = float_ptr + (wide * parts + i)[:, None] * 2 * GP + g[None, :]
    there = (i < working)[:, None] & (g < GP)[None, :]
    m_ig = tl.load(theirs, mask=there, other=NOTHING, cache_modifier=".cg")
    l_ig = tl.load(theirs + GP, mask=there, other=0.0, cache_modifier=".cg")
    top_g = tl.max(m_ig, 0)
    top_g = tl.where(top_g == NOTHING, 0.0, top_g)
    total_g = tl.sum(l_ig * tl.exp2(m_ig - top_g[None, :]), 0)
    lse_g = top_g + tl.log2(tl.where(total_g > 0, total_g, 1.0))

    score_row = float_ptr + pairs * parts * 2 * GP + wide * NC
    chunk_row = chunk_ptr + wide * (NC // CS)
    own = tl.where(position < 0, -1, position // S)
    hi = own + 1 - local_blocks
    for tile in tl.static_range(TILES):
        n = first + tile * BN + tl.arange(0, BN)
        score_n = tl.sum(tl.where((g < G)[:, None], tl.exp2(logits[tile] - lse_g[:, None]), 0.0), 0)
        tl.store(score_row + n, score_n, mask=n < NC)
        candidate_n = (n >= first_blocks) & (n < hi)
        largest = tl.max(tl.reshape(tl.where(candidate_n, _key(score_n), 0), [BN // CS, CS]), 1)
        chunk = (first + tile * BN) // CS + tl.arange(0, BN // CS)
        tl.store(chunk_row + chunk, largest, mask=chunk < NC // CS)
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + pairs + pair, 1, sem="acq_rel") < working - 1:
        return
    tl.debug_barrier()
    tl.store(arrived_ptr + pair, 0)  # nobody waits any more
    tl.store(arrived_ptr + pairs + pair, 0)
    _select_and_attend(
        q_gd, k_ptr, v_ptr, indices_ptr, out_ptr, lse_ptr, score_row, chunk_row, row, head, sequence, start, position,
        K, G, k, first_blocks, local_blocks, k_batch, k_row, k_head, v_batch, v_row, v_head, c, D, DP, S, M, BK, NCH,
        CS, KP, KP2, OFFICIAL, ATTEND,
    )  # fmt: skip
