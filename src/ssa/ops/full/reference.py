"""Full causal attention in plain PyTorch: the specification.

One run of equally long documents at a time, in chunks of queries; the backward pass recomputes the probabilities.
Low-precision inputs are computed in float32 and rounded once.

Shapes: n documents of a run, L their length, c queries of a chunk, H query heads,
K key-value heads, G = H/K, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssa.documents import DocumentLayout, run_view

CHUNK_ELEMENTS = 1 << 24  # logits at a time: 64 MiB in float32


def full_attention(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, scale: float) -> tuple[Tensor, Tensor]:
    """See :func:`ssa.ops.full_attention`; returns output and log-sum-exp."""
    return _FullAttention.apply(q, k, v, layout, scale)


class _FullAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = forward(q, k, v, layout, scale)
        ctx.save_for_backward(q, k, v, out)
        ctx.arguments = layout, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(d_out, *ctx.saved_tensors, *ctx.arguments), None, None


def forward(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[B, T, H, D]`` and log-sum-exp ``[B, T, H]``, without autograd."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:3], dtype=wide, device=q.device)
    for run in layout.runs():
        query, key, value = (run_view(x, run).to(wide) for x in (q, k, v))
        out_, lse_ = run_view(out, run), run_view(lse, run)
        for chunk, logits in _chunks(query, key, scale):
            probability = logits.softmax(-1)  # not exp(logits - lse): a large lse has few digits after the point
            out_[:, chunk] = (
                torch.einsum("nkgcl,nlkd->nckgd", probability, value[:, : chunk.stop]).flatten(2, 3).to(q.dtype)
            )
            lse_[:, chunk] = logits.logsumexp(-1).permute(0, 3, 1, 2).flatten(2)
    return out, lse


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, layout: DocumentLayout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k``, ``v``."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    K = k.shape[2]
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    for run in layout.runs():
        query, key, value, d_o, o = (run_view(x, run).to(wide) for x in (q, k, v, d_out, out))
        delta = (d_o * o).sum(-1).unflatten(2, (K, -1)).permute(0, 2, 3, 1)  # [n, K, G, L]
        d_o, query_ = d_o.unflatten(2, (K, -1)), query.unflatten(2, (K, -1))
        for chunk, logits in _chunks(query, key, scale):
            past = slice(0, chunk.stop)
            probability = logits.softmax(-1)  # [n, K, G, c, l]
            d_probability = torch.einsum("nckgd,nlkd->nkgcl", d_o[:, chunk], value[:, past])
            d_logits = probability * (d_probability - delta[..., chunk, None]) * scale
            run_view(dq, run)[:, chunk] = torch.einsum("nkgcl,nlkd->nckgd", d_logits, key[:, past]).flatten(2, 3)
            run_view(dk, run)[:, past] += torch.einsum("nkgcl,nckgd->nlkd", d_logits, query_[:, chunk])
            run_view(dv, run)[:, past] += torch.einsum("nkgcl,nckgd->nlkd", probability, d_o[:, chunk])
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _chunks(query: Tensor, key: Tensor, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of queries with their causal logits ``[n, K, G, c, l]`` against the l = ``chunk.stop`` keys so far."""
    n, L, H, _ = query.shape
    grouped = query.unflatten(2, (key.shape[2], -1))
    step = max(1, CHUNK_ELEMENTS // (n * H * L))
    position = torch.arange(L, device=query.device)
    for first in range(0, L, step):
        chunk = slice(first, min(first + step, L))
        logits = torch.einsum("nckgd,nlkd->nkgcl", grouped[:, chunk], key[:, : chunk.stop]) * scale
        future = position[: chunk.stop] > position[chunk, None]
        yield chunk, logits.masked_fill(future, float("-inf"))
