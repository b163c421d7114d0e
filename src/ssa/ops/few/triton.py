"""Launches of :mod:`ssa.ops.few.triton_kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from ssa.ops.decode.triton import dependent_launch
from ssa.ops.few.api import STEP, Product, Projections
from ssa.ops.few.triton_kernels import linear_kernel, project_kernel
from ssa.ops.triton_support import ceil_div, next_power_of_two, small_shared_memory

TILE, STAGES = 16384, 4  # bytes of a program's weights read at a time, and how many such tiles are on their way
SMALL_TILE, SMALL_STAGES = 8192, 2  # where shared memory is small
OUTPUTS = 256  # programs that keep a device busy: fewer outputs per program below it


def _tile(R: int, C: int, outputs: int, itemsize: int, index: int | None) -> tuple[int, int]:
    """Inputs of a tile, a power of two that divides C, and stages."""
    tile, stages = (SMALL_TILE, SMALL_STAGES) if small_shared_memory(index) else (TILE, STAGES - (R > 16))
    return min(C & -C, max(STEP, tile // (outputs * itemsize))), stages


def few_linear(x: Tensor, weight: Tensor, product: Product) -> Tensor:
    """See :func:`ssa.ops.few.few_linear`."""
    (B, N, C), O = x.shape, weight.shape[0]
    x, R = x.reshape(B * N, C), B * N
    gate = None if product.gate is None else product.gate.reshape(R, -1).contiguous()
    add = None if product.add is None else product.add.reshape(R, O)
    out = torch.empty(R, O, dtype=x.dtype, device=x.device)
    outputs = next(n for n in (64, 32, 16) if n == 16 or OUTPUTS * n <= O)
    pdl = dependent_launch(x.device.index)
    linear_kernel[(ceil_div(O, outputs),)](
        x, x if product.norm is None else product.norm, x if gate is None else gate, weight,
        weight if product.up is None else product.up, x if add is None else add, out, R, O, x.stride(0),
        0 if gate is None else gate.stride(0), 0 if add is None else add.stride(0), product.eps, C,
        0 if gate is None else C // gate.shape[1], max(16, next_power_of_two(R)), outputs,
        *_tile(R, C, outputs * (1 if product.up is None else 2), x.element_size(), x.device.index),
        product.norm is not None, product.up is not None, add is not None, bool(pdl), num_warps=4, **pdl,
    )  # fmt: skip
    return out.view(B, N, O)


def few_project(
    x: Tensor, layer: Projections, rope: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor], lengths: Tensor
) -> tuple[Tensor, Tensor | None]:
    """See :func:`ssa.ops.few.few_project`."""
    (B, N, C), (K, D) = x.shape, cache[0].shape[2:]
    H, R, x = layer.q.shape[0] // D, B * N, x.reshape(B * N, C)
    cos, sin = (part.contiguous() for part in rope)
    q = torch.empty(B, N, H, D, dtype=x.dtype, device=x.device)
    gate = None if layer.gate is None else torch.empty(B, N, H, dtype=x.dtype, device=x.device)
    outputs, pdl = 16, dependent_launch(x.device.index)
    pieces = D // 2 // outputs
    gates = 0 if gate is None else ceil_div(H, 2 * outputs)
    project_kernel[((H + 2 * K) * pieces + gates,)](
        x, layer.norm, layer.q, layer.k, layer.v, layer.q if layer.gate is None else layer.gate, cos, sin, lengths,
        q, *cache, q if gate is None else gate, R, N, H, K, x.stride(0), 0 if cos.shape[0] == 1 else N * D,
        *cache[0].stride()[:3], *cache[1].stride()[:3], layer.eps, C, D, max(16, next_power_of_two(R)), outputs,
        *_tile(R, C, 2 * outputs, x.element_size(), x.device.index), bool(pdl), num_warps=4, **pdl,
    )  # fmt: skip
    return q, gate
