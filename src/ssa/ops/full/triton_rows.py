"""What joins the parts of :mod:`ssa.ops.full.row_kernels` on a GPU, each in one pass.

A program takes ROWS rows (row of the window, head) of D elements, of keys and of values where both are added up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa.ops.full.query_rows import Window
from ssa.ops.full.row_kernels import Pair
from ssa.ops.triton_support import ceil_div, next_power_of_two, on_device

ELEMENTS = 2048  # of a program's tile: memory-bound, so few registers a thread


@triton.jit
def _folded(row, size, H: tl.constexpr, GROUP: tl.constexpr):
    """Document, row and head of (row of the window, head) after folding."""
    window, head = (row // H).to(tl.int32), row % H  # 64-bit division by a number that is not a constant is slow
    document, place = (window // size).to(tl.int64), (window % size).to(tl.int64)
    return document, place * GROUP + head % GROUP, head // GROUP


@triton.jit(do_not_specialize=["rows", "size"])
def fold_kernel(d_out, q, out, lse, d_out_to, q_to, out_to, lse_to, rows, size, H: tl.constexpr, GROUP: tl.constexpr,
                D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, BACKWARD: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DP)[None, :]
    here, offset = row < rows, row[:, None] * D + column
    inside = here[:, None] & (column < D)
    document, place, head = _folded(row, size, H, GROUP)
    to = ((document * size * GROUP + place) * (H // GROUP) + head)[:, None] * D + column
    tl.store(q_to + to, tl.load(q + offset, mask=inside), mask=inside)
    if BACKWARD:
        tl.store(d_out_to + to, tl.load(d_out + offset, mask=inside), mask=inside)
        tl.store(out_to + to, tl.load(out + offset, mask=inside), mask=inside)
        heads_first = (document * (H // GROUP) + head) * size * GROUP + place  # as cuDNN reads it
        tl.store(lse_to + heads_first, tl.load(lse + row, mask=here), mask=here)


@triton.jit(do_not_specialize=["rows", "size"])
def merge_kernel(out, lse, past, past_lse, rows, size, past_document, past_row, past_head, lse_document, lse_row,
                 lse_head, H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
                 ROWS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DP)[None, :]
    here, offset = row < rows, row[:, None] * D + column
    inside = here[:, None] & (column < D)
    document, place, head = _folded(row, size, H, GROUP)
    a = tl.load(lse + row, mask=here, other=0.0)
    b = tl.load(past_lse + document * lse_document + place * lse_row + head * lse_head, mask=here, other=0.0)
    high = tl.maximum(a, b)
    total = high + tl.log(tl.exp(a - high) + tl.exp(b - high))
    own = tl.load(out + offset, mask=inside, other=0.0).to(tl.float32) * tl.exp(a - total)[:, None]
    at = (document * past_document + place * past_row + head * past_head)[:, None] + column
    before = tl.load(past + at, mask=inside, other=0.0).to(tl.float32) * tl.exp(b - total)[:, None]
    tl.store(out + offset, (own + before).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + row, total, mask=here)


@triton.jit(do_not_specialize=["rows", "size"])
def add_kernel(target, index, square, past, rows, size, past_document, past_row, past_head, H: tl.constexpr,
               GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
               HAS_PAST: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DP)[None, :]
    here, offset = row < rows, row[:, None] * D + column
    inside = here[:, None] & (column < D)
    at = tl.load(index + row // H, mask=here, other=0) * H + row % H
    to = at[:, None] * D + column
    total = tl.load(target + to, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(square + offset, mask=inside, other=0.0).to(tl.float32)
    if HAS_PAST:
        document, place, head = _folded(row, size, H, GROUP)
        past_at = (document * past_document + place * past_row + head * past_head)[:, None] + column
        total += tl.load(past + past_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + to, total.to(target.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def widen_kernel(k_base, v_base, k_own, v_own, place, k_wide, v_wide, rows, K: tl.constexpr, D: tl.constexpr,
                 DP: tl.constexpr, ROWS: tl.constexpr, HAS_BASE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DP)[None, :]
    here, offset = row < rows, row[:, None] * D + column
    inside = here[:, None] & (column < D)
    at = tl.load(place + row // K, mask=here, other=-1).to(tl.int64)
    own, both = (at * K + row % K)[:, None] * D + column, inside & (at >= 0)[:, None]
    wide: tl.constexpr = k_wide.dtype.element_ty
    key = tl.load(k_own + own, mask=both, other=0.0).to(wide)
    value = tl.load(v_own + own, mask=both, other=0.0).to(wide)
    if HAS_BASE:
        key += tl.load(k_base + offset, mask=inside, other=0.0).to(wide)
        value += tl.load(v_base + offset, mask=inside, other=0.0).to(wide)
    tl.store(k_wide + offset, key, mask=inside)
    tl.store(v_wide + offset, value, mask=inside)


@triton.jit(do_not_specialize=["first", "length", "rows", "tiles"])
def add_keys_kernel(k_total, v_total, k_part, v_part, first, length, rows, tiles, part_document, part_row, part_head,
                    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    document = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # of the document
    column = tl.arange(0, DP)[None, :]
    inside = (row < rows)[:, None] & (column < D)
    to = ((first + document * length) * K + row)[:, None] * D + column
    part = (document * part_document + row // K * part_row + row % K * part_head)[:, None] + column
    wide: tl.constexpr = k_total.dtype.element_ty
    key = tl.load(k_total + to, mask=inside, other=0.0) + tl.load(k_part + part, mask=inside, other=0.0).to(wide)
    value = tl.load(v_total + to, mask=inside, other=0.0) + tl.load(v_part + part, mask=inside, other=0.0).to(wide)
    tl.store(k_total + to, key, mask=inside)
    tl.store(v_total + to, value, mask=inside)


def _tiles(x: Tensor) -> tuple[int, dict[str, int]]:
    rows, D = x.numel() // x.shape[-1], x.shape[-1]
    DP = max(16, next_power_of_two(D))
    size = max(1, ELEMENTS // DP)
    return ceil_div(rows, size), {"rows": rows, "D": D, "DP": DP, "ROWS": size}


def fold(parts: Sequence[Tensor], documents: int, heads: int) -> list[Tensor]:
    """See :func:`ssa.ops.full.row_kernels.fold`: of q, or of the upstream gradient, q, out and log-sum-exp. The last is
    heads first in memory."""
    parts = [x.contiguous() for x in parts]
    found = [torch.empty_like(x) for x in parts]
    rows, H, D = parts[0].shape
    programs, sizes = _tiles(parts[0])
    with on_device(parts[0]):
        fold_kernel[(programs,)](  # which reads q alone, where there is nothing else: it stands for all four
            *(parts * 4)[:4], *(found * 4)[:4], size=rows // documents, H=H, GROUP=H // heads,
            BACKWARD=len(parts) > 1, **sizes,
        )  # fmt: skip
    folded = [x.view(documents, -1, heads, D) for x in found[:3]]
    return [*folded, *(x.view(documents, heads, -1).transpose(1, 2) for x in found[3:])]


def merge(out: Tensor, lse: Tensor, past: Tensor, past_lse: Tensor) -> None:
    """See :func:`ssa.ops.full.row_kernels.merge`."""
    programs, sizes = _tiles(out)
    past, folded = _folding(out, past)
    with on_device(out):
        merge_kernel[(programs,)](out, lse, past, past_lse, **folded, **_strides("lse", past_lse), **sizes)


def add(target: Tensor, index: Tensor, square: Tensor, past: Tensor | None) -> None:
    """See :func:`ssa.ops.full.row_kernels.add`."""
    programs, sizes = _tiles(square)
    other, folded = _folding(square, square[None] if past is None else past)
    with on_device(target):
        add_kernel[(programs,)](target, index, square.contiguous(), other, HAS_PAST=past is not None, **folded, **sizes)


def _folding(x: Tensor, past: Tensor) -> tuple[Tensor, dict[str, int]]:
    """``past`` with dense elements, and what its kernel must know to find in it the rows of ``x``."""
    past = past if past.stride(-1) == 1 else past.contiguous()
    sizes = {"size": len(x) // len(past), "H": x.shape[1], "GROUP": x.shape[1] // past.shape[2]}
    return past, sizes | _strides("past", past)


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": x.stride(n) for n, axis in enumerate(("document", "row", "head"))}


def widen(base: Sequence[Tensor], own: Pair, place: Tensor) -> Pair:
    """See :func:`ssa.ops.full.row_kernels.widen`."""
    shape, dtype = (len(place), *own[0].shape[1:]), torch.promote_types(own[0].dtype, torch.float32)
    key, value = (torch.empty(shape, dtype=dtype, device=place.device) for _ in range(2))
    programs, sizes = _tiles(key)
    tensors = (x.contiguous() for x in (*(base or own), *own))
    with on_device(place):
        widen_kernel[(programs,)](*tensors, place, key, value, K=shape[1], HAS_BASE=len(base) > 0, **sizes)
    return key, value


def add_keys(totals: Pair, window: Window, parts: Pair) -> None:
    """See :func:`ssa.ops.full.row_kernels.add_keys`."""
    key, value = parts
    if key.stride() != value.stride() or key.stride(-1) != 1:
        key, value = key.contiguous(), value.contiguous()
    tiles, sizes = _tiles(key[0])
    with on_device(key):
        add_keys_kernel[(window.documents * tiles,)](
            *totals, key, value, window.first, window.length, tiles=tiles, part_document=key.stride(0),
            part_row=key.stride(1), part_head=key.stride(2), K=key.shape[2], **sizes,
        )  # fmt: skip
