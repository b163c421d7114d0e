"""Block-sparse attention, forward, in Triton. Two kernels share the work tile by tile.

    x = c q . k,  m = ceil(c q . k_self),  p = 2^(x - m),  O = sum p v / sum p,  c = scale * log2(e)

`union_forward_kernel` takes a tile of neighbouring tokens x the heads of a group as rows and the union of their blocks
as columns; a mask says who reads what. It serves the tiles whose union is small. `token_forward_kernel` takes one token
and gathers its own blocks; it serves the tokens of all other tiles. Who serves a tile is read from the union's size on
the device, so nothing waits for the host.

The reference m is the logit of the query with its own key, which every query reads: no running maximum, no rescaling,
and the sum cannot vanish. Only a row whose sum comes near float32's limit (some logit is 40 nats above that one) is
done again with its maximum.

A row's bits do not depend on its neighbours' blocks, which decide about the kernel and the union (a future token must
not change the past): blocks come in ascending order, each fills whole steps of the matrix unit, blocks that a row does
not read add exact zeros, m is an integer, so another m scales everything by a power of two, and the row sum adds 16
columns at a time in order.

Loads are not masked: a row that must not be read is replaced by one of the query's own document (so that a NaN of
another document stays there) and its logit is masked.

Shapes: M rows (tokens of the tile x GP padded heads), N columns (keys), D head dim padded to DP, S block size.
"""

from __future__ import annotations

import triton
import triton.language as tl

SMALL, LARGE = tl.constexpr(2.0**-60), tl.constexpr(2.0**60)  # a sum between them lost nothing, nor did sum p v
LOWEST = tl.constexpr(-(2.0**30))  # maximum of a row that reads nothing; masked exponents are at -2^40
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _add16(l_m16, p_mn, M: tl.constexpr, N: tl.constexpr):
    """Add the columns of ``p`` to ``l``, 16 at a time, from left to right; registers only."""
    if N == 16:
        l_m16 += p_mn
    else:
        left, right = tl.split(tl.permute(tl.reshape(p_mn, [M, 2, N // 2]), (0, 2, 1)))
        if N == 32:
            l_m16 = (l_m16 + left) + right
        else:
            l_m16 = _add32(_add32(l_m16, left, M, N // 2), right, M, N // 2)
    return l_m16


@triton.jit
def _add32(l_m16, p_mn, M: tl.constexpr, N: tl.constexpr):
    left, right = tl.split(tl.permute(tl.reshape(p_mn, [M, 2, N // 2]), (0, 2, 1)))
    if N == 32:
        l_m16 = (l_m16 + left) + right
    else:
        l_m16 = _add64(_add64(l_m16, left, M), right, M)
    return l_m16


@triton.jit
def _add64(l_m16, p_m32, M: tl.constexpr):
    left, right = tl.split(tl.permute(tl.reshape(p_m32, [M, 2, 16]), (0, 2, 1)))
    return (l_m16 + left) + right


@triton.jit
def _reference(x):
    """The integer m from the logit with the own key; 0 where that is out of range (such a row is done again)."""
    m = tl.ceil(x)
    return tl.where(tl.abs(m) < -LOWEST, m, 0.0)


@triton.jit
def _accumulate(s_mn, v_nd, m, l_m16, acc_md, c, M: tl.constexpr, N: tl.constexpr):
    """One step of the softmax over the columns of ``s``, relative to ``m`` (broadcast over it)."""
    p_mn = tl.exp2(s_mn * c - m)
    acc_md = tl.dot(p_mn.to(v_nd.dtype), v_nd, acc_md, input_precision="ieee")
    return _add16(l_m16, p_mn, M, N), acc_md


@triton.jit
def _store(out_ptr, lse_ptr, at, m, l, acc_md, keep, D: tl.constexpr, DP: tl.constexpr):
    """Output and natural log-sum-exp of the rows ``keep``; 0 and -inf for a row that reads nothing."""
    d = tl.arange(0, DP)
    some = l != 0  # also NaN
    safe = tl.where(some, l, 1.0)
    lse = tl.where(some, (m + tl.log2(safe)) * LN2, float("-inf"))
    out_md = (acc_md * (1.0 / safe)[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at[:, None] * D + d[None, :], out_md, mask=keep[:, None] & (d < D)[None, :])
    tl.store(lse_ptr + at, lse, mask=keep)


@triton.jit
def reads_one_by_one(union_count_ptr, tile, head, K, limit):
    """Whether the tokens of a tile go to the token kernels: the union of the tile before it is longer than ``limit``.

    The tile's own union would let the blocks of later tokens decide how earlier ones are computed.
    """
    return tl.load(union_count_ptr + (tl.num_programs(0) + 1 + tile) * K + head) > limit


@triton.jit
def wait_for_launch_before(first):
    """In a kernel that may begin before the one ahead of it has ended, since it needs nothing of that one: the
    ``first`` program waits, so that what comes next finds both done."""
    if first:
        tl.extra.cuda.gdc_wait()


@triton.jit
def tile_rows(tile_start_ptr, tile, head, G: tl.constexpr, GP: tl.constexpr, TT: tl.constexpr):
    """First token of a tile, how many it has, and per row: token of the tile, flat token, query head, whether it is."""
    row0 = tl.load(tile_start_ptr + tile)
    rows = tl.load(tile_start_ptr + tile + 1) - row0
    r = tl.arange(0, TT * GP)
    token, g = r // GP, r % GP
    return row0, rows, token, (row0 + token).to(tl.int64), head * G + g, (token < rows) & (g < G)


@triton.jit
def load_rows(base, rows, row_stride, D: tl.constexpr, DP: tl.constexpr):
    """Rows ``[rows, DP]`` of a tensor with D adjacent elements per row; zeros beyond D."""
    d = tl.arange(0, DP)
    at = base + rows.to(tl.int64)[:, None] * row_stride + d[None, :]
    if D == DP:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(d < D)[None, :], other=0.0)
    return x


@triton.jit
def load_keys(base, key, row_stride, D: tl.constexpr, DP: tl.constexpr, NARROW: tl.constexpr):
    """`load_rows` of a stride that is a multiple of 8; NARROW: offsets in units of 8 elements fit in 32 bits."""
    place = key if NARROW else key.to(tl.int64)
    return load_rows(base, place * (row_stride // 8), 8, D, DP)


@triton.jit
def list_entries(entries_row, entries_mask, n0, count, S: tl.constexpr, BN: tl.constexpr):
    """First key row and token mask of the block of each column ``[BN]``; readers load them one step ahead."""
    at = tl.minimum((n0 + tl.arange(0, BN)) // S, count)  # the entry behind the last is one that nobody reads
    return tl.load(entries_row + at), tl.load(entries_mask + at)


@triton.jit
def past_columns(entries_row, count, row0, TT: tl.constexpr, S: tl.constexpr, BN: tl.constexpr):
    """The columns, in whole steps, whose keys all lie before the tile: there a block is read wholly or not at all."""
    OWN: tl.constexpr = TT // S if TT > S else 1  # blocks that hold tokens of the tile, the last of the union
    before = tl.load(entries_row + tl.maximum(count - OWN - 1, 0)) + S <= row0
    return tl.where(before & (count > OWN), (count - OWN) * S // BN * BN, 0)


@triton.jit
def past_entries(entries_row, entries_mask, n0, S: tl.constexpr, BN: tl.constexpr):
    """As `list_entries` for a step of past columns, but the token masks of its at most 4 blocks are scalars."""
    at = n0 // S  # at most `count`, where the padding begins
    first_key = tl.load(entries_row + at + (n0 % S + tl.arange(0, BN)) // S)
    mask_ptr = entries_mask + at
    bits0 = tl.load(mask_ptr)
    bits1, bits2, bits3 = bits0, bits0, bits0
    if BN > S:
        bits1 = tl.load(mask_ptr + 1)
    if BN > 2 * S:
        bits2, bits3 = tl.load(mask_ptr + 2), tl.load(mask_ptr + 3)
    return first_key, bits0, bits1, bits2, bits3


@triton.jit
def reads_column(bits0, bits1, bits2, bits3, mine, S: tl.constexpr, BN: tl.constexpr):
    """Whether each row, with the bit ``mine`` of its token, reads each column of a step: one test per row and block."""
    n = tl.arange(0, BN)
    bits = tl.where(n < S, bits0, tl.where(n < 2 * S, bits1, tl.where(n < 3 * S, bits2, bits3)))
    return (bits[None, :] & mine[:, None]) != 0


@triton.jit
def tile_columns(
    first_key, bits, n0, row0, last_row, mask_value, dtype: tl.constexpr, S: tl.constexpr, BN: tl.constexpr,
    TP: tl.constexpr,
):  # fmt: skip
    """Key rows to load ``[BN]`` and ``[TP, BN]``: 0 where token i of the tile reads column n, else ``mask_value``.

    A product of the latter with the tokens' one-hot rows starts the logits: one small matrix product instead of integer
    work per logit. ``dtype`` is bfloat16 (float16 lacks the range), float32 for float32 inputs (the interpreter).
    """
    key_row = first_key + (n0 + tl.arange(0, BN)) % S
    bits &= -1 << tl.minimum(tl.maximum(key_row - row0, 0), 31)  # tokens before the key do not see it
    bits = tl.where(key_row - row0 > 31, 0, bits)
    i = tl.arange(0, TP)
    bias = tl.where(((bits[None, :] >> i[:, None]) & 1) != 0, 0.0, mask_value).to(dtype)
    return tl.minimum(key_row, last_row), bias


@triton.jit
def biased(one_hot, bias, q_md, k_nd):
    """Logits ``q . k`` of a tile, a large negative number where a row does not read a column."""
    return tl.dot(q_md, tl.trans(k_nd), tl.dot(one_hot, bias, input_precision="ieee"), input_precision="ieee")


@triton.jit
def union_forward_kernel(
    q_ptr,  # [N, H, D]
    k_ptr,  # [N, K, D]
    v_ptr,  # [N, K, D]
    out_ptr,  # [N, H, D]
    lse_ptr,  # [N, H]
    union_row_ptr,  # [tiles, K, LIST]
    union_mask_ptr,  # [tiles, K, LIST]
    union_count_ptr,  # [2, tiles + 1, K]
    tile_start_ptr,  # [tiles + 1]
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
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
    OVERLAP: tl.constexpr,
):
    """One tile of TT tokens x one KV head, unless `reads_one_by_one`."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    tile, head = tl.program_id(0), tl.program_id(1)
    one_by_one = reads_one_by_one(union_count_ptr, tile, head, K, limit)
    count = tl.load(union_count_ptr + tile * K + head)
    M: tl.constexpr = TT * GP
    TP: tl.constexpr = TT if TT > 16 else 16
    row0, rows, token, row, h, live = tile_rows(tile_start_ptr, tile, head, G, GP, TT)
    entries_row = union_row_ptr + (tile.to(tl.int64) * K + head) * LIST
    entries_mask = union_mask_ptr + (tile.to(tl.int64) * K + head) * LIST
    n = tl.arange(0, BN)
    if SELECT:  # the first loads wait for each other as little as they can
        first_key, bits0, bits1, bits2, bits3 = past_entries(entries_row, entries_mask, 0, S, BN)
    if one_by_one:
        return
    d = tl.arange(0, DP)
    live_md = live[:, None] & (d < D)[None, :]
    q_md = tl.load(q_ptr + (row * q_row + h * q_head)[:, None] + d[None, :], mask=live_md, other=0.0)
    MASK: tl.constexpr = tl.float32 if q_md.dtype == tl.float32 else tl.bfloat16
    i = tl.arange(0, TP)
    own = token[:, None] == i[None, :]
    one_hot = own.to(MASK)
    k_ptr += head * k_head
    v_ptr += head * v_head
    last_row = row0 + rows - 1
    k_id = load_rows(k_ptr, tl.minimum(row0 + i, last_row), k_row, D, DP)
    m = _reference(tl.sum(tl.where(own, tl.dot(q_md, tl.trans(k_id), input_precision="ieee"), 0.0), 1) * c)
    l_m16 = tl.zeros([M, 16], tl.float32)
    acc_md = tl.zeros([M, DP], tl.float32)
    past = tl.zeros([], tl.int32)
    if SELECT:
        past = past_columns(entries_row, count, row0, TT, S, BN)
        for n0 in range(0, past, BN):
            key = first_key + (n0 + n) % S
            m_mn = tl.where(reads_column(bits0, bits1, bits2, bits3, 1 << token, S, BN), m[:, None], float("inf"))
            first_key, bits0, bits1, bits2, bits3 = past_entries(entries_row, entries_mask, n0 + BN, S, BN)
            k_nd = load_keys(k_ptr, key, k_row, D, DP, NARROW)
            v_nd = load_keys(v_ptr, key, v_row, D, DP, NARROW)
            s_mn = tl.dot(q_md, tl.trans(k_nd), input_precision="ieee")
            l_m16, acc_md = _accumulate(s_mn, v_nd, m_mn, l_m16, acc_md, c, M, BN)
    first_key, bits = list_entries(entries_row, entries_mask, past, count, S, BN)
    for n0 in tl.range(past, count * S, BN, num_stages=1 if SELECT else None):
        key, bias = tile_columns(first_key, bits, n0, row0, last_row, mask_value, MASK, S, BN, TP)
        first_key, bits = list_entries(entries_row, entries_mask, n0 + BN, count, S, BN)
        k_nd = load_rows(k_ptr, key, k_row, D, DP)
        v_nd = load_rows(v_ptr, key, v_row, D, DP)
        s_mn = biased(one_hot, bias, q_md, k_nd)
        l_m16, acc_md = _accumulate(s_mn, v_nd, m[:, None], l_m16, acc_md, c, M, BN)
    at = row * H + h
    l = tl.sum(l_m16, 1)
    fits = (l > SMALL) & (l < LARGE)
    _store(out_ptr, lse_ptr, at, m, l, acc_md, live & fits, D, DP)
    again = live & (fits == 0)
    if tl.max(again.to(tl.int32)) > 0:
        m = tl.full([M], LOWEST, tl.float32)
        for n0 in range(0, count * S, 16):
            first_key16, bits16 = list_entries(entries_row, entries_mask, n0, count, S, 16)
            key, bias = tile_columns(first_key16, bits16, n0, row0, last_row, mask_value, MASK, S, 16, TP)
            s_mn = biased(one_hot, bias, q_md, load_rows(k_ptr, key, k_row, D, DP))
            m = tl.maximum(m, tl.ceil(tl.max(s_mn, 1) * c))
        l_m16 = tl.zeros([M, 16], tl.float32)
        acc_md = tl.zeros([M, DP], tl.float32)
        for n0 in range(0, count * S, 16):
            first_key16, bits16 = list_entries(entries_row, entries_mask, n0, count, S, 16)
            key, bias = tile_columns(first_key16, bits16, n0, row0, last_row, mask_value, MASK, S, 16, TP)
            s_mn = biased(one_hot, bias, q_md, load_rows(k_ptr, key, k_row, D, DP))
            v_nd = load_rows(v_ptr, key, v_row, D, DP)
            l_m16, acc_md = _accumulate(s_mn, v_nd, m[:, None], l_m16, acc_md, c, M, 16)
        _store(out_ptr, lse_ptr, at, m, tl.sum(l_m16, 1), acc_md, again, D, DP)


@triton.jit
def token_columns(mine, n0, slots, start, t, S: tl.constexpr, BN: tl.constexpr):
    """Key rows to load ``[BN]`` and which of them token t reads; unread columns load the token's own row."""
    column = n0 + tl.arange(0, BN)
    block = tl.load(mine + column // S, mask=column < slots * S, other=-1).to(tl.int32)
    key_row = start + block * S + column % S
    visible = (block >= 0) & (key_row <= t)
    return tl.where(visible, key_row, t), visible


@triton.jit
def token_forward_kernel(
    q_ptr,  # [N, H, D]
    k_ptr,  # [N, K, D]
    v_ptr,  # [N, K, D]
    out_ptr,  # [N, H, D]
    lse_ptr,  # [N, H]
    indices_ptr,  # [N, K, slots]
    starts_ptr,  # [N]
    union_count_ptr,  # [2, tiles + 1, K]
    tile_start_ptr,  # [tiles + 1]
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    H,
    K,
    slots,
    c,
    mask_value,
    limit,
    D: tl.constexpr,
    DP: tl.constexpr,
    S: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The tokens of one tile, one after the other, x one KV head, if `reads_one_by_one`."""
    tile, head = tl.program_id(0), tl.program_id(1)
    if OVERLAP:
        wait_for_launch_before((tile == 0) & (head == 0))
    if not reads_one_by_one(union_count_ptr, tile, head, K, limit):
        return
    row0, end = tl.load(tile_start_ptr + tile), tl.load(tile_start_ptr + tile + 1)
    start = tl.load(starts_ptr + row0).to(tl.int32)
    g, d = tl.arange(0, M), tl.arange(0, DP)
    live_md = (g < G)[:, None] & (d < D)[None, :]
    k_ptr += head * k_head
    v_ptr += head * v_head
    for t in range(row0, end):
        row = tl.cast(t, tl.int64)
        q_md = tl.load(q_ptr + row * q_row + (head * G + g)[:, None] * q_head + d[None, :], mask=live_md, other=0.0)
        k_d = tl.load(k_ptr + row * k_row + d, mask=d < D, other=0.0)
        m = _reference(tl.sum(q_md.to(tl.float32) * k_d.to(tl.float32)[None, :], 1) * c)
        l_m16 = tl.zeros([M, 16], tl.float32)
        acc_md = tl.zeros([M, DP], tl.float32)
        mine = indices_ptr + (row * K + head) * slots
        for n0 in range(0, slots * S, BN):
            key, visible = token_columns(mine, n0, slots, start, t, S, BN)
            k_nd = load_rows(k_ptr, key, k_row, D, DP)
            v_nd = load_rows(v_ptr, key, v_row, D, DP)
            s_mn = tl.where(visible[None, :], tl.dot(q_md, tl.trans(k_nd), input_precision="ieee"), mask_value)
            l_m16, acc_md = _accumulate(s_mn, v_nd, m[:, None], l_m16, acc_md, c, M, BN)
        at = row * H + head * G + g
        l = tl.sum(l_m16, 1)
        fits = (l > SMALL) & (l < LARGE)
        _store(out_ptr, lse_ptr, at, m, l, acc_md, (g < G) & fits, D, DP)
        again = (g < G) & (fits == 0)
        if tl.max(again.to(tl.int32)) > 0:
            m = tl.full([M], LOWEST, tl.float32)
            for n0 in range(0, slots * S, 16):
                key, visible = token_columns(mine, n0, slots, start, t, S, 16)
                s_mn = tl.dot(q_md, tl.trans(load_rows(k_ptr, key, k_row, D, DP)), input_precision="ieee")
                m = tl.maximum(m, tl.ceil(tl.max(tl.where(visible[None, :], s_mn, mask_value), 1) * c))
            l_m16 = tl.zeros([M, 16], tl.float32)
            acc_md = tl.zeros([M, DP], tl.float32)
            for n0 in range(0, slots * S, 16):
                key, visible = token_columns(mine, n0, slots, start, t, S, 16)
                s_mn = tl.dot(q_md, tl.trans(load_rows(k_ptr, key, k_row, D, DP)), input_precision="ieee")
                s_mn = tl.where(visible[None, :], s_mn, mask_value)
                v_nd = load_rows(v_ptr, key, v_row, D, DP)
                l_m16, acc_md = _accumulate(s_mn, v_nd, m[:, None], l_m16, acc_md, c, M, 16)
            _store(out_ptr, lse_ptr, at, m, tl.sum(l_m16, 1), acc_md, again, D, DP)
