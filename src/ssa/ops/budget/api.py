"""Adaptive budgets: for every query the fewest blocks that drop at most ``spec.max_dropped_mass`` of its attention.

Plain PyTorch on every device, in chunks. :func:`ssa.ops.select_blocks` and the decoding operations come here when the
spec has such a limit; :func:`adaptive_blocks` also says how many blocks were taken and what they may drop.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.errors import BackendError, InputError
from ssa.ops.budget.reference import BlockBounds, block_bounds, choose_chunk, chunk_rows
from ssa.ops.checks import check_qkv, resolve_layout, resolve_scale
from ssa.ops.spec import SparseSpec


class AdaptiveBlocks(NamedTuple):
    """Blocks of a varying number.

    Attributes:
        indices: int32 ``[B, T, K, n]``, ascending, padded with -1; n is the largest number that a query took.
        counts: int32 ``[B, T, K]``.
        bound: float ``[B, T, K]``, on the dropped mass of the worst head of the group: an upper bound if certified, an
            estimate otherwise. Above ``max_dropped_mass`` only where ``num_blocks`` was reached (or ``per_block``).
    """

    indices: Tensor
    counts: Tensor
    bound: Tensor


@torch.no_grad()
def adaptive_blocks(
    q: Tensor, k: Tensor, spec: SparseSpec, layout: DocumentLayout | None = None, *, scale: float | None = None
) -> AdaptiveBlocks:
    """Fewest blocks per query under ``spec.max_dropped_mass``.

    Args:
        q: ``[B, T, H, D]``, after RoPE.
        k: ``[B, T, K, D]``, after RoPE.
        spec: with ``max_dropped_mass``; ``num_blocks`` is the most that a query may take.
        layout: documents of the batch; default one per row.
        scale: logit scale, default ``D ** -0.5``.

    Raises:
        InputError: wrong shapes, dtypes or devices, or a spec without a limit.
    """
    where = "adaptive_blocks"
    check_qkv(where, q, k)
    check_limit(where, spec)
    layout, scale = resolve_layout(where, q, layout), resolve_scale(where, q, scale)
    B, T, H, D = q.shape
    S, device = spec.block_size, q.device
    grid = layout.block_grid(S, device)
    start = grid.block_start[:-1].long()
    flat = k.reshape(B * T, *k.shape[2:])
    members = (start[:, None] + torch.arange(S, device=device)).clamp(max=B * T - 1)
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    # blocks that are cut short are only ever a query's own, which is computed from its keys
    mean = flat[members].to(wide).mean(1)
    bounds = block_bounds(flat[members], mean) if spec.flavour == "certified" else None
    first, positions = grid.first_block.view(B, T), layout.positions(device)
    inside = torch.arange(S, device=device)
    parts = []
    for row in range(B):
        lo, hi = grid.row_blocks[row], grid.row_blocks[row + 1]
        some = None if bounds is None else BlockBounds(*(x[lo:hi] for x in bounds))
        step = chunk_rows(H, hi - lo, S, D)
        for t in range(0, T, step):
            place = positions[row, t : t + step].long()
            own_first = row * T + torch.arange(t, min(t + step, T), device=device) - place % S
            visible = inside <= (place % S)[:, None]
            own_keys = flat[(own_first[:, None] + inside).clamp(max=B * T - 1)]
            columns = first[row, t : t + step] - lo
            part = q[row, t : t + step]
            parts.append(choose_chunk(part, mean[lo:hi], some, own_keys, visible, columns, place, spec, scale))
    counts, bound = (torch.cat([getattr(p, name) for p in parts]) for name in ("counts", "bound"))
    most = max(int(counts.max()), 1)
    indices = torch.cat([fit(p.indices, most) for p in parts])
    return AdaptiveBlocks(*(x.view(B, T, *x.shape[1:]) for x in (indices, counts, bound)))


@torch.no_grad()
def adaptive_blocks_cached(
    q: Tensor,
    k: Tensor,
    pooled: Tensor,
    bounds: BlockBounds | None,
    lengths: Tensor,
    starts: Tensor | None,
    spec: SparseSpec,
    scale: float,
) -> AdaptiveBlocks:
    """:func:`adaptive_blocks` for new tokens; arguments as :func:`ssa.ops.decode.decode_attention`.

    ``indices`` has ``spec.num_blocks`` slots, so that nothing waits for the device. ``bounds`` (see
    :func:`update_block_bounds`) is needed by the certified flavour.
    """
    where = "adaptive_blocks_cached"
    check_limit(where, spec)
    if spec.flavour == "certified" and bounds is None:
        raise InputError(f"{where}.bounds", "None", "BlockBounds of the cache", "update_block_bounds, or 'estimated'")
    B, N, H, D = q.shape
    S, device = spec.block_size, q.device
    start = torch.zeros_like(lengths) if starts is None else starts
    position = (lengths - N - start).long()[:, None] + torch.arange(N, device=device)
    inside = torch.arange(S, device=device)
    step = chunk_rows(H, pooled.shape[1], S, D)
    parts = []
    for row in range(B):
        known = bounds if bounds is not None and spec.flavour == "certified" else None
        some = None if known is None else BlockBounds(*(x[row] for x in known))
        for i in range(0, N, step):
            place = position[row, i : i + step]
            own_first = start[row].long() + place.clamp(min=0) // S * S
            own_keys = k[row][(own_first[:, None] + inside).clamp(max=k.shape[1] - 1)]
            visible = inside <= (place - place.clamp(min=0) // S * S)[:, None]
            visible = visible | ((place < 0)[:, None] & (inside == 0))  # padding takes no block, but needs no NaN
            columns = torch.zeros_like(place)
            parts.append(
                choose_chunk(
                    q[row, i : i + step], pooled[row], some, own_keys, visible, columns, place, spec, scale
                )
            )  # fmt: skip
    indices = torch.cat([fit(p.indices, spec.num_blocks) for p in parts])
    others = (torch.cat([getattr(p, name) for p in parts]) for name in ("counts", "bound"))
    return AdaptiveBlocks(*(x.view(B, N, *x.shape[1:]) for x in (indices, *others)))


def empty_block_bounds(pooled: Tensor) -> BlockBounds:
    """Room for the bounds of a cache with pooled keys ``[B, P, K, D]``."""
    scalar = torch.zeros(pooled.shape[:3], dtype=torch.float32, device=pooled.device)
    return BlockBounds(scalar, scalar.clone(), torch.zeros_like(pooled), torch.zeros_like(pooled))


@torch.no_grad()
def update_block_bounds(
    bounds: BlockBounds, pooled: Tensor, k: Tensor, lengths: Tensor, new: int, starts: Tensor | None, block_size: int
) -> None:
    """Write, in place, the bounds of the blocks that the last ``new`` tokens completed; call it after
    :func:`ssa.ops.decode.update_pooled` with the same arguments."""
    S, device = block_size, k.device
    start = torch.zeros_like(lengths) if starts is None else starts
    length = (lengths - start).long()
    before, after = (length - new).clamp(min=0) // S, length // S
    block = before[:, None] + torch.arange((new - 1) // S + 1, device=device)  # [B, M]
    complete = block < after[:, None]
    block = torch.where(complete, block, before[:, None]).clamp(max=pooled.shape[1] - 1)
    complete = block < after[:, None]
    row = torch.arange(len(k), device=device)[:, None]
    members = (start[:, None] + block * S)[..., None] + torch.arange(S, device=device)  # [B, M, S]
    keys = k[row[..., None], members.clamp(max=k.shape[1] - 1)]
    found = block_bounds(keys, pooled[row, block])
    for to, value in zip(bounds, found, strict=True):
        keep = complete.view(*complete.shape, *[1] * (value.dim() - 2))
        to[row, block] = torch.where(keep, value.to(to.dtype), to[row, block])


def fit(indices: Tensor, width: int) -> Tensor:
    """``indices [t, K, n]`` cut or padded with -1 to ``width`` slots; what is cut must be -1."""
    if indices.shape[-1] >= width:
        return indices[..., :width]
    return torch.nn.functional.pad(indices, (0, width - indices.shape[-1]), value=-1)


def check_limit(where: str, spec: SparseSpec) -> None:
    """The spec has a limit of the dropped mass."""
    if spec.max_dropped_mass is None:
        raise InputError(f"{where}.spec", "max_dropped_mass None", "a limit such as max_dropped_mass=0.05")


def refuse_kernels(where: str, backend: str) -> None:
    """Adaptive selection has one implementation."""
    if backend not in ("auto", "reference"):
        raise BackendError(f"{where}(backend={backend!r})", "a spec with max_dropped_mass", "backend='auto'")
