"""Products of few tokens on a CPU in float32: oneDNN reads the weights of so few rows twice as fast as ``F.linear``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssa.ops.few.api import Product, Projections


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` by the operation that compiled code calls too."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def few_linear(x: Tensor, weight: Tensor, product: Product) -> Tensor:
    """See :func:`ssa.ops.few.few_linear`."""
    if product.norm is not None:
        x = F.rms_norm(x, x.shape[-1:], product.norm, product.eps)
    if product.gate is not None:
        x = (x.unflatten(-1, (product.gate.shape[-1], -1)) * product.gate[..., None]).flatten(-2)
    out = linear(x, weight)
    if product.up is not None:
        out = F.silu(out).mul_(linear(x, product.up))
    return out if product.add is None else out.add_(product.add)


def few_project(
    x: Tensor, layer: Projections, rope: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor], lengths: Tensor
) -> tuple[Tensor, Tensor | None]:
    """See :func:`ssa.ops.few.few_project`."""
    y, N, D = F.rms_norm(x, x.shape[-1:], layer.norm, layer.eps), x.shape[1], cache[0].shape[3]
    q, k, v = (linear(y, weight).unflatten(-1, (-1, D)) for weight in (layer.q, layer.k, layer.v))
    q, k = (_turned(z, rope[0][:, :, None], rope[1][:, :, None]) for z in (q, k))
    for row, length in enumerate(lengths.tolist()):
        cache[0][row, length - N : length] = k[row]
        cache[1][row, length - N : length] = v[row]
    return q, None if layer.gate is None else linear(y, layer.gate).sigmoid_()


def _turned(z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = z.chunk(2, -1)
    return (z * cos).add_(torch.cat([-high, low], -1).mul_(sin))
