"""Block-sparse attention on the GPU: launches, custom operations with autograd, and the choice of tiles.

``ssa::sparse_forward`` and ``ssa::sparse_backward`` take and return tensors only, so that ``torch.compile``,
activation checkpointing and FSDP see them as single operations.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.ops.sparse.triton_backward import dkv_kernel, dkv_reduce_kernel, token_dq_kernel, union_dq_kernel
from ssa.ops.sparse.triton_forward import token_forward_kernel, union_forward_kernel
from ssa.ops.sparse.triton_index import reader_index
from ssa.ops.sparse.triton_union import union_kernel
from ssa.ops.triton_support import LOG2E, flat, next_power_of_two

MASKED = -(2.0**40)  # exponent of a key that a row does not read
LIST_PADDING = 8  # union entries that nobody reads; at least columns / 16 of every union launch


class Launch(NamedTuple):
    """Columns of a tile, warps, pipeline stages, most registers per thread (None: the compiler's choice)."""

    columns: int
    warps: int
    stages: int
    registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        """Keywords of a kernel's launch."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


class Strategy(NamedTuple):
    """How one shape runs; chosen by :func:`strategy`, measured in docs/kernels.md.

    ``tokens`` per union tile; a tile goes to the union kernels if its union has at most ``limit`` blocks, else its
    tokens go to the token kernels. ``readers``: tokens per step of dk/dv; ``key_rows``: key rows per program.
    """

    tokens: int
    limit: int
    union_forward: Launch
    union_dq: Launch
    token_forward: Launch
    token_dq: Launch
    readers: int
    dkv: Launch
    merge: bool


def strategy(H: int, K: int, D: int, S: int, slots: int) -> Strategy:
    """The tiles of a shape, by rules that need no look at the data."""
    GP, DP = next_power_of_two(H // K), max(16, next_power_of_two(D))
    rows = 64
    tokens = min(32, max(1, rows // GP), max(1, 4096 // next_power_of_two(slots)))
    warps = 8 if tokens * GP >= 128 else 4
    wide = 64 if DP <= 128 else 32
    narrow = 32 if DP <= 128 else 16
    readers = max(1, (128 if DP <= 64 else 64 if DP <= 128 else 32) // GP)
    return Strategy(
        tokens=tokens,
        limit=tokens * slots * 5 // 8,
        union_forward=Launch(wide, warps, 2),
        union_dq=Launch(wide, warps, 2),
        token_forward=Launch(narrow, 1 if DP <= 64 else 2, 2),
        token_dq=Launch(narrow, 1 if DP <= 64 else 2, 2),
        readers=readers,
        dkv=Launch(64 if DP <= 64 else 32 if DP <= 128 else 16, 4, 2),
        merge=S <= 32,
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
    H, K, D, device = q.shape[2], k.shape[2], q.shape[3], q.device
    plan = strategy(H, K, D, block_size, block_indices.shape[3])
    tiles, supers = layout.block_grid(plan.tokens, device), layout.block_grid(4 * block_size, device)
    word_offset, words = _bitmap_rows(layout, block_size, str(device))
    out, lse, *_ = _sparse_forward(
        q,
        k,
        v,
        block_indices,
        layout.starts(device),
        tiles.block_start,
        supers.block_start,
        supers.first_block,
        word_offset,
        words,
        block_size,
        scale,
    )
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
        K, slots = k.shape[2], indices.shape[3]
        c = scale * LOG2E
        GP, DP = next_power_of_two(H // K), max(16, next_power_of_two(D))
        size = list_size(tokens, slots)
        return cls(B * T, H, K, D, DP, S, H // K, GP, slots, size, c, MASKED / c)


def _strides(*xs: Tensor) -> list[int]:
    return [stride for x in xs for stride in x.stride()[:2]]


@torch.library.custom_op("ssa::sparse_forward", mutates_args=())
def _sparse_forward(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,  # [B, T, K, D]
    v: Tensor,
    indices: Tensor,  # [B, T, K, slots]
    starts: Tensor,  # [B, T]
    tile_start: Tensor,  # [tiles + 1]
    super_start: Tensor,  # [supers + 1]; this and the next three are for the backward pass
    super_of_document: Tensor,  # [N]
    word_offset: Tensor,  # [supers + 1]
    words: int,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, log-sum-exp, and the union lists: rows, masks ``[tiles, K, list]`` and counts ``[tiles, K]``."""
    plan = strategy(q.shape[2], k.shape[2], q.shape[3], block_size, indices.shape[3])
    x = _Shape.of(q, k, indices, block_size, scale, plan.tokens)
    q_, k_, v_, indices = flat(q), flat(k), flat(v), indices.contiguous()
    tiles = tile_start.numel() - 1
    union_row = torch.empty(tiles, x.K, x.list_size, dtype=torch.int32, device=q.device)
    union_mask, union_count = torch.empty_like(union_row), union_row.new_empty(tiles, x.K)
    union_kernel[(tiles, x.K)](
        indices, union_row, union_mask, union_count, tile_start, starts, x.K, x.slots,
        x.S, plan.tokens, next_power_of_two(x.slots), LIST_PADDING, num_warps=min(8, max(1, x.list_size // 256)),
    )  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    launch = plan.union_forward
    union_forward_kernel[(tiles, x.K)](
        q_, k_, v_, out, lse, union_row, union_mask, union_count, tile_start, *_strides(q_, k_, v_), x.H, x.K,
        x.c, x.masked, plan.limit, x.D, x.DP, x.S, x.G, x.GP, plan.tokens, x.list_size, launch.columns,
        **launch.options,
    )  # fmt: skip
    launch = plan.token_forward
    token_forward_kernel[(tiles, x.K)](
        q_, k_, v_, out, lse, indices, starts, union_count, tile_start, *_strides(q_, k_, v_), x.H, x.K,
        x.slots, x.c, x.masked, plan.limit, x.D, x.DP, x.S, x.G, max(16, x.GP), launch.columns,
        **launch.options,
    )  # fmt: skip
    return out, lse, union_row, union_mask, union_count


@_sparse_forward.register_fake
def _(  # type: ignore[no-untyped-def]
    q, k, v, indices, starts, tile_start, super_start, super_of_document, word_offset, words, block_size, scale
):  # fmt: skip
    H, K, slots = q.shape[2], k.shape[2], indices.shape[3]
    plan = strategy(H, K, q.shape[3], block_size, slots)
    shape = (tile_start.shape[0] - 1, K, list_size(plan.tokens, slots))
    lists = [q.new_empty(shape, dtype=torch.int32), q.new_empty(shape, dtype=torch.int32)]
    count = q.new_empty(shape[:2], dtype=torch.int32)
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        *lists,
        count,
    )


@torch.library.custom_op("ssa::sparse_backward", mutates_args=())
def _sparse_backward(
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
    starts: Tensor,
    tile_start: Tensor,
    super_start: Tensor,
    super_of_document: Tensor,
    word_offset: Tensor,
    words: int,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v, contiguous."""
    plan = strategy(q.shape[2], k.shape[2], q.shape[3], block_size, indices.shape[3])
    x = _Shape.of(q, k, indices, block_size, scale, plan.tokens)
    q_, k_, v_, do_, indices = flat(q), flat(k), flat(v), flat(d_out), indices.contiguous()
    strides = _strides(q_, k_, v_, do_)
    delta = torch.empty_like(lse)
    dq, dk, dv = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (q, k, v))
    launch = plan.union_dq
    union_dq_kernel[(tile_start.numel() - 1, x.K)](
        q_, k_, v_, do_, out, lse, delta, dq, union_row, union_mask, union_count, tile_start, *strides, x.H, x.K,
        x.c, x.masked, plan.limit, x.D, x.DP, x.S, x.G, x.GP, plan.tokens, x.list_size, launch.columns,
        **launch.options,
    )  # fmt: skip
    launch = plan.token_dq
    token_dq_kernel[(tile_start.numel() - 1, x.K)](
        q_, k_, v_, do_, out, lse, delta, dq, indices, starts, union_count, tile_start, *strides, x.H, x.K,
        x.slots, x.c, plan.limit, x.D, x.DP, x.S, x.G, max(16, x.GP), launch.columns,
        **launch.options,
    )  # fmt: skip
    supers = super_start.numel() - 1
    index = reader_index(
        indices.view(x.N, x.K, x.slots), super_of_document, super_start, word_offset, words, plan.merge
    )
    part_rows = index.units * x.S
    part = torch.empty(2, part_rows, x.DP, dtype=torch.float32, device=q.device)
    launch = plan.dkv
    for level, most_works in enumerate(index.most_works):
        key_rows = min(x.S << level, launch.columns)
        dkv_kernel[(most_works, (x.S << level) // key_rows)](
            q_, k_, v_, do_, lse, delta, index.entry, index.work, index.work_offset, super_start, part, *strides,
            x.H, x.K, supers, part_rows, x.c, x.D, x.DP, x.S, x.G, x.GP, 1 << level, key_rows, plan.readers,
            **launch.options,
        )  # fmt: skip
    dkv_reduce_kernel[(supers, x.K, 4)](
        part, index.work_offset, index.level, super_start, dk, dv, x.K, supers, part_rows, x.D, x.DP, x.S, num_warps=4
    )
    return dq, dk, dv


@_sparse_backward.register_fake
def _(d_out, q, k, v, *_rest):  # type: ignore[no-untyped-def]
    return tuple(torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, words, block_size, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.arguments = words, block_size, scale
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    rest = (None,) * 9
    if d_out is None:
        return None, None, None, *rest
    q, k, v, indices, *layout, out, lse, union_row, union_mask, union_count = ctx.saved_tensors
    gradients = _sparse_backward(
        d_out, q, k, v, indices, out, lse, union_row, union_mask, union_count, *layout, *ctx.arguments
    )
    return *gradients, *rest


_sparse_forward.register_autograd(_backward, setup_context=_setup_context)
