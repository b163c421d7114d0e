"""What joins the parts of :mod:`ssa.ops.full.row_kernels` on a GPU, each in one pass and in place.

A program takes ROWS rows (row of the window, head) of D elements.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ssa.ops.triton_support import ceil_div, next_power_of_two, on_device

ELEMENTS = 2048  # of a program's tile: memory-bound, so few registers a thread


@triton.jit
def merge_kernel(out, lse, past, past_lse, rows, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DP)[None, :]
    here, offset = row < rows, row[:, None] * D + column
    inside = here[:, None] & (column < D)
    a, b = tl.load(lse + row, mask=here, other=0.0), tl.load(past_lse + row, mask=here, other=0.0)
    high = tl.maximum(a, b)
    total = high + tl.log(tl.exp(a - high) + tl.exp(b - high))
    own = tl.load(out + offset, mask=inside, other=0.0).to(tl.float32) * tl.exp(a - total)[:, None]
    before = tl.load(past + offset, mask=inside, other=0.0).to(tl.float32) * tl.exp(b - total)[:, None]
    tl.store(out + offset, (own + before).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + row, total, mask=here)


@triton.jit
def add_kernel(target, index, square, past, rows, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
               ROWS: tl.constexpr, HAS_PAST: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DP)[None, :]
    here, offset = row < rows, row[:, None] * D + column
    inside = here[:, None] & (column < D)
    at = tl.load(index + row // H, mask=here, other=0) * H + row % H
    to = at[:, None] * D + column
    total = tl.load(target + to, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(square + offset, mask=inside, other=0.0).to(tl.float32)
    if HAS_PAST:
        total += tl.load(past + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + to, total.to(target.dtype.element_ty), mask=inside)


def _tiles(x: Tensor) -> tuple[int, dict[str, int]]:
    rows, D = x.numel() // x.shape[-1], x.shape[-1]
    DP = max(16, next_power_of_two(D))
    size = max(1, ELEMENTS // DP)
    return ceil_div(rows, size), {"rows": rows, "D": D, "DP": DP, "ROWS": size}


def merge(out: Tensor, lse: Tensor, past: Tensor, past_lse: Tensor) -> None:
    """See :func:`ssa.ops.full.row_kernels.merge`."""
    programs, sizes = _tiles(out)
    with on_device(out):
        merge_kernel[(programs,)](out, lse, past.contiguous(), past_lse.contiguous(), **sizes)


def add(target: Tensor, index: Tensor, square: Tensor, past: Tensor | None) -> None:
    """See :func:`ssa.ops.full.row_kernels.add`."""
    programs, sizes = _tiles(square)
    other = square if past is None else past.contiguous()
    with on_device(target):
        add_kernel[(programs,)](
            target, index, square.contiguous(), other, H=target.shape[1], HAS_PAST=past is not None, **sizes
        )
