"""Block-sparse attention, backward, in Triton: dq by tiles or tokens like the forward, dk and dv block by block.

    p = 2^(c q.k - L),  delta = sum_d dO O,  ds = p (dO.v - delta)
    dq = scale sum_n ds k,   dk = scale sum_t ds q,   dv = sum_t p dO

dq also computes delta, unless it is given, for dk and dv to read. dk and dv walk an inverted index (`triton_index`): a
work item is a group of NB neighbouring blocks and at most SEG of the tokens that read any of them, so a block that
everybody reads is shared by many programs. Each item writes float32 partial sums; a last kernel adds them in a fixed
order.

Shapes: M rows (tokens x heads of a group), N columns (keys), D head dim padded to DP, S block size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssa.ops.sparse.triton_forward import (
    biased,
    list_entries,
    load_keys,
    load_rows,
    past_columns,
    past_entries,
    reads_column,
    reads_one_by_one,
    tile_columns,
    tile_rows,
    token_columns,
    wait_for_launch_before,
)

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(
    q_ptr, do_ptr, out_ptr, lse_ptr, delta_ptr, q_offset, do_offset, flat_row, live, D: tl.constexpr, DP: tl.constexpr,
    KNOWN: tl.constexpr,
):  # fmt: skip
    """q, dO ``[M, D]``, base-2 L and delta ``[M]`` of some (token, head) rows; stores delta unless it is KNOWN."""
    d = tl.arange(0, DP)
    live_md = live[:, None] & (d < D)[None, :]
    q_md = tl.load(q_ptr + q_offset[:, None] + d[None, :], mask=live_md, other=0.0)
    do_md = tl.load(do_ptr + do_offset[:, None] + d[None, :], mask=live_md, other=0.0)
    lse = tl.load(lse_ptr + flat_row, mask=live, other=0.0)
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)  # a row that read nothing has p = 0
    if KNOWN:
        delta = tl.load(delta_ptr + flat_row, mask=live, other=0.0)
    else:
        o_md = tl.load(out_ptr + flat_row[:, None] * D + d[None, :], mask=live_md, other=0.0)
        delta = tl.sum(o_md.to(tl.float32) * do_md.to(tl.float32), 1)
        tl.store(delta_ptr + flat_row, delta, mask=live)
    return q_md, do_md, lse, delta


@triton.jit
def _store_dq(dq_ptr, plus_ptr, flat_row, live, dq_md, D: tl.constexpr, DP: tl.constexpr, PLUS: tl.constexpr):
    """Store dq, with ``plus`` added before the one rounding."""
    d = tl.arange(0, DP)
    at, inside = flat_row[:, None] * D + d[None, :], live[:, None] & (d < D)[None, :]
    if PLUS:
        dq_md += tl.load(plus_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dq_ptr + at, dq_md.to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def union_dq_kernel(
    q_ptr,  # [N, H, D]
    k_ptr,  # [N, K, D]
    v_ptr,  # [N, K, D]
    do_ptr,  # [N, H, D]
    out_ptr,  # [N, H, D]
    lse_ptr,  # [N, H]
    delta_ptr,  # [N, H], written here unless KNOWN
    dq_ptr,  # [N, H, D]
    plus_ptr,  # [N, H, D] added to dq, if PLUS
    union_row_ptr,
    union_mask_ptr,
    union_count_ptr,
    tile_start_ptr,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    do_row,
    do_head,
    H,
    K,
    c,
    mask_value,
    limit,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    TT: tl.constexpr,
    LIST: tl.constexpr,
    BN: tl.constexpr,
    SELECT: tl.constexpr,
    NARROW: tl.constexpr,
    PLUS: tl.constexpr,
    KNOWN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """dq of one tile x one KV head, unless `reads_one_by_one`."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    tile, head = tl.program_id(0), tl.program_id(1)
    one_by_one = reads_one_by_one(union_count_ptr, tile, head, K, limit)
    count = tl.load(union_count_ptr + tile * K + head)
    M: tl.constexpr = TT * GP
    TP: tl.constexpr = TT if TT > 16 else 16
    row0, rows, token, row, h, live = tile_rows(tile_start_ptr, tile, head, G, GP, TT)
    entries = (tile.to(tl.int64) * K + head) * LIST
    union_row_ptr += entries
    union_mask_ptr += entries
    n = tl.arange(0, BN)
    if SELECT:  # the first loads wait for each other as little as they can
        first_key, bits0, bits1, bits2, bits3 = past_entries(union_row_ptr, union_mask_ptr, 0, S, BN)
    if one_by_one:
        return
    q_md, do_md, lse, delta = _load_rows(
        q_ptr, do_ptr, out_ptr, lse_ptr, delta_ptr, row * q_row + h * q_head, row * do_row + h * do_head, row * H + h,
        live, D, DP, KNOWN,
    )  # fmt: skip
    MASK: tl.constexpr = tl.float32 if q_md.dtype == tl.float32 else tl.bfloat16
    one_hot = (token[:, None] == tl.arange(0, TP)[None, :]).to(MASK)
    acc_md = tl.zeros([M, DP], tl.float32)
    k_ptr += head * k_head
    v_ptr += head * v_head
    last_row = row0 + rows - 1
    past = tl.zeros([], tl.int32)
    if SELECT:  # whether a token reads a block is one choice per row and block, made on the row's log-sum-exp
        past = past_columns(union_row_ptr, count, row0, TT, S, BN)
        mine = 1 << token
        for n0 in range(0, past, BN):
            key = first_key + (n0 + n) % S
            lse_mn = tl.where(reads_column(bits0, bits1, bits2, bits3, mine, S, BN), lse[:, None], float("inf"))
            first_key, bits0, bits1, bits2, bits3 = past_entries(union_row_ptr, union_mask_ptr, n0 + BN, S, BN)
            k_nd = load_keys(k_ptr, key, k_row, D, DP, NARROW)
            v_nd = load_keys(v_ptr, key, v_row, D, DP, NARROW)
            s_mn = tl.dot(q_md, tl.trans(k_nd), input_precision="ieee")
            dp_mn = tl.dot(do_md, tl.trans(v_nd), input_precision="ieee")
            ds_mn = tl.exp2(s_mn * c - lse_mn) * (dp_mn - delta[:, None])
            acc_md = tl.dot(ds_mn.to(k_nd.dtype), k_nd, acc_md, input_precision="ieee")
    first_key, bits = list_entries(union_row_ptr, union_mask_ptr, past, count, S, BN)
    for n0 in tl.range(past, count * S, BN, num_stages=1 if SELECT else None):
        key, bias = tile_columns(first_key, bits, n0, row0, last_row, mask_value, MASK, S, BN, TP)
        first_key, bits = list_entries(union_row_ptr, union_mask_ptr, n0 + BN, count, S, BN)
        k_nd = load_rows(k_ptr, key, k_row, D, DP)
        v_nd = load_rows(v_ptr, key, v_row, D, DP)
        s_mn = biased(one_hot, bias, q_md, k_nd)
        dp_mn = tl.dot(do_md, tl.trans(v_nd), input_precision="ieee")
        ds_mn = tl.exp2(s_mn * c - lse[:, None]) * (dp_mn - delta[:, None])
        acc_md = tl.dot(ds_mn.to(k_nd.dtype), k_nd, acc_md, input_precision="ieee")
    _store_dq(dq_ptr, plus_ptr, row * H + h, live, acc_md * (c * LN2), D, DP, PLUS)


@triton.jit
def token_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    plus_ptr,
    indices_ptr,  # [N, K, slots]
    starts_ptr,  # [N]
    union_count_ptr,
    tile_start_ptr,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    do_row,
    do_head,
    H,
    K,
    slots,
    c,
    limit,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
    PLUS: tl.constexpr,
    KNOWN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """dq of the tokens of one tile x one KV head, if `reads_one_by_one`."""
    tile, head = tl.program_id(0), tl.program_id(1)
    if OVERLAP:
        wait_for_launch_before((tile == 0) & (head == 0))
    if not reads_one_by_one(union_count_ptr, tile, head, K, limit):
        return
    row0, end = tl.load(tile_start_ptr + tile), tl.load(tile_start_ptr + tile + 1)
    start = tl.load(starts_ptr + row0).to(tl.int32)
    g = tl.arange(0, M)
    h = head * G + g
    k_ptr += head * k_head
    v_ptr += head * v_head
    for t in range(row0, end):
        row = tl.cast(t, tl.int64)
        q_md, do_md, lse, delta = _load_rows(
            q_ptr, do_ptr, out_ptr, lse_ptr, delta_ptr, row * q_row + h * q_head, row * do_row + h * do_head,
            row * H + h, g < G, D, DP, KNOWN,
        )  # fmt: skip
        acc_md = tl.zeros([M, DP], tl.float32)
        mine = indices_ptr + (row * K + head) * slots
        for n0 in range(0, slots * S, BN):
            key, visible = token_columns(mine, n0, slots, start, t, S, BN)
            k_nd = load_rows(k_ptr, key, k_row, D, DP)
            v_nd = load_rows(v_ptr, key, v_row, D, DP)
            s_mn = tl.dot(q_md, tl.trans(k_nd), input_precision="ieee") * c - lse[:, None]
            p_mn = tl.where(visible[None, :], tl.exp2(s_mn), 0.0)
            ds_mn = p_mn * (tl.dot(do_md, tl.trans(v_nd), input_precision="ieee") - delta[:, None])
            acc_md = tl.dot(ds_mn.to(k_nd.dtype), k_nd, acc_md, input_precision="ieee")
        _store_dq(dq_ptr, plus_ptr, row * H + h, g < G, acc_md * (c * LN2), D, DP, PLUS)


@triton.jit(do_not_specialize=["supers", "part_rows"])
def dkv_kernel(
    q_ptr,  # [N, H, D]
    k_ptr,  # [N, K, D]
    v_ptr,  # [N, K, D]
    do_ptr,  # [N, H, D]
    lse_ptr,  # [N, H]
    delta_ptr,  # [N, H]
    entry_ptr,  # readers of each group of blocks: token * 16 + bit per block of the group
    work_ptr,  # [works, 3] group, first entry, end
    work_offset_ptr,  # [groups + 1] first work item of each group
    super_start_ptr,  # [supers + 1] first key row of each super-block of 4 blocks
    part_ptr,  # [2, units * S, DP] float32 partial dk, dv
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    do_row,
    do_head,
    H,
    K,
    supers,
    part_rows,
    c,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    LEVEL: tl.constexpr,
    CT: tl.constexpr,
    TQ: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
    NARROW: tl.constexpr,  # whether offsets in units of 8 elements fit in 32 bits
    OVERLAP: tl.constexpr,
):
    """Partial dk, dv of CT key rows of one work item; program axis 1 walks the item's NB * S rows.

    OVERLAP: the launches for the sizes of groups need not wait for each other, so the next begins when all programs of
    this one have. One program waits for the launch before, so that none has ended before that one has.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    NB: tl.constexpr = 1 << LEVEL
    GROUPS: tl.constexpr = 4 // NB  # per super-block
    pid, Z = tl.program_id(0), K * supers
    region = (8 - (8 >> LEVEL)) * Z  # first group of this size
    before = tl.load(work_offset_ptr + region)
    work = before + pid
    if work >= tl.load(work_offset_ptr + (8 - (8 >> (LEVEL + 1))) * Z):
        if OVERLAP:
            wait_for_launch_before(pid == 0)
        return
    unit = before + (pid << LEVEL)
    if LEVEL == 2:
        unit += before - tl.load(work_offset_ptr + 4 * Z)  # those of size 2 take two each
    n = tl.program_id(1) * CT + tl.arange(0, CT)
    bit = n // S
    M: tl.constexpr = TQ * GP
    r, d = tl.arange(0, M), tl.arange(0, DP)
    g = r % GP
    group = tl.load(work_ptr + work * 3) - region
    first, last = tl.load(work_ptr + work * 3 + 1), tl.load(work_ptr + work * 3 + 2)
    head, in_head = group // (supers * GROUPS), group % (supers * GROUPS)
    super_block, j = in_head // GROUPS, in_head % GROUPS
    key_row = tl.load(super_start_ptr + super_block) + j * NB * S + n
    key_end = tl.load(super_start_ptr + super_block + 1)
    key = tl.minimum(key_row, key_end - 1)
    k_nd = load_rows(k_ptr + head * k_head, key, k_row, D, DP)
    v_nd = load_rows(v_ptr + head * v_head, key, v_row, D, DP)
    if KEYS_FIRST:
        dk, dv = tl.zeros([CT, DP], tl.float32), tl.zeros([CT, DP], tl.float32)
    else:
        dk, dv = tl.zeros([DP, CT], tl.float32), tl.zeros([DP, CT], tl.float32)
    if G == GP:
        h = head * G + g
    else:
        h = head * G + tl.minimum(g, G - 1)
    next_entry = tl.load(entry_ptr + tl.minimum(first + r // GP, last - 1))
    for e0 in range(first, last, TQ):
        e = e0 + r // GP
        live = (e < last) & (g < G)
        entry = next_entry  # one step ahead, so that the rows below need not wait for it
        next_entry = tl.load(entry_ptr + tl.minimum(e + TQ, last - 1))
        token = entry >> 4
        place = token if NARROW else token.to(tl.int64)
        q_md = load_rows(q_ptr, place * (q_row // 8) + h * (q_head // 8), 8, D, DP)
        do_md = load_rows(do_ptr, place * (do_row // 8) + h * (do_head // 8), 8, D, DP)
        lse = tl.load(lse_ptr + place * H + h) * LOG2E
        delta = tl.load(delta_ptr + place * H + h)
        seen = tl.where(live, token, -1)
        if KEYS_FIRST:  # p and ds stay in registers as the left factors of the last two products
            s_nm = tl.dot(k_nd, tl.trans(q_md), input_precision="ieee") * c - lse[None, :]
            dp_nm = tl.dot(v_nd, tl.trans(do_md), input_precision="ieee")
            visible = key_row[:, None] <= seen[None, :]
            if NB > 1:
                visible &= ((entry[None, :] >> bit[:, None]) & 1) != 0
            p_nm = tl.where(visible, tl.exp2(s_nm), 0.0)
            dv = tl.dot(p_nm.to(do_md.dtype), do_md, dv, input_precision="ieee")
            ds_nm = p_nm * (dp_nm - delta[None, :])
            dk = tl.dot(ds_nm.to(q_md.dtype), q_md, dk, input_precision="ieee")
        else:
            s_mn = tl.dot(q_md, tl.trans(k_nd), input_precision="ieee") * c - lse[:, None]
            dp_mn = tl.dot(do_md, tl.trans(v_nd), input_precision="ieee")
            visible = key_row[None, :] <= seen[:, None]
            if NB > 1:
                visible &= ((entry[:, None] >> bit[None, :]) & 1) != 0
            p_mn = tl.where(visible, tl.exp2(s_mn), 0.0)
            dv = tl.dot(tl.trans(do_md), p_mn.to(do_md.dtype), dv, input_precision="ieee")
            ds_mn = p_mn * (dp_mn - delta[:, None])
            dk = tl.dot(tl.trans(q_md), ds_mn.to(q_md.dtype), dk, input_precision="ieee")
    part = unit.to(tl.int64) * S + n
    out = part[:, None] * DP + d[None, :] if KEYS_FIRST else part[None, :] * DP + d[:, None]
    tl.store(part_ptr + out, dk * (c * LN2))
    tl.store(part_ptr + part_rows.to(tl.int64) * DP + out, dv)
    if OVERLAP:
        wait_for_launch_before(pid == 0)


@triton.jit(do_not_specialize=["supers", "part_rows"])
def dkv_reduce_kernel(
    part_ptr,  # [2, units * S, DP]
    work_offset_ptr,  # [groups + 1]
    level_ptr,  # [K, supers] log2 of the blocks per group
    super_start_ptr,
    dk_ptr,  # [N, K, D]
    dv_ptr,  # [N, K, D]
    dk_plus_ptr,  # [N, K, D] added to dk and to dv, if PLUS
    dv_plus_ptr,
    K,
    supers,
    part_rows,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    PLUS: tl.constexpr,
):
    """Sum the partial rows of one block in the order of its work items; 0 for a block that nobody read."""
    super_block, head, j = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key_end = tl.load(super_start_ptr + super_block + 1)
    n, d = tl.arange(0, S), tl.arange(0, DP)
    key_row = tl.load(super_start_ptr + super_block) + j * S + n
    level = tl.load(level_ptr + head * supers + super_block)
    before2 = tl.load(work_offset_ptr + K * supers * 4)
    before4 = tl.load(work_offset_ptr + K * supers * 6)
    nth = head * supers + super_block
    if level == 0:
        group = nth * 4 + j
    elif level == 1:
        group = K * supers * 4 + nth * 2 + j // 2
    else:
        group = K * supers * 6 + nth
    first, last = tl.load(work_offset_ptr + group), tl.load(work_offset_ptr + group + 1)
    base = tl.where(level == 0, 0, tl.where(level == 1, before2, before4))
    unit0 = tl.where(level == 2, before2 + 2 * (before4 - before2), base)
    dk_nd = tl.zeros([S, DP], tl.float32)
    dv_nd = tl.zeros([S, DP], tl.float32)
    for work in range(first, last):
        unit = unit0 + ((work - base) << level) + (j & ((1 << level) - 1))
        part = (unit.to(tl.int64) * S + n)[:, None] * DP + d[None, :]
        dk_nd += tl.load(part_ptr + part)
        dv_nd += tl.load(part_ptr + part_rows.to(tl.int64) * DP + part)
    out = (key_row.to(tl.int64) * K + head)[:, None] * D + d[None, :]
    live = (key_row < key_end)[:, None] & (d < D)[None, :]
    if PLUS:
        dk_nd += tl.load(dk_plus_ptr + out, mask=live, other=0.0).to(tl.float32)
        dv_nd += tl.load(dv_plus_ptr + out, mask=live, other=0.0).to(tl.float32)
    tl.store(dk_ptr + out, dk_nd.to(dk_ptr.dtype.element_ty), mask=live)
    tl.store(dv_ptr + out, dv_nd.to(dv_ptr.dtype.element_ty), mask=live)
