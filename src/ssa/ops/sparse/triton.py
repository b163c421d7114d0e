"""Block-sparse attention on the GPU: launches, custom operations with autograd, and the choice of tiles.

``ssa::sparse_forward`` and ``ssa::sparse_backward`` take and return tensors and numbers, so that ``torch.compile``,
activation checkpointing and FSDP see them as single operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssa.documents import BlockGrid, DocumentLayout
from ssa.ops.sparse.triton_backward import dkv_kernel, dkv_reduce_kernel, token_dq_kernel, union_dq_kernel
from ssa.ops.sparse.triton_forward import token_forward_kernel, union_forward_kernel
from ssa.ops.sparse.triton_index import ReaderIndex, reader_index
from ssa.ops.sparse.triton_union import union_kernel
from ssa.ops.triton_support import (
    LOG2E,
    Launch,
    Launcher,
    aligned,
    can_overlap,
    ceil_div,
    fork,
    layout_of,
    next_power_of_two,
    on_device,
    rows,
    small_shared_memory,
)

MASKED = -(2.0**40)  # exponent of a key that a row does not read
LARGE_INDEX = 1 << 18  # entries of the selection from which the inverted index is built beside dq
LIST_PADDING = 8  # union entries that nobody reads; at least columns / 16 of every union launch


class Tile(NamedTuple):
    """Columns of a tile and how its kernel is launched."""

    columns: int
    how: Launch


class Readers(NamedTuple):
    """How dk and dv of groups of one size are computed: ``tokens`` x ``columns`` (keys) per step, keys as rows of the
    products or not."""

    tokens: int
    columns: int
    keys_first: bool
    how: Launch


class Strategy(NamedTuple):
    """How one shape runs; chosen by :func:`strategy`, measured in docs/kernels.md.

    ``tokens`` per union tile; a tile goes to the union kernels if the union of the tile before it has at most ``limit``
    blocks, else its tokens go to the token kernels. ``dkv``: for groups of 1, 2 and 4 blocks, and
    the ``cost`` of one reader of each.
    ``select``: mask blocks of the union by a choice per row and block (forward, dq). ``overlap``: launches of dk/dv.
    """

    tokens: int
    limit: int
    union_forward: Tile
    union_dq: Tile
    select: tuple[bool, bool]
    token_forward: Tile
    token_dq: Tile
    dkv: tuple[Readers, Readers, Readers]
    cost: tuple[int, ...]
    overlap: bool


@lru_cache(maxsize=256)
def strategy(H: int, K: int, D: int, S: int, slots: int, small: bool = False) -> Strategy:
    """The tiles of a shape, by rules that need no look at the data; ``small``: of a GPU with little shared memory.

    ``tokens`` must not depend on the GPU, since the sizes of the union lists follow from it.
    """
    GP, DP = next_power_of_two(H // K), max(16, next_power_of_two(D))
    tokens = min(32, max(1, 64 // GP), max(1, 4096 // next_power_of_two(slots)))
    M = tokens * GP
    warps = 8 if M >= 128 else 4
    narrow = M == 64 and DP == 64  # registers are capped so that one more program fits a multiprocessor
    wide = 64 if DP <= 64 or (DP <= 128 and not small) else 32
    token = Tile(32 if DP <= 128 else 16, Launch(1))
    columns = 64 if DP <= 128 else 16
    columns = max(16, columns // 2) if small else columns
    how = Launch(4, 3 if DP <= 64 and not small else 2)
    readers = Readers(max(1, (64 if DP <= 128 else 32) // GP), columns, False, how)
    fours = Readers(max(1, (64 if DP <= 64 else 32) // GP), 64, True, Launch(4, 3))
    return Strategy(
        tokens=tokens,
        limit=max(slots * 3 // 2, tokens * slots // 2),
        union_forward=Tile(32, Launch(warps, 3, 96 if narrow else 168 if M == 64 else None))
        if narrow or DP == 128
        else Tile(wide, Launch(warps)),
        union_dq=Tile(32, Launch(warps, 3, 96)) if narrow else Tile(wide, Launch(warps)),
        select=(DP <= 128, DP <= 64),
        token_forward=token,
        token_dq=token,
        dkv=(readers, readers, fours if DP <= 128 and not small else readers),
        cost=((16, 20, 29) if DP <= 64 else (16, 22, 32)) if S <= 32 else (16,),
        overlap=True,
    )


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int,
    layout: DocumentLayout,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`ssa.ops.sparse_attention`; returns output and log-sum-exp."""
    run = torch.ops.ssa.sparse_forward if torch.compiler.is_compiling() else _Sparse.apply
    out, lse, *_ = run(q, k, v, block_indices, layout.lengths, block_size, scale)
    return out, lse


@lru_cache(maxsize=64)
def _bitmap_rows(layout: DocumentLayout, S: int, device: str) -> tuple[Tensor, int]:
    """Bitmap words before each super-block of 4 blocks (int64 ``[supers + 1]``) and in all, for one KV head.

    A block's row has a bit for every token from its super-block's first to its document's last.
    """
    start = layout.block_grid(4 * S).block_start.long()[:-1]
    end = layout.cu_seqlens().long()[layout.document_ids().view(-1)[start] + 1]
    offset = torch.zeros(len(start) + 1, dtype=torch.int64)
    offset[1:] = (4 * ((end - start + 31) // 32)).cumsum(0)
    return offset.to(device), int(offset[-1])


def list_size(tokens: int, slots: int) -> int:
    """Room of one union list: every slot of every token (a power of two), and padding."""
    return tokens * next_power_of_two(slots) + LIST_PADDING


class _Shape(NamedTuple):
    """Sizes that every launch needs."""

    N: int
    H: int
    K: int
    D: int
    DP: int
    S: int
    G: int
    GP: int
    slots: int
    list_size: int  # entries of a union list
    c: float
    masked: float

    @classmethod
    def of(cls, q: Tensor, k: Tensor, indices: Tensor, S: int, scale: float, tokens: int) -> _Shape:
        B, T, H, D = q.shape
        return _shape(B * T, H, k.shape[2], D, S, indices.shape[3], scale, tokens)


@lru_cache(maxsize=256)
def _shape(N: int, H: int, K: int, D: int, S: int, slots: int, scale: float, tokens: int) -> _Shape:
    c = scale * LOG2E
    GP, DP = next_power_of_two(H // K), max(16, next_power_of_two(D))
    return _Shape(N, H, K, D, DP, S, H // K, GP, slots, list_size(tokens, slots), c, MASKED / c)


def _narrow(x: _Shape, strides: tuple[int, ...]) -> bool:
    """Whether offsets in units of 8 elements fit in 32 bits."""
    return x.N * max(8 * x.H, *strides[::2]) < 1 << 34


def _forward(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,  # [B, T, K, D]
    v: Tensor,
    indices: Tensor,  # [B, T, K, slots]
    lengths: Sequence[int],
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, log-sum-exp, and the union lists: rows, masks ``[tiles, K, list]`` and counts ``[2, tiles + 1, K]``."""
    small = small_shared_memory(q.device.index)
    plan = strategy(q.shape[2], k.shape[2], q.shape[3], block_size, indices.shape[3], small)
    x = _Shape.of(q, k, indices, block_size, scale, plan.tokens)
    (q, q_strides), (k, k_strides), (v, v_strides), indices = rows(q), rows(k), rows(v), aligned(indices)
    strides = (*q_strides, *k_strides, *v_strides)
    narrow = _narrow(x, strides)
    launch = Launcher(q.device, q.dtype, indices.dtype, x.H, x.K, x.slots, plan.limit, strides)
    layout = layout_of(tuple(lengths), *q.shape[:2])
    starts, tile_start = layout.starts(q.device), layout.block_grid(plan.tokens, q.device).block_start
    tiles = tile_start.numel() - 1
    union_row = torch.empty(tiles, x.K, x.list_size, dtype=torch.int32, device=q.device)
    union_mask = torch.empty_like(union_row)
    union_count = torch.empty(2, tiles + 1, x.K, dtype=torch.int32, device=q.device)
    arguments: tuple[Any, ...] = (indices, union_row, union_mask, union_count, tile_start, starts, x.K, x.slots)
    constants: tuple[Any, ...] = (x.S, plan.tokens, next_power_of_two(x.slots), LIST_PADDING)
    launch(union_kernel, (tiles, x.K, 1), arguments, constants, Launch(min(8, max(1, x.list_size // 256))))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    tile = plan.union_forward
    arguments = (
        q, k, v, out, lse, union_row, union_mask, union_count, tile_start, *strides, x.H, x.K, x.c, x.masked,
        plan.limit,
    )  # fmt: skip
    select = plan.select[0] and tile.columns <= 4 * x.S
    constants = (x.D, x.DP, x.S, x.G, x.GP, plan.tokens, x.list_size, tile.columns, select, narrow)
    launch(union_forward_kernel, (tiles, x.K, 1), arguments, constants, tile.how)
    tile = plan.token_forward
    arguments = (
        q, k, v, out, lse, indices, starts, union_count, tile_start, *strides, x.H, x.K, x.slots, x.c, x.masked,
        plan.limit,
    )  # fmt: skip
    constants = (x.D, x.DP, x.S, x.G, max(16, x.GP), tile.columns)
    launch(token_forward_kernel, (tiles, x.K, 1), arguments, constants, tile.how)
    return out, lse, union_row, union_mask, union_count


def _keys_and_values(
    launch: Launcher,
    plan: Strategy,
    x: _Shape,
    grid: BlockGrid,
    index: ReaderIndex,
    read: tuple[Tensor, ...],  # q, k, v, d_out, lse, delta
    strides: tuple[int, ...],
    written: tuple[Tensor, ...],  # dk, dv, and what is added to them
    plus: bool,
) -> None:
    """dk and dv through the inverted index."""
    device = read[0].device
    super_start, supers = grid.block_start, grid.num_blocks
    part_rows = index.units * x.S
    part = torch.empty(2, part_rows, x.DP, dtype=torch.float32, device=device)
    arguments: tuple[Any, ...] = (
        *read, index.entry, index.work, index.work_offset, super_start, part, *strides, x.H, x.K, supers, part_rows, x.c
    )  # fmt: skip
    levels, narrow = len(index.most_works), _narrow(x, strides)
    overlap = plan.overlap and can_overlap(device.index)
    for level in reversed(range(levels)):
        tokens, columns, keys_first, how = plan.dkv[level]
        key_rows = min(x.S << level, columns)
        constants = (x.D, x.DP, x.S, x.G, x.GP, level, key_rows, tokens, keys_first, narrow, overlap)
        programs = (index.most_works[level], (x.S << level) // key_rows, 1)
        launch(dkv_kernel, programs, arguments, constants, how._replace(overlap=overlap and level < levels - 1))
    arguments = (part, index.work_offset, index.level, super_start, *written, x.K, supers, part_rows)
    launch(dkv_reduce_kernel, (supers, x.K, 4), arguments, (x.D, x.DP, x.S, plus), Launch(4))


def _backward(
    d_out: Tensor,  # [B, T, H, D]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    out: Tensor,
    lse: Tensor,
    union_row: Tensor,
    union_mask: Tensor,
    union_count: Tensor,
    lengths: Sequence[int],
    block_size: int,
    scale: float,
    plus_q: Tensor | None = None,  # added to dq, dk, dv in float32: all three or none
    plus_k: Tensor | None = None,
    plus_v: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v, contiguous."""
    plus = plus_q is not None
    small = small_shared_memory(q.device.index)
    plan = strategy(q.shape[2], k.shape[2], q.shape[3], block_size, indices.shape[3], small)
    x = _Shape.of(q, k, indices, block_size, scale, plan.tokens)
    dq, dk, dv = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (q, k, v))
    (q, q_strides), (k, k_strides), (v, v_strides), (d_out, d_strides) = rows(q), rows(k), rows(v), rows(d_out)
    indices = aligned(indices)
    strides = (*q_strides, *k_strides, *v_strides, *d_strides)
    launch = Launcher(q.device, q.dtype, indices.dtype, x.H, x.K, x.slots, plan.limit, strides)
    delta = torch.empty_like(lse)
    layout = layout_of(tuple(lengths), *q.shape[:2])
    starts, tile_start = layout.starts(q.device), layout.block_grid(plan.tokens, q.device).block_start
    tiles = tile_start.numel() - 1
    beside = fork(q.device) if indices.numel() >= LARGE_INDEX else None
    grid = layout.block_grid(4 * x.S, q.device)
    bitmap_rows = _bitmap_rows(layout, x.S, str(q.device))
    with torch.cuda.stream(beside):  # of small kernels, which leave the GPU room for those of dq
        readers = indices.view(x.N, x.K, x.slots)
        index = reader_index(readers, grid.first_block, grid.block_start, *bitmap_rows, plan.cost)
    dq_plus, dk_plus, dv_plus = (y if x is None else aligned(x) for x, y in ((plus_q, dq), (plus_k, dk), (plus_v, dv)))
    tensors: tuple[Any, ...] = (q, k, v, d_out, out, lse, delta, dq, dq_plus)
    tile = plan.union_dq
    arguments: tuple[Any, ...] = (
        *tensors, union_row, union_mask, union_count, tile_start, *strides, x.H, x.K, x.c, x.masked, plan.limit
    )  # fmt: skip
    select = plan.select[1] and tile.columns <= 4 * x.S
    constants: tuple[Any, ...] = (
        x.D, x.DP, x.S, x.G, x.GP, plan.tokens, x.list_size, tile.columns, select, _narrow(x, strides), plus
    )  # fmt: skip
    launch(union_dq_kernel, (tiles, x.K, 1), arguments, constants, tile.how)
    tile = plan.token_dq
    arguments = (*tensors, indices, starts, union_count, tile_start, *strides, x.H, x.K, x.slots, x.c, plan.limit)
    constants = (x.D, x.DP, x.S, x.G, max(16, x.GP), tile.columns, plus)
    launch(token_dq_kernel, (tiles, x.K, 1), arguments, constants, tile.how)
    read = (q, k, v, d_out, lse, delta)
    if beside is not None:
        torch.cuda.current_stream(q.device).wait_stream(beside)
    _keys_and_values(launch, plan, x, grid, index, read, strides, (dk, dv, dk_plus, dv_plus), plus)
    return dq, dk, dv


def _forward_on_its_device(q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    with on_device(q):
        return _forward(q, *rest)


def _backward_on_its_device(d_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    with on_device(d_out):
        return _backward(d_out, *rest)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, lengths: Sequence[int], block_size: int, scale: float
) -> tuple[Tensor, ...]:
    H, K, D, slots = int(q.shape[2]), int(k.shape[2]), int(q.shape[3]), int(indices.shape[3])
    tokens = strategy(H, K, D, int(block_size), slots).tokens
    tiles = sum(ceil_div(n, tokens) for n in lengths)
    union_row, union_mask = (q.new_empty(tiles, K, list_size(tokens, slots), dtype=torch.int32) for _ in range(2))
    count = q.new_empty(2, tiles + 1, K, dtype=torch.int32)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32), union_row, union_mask, count


def _backward_fake(d_out, q, k, v, *_rest):  # type: ignore[no-untyped-def]
    return tuple(torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, indices, *arguments = inputs
    ctx.save_for_backward(q, k, v, indices, *output)
    ctx.arguments = arguments
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    rest = (None,) * 4
    if d_out is None:
        return None, None, None, *rest
    return *torch.ops.ssa.sparse_backward(d_out, *ctx.saved_tensors, *ctx.arguments), *rest


class _Sparse(torch.autograd.Function):
    """What PyTorch's registered gradient does, for eager mode at a third of its host time."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = torch.ops.ssa.sparse_forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_gradients)


LIBRARY = torch.library.Library("ssa", "FRAGMENT")  # cheaper per call than `custom_op`
LIBRARY.define(
    "sparse_forward(Tensor q, Tensor k, Tensor v, Tensor indices, int[] lengths, int block_size, float scale) "
    "-> (Tensor out, Tensor lse, Tensor union_row, Tensor union_mask, Tensor union_count)"
)
LIBRARY.define(
    "sparse_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor indices, Tensor out, Tensor lse, "
    "Tensor union_row, Tensor union_mask, Tensor union_count, int[] lengths, int block_size, float scale, "
    "Tensor? plus_q=None, Tensor? plus_k=None, Tensor? plus_v=None) "
    "-> (Tensor dq, Tensor dk, Tensor dv)"
)
LIBRARY.impl("sparse_forward", _forward_on_its_device, "CompositeExplicitAutograd")
LIBRARY.impl("sparse_backward", _backward_on_its_device, "CompositeExplicitAutograd")
torch.library.register_fake("ssa::sparse_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("ssa::sparse_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd("ssa::sparse_forward", _gradients, setup_context=_setup_context, lib=LIBRARY)
