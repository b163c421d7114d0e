"""Products of a few rows in Triton: a program owns a few outputs and reads their weights once, tile after tile.

Shapes: r/M rows, padded to 16; n/BN outputs; c/BK inputs of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ssa.ops.decode.triton_kernels import _begin


@triton.jit
def _weights(w_ptr, n, c, inside, w_row):
    return tl.load(
        w_ptr + n.to(tl.int64)[:, None] * w_row + c[None, :],
        mask=inside[:, None],
        other=0.0,
        eviction_policy="evict_first",
    )


@triton.jit(do_not_specialize=["R", "eps"])
def linear_kernel(
    x_ptr,  # [R, C]
    norm_ptr,  # [C]
    gate_ptr,  # [R, C / HEAD]
    w_ptr,  # [N, C]
    up_ptr,  # [N, C]
    add_ptr,  # [R, N]
    out_ptr,  # [R, N]
    R,
    N,
    x_row,
    gate_row,
    add_row,
    eps,
    C: tl.constexpr,
    HEAD: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    UP: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """See :func:`ssa.ops.few.api.few_linear`. HEAD = 0: no gate."""
    _begin(PDL)
    r, n = tl.arange(0, M), tl.program_id(0) * BN + tl.arange(0, BN)
    acc_rn = tl.zeros([M, BN], tl.float32)
    up_rn = tl.zeros([M, BN], tl.float32)
    squares_rc = tl.zeros([M, BK], tl.float32)
    for c0 in tl.range(0, C, BK, num_stages=STAGES):
        c = c0 + tl.arange(0, BK)
        x_rc = tl.load(x_ptr + r[:, None] * x_row + c[None, :], mask=(r < R)[:, None], other=0.0)
        w_nc = _weights(w_ptr, n, c, n < N, C)
        if NORM:
            wide = x_rc.to(tl.float32)
            squares_rc += wide * wide
            x_rc = (wide * tl.load(norm_ptr + c).to(tl.float32)[None, :]).to(x_rc.dtype)
        if HEAD:
            h = c0 // HEAD + tl.arange(0, BK // HEAD)
            gate_rh = tl.load(gate_ptr + r[:, None] * gate_row + h[None, :], mask=(r < R)[:, None], other=0.0)
            x_rhd = tl.reshape(x_rc, [M, BK // HEAD, HEAD]).to(tl.float32) * gate_rh[:, :, None].to(tl.float32)
            x_rc = tl.reshape(x_rhd, [M, BK]).to(x_rc.dtype)
        acc_rn = tl.dot(x_rc, tl.trans(w_nc), acc_rn, input_precision="ieee")
        if UP:
            up_rn = tl.dot(x_rc, tl.trans(_weights(up_ptr, n, c, n < N, C)), up_rn, input_precision="ieee")
    if NORM:
        scale_r = tl.rsqrt(tl.sum(squares_rc, 1) / C + eps)
        acc_rn *= scale_r[:, None]
        up_rn *= scale_r[:, None]
    if UP:
        acc_rn = acc_rn / (1.0 + tl.exp(-acc_rn)) * up_rn
    there = (r < R)[:, None] & (n < N)[None, :]
    if ADD:
        acc_rn += tl.load(add_ptr + r[:, None] * add_row + n[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + r[:, None] * N + n[None, :], acc_rn.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["R", "N", "eps"])
def project_kernel(
    x_ptr,  # [R, C]
    norm_ptr,  # [C]
    q_weight,  # [H D, C]
    k_weight,  # [K D, C]
    v_weight,
    g_weight,  # [H, C]
    cos_ptr,  # [R or N, D]
    sin_ptr,
    lengths_ptr,
    q_ptr,  # [R, H, D]
    k_ptr,  # [B, rows, K, D]
    v_ptr,
    gate_ptr,  # [R, H]
    R,
    N,
    H,
    K,
    x_row,
    rope_batch,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    eps,
    C: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """See :func:`ssa.ops.few.api.few_project`. A program has BN outputs of a head and the BN that RoPE pairs them with;
    of gates, 2 BN heads."""
    _begin(PDL)
    pieces: tl.constexpr = D // 2 // BN
    unit = tl.program_id(0) // pieces
    i, r = tl.program_id(0) % pieces * BN + tl.arange(0, BN), tl.arange(0, M)
    is_q, is_k, is_v = unit < H, (unit >= H) & (unit < H + K), (unit >= H + K) & (unit < H + 2 * K)
    head = tl.where(is_q, unit, tl.where(is_k, unit - H, unit - H - K))
    w_ptr = q_weight
    if is_k:
        w_ptr = k_weight
    if is_v:
        w_ptr = v_weight
    low, high, outputs = head * D + i, head * D + D // 2 + i, tl.maximum(H, K) * D
    if unit >= H + 2 * K:
        w_ptr = g_weight
        low = ((unit - H - 2 * K) * pieces + tl.program_id(0) % pieces) * 2 * BN + tl.arange(0, BN)
        high, outputs = low + BN, H
    low_rn = tl.zeros([M, BN], tl.float32)
    high_rn = tl.zeros([M, BN], tl.float32)
    squares_rc = tl.zeros([M, BK], tl.float32)
    for c0 in tl.range(0, C, BK, num_stages=STAGES):
        c = c0 + tl.arange(0, BK)
        x_rc = tl.load(x_ptr + r[:, None] * x_row + c[None, :], mask=(r < R)[:, None], other=0.0)
        low_nc, high_nc = _weights(w_ptr, low, c, low < outputs, C), _weights(w_ptr, high, c, high < outputs, C)
        wide = x_rc.to(tl.float32)
        squares_rc += wide * wide
        x_rc = (wide * tl.load(norm_ptr + c).to(tl.float32)[None, :]).to(x_rc.dtype)
        low_rn = tl.dot(x_rc, tl.trans(low_nc), low_rn, input_precision="ieee")
        high_rn = tl.dot(x_rc, tl.trans(high_nc), high_rn, input_precision="ieee")
    scale_r = tl.rsqrt(tl.sum(squares_rc, 1) / C + eps)
    low_rn *= scale_r[:, None]
    high_rn *= scale_r[:, None]
    real = (r < R)[:, None]
    if unit >= H + 2 * K:
        gate = gate_ptr + r[:, None] * H
        kind = gate_ptr.dtype.element_ty
        tl.store(gate + low[None, :], (1.0 / (1.0 + tl.exp(-low_rn))).to(kind), mask=real & (low < H)[None, :])
        tl.store(gate + high[None, :], (1.0 / (1.0 + tl.exp(-high_rn))).to(kind), mask=real & (high < H)[None, :])
        return
    kind = q_ptr.dtype.element_ty
    low_rn, high_rn = low_rn.to(kind).to(tl.float32), high_rn.to(kind).to(tl.float32)
    sequence, token = r // N, r % N
    if unit < H + K:
        place = (sequence * rope_batch + token * D)[:, None] + i[None, :]
        cos_low = tl.load(cos_ptr + place, mask=real, other=0.0).to(tl.float32)
        cos_high = tl.load(cos_ptr + place + D // 2, mask=real, other=0.0).to(tl.float32)
        sin_low = tl.load(sin_ptr + place, mask=real, other=0.0).to(tl.float32)
        sin_high = tl.load(sin_ptr + place + D // 2, mask=real, other=0.0).to(tl.float32)
        turned = low_rn * cos_low - high_rn * sin_low
        high_rn = high_rn * cos_high + low_rn * sin_high
        low_rn = turned
    if is_q:
        out = q_ptr + ((r * H + head) * D)[:, None] + i[None, :]
        tl.store(out, low_rn.to(kind), mask=real)
        tl.store(out + D // 2, high_rn.to(kind), mask=real)
    else:
        row = (tl.load(lengths_ptr + sequence, mask=r < R, other=0) - N + token).to(tl.int64)
        wide_sequence = sequence.to(tl.int64)
        out = k_ptr + (wide_sequence * k_batch + row * k_row + head * k_head)[:, None] + i[None, :]
        if is_v:
            out = v_ptr + (wide_sequence * v_batch + row * v_row + head * v_head)[:, None] + i[None, :]
        tl.store(out, low_rn.to(kind), mask=real)
        tl.store(out + D // 2, high_rn.to(kind), mask=real)
