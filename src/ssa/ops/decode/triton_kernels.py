"""Decoding in Triton: pooled keys of completed blocks, scores of blocks, exact top-k, attention split over the keys.

A step of sparse decoding is three launches: ``score_kernel`` reads the pooled keys once and leaves the logits and, per
split, their maximum and sum; ``sum_kernel`` makes scores of the logits; ``select_kernel`` selects the row's blocks and,
up to some size, attends over them. Large budgets and full decoding spread the keys over programs (``attend_kernel``)
and merge (``combine_kernel``).

With PDL a kernel may start while the one before it ends (programmatic dependent launch). Every program of every kernel
here then waits, before it returns or reads what that one may have written, so the end of a kernel implies the end of
all before it. Where programs fill the device, those of the next kernel would take their place: it starts at the end.

Grids follow capacities and tiles follow the lengths on the device: splits beyond a length return at once, the others
share what there is evenly. So a captured CUDA graph serves any lengths.

Shapes: a row is a (sequence, new token) pair, r of R rows; g/GP/M query heads of a KV head, their number padded to a
power of two, and to at least 16 where a dot product needs it; n/BN blocks or keys of a tile; d/DP head dim, padded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssa.ops.selection.triton_topk import _best_of_chunks, _emit, _emit_official, _key

NOTHING = tl.constexpr(float("-inf"))
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _begin(PDL: tl.constexpr):
    """Wait for the kernels before this one, and, from 2 on, let the next one be brought in at once, not at the end."""
    if PDL > 0:
        tl.extra.cuda.gdc_wait()
    if PDL > 1:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _place(row, lengths_ptr, starts_ptr, N, STARTS: tl.constexpr):
    """Sequence of a row, its first real cache row, and the row's position (negative in the left padding)."""
    sequence = row // N
    start = sequence * 0
    if STARTS:
        start = tl.load(starts_ptr + sequence)
    return sequence, start, tl.load(lengths_ptr + sequence) - N + row % N - start


@triton.jit
def _share(tiles, split, splits):
    """Tiles of a split, and how many splits have any."""
    each = tl.cdiv(tiles, splits)
    used = tl.where(each > 0, tl.cdiv(tiles, tl.maximum(each, 1)), 0)
    first = tl.minimum(split * each, tiles)
    return first, tl.minimum(first + each, tiles), used


@triton.jit
def _block_mean(rows, first, k_row, d, D: tl.constexpr, DP: tl.constexpr, S: tl.constexpr):
    """Mean ``[DP]`` of the S cache rows from ``first`` on: the prefill's sum, in its order; float32."""
    total_d = tl.zeros([DP], tl.float32)
    for i in range(0, S, 16):
        for j in tl.static_range(16):  # unrolled, so that the loads do not wait for the additions
            x_d = tl.load(rows + (first + i + j).to(tl.int64) * k_row + d, mask=d < D, other=0.0)
            total_d += x_d.to(tl.float32)
    return tl.div_rn(total_d, tl.full([DP], S, tl.float32))


@triton.jit
def _group(
    q_ptr, sequence, token, head, G, q_batch, q_row, q_head, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr
):  # fmt: skip
    """Queries ``[M, DP]`` of a new token's heads that share a KV head; 0 beyond them."""
    g, d = tl.arange(0, M), tl.arange(0, DP)
    query = q_ptr + sequence.to(tl.int64) * q_batch + token.to(tl.int64) * q_row + head * G * q_head
    return tl.load(query + g[:, None] * q_head + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=["new"])
def pool_new_kernel(
    k_ptr,  # [B, C, K, D]
    pooled_ptr,  # [B, P, K, D]
    lengths_ptr,
    starts_ptr,
    new,
    K,
    k_batch,
    k_row,
    k_head,
    p_batch,
    p_row,
    p_head,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    STARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Mean key of one block if the new tokens completed it: the prefill's sum, in its order and rounded once."""
    _begin(PDL)
    sequence, head = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K
    start = tl.program_id(0) * 0
    if STARTS:
        start = tl.load(starts_ptr + sequence)
    length = tl.load(lengths_ptr + sequence) - start
    block = tl.maximum(length - new, 0) // S + tl.program_id(0)
    if block >= length // S:
        return
    d = tl.arange(0, DP)
    mean_d = _block_mean(k_ptr + sequence * k_batch + head * k_head, start + block * S, k_row, d, D, DP, S)
    out = pooled_ptr + sequence * p_batch + block.to(tl.int64) * p_row + head * p_head + d
    tl.store(out, mean_d.to(pooled_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["row0", "rows", "N", "splits", "NC"])
def score_kernel(
    q_ptr,  # [B, N, H, D]
    pooled_ptr,  # [B, P, K, D]; written if UPDATE
    k_ptr,  # [B, C, K, D]; read if UPDATE
    lengths_ptr,
    starts_ptr,
    float_ptr,  # workspace: logits [rows, K, G, NC] in base 2, then maxima and sums [rows, K, splits, 2, GP]
    row0,
    rows,
    N,
    K,
    G,
    splits,
    NC,
    q_batch,
    q_row,
    q_head,
    p_batch,
    p_row,
    p_head,
    k_batch,
    k_row,
    k_head,
    c,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    GP: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
    UPDATE: tl.constexpr,
    STARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Logits of one row's heads over the completed blocks of one split, their maximum and sum.

    UPDATE (N = 1): the block that the new token completed, if it did, has no mean yet; it is made, used and kept.
    """
    _begin(PDL)
    split = tl.program_id(0) % splits
    pair = tl.program_id(0) // splits
    head = pair % K
    row = row0 + pair // K
    sequence, start, position = _place(row, lengths_ptr, starts_ptr, N, STARTS)
    complete = tl.maximum(position + 1, 0) // S
    tiles = tl.cdiv(complete, BN)
    first, last, _ = _share(tiles, split, splits)
    if first >= last:
        return
    g, d = tl.arange(0, M), tl.arange(0, DP)
    q_gd = _group(q_ptr, sequence, row % N, head, G, q_batch, q_row, q_head, D, DP, M)
    means = pooled_ptr + sequence.to(tl.int64) * p_batch + head * p_head
    logits = float_ptr + pair.to(tl.int64) * G * NC
    m, l = tl.full([M], NOTHING, tl.float32), tl.zeros([M], tl.float32)
    known = complete
    if UPDATE:
        known -= ((position + 1) % S == 0).to(tl.int32)
    for tile in range(first, tl.minimum(last, tl.cdiv(known, BN))):
        n = tile * BN + tl.arange(0, BN)
        place = means + n.to(tl.int64)[:, None] * p_row + d[None, :]
        there = (n < known)[:, None] & (d < D)[None, :]
        k_nd = tl.load(place, mask=there, other=0.0, eviction_policy="evict_first")  # nothing reads them again soon
        s_gn = tl.dot(q_gd, tl.trans(k_nd), input_precision="ieee") * c
        s_gn = tl.where((n < known)[None, :], s_gn, NOTHING)
        tl.store(logits + g[:, None] * NC + n[None, :], s_gn, mask=(g < G)[:, None])
        top = tl.maximum(m, tl.max(s_gn, 1))  # finite: every tile has a block
        l = l * tl.exp2(m - top) + tl.sum(tl.exp2(s_gn - top[:, None]), 1)
        m = top
    if UPDATE:  # noqa: SIM102  (one is known when compiling, the other is not)
        if (known < complete) & (last == tiles):
            keys = k_ptr + sequence.to(tl.int64) * k_batch + head * k_head
            mean_d = _block_mean(keys, start + known * S, k_row, d, D, DP, S).to(pooled_ptr.dtype.element_ty)
            tl.store(means + known.to(tl.int64) * p_row + d, mean_d, mask=d < D)
            s_g = tl.sum(q_gd.to(tl.float32) * mean_d.to(tl.float32)[None, :], 1) * c
            tl.store(logits + g * NC + known, s_g, mask=g < G)
            top = tl.maximum(m, s_g)
            l = l * tl.exp2(m - top) + tl.exp2(s_g - top)
            m = top
    partial = float_ptr + rows.to(tl.int64) * K * G * NC + (pair.to(tl.int64) * splits + split) * 2 * GP + g
    tl.store(partial, m, mask=g < GP)
    tl.store(partial + GP, l, mask=g < GP)


@triton.jit
def _attend_tile(q_md, k_nd, v_nd, seen_mn, m, l, o_md, c):
    """Running maximum, sum and output after a tile of keys."""
    s_mn = tl.where(seen_mn, tl.dot(q_md, tl.trans(k_nd), input_precision="ieee") * c, NOTHING)
    top = tl.maximum(m, tl.max(s_mn, 1))
    base = tl.where(top == NOTHING, 0.0, top)
    p_mn = tl.exp2(s_mn - base[:, None])
    old = tl.exp2(m - base)
    o_md = o_md * old[:, None] + tl.dot(p_mn.to(v_nd.dtype), v_nd, input_precision="ieee")
    return top, l * old + tl.sum(p_mn, 1), o_md


@triton.jit
def _attend_span(
    q_md,
    keys,  # first cache row of the sequence's KV head
    values,
    list_ptr,  # blocks of the row; not read unless LISTED
    first,  # entries of the list, or places in the sequence
    last,
    position_m,
    furthest,  # largest position of the tile
    k_row,
    v_row,
    c,
    M: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    BN: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Normalised output ``[M, DP]`` and base-2 log-sum-exp ``[M]`` (-inf and 0 where nothing is visible)."""
    d = tl.arange(0, DP)
    m = tl.full([M], NOTHING, tl.float32)
    l = tl.zeros([M], tl.float32)
    o_md = tl.zeros([M, DP], tl.float32)
    for begin in range(first, last, BN):
        e = begin + tl.arange(0, BN)
        place = e
        real = e < last
        if LISTED:
            block = tl.load(list_ptr + e // S, mask=real, other=-1).to(tl.int32)
            place = block * S + e % S
            real = real & (block >= 0)
        real = real & (place <= furthest)
        at = place.to(tl.int64)[:, None]
        loaded = real[:, None] & (d < D)[None, :]
        k_nd = tl.load(keys + at * k_row + d[None, :], mask=loaded, other=0.0)
        v_nd = tl.load(values + at * v_row + d[None, :], mask=loaded, other=0.0)
        seen_mn = real[None, :] & (place[None, :] <= position_m[:, None])
        m, l, o_md = _attend_tile(q_md, k_nd, v_nd, seen_mn, m, l, o_md, c)
    seen = l > 0
    o_md = o_md / tl.where(seen, l, 1.0)[:, None]
    return o_md, tl.where(seen, m + tl.log2(tl.where(seen, l, 1.0)), NOTHING)


@triton.jit(do_not_specialize=["row0", "rows", "N", "splits", "parts", "NC", "first_blocks", "local_blocks"])
def sum_kernel(
    lengths_ptr,
    starts_ptr,
    float_ptr,  # of score_kernel, then scores [rows, K, NC]
    chunk_ptr,  # [rows, K, NC / CS] int32 chunk maxima
    row0,
    rows,
    N,
    K,
    G,
    splits,
    parts,  # programs of a row
    NC,
    first_blocks,
    local_blocks,
    S: tl.constexpr,
    GP: tl.constexpr,
    BN: tl.constexpr,
    SP: tl.constexpr,
    CS: tl.constexpr,
    STARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Scores of one part of a row, on as many programs as the device holds: few registers, nothing to wait for."""
    _begin(PDL)
    part = tl.program_id(0) % parts
    pair = tl.program_id(0) // parts
    _, _, position = _place(row0 + pair // K, lengths_ptr, starts_ptr, N, STARTS)
    complete = tl.maximum(position + 1, 0) // S
    tiles = tl.cdiv(complete, BN)
    first, last, _ = _share(tiles, part, parts)
    if first >= last:
        return
    _, _, used = _share(tiles, 0, splits)
    pairs, wide = rows.to(tl.int64) * K, pair.to(tl.int64)
    g, i = tl.arange(0, GP), tl.arange(0, SP)
    partial = float_ptr + pairs * G * NC + (wide * splits + i)[:, None] * 2 * GP + g[None, :]
    m_ig = tl.load(partial, mask=(i < used)[:, None], other=NOTHING)
    l_ig = tl.load(partial + GP, mask=(i < used)[:, None], other=0.0)
    m_g = tl.max(m_ig, 0)
    lse_g = m_g + tl.log2(tl.sum(l_ig * tl.exp2(m_ig - m_g[None, :]), 0))
    logits = float_ptr + wide * G * NC
    score_row = float_ptr + pairs * (G * NC + splits * 2 * GP) + wide * NC
    chunk_row = chunk_ptr + wide * (NC // CS)
    hi = position // S + 1 - local_blocks
    for tile in range(first, last):
        n = tile * BN + tl.arange(0, BN)
        there = (g < G)[:, None] & (n < complete)[None, :]
        s_gn = tl.load(logits + g[:, None] * NC + n[None, :], mask=there, other=NOTHING)
        score_n = tl.sum(tl.exp2(s_gn - lse_g[:, None]), 0)
        tl.store(score_row + n, score_n)
        candidate = (n >= first_blocks) & (n < hi)
        largest = tl.max(tl.reshape(tl.where(candidate, _key(score_n), 0), [BN // CS, CS]), 1)
        tl.store(chunk_row + tile * (BN // CS) + tl.arange(0, BN // CS), largest)


@triton.jit(do_not_specialize=["row0", "rows", "N", "splits", "NC", "k", "first_blocks", "local_blocks"])
def select_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    starts_ptr,
    indices_ptr,  # [R, K, k] int32
    out_ptr,  # [R, H, D]
    lse_ptr,  # [R, H] float32, natural
    float_ptr,  # of score_kernel, then scores [rows, K, NC]
    chunk_ptr,  # [rows, K, NC / CS] int32 chunk maxima
    row0,
    rows,
    N,
    K,
    G,
    splits,
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
    BK: tl.constexpr,
    NCH: tl.constexpr,
    CS: tl.constexpr,
    KP: tl.constexpr,
    KP2: tl.constexpr,
    OFFICIAL: tl.constexpr,
    ATTEND: tl.constexpr,
    STARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Top-k of a row in the chunks with the largest maxima, and attention over its blocks."""
    _begin(PDL)
    pair = tl.program_id(0)
    head = pair % K
    row = row0 + pair // K
    sequence, start, position = _place(row, lengths_ptr, starts_ptr, N, STARTS)
    q_md = _group(q_ptr, sequence, row % N, head, G, q_batch, q_row, q_head, D, DP, M)
    pairs, wide = rows.to(tl.int64) * K, pair.to(tl.int64)
    score_row = float_ptr + pairs * (G * NC + splits * 2 * GP) + wide * NC
    chunk_row = chunk_ptr + wide * (NC // CS)
    own = tl.where(position < 0, -1, position // S)
    listed = indices_ptr + (row.to(tl.int64) * K + head) * k
    if OFFICIAL:
        _emit_official(score_row, chunk_row, listed, own, k, S, NCH, CS, KP, KP2)
    else:
        hi = own + 1 - local_blocks
        need = k - first_blocks - local_blocks
        block, _, taken = _best_of_chunks(score_row, chunk_row, listed, first_blocks, hi, need, NCH, CS, KP)
        _emit(listed, tl.minimum(first_blocks, own + 1), block, taken, own, local_blocks, k, KP2)
    if ATTEND:
        tl.debug_barrier()  # the list is complete
        h, d = tl.arange(0, M), tl.arange(0, DP)
        keys = k_ptr + sequence.to(tl.int64) * k_batch + start.to(tl.int64) * k_row + head * k_head
        values = v_ptr + sequence.to(tl.int64) * v_batch + start.to(tl.int64) * v_row + head * v_head
        position_m = tl.full([M], 0, tl.int32) + position
        o_md, lse_m = _attend_span(
            q_md, keys, values, listed, 0, k * S, position_m, position, k_row, v_row, c, M, D, DP, S, BK, True
        )
        place, live = (row.to(tl.int64) * K + head) * G, (h < G)[:, None] & (d < D)[None, :]
        tl.store(out_ptr + (place + h)[:, None] * D + d[None, :], o_md.to(out_ptr.dtype.element_ty), mask=live)
        tl.store(lse_ptr + place + h, lse_m * LN2, mask=h < G)


@triton.jit(do_not_specialize=["tiles", "N", "splits", "slots"])
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    list_ptr,  # [R, K, slots] blocks; not read unless LISTED
    lengths_ptr,
    starts_ptr,
    out_ptr,  # [R, H, D]; float32 [R, H, splits, D] if PARTIAL
    lse_ptr,  # [R, H] natural; [R, H, splits] base 2 if PARTIAL
    tiles,  # of TT tokens in N
    N,
    K,
    G,
    splits,
    slots,
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
    TT: tl.constexpr,
    BN: tl.constexpr,
    LISTED: tl.constexpr,
    PARTIAL: tl.constexpr,
    STARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of TT tokens x the heads of one KV head, over a list of blocks (TT = 1) or over everything before them."""
    _begin(PDL)
    split = tl.program_id(0) % splits
    pair = tl.program_id(0) // splits
    head = pair % K
    tile = pair // K
    sequence = (tile // tiles).to(tl.int64)
    token0 = tile % tiles * TT
    start = tile * 0
    if STARTS:
        start = tl.load(starts_ptr + sequence)
    position0 = tl.load(lengths_ptr + sequence) - N + token0 - start
    i, d = tl.arange(0, M), tl.arange(0, DP)
    t, g = i // GP, i % GP
    mine = (t < TT) & (token0 + t < N) & (g < G)
    furthest = position0 + tl.minimum(TT, N - token0) - 1
    total = tl.maximum(furthest + 1, 0)
    if LISTED:
        total = slots * S
    first, last, _ = _share(tl.cdiv(total, BN), split, splits)
    row = sequence * N + token0 + t
    place = (row * K + head) * G + g
    if PARTIAL:  # noqa: SIM102  (one is known when compiling, the other is not)
        if first >= last:
            tl.store(lse_ptr + place * splits + split, tl.full([M], NOTHING, tl.float32), mask=mine)
            return
    live = mine[:, None] & (d < D)[None, :]
    query = q_ptr + sequence * q_batch + (token0 + t).to(tl.int64) * q_row + (head * G + g) * q_head
    q_md = tl.load(query[:, None] + d[None, :], mask=live, other=0.0)
    o_md, lse_m = _attend_span(
        q_md,
        k_ptr + sequence * k_batch + start.to(tl.int64) * k_row + head * k_head,
        v_ptr + sequence * v_batch + start.to(tl.int64) * v_row + head * v_head,
        list_ptr + ((sequence * N + token0) * K + head) * slots,
        first * BN, tl.minimum(last * BN, total), position0 + t, furthest, k_row, v_row, c, M, D, DP, S, BN, LISTED,
    )  # fmt: skip
    if PARTIAL:
        place = place * splits + split
    else:
        lse_m = lse_m * LN2
    tl.store(out_ptr + place[:, None] * D + d[None, :], o_md.to(out_ptr.dtype.element_ty), mask=live)
    tl.store(lse_ptr + place, lse_m, mask=mine)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    part_ptr,  # [R, H, splits, D] float32
    part_lse_ptr,  # [R, H, splits] base 2
    out_ptr,  # [R, H, D]
    lse_ptr,  # [R, H]
    splits,
    D: tl.constexpr,
    DP: tl.constexpr,
    SP: tl.constexpr,
    BS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merge the parts of one query head; a part without keys has an lse of -inf and is not read."""
    _begin(PDL)
    place = tl.program_id(0).to(tl.int64)
    i, j, d = tl.arange(0, SP), tl.arange(0, BS), tl.arange(0, DP)
    lse_i = tl.load(part_lse_ptr + place * splits + i, mask=i < splits, other=NOTHING)
    m = tl.max(lse_i)
    base = tl.where(m == NOTHING, 0.0, m)
    total = tl.sum(tl.exp2(lse_i - base))
    o_d = tl.zeros([DP], tl.float32)
    for s0 in range(0, splits, BS):
        at = place * splits + s0 + j
        w_j = tl.exp2(tl.load(part_lse_ptr + at, mask=s0 + j < splits, other=NOTHING) - base)
        read = (w_j > 0)[:, None] & (d < D)[None, :]
        o_d += tl.sum(tl.load(part_ptr + at[:, None] * D + d[None, :], mask=read, other=0.0) * w_j[:, None], 0)
    o_d = o_d / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + place * D + d, o_d.to(out_ptr.dtype.element_ty), mask=d < D)
    tl.store(lse_ptr + place, tl.where(total > 0, (base + tl.log2(tl.where(total > 0, total, 1.0))) * LN2, NOTHING))
