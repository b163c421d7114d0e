"""Full causal attention through PyTorch's flash kernel for CPUs, one run of equally long documents at a time.

Its forward and backward are called directly because the public function does not return the log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssa.documents import DocumentLayout, Run, run_view

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[B, T, H, D]`` and log-sum-exp ``[B, T, H]`` of ``q [B, T, H, D]``, ``k`` and ``v`` ``[B, T, K, D]``."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.empty(q.shape[:3], dtype=wide, device=q.device)
    for run in layout.runs():
        query, key, value = _heads_first(run, q, k, v)
        run_out, run_lse = _forward(query, key, value, 0.0, True, attn_mask=None, scale=scale)
        run_view(out, run).copy_(run_out.transpose(1, 2))
        run_view(lse, run).copy_(run_lse.transpose(1, 2))
    return out, lse


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: DocumentLayout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k``, ``v``."""
    K = k.shape[2]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for run in layout.runs():
        query, key, value = _heads_first(run, q, k, v)
        d_o, o, l = (run_view(x, run).transpose(1, 2).contiguous() for x in (d_out, out, lse))
        grads = _backward(d_o, query, key, value, o, l, 0.0, True, attn_mask=None, scale=scale)
        run_view(dq, run).copy_(grads[0].transpose(1, 2))
        for target, grad in ((dk, grads[1]), (dv, grads[2])):  # [n, H, L, D]: sum over each group's heads
            run_view(target, run).copy_(grad.unflatten(1, (K, -1)).sum(2).transpose(1, 2))
    return dq, dk, dv


def _heads_first(run: Run, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[n, H, L, D]`` each, keys and values repeated for their group."""
    group = q.shape[2] // k.shape[2]
    query = run_view(q, run).transpose(1, 2)
    key, value = (run_view(x, run).transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    return query, key, value
