"""Block-sparse attention on the GPU: launches, custom operations with autograd, and the choice of tiles.

``ssa::sparse_forward`` and ``ssa::sparse_backward`` take and return tensors and numbers, so that ``torch.compile``,
activation checkpointing and FSDP see them as single operations. In the operation of both streams the backward pass is
``ssa::sparse_begin`` and ``ssa::sparse_finish``, and the full stream's stands between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.ops.sparse.triton_backward import dkv_kernel, dkv_reduce_kernel, token_dq_kernel, union_dq_kernel
from ssa.ops.sparse.triton_forward import token_forward_kernel, union_forward_kernel
from ssa.ops.sparse.triton_index import ReaderIndex, index_sizes, reader_index
from ssa.ops.sparse.triton_union import union_kernel
from ssa.ops.triton_support import (
    LOG2E,
    Launch,
    Launcher,
    aligned,
    beside,
    can_overlap,
    ceil_div,
    join,
    layout_of,
    next_power_of_two,
    on_device,
    rows,
    small_shared_memory,
)

MASKED = -(2.0**40)  # exponent of a key that a row does not read
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
    ``select``: mask blocks of the union by a choice per row and block (forward, dq). ``overlap``: launches of dk/dv,
    and of tokens with unions.
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


def _overlaps(plan: Strategy, device: torch.device) -> bool:
    """Whether a kernel that needs nothing of the one ahead of it begins in that one's tail."""
    return plan.overlap and can_overlap(device.index)


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
    tile, overlap = plan.union_forward, _overlaps(plan, q.device)
    arguments = (
        q, k, v, out, lse, union_row, union_mask, union_count, tile_start, *strides, x.H, x.K, x.c, x.masked,
        plan.limit,
    )  # fmt: skip
    select = plan.select[0] and tile.columns <= 4 * x.S
    constants = (x.D, x.DP, x.S, x.G, x.GP, plan.tokens, x.list_size, tile.columns, select, narrow, overlap)
    launch(union_forward_kernel, (tiles, x.K, 1), arguments, constants, tile.how)
    tile = plan.token_forward
    arguments = (
        q, k, v, out, lse, indices, starts, union_count, tile_start, *strides, x.H, x.K, x.slots, x.c, x.masked,
        plan.limit,
    )  # fmt: skip
    constants = (x.D, x.DP, x.S, x.G, max(16, x.GP), tile.columns, overlap)
    launch(token_forward_kernel, (tiles, x.K, 1), arguments, constants, tile.how._replace(overlap=overlap))
    return out, lse, union_row, union_mask, union_count


class _Call(NamedTuple):
    """A backward pass: what all its parts read."""

    plan: Strategy
    x: _Shape
    layout: DocumentLayout
    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    indices: Tensor
    strides: tuple[int, ...]

    @classmethod
    def of(
        cls, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, indices: Tensor, lengths: Sequence[int], S: int,
        scale: float,
    ) -> _Call:  # fmt: skip
        small = small_shared_memory(q.device.index)
        plan = strategy(q.shape[2], k.shape[2], q.shape[3], S, indices.shape[3], small)
        x = _Shape.of(q, k, indices, S, scale, plan.tokens)
        layout = layout_of(tuple(lengths), *q.shape[:2])
        (q, q_strides), (k, k_strides), (v, v_strides), (d_out, d_strides) = rows(q), rows(k), rows(v), rows(d_out)
        strides = (*q_strides, *k_strides, *v_strides, *d_strides)
        return cls(plan, x, layout, q, k, v, d_out, aligned(indices), strides)

    def launcher(self) -> Launcher:
        """Of the current stream."""
        x = self.x
        return Launcher(
            self.q.device, self.q.dtype, self.indices.dtype, x.H, x.K, x.slots, self.plan.limit, self.strides
        )

    def readers(self) -> ReaderIndex:
        """Who reads which block."""
        x, grid = self.x, self.layout.block_grid(4 * self.x.S, self.q.device)
        words = _bitmap_rows(self.layout, x.S, str(self.q.device))
        indices = self.indices.view(x.N, x.K, x.slots)
        return reader_index(indices, grid.first_block, grid.block_start, *words, self.plan.cost)


def _queries(
    call: _Call, out: Tensor, lse: Tensor, union_row: Tensor, union_mask: Tensor, union_count: Tensor,
    known: Tensor | None, plus_q: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq, and delta, unless it is ``known``: the sums of out times d_out over D. Joins what runs beside."""
    plan, x, launch = call.plan, call.x, call.launcher()
    dq = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    delta = torch.empty_like(lse) if known is None else known
    starts, tile_start = call.layout.starts(dq.device), call.layout.block_grid(plan.tokens, dq.device).block_start
    tiles, plus = tile_start.numel() - 1, plus_q is not None
    dq_plus = dq if plus_q is None else aligned(plus_q)
    tensors: tuple[Any, ...] = (call.q, call.k, call.v, call.d_out, out, lse, delta, dq, dq_plus)
    tile, overlap = plan.union_dq, _overlaps(plan, dq.device)
    arguments: tuple[Any, ...] = (
        *tensors, union_row, union_mask, union_count, tile_start, *call.strides, x.H, x.K, x.c, x.masked, plan.limit
    )  # fmt: skip
    select = plan.select[1] and tile.columns <= 4 * x.S
    constants: tuple[Any, ...] = (
        x.D, x.DP, x.S, x.G, x.GP, plan.tokens, x.list_size, tile.columns, select, _narrow(x, call.strides), plus,
        known is not None, overlap,
    )  # fmt: skip
    launch(union_dq_kernel, (tiles, x.K, 1), arguments, constants, tile.how)
    tile = plan.token_dq
    arguments = (
        *tensors, call.indices, starts, union_count, tile_start, *call.strides, x.H, x.K, x.slots, x.c, plan.limit
    )  # fmt: skip
    constants = (x.D, x.DP, x.S, x.G, max(16, x.GP), tile.columns, plus, known is not None, overlap)
    launch(token_dq_kernel, (tiles, x.K, 1), arguments, constants, tile.how._replace(overlap=overlap))
    join(dq.device, x.N * x.K)
    return dq, delta


def _key_parts(call: _Call, index: ReaderIndex, lse: Tensor, delta: Tensor) -> Tensor:
    """dk and dv of the index's work items ``[2, rows, DP]``, float32."""
    plan, x, launch, device = call.plan, call.x, call.launcher(), call.q.device
    super_start = call.layout.block_grid(4 * x.S, device).block_start
    part_rows = index.units * x.S
    part = torch.empty(2, part_rows, x.DP, dtype=torch.float32, device=device)
    arguments: tuple[Any, ...] = (
        call.q, call.k, call.v, call.d_out, lse, delta, index.entry, index.work, index.work_offset, super_start, part,
        *call.strides, x.H, x.K, super_start.numel() - 1, part_rows, x.c,
    )  # fmt: skip
    levels, narrow = len(index.most_works), _narrow(x, call.strides)
    overlap = _overlaps(plan, device)
    for level in reversed(range(levels)):
        tokens, columns, keys_first, how = plan.dkv[level]
        key_rows = min(x.S << level, columns)
        constants = (x.D, x.DP, x.S, x.G, x.GP, level, key_rows, tokens, keys_first, narrow, overlap)
        programs = (index.most_works[level], (x.S << level) // key_rows, 1)
        launch(dkv_kernel, programs, arguments, constants, how._replace(overlap=overlap and level < levels - 1))
    return part


def _keys_and_values(
    call: _Call, part: Tensor, work_offset: Tensor, level: Tensor, plus_k: Tensor | None, plus_v: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dk and dv: the sums of their parts."""
    x, super_start = call.x, call.layout.block_grid(4 * call.x.S, call.q.device).block_start
    dk, dv = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (call.k, call.v))
    dk_plus, dv_plus = (y if z is None else aligned(z) for y, z in ((dk, plus_k), (dv, plus_v)))
    supers = super_start.numel() - 1
    arguments = (part, work_offset, level, super_start, dk, dv, dk_plus, dv_plus, x.K, supers, part.shape[1])
    constants = (x.D, x.DP, x.S, plus_k is not None)
    call.launcher()(dkv_reduce_kernel, (supers, x.K, 4), arguments, constants, Launch(4))
    return dk, dv


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
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v, contiguous."""
    call = _Call.of(d_out, q, k, v, indices, lengths, block_size, scale)
    index = beside(q.device, call.x.N * call.x.K, call.readers)  # small kernels, which leave room for those of dq
    dq, delta = _queries(call, out, lse, union_row, union_mask, union_count, None, None)
    part = _key_parts(call, index, lse, delta)
    return dq, *_keys_and_values(call, part, index.work_offset, index.level, None, None)


def _begin(
    d_out: Tensor,
    delta: Tensor,  # [B, T, H] float32: sums of out times d_out over D
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What of dk and dv needs nothing else, beside what comes next: the parts, and where those of a block begin."""

    def run() -> tuple[Tensor, Tensor, Tensor]:
        call = _Call.of(d_out, q, k, v, indices, lengths, block_size, scale)
        index = call.readers()
        return _key_parts(call, index, lse, delta), index.work_offset, index.level

    return beside(q.device, math.prod(indices.shape[:3]), run)


def _finish(
    d_out: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    out: Tensor,
    lse: Tensor,
    union_row: Tensor,
    union_mask: Tensor,
    union_count: Tensor,
    part: Tensor,
    work_offset: Tensor,
    level: Tensor,
    lengths: Sequence[int],
    block_size: int,
    scale: float,
    plus_q: Tensor | None = None,  # added to dq, dk, dv in float32: all three or none
    plus_k: Tensor | None = None,
    plus_v: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, the latter two of what `_begin` returned."""
    call = _Call.of(d_out, q, k, v, indices, lengths, block_size, scale)
    dq, _ = _queries(call, out, lse, union_row, union_mask, union_count, delta, plus_q)
    return dq, *_keys_and_values(call, part, work_offset, level, plus_k, plus_v)


def _on_its_device(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    @wraps(function)
    def run(first: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        with on_device(first):
            return function(first, *rest)

    return run


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


def _gradients_fake(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (q, k, v))


def _begin_fake(d_out, delta, q, k, v, indices, lse, lengths, S, scale):  # type: ignore[no-untyped-def]
    K = int(k.shape[2])
    begins = [(n, begin) for n in lengths for begin in range(0, n, 4 * S)]  # of super-blocks; as :func:`_bitmap_rows`
    supers, words = len(begins), sum(4 * ceil_div(n - begin, 32) for n, begin in begins)
    plan = strategy(int(q.shape[2]), K, int(q.shape[3]), int(S), int(indices.shape[3]))
    sizes = index_sizes(indices.numel(), K * supers, K * words, plan.cost)
    integers = lambda n: q.new_empty(n, dtype=torch.int32)  # noqa: E731
    part = q.new_empty(2, sizes.units * S, max(16, next_power_of_two(int(q.shape[3]))), dtype=torch.float32)
    return part, integers(7 * K * supers + 1), integers(K * supers)


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
_READ = "Tensor q, Tensor k, Tensor v, Tensor indices"
_SAVED = "Tensor out, Tensor lse, Tensor union_row, Tensor union_mask, Tensor union_count"
_NUMBERS = "int[] lengths, int block_size, float scale"
_PARTS = "Tensor part, Tensor work_offset, Tensor level"
_PLUS = "Tensor? plus_q=None, Tensor? plus_k=None, Tensor? plus_v=None"
LIBRARY.define(f"sparse_forward({_READ}, {_NUMBERS}) -> ({_SAVED})")
LIBRARY.define(f"sparse_backward(Tensor d_out, {_READ}, {_SAVED}, {_NUMBERS}) -> (Tensor dq, Tensor dk, Tensor dv)")
LIBRARY.define(f"sparse_begin(Tensor d_out, Tensor delta, {_READ}, Tensor lse, {_NUMBERS}) -> ({_PARTS})")
LIBRARY.define(
    f"sparse_finish(Tensor d_out, Tensor delta, {_READ}, {_SAVED}, {_PARTS}, {_NUMBERS}, {_PLUS}) "
    "-> (Tensor dq, Tensor dk, Tensor dv)"
)
for _name, _function, _fake in (
    ("sparse_forward", _forward, _forward_fake),
    ("sparse_backward", _backward, lambda d_out, q, k, v, *_: _gradients_fake(q, k, v)),
    ("sparse_begin", _begin, _begin_fake),
    ("sparse_finish", _finish, lambda d_out, delta, q, k, v, *_: _gradients_fake(q, k, v)),
):
    LIBRARY.impl(_name, _on_its_device(_function), "CompositeExplicitAutograd")
    torch.library.register_fake(f"ssa::{_name}", _fake, lib=LIBRARY)
torch.library.register_autograd("ssa::sparse_forward", _gradients, setup_context=_setup_context, lib=LIBRARY)
