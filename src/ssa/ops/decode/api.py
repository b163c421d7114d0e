"""Attention of the newest tokens against a cache: ``decode_attention`` and its parts.

Conventions of every function here. Shapes: B sequences, N >= 1 newest tokens of each, C rows of cache capacity,
H query heads, K key-value heads, D head dim, S block size, P >= ceil(C / S) pooled blocks.

- ``lengths`` int32 ``[B]``: filled cache rows of each sequence, the N new ones included. ``starts`` int32 ``[B]`` or
  None (zeros): its first real row; what lies before is left padding. Both stay on the device, which nobody waits for.
- Query ``i`` of sequence ``b`` stands at row ``lengths[b] - N + i``. A query before ``starts[b]`` gives 0 and an lse
  of -inf.
- Rows outside ``starts[b] .. lengths[b] - 1`` may hold anything, NaN too. So may a pooled block that is not complete.
- Block ``j`` of a sequence covers the rows ``starts[b] + j * S ...``; block indices are relative to ``starts``.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Literal, overload

import torch
from torch import Tensor

from ssa.errors import InputError
from ssa.ops.budget.api import adaptive_blocks_cached, refuse_kernels
from ssa.ops.budget.reference import BlockBounds
from ssa.ops.checks import DTYPES, check_positive, reads_values, resolve_scale
from ssa.ops.dispatch import Backend, Request, always, choose, constant_when_compiled, register
from ssa.ops.spec import BLOCK_SIZES, SparseSpec, is_integer
from ssa.ops.triton_support import refuse


@lru_cache(maxsize=256)
def _remembered(interpreted: str | None, request: Request) -> str:
    return refuse(request) or ""


@constant_when_compiled
def _reason(device: str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, S: int, blocks: int) -> str:
    request = Request(torch.device(device), dtype, heads, kv_heads, head_dim, S, blocks)
    return _remembered(os.environ.get("TRITON_INTERPRET"), request)


def refuse_decoding(request: Request) -> str | None:
    """As of the prefill's kernels, remembered: a step of decoding takes less time than asking. Full decoding has no
    blocks."""
    shape = request.heads, request.kv_heads, request.head_dim, request.block_size or 16, request.num_blocks or 1
    return _reason(str(request.device), request.dtype, *shape) or None


def _not_on_cpu(request: Request) -> str | None:
    return None if request.device.type == "cpu" else f"needs a CPU, not {request.device.type}"


for _operation in (
    "select_blocks_cached",
    "attend_blocks_cached",
    "full_decode_attention",
    "update_pooled",
):
    register(
        _operation,
        Backend("triton", f"ssa.ops.decode.triton:{_operation}", refuse_decoding),
        Backend("reference", f"ssa.ops.decode.reference:{_operation}", always),
    )


register(
    "decode_attention",
    Backend("triton", "ssa.ops.decode.triton:decode_attention", refuse_decoding),
    Backend("cpu", "ssa.ops.decode.cpu:decode_attention", _not_on_cpu),
    Backend("reference", "ssa.ops.decode.reference:decode_attention", always),
)


@torch.no_grad()
def select_blocks_cached(
    q: Tensor,
    pooled: Tensor,
    lengths: Tensor,
    spec: SparseSpec,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
    k: Tensor | None = None,
    bounds: BlockBounds | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`ssa.ops.select_blocks` for new tokens, from the pooled keys of the cache (paper section 3).

    Args:
        q: ``[B, N, H, D]``, after RoPE.
        pooled: ``[B, P, K, D]`` mean key of each completed block.
        lengths, starts: int32 ``[B]``.
        spec: block size, budget, rule.
        scale: logit scale, default ``D ** -0.5``.
        k: ``[B, C, K, D]``, with ``spec.max_dropped_mass`` only: the own block's mass is computed from its keys.
        bounds: with a certified ``spec.max_dropped_mass`` only, see :func:`ssa.ops.budget.api.update_block_bounds`.
        backend: ``"auto"`` or a name that :func:`ssa.ops.explain` lists.

    Returns:
        int32 ``[B, N, K, spec.num_blocks]``: blocks relative to ``starts``, ascending, padded with -1.

    Raises:
        InputError: wrong shapes, dtypes or devices.
        BackendError: the named backend cannot serve the call.
    """
    where = "select_blocks_cached"
    _check_tensors(where, q, ("pooled", pooled))
    _check_lengths(where, q, lengths, starts, pooled.shape[1] * spec.block_size)
    if spec.max_dropped_mass is not None:
        refuse_kernels(where, backend)
        if k is None:
            raise InputError(f"{where}.k", "None with max_dropped_mass", "the cache's keys [B, C, K, D]")
        _check_tensors(where, q, ("pooled", pooled), ("k", k))
        return adaptive_blocks_cached(
            q, k, pooled, bounds, lengths, starts, spec, resolve_scale(where, q, scale)
        ).indices
    implementation = choose(where, _request(q, pooled, spec), backend)
    return implementation(q, pooled, lengths, starts, spec, resolve_scale(where, q, scale))


@torch.no_grad()
def attend_blocks_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int,
    lengths: Tensor,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of new tokens over given blocks of the cache: :func:`ssa.ops.sparse_attention` for decoding.

    Args:
        q: ``[B, N, H, D]``.
        k, v: ``[B, C, K, D]``.
        block_indices: int32 or int64 ``[B, N, K, n]``, -1 for nothing; no block twice.
        block_size: tokens per block S.
        lengths, starts: int32 ``[B]``.
        scale: logit scale, default ``D ** -0.5``.
        backend: ``"auto"`` or a name that :func:`ssa.ops.explain` lists.

    Returns:
        Output ``[B, N, H, D]`` and float32 (float64 for float64 inputs) log-sum-exp ``[B, N, H]``.

    Raises:
        InputError: wrong shapes, dtypes or devices.
        BackendError: the named backend cannot serve the call.
    """
    where = "attend_blocks_cached"
    _check_tensors(where, q, ("k", k), ("v", v))
    _check_lengths(where, q, lengths, starts, k.shape[1])
    if not is_integer(block_size) or block_size not in BLOCK_SIZES:
        raise InputError(f"{where}.block_size", repr(block_size), f"an integer out of {BLOCK_SIZES}")
    expected = (*q.shape[:2], k.shape[2])
    integers = block_indices.dtype in (torch.int32, torch.int64)
    if block_indices.dim() != 4 or tuple(block_indices.shape[:3]) != expected or not integers:
        raise InputError(
            f"{where}.block_indices",
            f"{block_indices.dtype} {tuple(block_indices.shape)}",
            f"integers [B, N, K, num_blocks] = {(*expected, 'n')}",
        )
    request = Request.of(q, k, block_size=block_size, num_blocks=block_indices.shape[3])
    implementation = choose(where, request, backend)
    return implementation(q, k, v, block_indices, block_size, lengths, starts, resolve_scale(where, q, scale))


@overload
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled: Tensor,
    lengths: Tensor,
    spec: SparseSpec,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
    bounds: BlockBounds | None = None,
    update: bool = False,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled: Tensor,
    lengths: Tensor,
    spec: SparseSpec,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
    bounds: BlockBounds | None = None,
    update: bool = False,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
@torch.no_grad()
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled: Tensor,
    lengths: Tensor,
    spec: SparseSpec,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
    bounds: BlockBounds | None = None,
    update: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Block-sparse attention of new tokens: select among the pooled keys, read the chosen blocks of the cache.

    Equals :func:`ssa.ops.select_blocks` and :func:`ssa.ops.sparse_attention` over the whole sequence, restricted to
    its last N tokens. Time and memory traffic follow ``P + k * S``, not the length.

    Args:
        q: ``[B, N, H, D]``, after RoPE.
        k, v: ``[B, C, K, D]``; H a multiple of K.
        pooled: ``[B, P, K, D]`` mean key of each completed block, see :func:`update_pooled`.
        lengths, starts: int32 ``[B]``.
        spec: block size, budget, rule.
        scale: logit scale, default ``D ** -0.5``.
        bounds: with a certified ``spec.max_dropped_mass`` only, see :func:`ssa.ops.budget.api.update_block_bounds`.
        update: ``pooled`` lacks the blocks that these N tokens completed; write them as :func:`update_pooled` does. For
            one new token kernels do both in one launch.
        return_lse: also return the log-sum-exp (natural log) of the scaled logits.
        backend: ``"auto"`` or a name that :func:`ssa.ops.explain` lists.

    Returns:
        Output ``[B, N, H, D]`` in the dtype of ``q``; with ``return_lse`` also float32 (float64 for float64 inputs)
        ``[B, N, H]``.

    Raises:
        InputError: wrong shapes, dtypes or devices.
        BackendError: the named backend cannot serve the call.
    """
    where = "decode_attention"
    _check_tensors(where, q, ("k", k), ("v", v), ("pooled", pooled))
    _check_lengths(where, q, lengths, starts, k.shape[1])
    _check_blocks(where, pooled, k, spec.block_size)
    if spec.max_dropped_mass is not None:
        if update:
            update_pooled(pooled, k, lengths, q.shape[1], starts, spec.block_size)
        indices = select_blocks_cached(q, pooled, lengths, spec, starts=starts, scale=scale, k=k, bounds=bounds)
        out, lse = attend_blocks_cached(
            q, k, v, indices, spec.block_size, lengths, starts=starts, scale=scale, backend=backend
        )
        return (out, lse) if return_lse else out
    implementation = choose(where, _request(q, k, spec), backend)
    out, lse = implementation(q, k, v, pooled, lengths, starts, spec, resolve_scale(where, q, scale), update)
    return (out, lse) if return_lse else out


@overload
def full_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def full_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
@torch.no_grad()
def full_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of new tokens over the whole cache; arguments and results as :func:`decode_attention`."""
    where = "full_decode_attention"
    _check_tensors(where, q, ("k", k), ("v", v))
    _check_lengths(where, q, lengths, starts, k.shape[1])
    implementation = choose(where, Request.of(q, k), backend)
    out, lse = implementation(q, k, v, lengths, starts, resolve_scale(where, q, scale))
    return (out, lse) if return_lse else out


@torch.no_grad()
def update_pooled(
    pooled: Tensor,
    k: Tensor,
    lengths: Tensor,
    new: int,
    starts: Tensor | None,
    block_size: int,
    *,
    backend: str = "auto",
) -> None:
    """Write, in place, the means of the blocks that the last ``new`` tokens completed.

    The same sum as the prefill's, in float32 token after token and rounded once, so the bits are the same too.

    Args:
        pooled: ``[B, P, K, D]``, written.
        k: ``[B, C, K, D]``, the new rows already in place.
        lengths, starts: int32 ``[B]``; ``lengths`` includes the new tokens.
        new: tokens written since the last call.
        block_size: tokens per block S.
        backend: ``"auto"`` or a name that :func:`ssa.ops.explain` lists.

    Raises:
        InputError: wrong shapes, dtypes or devices.
        BackendError: the named backend cannot serve the call.
    """
    where = "update_pooled"
    check_positive(f"{where}.new", new)
    _check_tensors(where, k, ("pooled", pooled))
    _check_lengths(where, k, lengths, starts, k.shape[1])
    _check_blocks(where, pooled, k, block_size)
    request = Request.of(k, k, block_size=block_size)
    choose(where, request, backend)(pooled, k, lengths, new, starts, block_size)


def _request(q: Tensor, k: Tensor, spec: SparseSpec) -> Request:
    return Request.of(q, k, block_size=spec.block_size, num_blocks=spec.num_blocks)


def _check_tensors(where: str, q: Tensor, *cache: tuple[str, Tensor]) -> None:
    """``q [B, N, H, D]`` and the parts of a cache ``[B, rows, K, D]``: one dtype, one device, H a multiple of K."""
    kv_heads = cache[0][1].shape[2] if cache[0][1].dim() == 4 else 0
    for name, x in (("q", q), *cache):
        if x.dim() != 4 or 0 in x.shape:
            raise InputError(
                where, f"{name} of shape {tuple(x.shape)}", "4 dimensions [B, tokens, heads, D], none empty"
            )
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise InputError(where, f"q of dtype {q.dtype} and {name} of {x.dtype}", "one floating-point dtype")
        if x.device != q.device:
            raise InputError(where, f"q on {q.device} and {name} on {x.device}", "one device")
        if x.shape[0] != q.shape[0] or x.shape[3] != q.shape[3]:
            raise InputError(where, f"q {tuple(q.shape)} and {name} {tuple(x.shape)}", "equal B and head dimension D")
        if name != "q" and x.shape[2] != kv_heads:
            raise InputError(where, f"{name} with {x.shape[2]} heads", f"the {kv_heads} heads of {cache[0][0]}")
        if name == "v" and x.shape != cache[0][1].shape:
            raise InputError(where, f"k {tuple(cache[0][1].shape)} and v {tuple(x.shape)}", "equal shapes")
    if q.shape[2] % kv_heads:
        raise InputError(
            where, f"{q.shape[2]} query heads and {kv_heads} KV heads", "query heads divisible by KV heads"
        )


def _check_lengths(where: str, q: Tensor, lengths: Tensor, starts: Tensor | None, rows: int) -> None:
    for name, x in (("lengths", lengths), ("starts", starts)):
        if x is None:
            continue
        if x.dtype != torch.int32 or tuple(x.shape) != q.shape[:1] or x.device != q.device:
            raise InputError(
                f"{where}.{name}",
                f"{x.dtype} {tuple(x.shape)} on {x.device}",
                f"int32 [B] = ({q.shape[0]},) on {q.device}",
            )
    if not reads_values(lengths):
        return
    first = [0] * len(lengths) if starts is None else starts.tolist()
    for row, (start, length) in enumerate(zip(first, lengths.tolist(), strict=True)):
        if not 0 <= start <= length <= rows:
            raise InputError(
                where, f"start {start} and length {length} of sequence {row}", f"0 <= start <= length <= {rows} rows"
            )


def _check_blocks(where: str, pooled: Tensor, k: Tensor, block_size: int) -> None:
    if not is_integer(block_size) or block_size not in BLOCK_SIZES:
        raise InputError(f"{where}.block_size", repr(block_size), f"an integer out of {BLOCK_SIZES}")
    if pooled.shape[1] * block_size < k.shape[1]:
        raise InputError(
            f"{where}.pooled",
            f"{pooled.shape[1]} blocks of {block_size}",
            f"at least ceil({k.shape[1]} / {block_size}) for {k.shape[1]} cache rows",
        )
