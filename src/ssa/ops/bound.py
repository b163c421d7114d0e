"""What the sparse stream drops, per query: dropped mass, AttnSparsity, entropy and both sides of Theorem 1.

Identity behind the theorem: on a selected token the full attention is ``(1 - delta)`` times the sparse attention, so
``h_full - h_sparse = sum over dropped j of a_full(j) v(j) - delta * h_sparse``, and
``delta = 1 - exp(lse_sparse - lse_full)`` follows from the two log-sum-exps alone.

Shapes: B batch, T tokens, H query heads, K key-value heads, G = H/K, D head dim, n documents of a run, L their length.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ssa.documents import DocumentLayout, run_view
from ssa.errors import InputError
from ssa.ops.checks import check_block_indices, check_qkv, resolve_layout, resolve_scale
from ssa.ops.full.api import full_attention
from ssa.ops.sparse.api import sparse_attention

CHUNK_ELEMENTS = 1 << 24


class ErrorBound(NamedTuple):
    """Both sides of Theorem 1, ``[B, T, H]``: ``error <= bound`` up to rounding.

    Attributes:
        error: ``||h_full - h_sparse||``.
        bound: ``delta * (max over dropped j of ||v(j)|| + ||h_sparse||)``.
        dropped_mass: ``delta``.
    """

    error: Tensor
    bound: Tensor
    dropped_mass: Tensor


def attention_sparsity(lse_sparse: Tensor, lse_full: Tensor) -> Tensor:
    """AttnSparsity (Definition 1): full-attention mass on the selected tokens, ``exp(lse_sparse - lse_full)``.

    Both ``[B, T, H]`` natural-log log-sum-exps of the same logits.
    """
    _check_same("attention_sparsity", lse_sparse, lse_full)
    return (lse_sparse - lse_full).exp().clamp(max=1.0)


def dropped_mass(lse_sparse: Tensor, lse_full: Tensor) -> Tensor:
    """``delta = 1 - AttnSparsity``, computed without cancellation; arguments as :func:`attention_sparsity`."""
    _check_same("dropped_mass", lse_sparse, lse_full)
    return -torch.expm1((lse_sparse - lse_full).clamp(max=0.0))


@torch.no_grad()
def attention_entropy(
    q: Tensor, k: Tensor, layout: DocumentLayout | None = None, *, scale: float | None = None
) -> Tensor:
    """Entropy of each query's full attention distribution in bits, ``[B, T, H]``; 0 for a document's first token.

    Args as :func:`ssa.ops.full_attention`. Memory is bounded by chunks; cost is that of full attention.
    """
    where = "attention_entropy"
    check_qkv(where, q, k)
    layout, scale = resolve_layout(where, q, layout), resolve_scale(where, q, scale)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(q.shape[:3], dtype=wide, device=q.device)
    for run in layout.runs():
        query, key = run_view(q, run).to(wide).unflatten(2, (k.shape[2], -1)), run_view(k, run).to(wide)
        for chunk in _query_chunks(run, q.shape[2]):
            logits = torch.einsum("nckgd,nlkd->nckgl", query[:, chunk], key[:, : chunk.stop]) * scale
            logits = logits.masked_fill(~_causal(chunk, q.device), float("-inf"))
            log_p = logits.log_softmax(-1)
            # exp(-inf) * -inf is NaN, and a masked token adds nothing
            entropy = -(log_p.exp() * log_p.masked_fill(log_p == float("-inf"), 0.0)).sum(-1)
            run_view(out, run)[:, chunk] = entropy.flatten(2) / math.log(2)
    return out


@torch.no_grad()
def error_bound(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int,
    layout: DocumentLayout | None = None,
    *,
    scale: float | None = None,
) -> ErrorBound:
    """Both sides of Theorem 1 for every query and head. Arguments as :func:`ssa.ops.sparse_attention`."""
    where = "error_bound"
    check_qkv(where, q, k, v)
    layout, scale = resolve_layout(where, q, layout), resolve_scale(where, q, scale)
    check_block_indices(where, block_indices, k, block_size, layout)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    full, lse_full = full_attention(q, k, v, layout, scale=scale, return_lse=True)
    sparse, lse_sparse = sparse_attention(q, k, v, block_indices, block_size, layout, scale=scale, return_lse=True)
    delta = dropped_mass(lse_sparse, lse_full)
    group = q.shape[2] // k.shape[2]
    dropped = largest_dropped_value(v, block_indices, block_size, layout).repeat_interleave(group, 2)
    return ErrorBound((full - sparse).norm(dim=-1), delta * (dropped + sparse.norm(dim=-1)), delta)


def largest_dropped_value(v: Tensor, block_indices: Tensor, block_size: int, layout: DocumentLayout) -> Tensor:
    """``max ||v(j)||`` over the tokens in a query's past that its blocks do not cover, ``[B, T, K]``; 0 if none."""
    norm = v.norm(dim=-1)
    out = torch.zeros_like(norm)
    K = v.shape[2]
    for run in layout.runs():
        length = run[2]
        blocks = -(-length // block_size)
        norms, indices, out_ = run_view(norm, run), run_view(block_indices, run).long(), run_view(out, run)
        for chunk in _query_chunks(run, K):
            picked = torch.zeros(*indices[:, chunk].shape[:3], blocks + 1, dtype=torch.bool, device=v.device)
            picked.scatter_(-1, torch.where(indices[:, chunk] >= 0, indices[:, chunk], blocks), True)
            token = picked[..., :blocks].repeat_interleave(block_size, -1)[..., : chunk.stop]  # [n, c, K, l]
            kept_out = ~token & _causal(chunk, v.device)[:, 0]
            past = norms[:, : chunk.stop].transpose(1, 2)[:, None]  # [n, 1, K, l]
            out_[:, chunk] = past.masked_fill(~kept_out, 0.0).amax(-1)
    return out


def _check_same(where: str, lse_sparse: Tensor, lse_full: Tensor) -> None:
    for what, a, b in (
        ("shape", tuple(lse_sparse.shape), tuple(lse_full.shape)),
        ("dtype", lse_sparse.dtype, lse_full.dtype),
        ("device", lse_sparse.device, lse_full.device),
    ):
        if a != b:
            raise InputError(where, f"lse_sparse of {what} {a} and lse_full of {b}", f"the same {what}")


def _query_chunks(run: tuple[int, int, int], heads: int) -> list[slice]:
    _, count, length = run
    step = max(1, CHUNK_ELEMENTS // (count * heads * length))
    return [slice(a, min(a + step, length)) for a in range(0, length, step)]


def _causal(chunk: slice, device: torch.device) -> Tensor:
    """``[c, 1, 1, chunk.stop]``: whether a key is in a query's past."""
    position = torch.arange(chunk.stop, device=device)
    return (position <= position[chunk, None])[:, None, None]
