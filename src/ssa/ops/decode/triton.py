"""Decoding on the GPU: launches of :mod:`ssa.ops.decode.triton_kernels` as custom operations.

Everything that a launch needs follows from shapes and capacities, never from the lengths on the device, so nothing
waits for the device and a CUDA graph of a step stays right for other lengths.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ssa.ops.decode.triton_kernels import (
    attend_kernel,
    combine_kernel,
    pool_new_kernel,
    score_kernel,
    select_kernel,
    sum_kernel,
)
from ssa.ops.spec import SparseSpec
from ssa.ops.triton_support import LOG2E, capability, ceil_div, is_interpreted, next_power_of_two

WORK_ELEMENTS = 1 << 26  # float32 logits held at a time: 256 MiB; longer chunks of new tokens go in slabs
WIDTH = 128  # scores of a row are a multiple of it
FUSED_KEYS = 512  # budgets up to so many keys are attended by the program that selected them
TILE_BYTES = 16384  # of one tile of keys
SELECT_BYTES = 32768  # of a tile of keys in select_kernel
DEPENDENT_LAUNCH = True  # where compute capability and Triton allow it
DEPENDENT_SELECTION = 1  # in the selection; see _dependent


class _Selection(NamedTuple):
    """Launch of the selection kernels."""

    DP: int
    GP: int
    M: int
    BN: int  # pooled keys per tile
    BK: int  # keys per tile of the attention that follows
    splits: int
    width: int  # NC
    chunk: int  # CS
    chunks: int  # NCH
    KP: int
    slab: int  # rows at a time
    parts: int  # programs of a row that sum over the heads


class _Attention(NamedTuple):
    """Launch of the attention over split keys."""

    DP: int
    GP: int
    M: int
    TT: int
    BN: int
    splits: int


@cache
def _processors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count if torch.cuda.is_available() else 4


@cache
def _dependent(index: int | None, when: int = 2) -> tuple[int, dict[str, Any]]:
    """PDL of the kernels, and launch options, of programmatic dependent launch: 0 and none where it is not available.

    ``when`` the next kernel may be brought in: 0 in turn, 1 at the end of a kernel, 2 from its begin on.
    """
    available = torch.cuda.is_available() and capability(index)[0] >= 9 and not is_interpreted()
    gdc = getattr(getattr(tl.extra, "cuda", None), "gdc_wait", None)
    return (when, {"launch_pdl": True}) if when and DEPENDENT_LAUNCH and available and gdc is not None else (0, {})


def _tile(DP: int, itemsize: int, least: int) -> int:
    return min(128, max(least, TILE_BYTES // (DP * itemsize)))


@lru_cache(maxsize=256)
def _selection(
    B: int, N: int, H: int, K: int, D: int, P: int, itemsize: int, spec: SparseSpec, index: int | None
) -> _Selection:
    DP, GP = max(16, next_power_of_two(D)), next_power_of_two(H // K)
    BN = min(_tile(DP, itemsize, 32), max(32, next_power_of_two(P)))
    official = spec.rule == "official"
    width = ceil_div(P, WIDTH) * WIDTH
    chunk = 8 if width <= 512 else 16 if width <= 4096 else 32
    free = spec.num_blocks - spec.first_blocks - spec.local_blocks
    if official:
        chunk, free = min(chunk, spec.block_size), min(spec.block_size // 2, spec.num_blocks)
    KP = max(next_power_of_two(free), spec.block_size // chunk if official else 1)
    slab = max(1, min(B * N, WORK_ELEMENTS // (H * width)))
    rows, processors, tiles = slab * K, _processors(index), width // BN
    splits = max(1, min(tiles, 4 * processors // rows, 1024 // GP))
    parts = max(1, min(tiles, 8 * processors // rows))
    chunks, BK = max(4, next_power_of_two(width // chunk)), SELECT_BYTES // (DP * itemsize)
    return _Selection(DP, GP, max(16, GP), BN, BK, splits, width, chunk, chunks, KP, slab, parts)


@lru_cache(maxsize=256)
def _attention(
    B: int, N: int, H: int, K: int, D: int, keys: int, itemsize: int, listed: bool, index: int | None
) -> _Attention:
    DP, GP = max(16, next_power_of_two(D)), next_power_of_two(H // K)
    TT = 1 if listed else min(next_power_of_two(N), max(1, 64 // GP))
    BN = _tile(DP, itemsize, 16)
    groups = B * ceil_div(N, TT) * K
    least = FUSED_KEYS if listed else BN  # keys worth a second launch
    splits = max(1, min(ceil_div(keys, least), 2 * _processors(index) // groups, 512))
    return _Attention(DP, GP, max(16, TT * GP), TT, BN, splits)


def forget_launches() -> None:
    """The constants of this module have changed."""
    for remembered in (_dependent, _selection, _attention):
        remembered.cache_clear()


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _select(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    spec: SparseSpec,
    scale: float,
    attend: bool,
    update: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks ``[B, N, K, k]``; with ``attend`` also output and lse instead (else empty tensors)."""
    B, N, H, D = q.shape
    K, P, device = pooled.shape[2], pooled.shape[1], q.device
    G, c, S, k_blocks = H // K, scale * LOG2E, spec.block_size, spec.num_blocks
    q, pooled, k, v = _dense(q), _dense(pooled), _dense(k), _dense(v)
    x = _selection(B, N, H, K, D, P, q.element_size(), spec, device.index)
    indices = torch.empty(B, N, K, k_blocks, dtype=torch.int32, device=device)
    out = torch.empty((B, N, H, D) if attend else (0,), dtype=q.dtype, device=device)
    lse = torch.empty((B, N, H) if attend else (0,), dtype=torch.float32, device=device)
    room = G * x.width + x.splits * 2 * x.GP + x.width
    floats = torch.empty(x.slab * K * room, dtype=torch.float32, device=device)
    maxima = torch.empty(x.slab * K * (x.width // x.chunk), dtype=torch.int32, device=device)
    given, first = starts is not None, lengths if starts is None else starts
    q_strides, kv_strides = q.stride()[:3], (*k.stride()[:3], *v.stride()[:3])
    SP, KP2 = next_power_of_two(x.splits), next_power_of_two(k_blocks)
    BK = min(x.BK, KP2 * S)
    pdl, options = _dependent(device.index, DEPENDENT_SELECTION)
    forced = spec.first_blocks, spec.local_blocks
    for row0 in range(0, B * N, x.slab):
        rows = min(x.slab, B * N - row0)
        score_kernel[(rows * K * x.splits,)](
            q, pooled, k, lengths, first, floats, row0, rows, N, K, G, x.splits, x.width, *q_strides,
            *pooled.stride()[:3], *k.stride()[:3], c, D, x.DP, S, x.GP, x.M, x.BN, update, given, pdl,
            num_warps=4, num_stages=3, **options,
        )  # fmt: skip
        sum_kernel[(rows * K * x.parts,)](
            lengths, first, floats, maxima, row0, rows, N, K, G, x.splits, x.parts, x.width, *forced,
            S, x.GP, x.BN, SP, x.chunk, given, pdl,
            num_warps=4, num_stages=3, **options,
        )  # fmt: skip
        select_kernel[(rows * K,)](
            q, k, v, lengths, first, indices, out, lse, floats, maxima, row0, rows, N, K, G, x.splits, x.width,
            k_blocks, *forced, *q_strides, *kv_strides, c, D, x.DP, S, x.GP, x.M, BK, x.chunks, x.chunk, x.KP, KP2,
            spec.rule == "official", attend, given, pdl,
            num_warps=4, num_stages=2, **options,
        )  # fmt: skip
    return indices, out, lse


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor | None,
    block_size: int,
    lengths: Tensor,
    starts: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks, or over all keys: one launch if the keys stay together, else two."""
    B, N, H, D = q.shape
    C, K, device = k.shape[1], k.shape[2], q.device
    q, k, v = _dense(q), _dense(k), _dense(v)
    listed = indices is not None
    slots = indices.shape[3] if indices is not None else 0
    x = _attention(B, N, H, K, D, slots * block_size if listed else C, q.element_size(), listed, device.index)
    out = torch.empty(B, N, H, D, dtype=q.dtype, device=device)
    lse = torch.empty(B, N, H, dtype=torch.float32, device=device)
    part, part_lse = out, lse
    if x.splits > 1:
        part = torch.empty(B, N, H, x.splits, D, dtype=torch.float32, device=device)
        part_lse = torch.empty(B, N, H, x.splits, dtype=torch.float32, device=device)
    tiles, (pdl, options) = ceil_div(N, x.TT), _dependent(device.index)
    attend_kernel[(B * tiles * K * x.splits,)](
        q, k, v, lengths if indices is None else indices.contiguous(), lengths, lengths if starts is None else starts,
        part, part_lse, tiles, N, K, H // K, x.splits, slots, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        scale * LOG2E, D, x.DP, block_size, x.GP, x.M, x.TT, x.BN, listed, x.splits > 1, starts is not None,
        pdl, num_warps=4, num_stages=3, **options,
    )  # fmt: skip
    if x.splits > 1:
        SP = max(16, next_power_of_two(x.splits))
        combine_kernel[(B * N * H,)](
            part,
            part_lse,
            out,
            lse,
            x.splits,
            D,
            x.DP,
            SP,
            min(SP, max(16, 4096 // x.DP)),
            pdl,
            num_warps=4,
            **options,
        )
    return out, lse


def select_blocks_cached(
    q: Tensor, pooled: Tensor, lengths: Tensor, starts: Tensor | None, spec: SparseSpec, scale: float
) -> Tensor:
    """See :func:`ssa.ops.decode.select_blocks_cached`."""
    return torch.ops.ssa.select_cached(q, pooled, lengths, starts, *_numbers(spec), scale)


def attend_blocks_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    block_size: int,
    lengths: Tensor,
    starts: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See :func:`ssa.ops.decode.attend_blocks_cached`."""
    return torch.ops.ssa.attend_cached(q, k, v, indices, block_size, lengths, starts, scale)


def full_decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, starts: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """See :func:`ssa.ops.decode.full_decode_attention`; returns output and log-sum-exp."""
    return torch.ops.ssa.attend_cached(q, k, v, None, 1, lengths, starts, scale)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled: Tensor,
    lengths: Tensor,
    starts: Tensor | None,
    spec: SparseSpec,
    scale: float,
    update: bool,
) -> tuple[Tensor, Tensor]:
    """See :func:`ssa.ops.decode.decode_attention`; returns output and log-sum-exp."""
    operation = torch.ops.ssa.update_and_decode if update else torch.ops.ssa.decode
    return operation(q, k, v, pooled, lengths, starts, *_numbers(spec), scale)


def update_pooled(pooled: Tensor, k: Tensor, lengths: Tensor, new: int, starts: Tensor | None, block_size: int) -> None:
    """See :func:`ssa.ops.decode.update_pooled`."""
    torch.ops.ssa.update_pooled(pooled, k, lengths, new, starts, block_size)


def _numbers(spec: SparseSpec) -> tuple[int, int, int, int, bool]:
    return spec.block_size, spec.num_blocks, spec.first_blocks, spec.local_blocks, spec.rule == "official"


@lru_cache(maxsize=64)
def _spec(S: int, k: int, first: int, local: int, official: bool) -> SparseSpec:
    return SparseSpec(S, k, first, local, "official" if official else "exact")


def _select_op(
    q: Tensor, pooled: Tensor, lengths: Tensor, starts: Tensor | None,
    S: int, k: int, first: int, local: int, official: bool, scale: float,
) -> Tensor:  # fmt: skip
    spec = _spec(S, k, first, local, official)
    return _select(q, pooled, pooled, pooled, lengths, starts, spec, scale, False)[0]


def _decode_op(
    q: Tensor, k: Tensor, v: Tensor, pooled: Tensor, lengths: Tensor, starts: Tensor | None,
    S: int, blocks: int, first: int, local: int, official: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _decode(q, k, v, pooled, lengths, starts, _spec(S, blocks, first, local, official), scale, False)


def _update_and_decode_op(
    q: Tensor, k: Tensor, v: Tensor, pooled: Tensor, lengths: Tensor, starts: Tensor | None,
    S: int, blocks: int, first: int, local: int, official: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    together = q.shape[1] == 1 and pooled.stride(3) == 1 and k.stride(3) == 1
    if not together:
        _update_op(pooled, k, lengths, q.shape[1], starts, S)
    return _decode(q, k, v, pooled, lengths, starts, _spec(S, blocks, first, local, official), scale, together)


def _decode(
    q: Tensor, k: Tensor, v: Tensor, pooled: Tensor, lengths: Tensor, starts: Tensor | None,
    spec: SparseSpec, scale: float, update: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    S = spec.block_size
    if spec.num_blocks * S >= k.shape[1] and spec.rule != "official":  # every block of the cache
        if update:
            _update_op(pooled, k, lengths, 1, starts, S)
        return _attend(q, k, v, None, 1, lengths, starts, scale)
    fused = spec.num_blocks * S <= FUSED_KEYS
    indices, out, lse = _select(q, k, v, pooled, lengths, starts, spec, scale, fused, update)
    return (out, lse) if fused else _attend(q, k, v, indices, S, lengths, starts, scale)


def _update_op(pooled: Tensor, k: Tensor, lengths: Tensor, new: int, starts: Tensor | None, S: int) -> None:
    if pooled.stride(3) != 1:
        raise RuntimeError("update_pooled: the head dimension of `pooled` must be contiguous")
    k, D, (pdl, options) = _dense(k), k.shape[3], _dependent(k.device.index)
    pool_new_kernel[(ceil_div(new, S), k.shape[0] * k.shape[2])](
        k, pooled, lengths, lengths if starts is None else starts, new, k.shape[2], *k.stride()[:3],
        *pooled.stride()[:3], D, max(16, next_power_of_two(D)), S, starts is not None, pdl, num_warps=1, **options,
    )  # fmt: skip


def _attention_fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


def _select_fake(
    q: Tensor, pooled: Tensor, lengths: Tensor, starts: Tensor | None, S: int, k: int, *_: object
) -> Tensor:
    return q.new_empty(*q.shape[:2], pooled.shape[2], k, dtype=torch.int32)


LIBRARY = torch.library.Library("ssa", "FRAGMENT")  # cheaper per call than `custom_op`
_SPEC = "int S, int k_blocks, int first, int local, bool official, float scale"
LIBRARY.define(f"select_cached(Tensor q, Tensor pooled, Tensor lengths, Tensor? starts, {_SPEC}) -> Tensor")
LIBRARY.define(
    "attend_cached(Tensor q, Tensor k, Tensor v, Tensor? indices, int S, Tensor lengths, Tensor? starts, float scale)"
    " -> (Tensor, Tensor)"
)
LIBRARY.define(
    f"decode(Tensor q, Tensor k, Tensor v, Tensor pooled, Tensor lengths, Tensor? starts, {_SPEC}) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "update_and_decode(Tensor q, Tensor k, Tensor v, Tensor(a!) pooled, Tensor lengths, Tensor? starts,"
    f" {_SPEC}) -> (Tensor, Tensor)"
)
LIBRARY.define("update_pooled(Tensor(a!) pooled, Tensor k, Tensor lengths, int new, Tensor? starts, int S) -> ()")
for _name, _function, _fake in (
    ("select_cached", _select_op, _select_fake),
    ("attend_cached", _attend, _attention_fake),
    ("decode", _decode_op, _attention_fake),
    ("update_and_decode", _update_and_decode_op, _attention_fake),
    ("update_pooled", _update_op, lambda *_: None),
):
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ssa::{_name}", _fake, lib=LIBRARY)
