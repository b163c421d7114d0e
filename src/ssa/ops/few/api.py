"""Products of a few tokens: :func:`few_linear`, :func:`few_project`.

Shapes: B sequences, N new tokens of each, R = B * N rows, at most :data:`MAX_ROWS`; C inputs and O outputs of a linear
layer, whose weight is ``[O, C]``; H query heads, K key-value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ssa.errors import InputError
from ssa.ops.decode.api import refuse_decoding
from ssa.ops.dispatch import Backend, Request, always, choose, register

MAX_ROWS = 32  # more are bound by arithmetic, where the vendor's products are better
STEP = 128  # C is a multiple of it
HEAD_DIMS = (32, 64, 128)


class Product(NamedTuple):
    """What a launch computes besides ``x @ weight.T``, in this order.

    Attributes:
        norm: RMSNorm's weight ``[C]``: of ``x``, with ``eps``.
        gate: ``[B, N, H]``, factors of the C / H inputs of each head.
        up: ``[O, C]``, a second weight: ``silu(x @ weight.T) * (x @ up.T)``.
        add: ``[B, N, O]``, the residual.
    """

    norm: Tensor | None = None
    eps: float = 0.0
    gate: Tensor | None = None
    up: Tensor | None = None
    add: Tensor | None = None


class Projections(NamedTuple):
    """Weights of one attention layer: RMSNorm's ``[C]``; ``[H D, C]``, ``[K D, C]`` twice, and ``[H, C]`` or None."""

    norm: Tensor
    eps: float
    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor | None


def _refuse_cpu(request: Request) -> str | None:
    if request.device.type != "cpu" or request.dtype != torch.float32:
        return f"needs float32 on a CPU, not {request.dtype} on {request.device.type}"
    return None if torch.backends.mkldnn.is_available() else "needs a torch with oneDNN"


for _operation in ("few_linear", "few_project"):
    register(
        _operation,
        Backend("triton", f"ssa.ops.few.triton:{_operation}", refuse_decoding),
        Backend("cpu", f"ssa.ops.few.cpu:{_operation}", _refuse_cpu),
        Backend("reference", f"ssa.ops.few.reference:{_operation}", always),
    )


def is_few(x: Tensor) -> bool:
    """Whether ``x [B, N, C]`` has few rows, without gradients, on a GPU or in float32 on a CPU."""
    if x.shape[0] * x.shape[1] > MAX_ROWS or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return refuse_decoding(_request(x)) is None or _refuse_cpu(_request(x)) is None


def serves(x: Tensor, weights: Iterable[Tensor]) -> bool:
    """Whether layers with these weights ``[O, C]`` and ``[C]`` can be given to the functions here: plain contiguous
    tensors of the dtype and on the device of ``x``."""
    return all(
        type(w.data) is Tensor
        and w.dtype == x.dtype
        and w.device == x.device
        and w.shape[-1] % STEP == 0
        and w.is_contiguous()
        for w in weights
    )


def _request(x: Tensor) -> Request:
    return Request(x.device, x.dtype, 1, 1, 16, 16, 1)


@torch.no_grad()
def few_linear(x: Tensor, weight: Tensor, product: Product = Product(), *, backend: str = "auto") -> Tensor:  # noqa: B008
    """A linear layer without bias and what stands around it: ``x [B, N, C]``, ``weight [O, C]`` -> ``[B, N, O]``.

    Sums in float32 and rounds once, so an RMSNorm before it is applied to the sums, not to rounded inputs.

    Raises:
        InputError: shapes that do not fit.
        BackendError: the named backend cannot serve the call.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[1] != x.shape[2] or weight.shape[1] % STEP:
        raise InputError(
            "few_linear",
            f"x {tuple(x.shape)} and a weight {tuple(weight.shape)}",
            f"[B, N, C] and [O, C], C a multiple of {STEP}",
        )
    if product.gate is not None and x.shape[2] // product.gate.shape[2] not in HEAD_DIMS:
        raise InputError(
            "few_linear.gate", f"{x.shape[2] // product.gate.shape[2]} inputs a head", f"one of {HEAD_DIMS}"
        )
    return choose("few_linear", _request(x), backend)(x, weight, product)


@torch.no_grad()
def few_project(
    x: Tensor,
    layer: Projections,
    rope: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    lengths: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Norm, projections and RoPE of new tokens; keys and values go to their rows of the cache.

    Args:
        x: ``[B, N, C]``.
        layer: weights.
        rope: cos and sin ``[B or 1, N, D]``, two equal halves each.
        cache: keys and values ``[B, rows, K, D]``, written.
        lengths: int32 ``[B]``, the new tokens included: token i of sequence b goes to row ``lengths[b] - N + i``.
        backend: ``"auto"`` or a name that :func:`ssa.ops.explain` lists.

    Returns:
        q ``[B, N, H, D]`` after RoPE; the sigmoid of the gates ``[B, N, H]`` or None.

    Raises:
        InputError: shapes that do not fit.
        BackendError: the named backend cannot serve the call.
    """
    D = cache[0].shape[3]
    if x.dim() != 3 or layer.q.shape[1] != x.shape[2] or layer.q.shape[0] % D or D % 32 or x.shape[2] % STEP:
        raise InputError(
            "few_project",
            f"x {tuple(x.shape)}, weights {tuple(layer.q.shape)}, heads of {D}",
            f"[B, N, C] and [H D, C], C a multiple of {STEP} and D of 32",
        )
    return choose("few_project", _request(x), backend)(x, layer, rope, cache, lengths)
