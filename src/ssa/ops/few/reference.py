"""The specification of :mod:`ssa.ops.few` in plain PyTorch: float32 sums, rounded at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from ssa.ops.few.api import Product, Projections


def _normed(x: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    wide = x.float()
    return wide if norm is None else wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * norm.float()


def few_linear(x: Tensor, weight: Tensor, product: Product) -> Tensor:
    """See :func:`ssa.ops.few.few_linear`."""
    y = _normed(x, product.norm, product.eps)
    if product.gate is not None:
        y = (y.unflatten(-1, (product.gate.shape[-1], -1)) * product.gate[..., None].float()).flatten(-2)
    out = y @ weight.float().T
    if product.up is not None:
        out = torch.nn.functional.silu(out) * (y @ product.up.float().T)
    return (out if product.add is None else out + product.add.float()).to(x.dtype)


def few_project(
    x: Tensor, layer: Projections, rope: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor], lengths: Tensor
) -> tuple[Tensor, Tensor | None]:
    """See :func:`ssa.ops.few.few_project`."""
    y, N, D = _normed(x, layer.norm, layer.eps), x.shape[1], cache[0].shape[3]
    q, k, v = ((y @ w.float().T).to(x.dtype).unflatten(-1, (-1, D)) for w in (layer.q, layer.k, layer.v))
    cos, sin = (part[:, :, None].float() for part in rope)

    def turned(z: Tensor) -> Tensor:
        low, high = z.float().chunk(2, -1)
        return (z.float() * cos + torch.cat([-high, low], -1) * sin).to(x.dtype)

    rows = (lengths.long() - N)[:, None] + torch.arange(N, device=x.device)
    sequence = torch.arange(len(x), device=x.device)[:, None]
    cache[0][sequence, rows], cache[1][sequence, rows] = turned(k), v
    return turned(q), None if layer.gate is None else torch.sigmoid(y @ layer.gate.float().T).to(x.dtype)
