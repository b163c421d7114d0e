"""How much attention mass a block may hold, from what is kept of its keys, and the fewest blocks that hold enough.

With x_j = scale q.k_j, block n of S keys has the mass W_n = sum_j exp(x_j). Kept blocks A drop
delta = D / (K + D), with K and D the masses of the kept and of the other blocks. From the mean key kbar, the radius
r = max ||k_j - kbar|| and the box low <= k_j <= high (per channel):

    xbar = scale q.kbar                                                    logit of the mean, equal to the mean logit
    W_n >= S exp(xbar)                                                     Jensen
    lo <= x_j <= hi,  hi = min(xbar + scale ||q|| r, scale sum_d max(q_d low_d, q_d high_d)),  lo likewise
    W_n <= S ((hi - xbar) exp(lo) + (xbar - lo) exp(hi)) / (hi - lo)       the chord above exp on [lo, hi]

delta rises with D and falls with K, so D's upper bound and K's lower bound give an upper bound on delta. The query's
own block is computed exactly. Rounding: the bounds are widened by what float arithmetic can lose in a dot product,
n u sum |q_d k_d| <= n u ||q|| ||k||, and by what sums of N terms can lose.

Shapes: t queries, K key-value heads, G = H/K, N blocks, S block size, D head dim.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ssa.ops.spec import SparseSpec

CHUNK_ELEMENTS = 1 << 21  # logits of blocks held at a time; some twenty tensors of that size live at once


class BlockBounds(NamedTuple):
    """What is known of each completed block's keys beside the stored mean; leading dimensions as that mean's.

    Attributes:
        radius: float32 ``[..., K]``, at least ``max_j ||k_j - mean||`` with the mean as it is stored.
        error: float32 ``[..., K]``, at least the distance of the stored mean from the true one.
        low, high: ``[..., K, D]`` in the keys' dtype, smallest and largest key per channel.
    """

    radius: Tensor
    error: Tensor
    low: Tensor
    high: Tensor


class Masses(NamedTuple):
    """Logarithms of lower and upper bounds of each block's mass, ``[t, K, G, N]``; equal if estimated."""

    low: Tensor
    high: Tensor


class Chosen(NamedTuple):
    """``indices [t, K, n]`` int32 ascending, padded with -1; ``counts`` and ``bound`` (dropped mass) ``[t, K]``."""

    indices: Tensor
    counts: Tensor
    bound: Tensor


def block_bounds(keys: Tensor, mean: Tensor) -> BlockBounds:
    """Of whole blocks ``keys [..., S, K, D]`` with stored means ``[..., K, D]``; in float64 where the keys are."""
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    x, stored = keys.to(wide), mean.to(wide)
    true = x.mean(-3)
    low, high = keys.amin(-3), keys.amax(-3)
    # a norm of D rounded terms is off by at most D roundings of itself
    widen = 1 + 4 * x.shape[-1] * torch.finfo(wide).eps
    radius = (x - stored.unsqueeze(-3)).norm(dim=-1).amax(-2) * widen
    error = (true - stored).norm(dim=-1) + 4 * keys.shape[-3] * torch.finfo(wide).eps * x.norm(dim=-1).amax(-2)
    return BlockBounds(radius, error * widen, low, high)


def estimated_masses(q: Tensor, mean: Tensor, scale: float) -> Tensor:
    """Logits of the means ``[t, K, G, N]``, in float32 or wider; the mass without its factor S."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    query = q.to(wide).unflatten(1, (mean.shape[1], -1))
    return torch.einsum("tkgd,nkd->tkgn", query, mean.to(wide)) * scale


def bounded_masses(q: Tensor, mean: Tensor, bounds: BlockBounds, scale: float, S: int) -> Masses:
    """Bounds of the mass of whole blocks, for ``q [t, H, D]`` and ``mean [N, K, D]``."""
    xbar = estimated_masses(q, mean, scale)
    wide, D = xbar.dtype, q.shape[2]
    query = q.to(wide).unflatten(1, (mean.shape[1], -1))
    low, high = bounds.low.to(wide), bounds.high.to(wide)
    length = query.norm(dim=-1)[..., None] * scale  # [t, K, G, 1]
    per_block = lambda x: x.to(wide).mT[:, None]  # noqa: E731  [N, K] -> [K, 1, N]
    reach = length * per_block(bounds.radius)
    positive, negative = query.clamp(min=0), query.clamp(max=0)
    dot = lambda a, b: torch.einsum("tkgd,nkd->tkgn", a, b) * scale  # noqa: E731
    largest = torch.maximum(low.abs(), high.abs()).norm(dim=-1) + bounds.radius.to(wide)  # at least every ||k||
    slack = length * per_block(largest) * (4 * (D + 4) * torch.finfo(wide).eps)
    off = length * per_block(bounds.error) + slack
    hi = torch.minimum(xbar + reach, dot(positive, high) + dot(negative, low)) + slack
    lo = torch.maximum(xbar - reach, dot(positive, low) + dot(negative, high)) - slack
    middle = torch.minimum(torch.maximum(xbar + off, lo), hi)
    share = ((middle - lo) / (hi - lo).clamp(min=torch.finfo(wide).tiny)).clamp(max=1.0)
    top = hi + (share + (1 - share) * (lo - hi).exp()).log() + math.log(S)
    rounding = 8 * torch.finfo(wide).eps * (1 + hi.abs() + lo.abs())
    return Masses(xbar - off + math.log(S) - rounding, torch.minimum(top, hi + math.log(S)) + rounding)


def own_mass(q: Tensor, keys: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Log of the exact mass ``[t, K, G]`` of each query's own block, ``keys [t, S, K, D]``, ``visible [t, S]``."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    query = q.to(wide).unflatten(1, (keys.shape[2], -1))
    key = keys.to(wide).masked_fill(~visible[..., None, None], 0.0)
    logits = torch.einsum("tkgd,tskd->tkgs", query, key) * scale
    return logits.masked_fill(~visible[:, None, None], -torch.inf).logsumexp(-1)


def choose(masses: Masses, own_log: Tensor, first: Tensor, position: Tensor, spec: SparseSpec) -> Chosen:
    """The fewest blocks, in falling order of mass, that drop at most ``spec.max_dropped_mass`` of every head's.

    ``first [t]``: column of the query's block 0; ``position [t]``: its place in the document, negative for padding.
    A query whose limit ``spec.num_blocks`` comes first gets so many blocks, and ``bound`` says what that may drop.
    """
    S, eps = spec.block_size, torch.finfo(own_log.dtype).eps
    N = masses.low.shape[-1]
    block = torch.arange(N, device=own_log.device) - first[:, None]  # [t, N]
    own = torch.where(position < 0, -1, position.div(S, rounding_mode="floor"))[:, None]
    candidate = (block >= 0) & (block <= own)
    forced = candidate & ((block < spec.first_blocks) | (block > own - spec.local_blocks))
    mine = (block == own)[:, None, None]
    low, high = (
        torch.where(mine, own_log[..., None], x).masked_fill(~candidate[:, None, None], -torch.inf) for x in masses
    )
    score = high.softmax(-1).nan_to_num().sum(2)  # [t, K, N]
    score = score.masked_fill(forced[:, None], torch.inf).masked_fill(~candidate[:, None], -1.0)
    order = score.sort(dim=-1, descending=True, stable=True).indices
    expanded = order[:, :, None].expand_as(low)
    kept = low.gather(-1, expanded).logcumsumexp(-1)  # log K after keeping the first 1, 2, ... blocks
    rest = high.gather(-1, expanded).flip(-1).logcumsumexp(-1).flip(-1)
    dropped = torch.full_like(rest, -torch.inf)
    dropped[..., :-1] = rest[..., 1:] + 4 * N * eps  # log D, widened by the rounding of N additions
    if spec.flavour == "estimated":
        dropped = dropped + math.log(spec.safety)
    odds = (
        (dropped - kept).nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(2)
    )  # [t, K, N] log D / K of the worst head
    limit = spec.max_dropped_mass or 0.0
    enough = odds <= (math.log(limit / (1 - limit)) if limit > 0 else -torch.inf)
    if spec.flavour == "per_block":
        heavy = (score / low.shape[2] > limit) & candidate[:, None]  # the forced ones' scores are infinite
        wanted = heavy.sum(-1)
    else:
        wanted = enough.int().argmax(-1) + 1  # the last candidate drops nothing, so some place is enough
    floor = forced.sum(-1)[:, None]
    counts = torch.minimum(torch.maximum(wanted, floor), candidate.sum(-1)[:, None]).clamp(max=spec.num_blocks)
    bound = odds.gather(-1, (counts - 1).clamp(min=0)[..., None])[..., 0].sigmoid().masked_fill(counts == 0, 0.0)
    width = min(N, spec.num_blocks)
    slot = torch.arange(width, device=order.device)
    nothing = torch.iinfo(torch.int64).max
    taken = torch.where(slot < counts[..., None], order[..., :width] - first[:, None, None], nothing).sort(-1).values
    indices = torch.where(taken == nothing, -1, taken).int()
    return Chosen(indices, counts.int(), bound)


def choose_chunk(
    q: Tensor,
    mean: Tensor,
    bounds: BlockBounds | None,
    own_keys: Tensor,
    visible: Tensor,
    first: Tensor,
    position: Tensor,
    spec: SparseSpec,
    scale: float,
) -> Chosen:
    """Blocks of t queries ``q [t, H, D]`` among ``mean [N, K, D]``; ``own_keys [t, S, K, D]``, ``visible [t, S]``."""
    if bounds is None:
        estimate = estimated_masses(q, mean, scale) + math.log(spec.block_size)
        masses = Masses(estimate, estimate)
    else:
        masses = bounded_masses(q, mean, bounds, scale, spec.block_size)
    return choose(masses, own_mass(q, own_keys, visible, scale), first.long(), position, spec)


def chunk_rows(H: int, N: int, S: int, D: int) -> int:
    """Queries at a time."""
    return max(1, CHUNK_ELEMENTS // (H * max(N, S * D // 8)))
