"""Both elementwise passes over the streams' outputs as one kernel each; what they compute stands in ``passes``.

A program takes ROWS rows (row, head) of D elements. Sums leave it as one partial sum per program, which are added in a
fixed order, so that two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa.ops.dual.passes import Inflow, Streams
from ssa.ops.triton_support import ceil_div, next_power_of_two, on_device

ELEMENTS = 2048  # of a program's tile: memory-bound, so few registers a thread


@triton.jit
def _tile(full, sparse, gate, place, rows, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
          HAS_GATE: tl.constexpr, SAMPLED: tl.constexpr):  # fmt: skip
    """Row numbers in both streams, which exist in each, offsets, and the outputs and the gate in float32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = row < rows
    full_row, both = row, here
    if SAMPLED:
        at = tl.load(place + row // H, mask=here, other=-1).to(tl.int64)
        both = here & (at >= 0)
        full_row = at * H + row % H
    column = tl.arange(0, DP)[None, :]
    inside = column < D
    offset, full_offset = row[:, None] * D + column, full_row[:, None] * D + column
    o_full = tl.load(full + full_offset, mask=both[:, None] & inside, other=0.0).to(tl.float32)
    o_sparse = tl.load(sparse + offset, mask=here[:, None] & inside, other=0.0).to(tl.float32)
    g = tl.full((ROWS,), 1.0, tl.float32)
    if HAS_GATE:
        g = tl.load(gate + row, mask=here, other=0.0).to(tl.float32)
    return row, full_row, here, both, inside, offset, full_offset, o_full, o_sparse, g


@triton.jit
def forward_kernel(full, sparse, gate, place, lse_full, lse_sparse, out, part, rows, programs,
                   H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, HAS_GATE: tl.constexpr,
                   SAMPLED: tl.constexpr, GATED: tl.constexpr, MAIN_FULL: tl.constexpr,
                   SMOOTH: tl.constexpr):  # fmt: skip
    row, full_row, here, both, inside, offset, _full_offset, o_full, o_sparse, g = _tile(
        full, sparse, gate, place, rows, H, D, DP, ROWS, HAS_GATE, SAMPLED
    )
    if HAS_GATE:
        main = o_full if MAIN_FULL else o_sparse
        tl.store(out + offset, (main * g[:, None]).to(out.dtype.element_ty), mask=here[:, None] & inside)
    d = o_full - o_sparse
    if GATED:
        d *= g[:, None]
    h = d * d
    if SMOOTH:
        size = tl.abs(d)
        h = tl.where(size < 1.0, 0.5 * h, size - 0.5)
    h = tl.where(both[:, None], h, 0.0)
    l_full = tl.load(lse_full + full_row, mask=both, other=0.0)
    l_sparse = tl.load(lse_sparse + row, mask=both, other=0.0)
    mass = tl.where(both, tl.minimum(tl.exp(l_sparse - l_full), 1.0), 0.0)
    tl.store(part + tl.program_id(0), tl.sum(tl.sum(h, 1), 0))
    tl.store(part + programs + tl.program_id(0), tl.sum(mass, 0))


@triton.jit
def backward_kernel(full, sparse, gate, place, up, d_loss, d_full, d_sparse, d_gate, delta, rows, factor, up_row,
                    up_head, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
                    HAS_GATE: tl.constexpr, SAMPLED: tl.constexpr, GATED: tl.constexpr, MAIN_FULL: tl.constexpr,
                    SMOOTH: tl.constexpr, PULL_FULL: tl.constexpr, PULL_SPARSE: tl.constexpr):  # fmt: skip
    row, _full_row, here, both, inside, offset, full_offset, o_full, o_sparse, g = _tile(
        full, sparse, gate, place, rows, H, D, DP, ROWS, HAS_GATE, SAMPLED
    )
    up_offset = (row // H)[:, None] * up_row + (row % H)[:, None] * up_head + tl.arange(0, DP)[None, :]
    upstream = tl.load(up + up_offset, mask=here[:, None] & inside, other=0.0).to(tl.float32)
    g = g[:, None]
    d = o_full - o_sparse
    if GATED:
        d *= g
    if SMOOTH:
        pull = tl.minimum(tl.maximum(d, -1.0), 1.0)
    else:
        pull = 2.0 * d
    pull = tl.where(both[:, None], pull * (tl.load(d_loss).to(tl.float32) * factor), 0.0)
    to_full = upstream if MAIN_FULL else tl.zeros_like(upstream)
    to_sparse = tl.zeros_like(upstream) if MAIN_FULL else upstream
    if GATED:
        if PULL_FULL:
            to_full += pull
        if PULL_SPARSE:
            to_sparse -= pull
    if HAS_GATE:
        dg = tl.sum(to_full * o_full + to_sparse * o_sparse, 1)
        tl.store(d_gate + row, dg.to(d_gate.dtype.element_ty), mask=here)
        to_full *= g
        to_sparse *= g
    if not GATED:
        if PULL_FULL:
            to_full += pull
        if PULL_SPARSE:
            to_sparse -= pull
    to_sparse = to_sparse.to(d_sparse.dtype.element_ty)
    tl.store(d_full + full_offset, to_full.to(d_full.dtype.element_ty), mask=both[:, None] & inside)
    tl.store(d_sparse + offset, to_sparse, mask=here[:, None] & inside)
    tl.store(delta + row, tl.sum(to_sparse.to(tl.float32) * o_sparse, 1), mask=here)


def _launch(x: Streams) -> tuple[int, int, tuple[Tensor, ...], dict[str, int | bool]]:
    """Rows, programs, the tensors that both kernels begin with, and the constants that both take."""
    N, H, D = x.sparse.shape
    DP = max(16, next_power_of_two(D))
    size = max(1, ELEMENTS // DP)
    programs = ceil_div(N * H, size)
    place = x.sparse if x.rows is None else x.rows.place(N, x.sparse.device)
    gate = x.sparse if x.gate is None else x.gate.contiguous()
    constants = {"H": H, "D": D, "DP": DP, "ROWS": size, "HAS_GATE": x.gate is not None, "SAMPLED": x.rows is not None}
    constants |= {"GATED": x.gates_difference, "MAIN_FULL": x.main == "full", "SMOOTH": x.spec.distance == "smooth_l1"}
    return N * H, programs, (x.full.contiguous(), x.sparse.contiguous(), gate, place), constants


def forward(x: Streams, lse_full: Tensor, lse_sparse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`ssa.ops.dual.passes.forward`."""
    rows, programs, tensors, constants = _launch(x)
    main = x.full if x.main == "full" else x.sparse
    out = main if x.gate is None else torch.empty_like(x.sparse)
    part = torch.empty(2, programs, dtype=torch.float32, device=x.sparse.device)
    with on_device(out):
        forward_kernel[(programs,)](
            *tensors, lse_full.contiguous(), lse_sparse.contiguous(), out, part, rows, programs, **constants
        )
    distance, mass = part.sum(1).unbind()
    return out, distance / x.elements, mass / max(1, lse_full.numel())


def backward(x: Streams, d_out: Tensor, d_loss: Tensor) -> Inflow:
    """See :func:`ssa.ops.dual.passes.backward`."""
    rows, programs, tensors, constants = _launch(x)
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    inflow = Inflow(
        torch.empty(x.full.shape, dtype=x.full.dtype, device=x.full.device),
        torch.empty(x.sparse.shape, dtype=x.sparse.dtype, device=x.sparse.device),
        None if x.gate is None else torch.empty(x.gate.shape, dtype=x.gate.dtype, device=x.gate.device),
        torch.empty(x.sparse.shape[:2], dtype=torch.float32, device=x.sparse.device),
    )
    d_gate = inflow.sparse if inflow.gate is None else inflow.gate
    with on_device(d_out):
        backward_kernel[(programs,)](
            *tensors, d_out, d_loss, inflow.full, inflow.sparse, d_gate, inflow.delta, rows, x.spec.weight / x.elements,
            *d_out.stride()[:2], **constants, PULL_FULL=x.pulls_full, PULL_SPARSE=x.pulls_sparse,
        )  # fmt: skip
    return inflow
