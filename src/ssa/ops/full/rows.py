"""``full_attention_rows``: exact causal attention of some query rows, at their share of the cost."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssa.documents import DocumentLayout
from ssa.errors import InputError
from ssa.ops.checks import check_qkv, resolve_layout, resolve_scale
from ssa.ops.dispatch import Backend, Request, always, choose, first_reason, register
from ssa.ops.full import backends
from ssa.ops.full.query_rows import QueryRows
from ssa.ops.full.row_kernels import RowKernel

SHORTEST = 16  # rows of a window or of the keys before it, below which cuDNN's tiles are mostly empty
MOST_WINDOWS = 16  # cuDNN is called once per window, and plans a call for every new shape


def _refuse_cudnn(request: Request) -> str | None:
    windows = request.rows.windows if request.rows else ()
    deterministic = torch.are_deterministic_algorithms_enabled()
    return backends.refuse_cudnn(request) or first_reason(
        [
            ("cudnn" not in backends.usable(request), "Flash is the better choice on this GPU"),
            (deterministic, "its backward pass has no deterministic mode"),
            (
                len({w.length for w in windows}) > 1,
                "documents of several lengths, whose windows never repeat: cuDNN would plan a call for each",
            ),
            (len(windows) > MOST_WINDOWS, f"more than {MOST_WINDOWS} different windows"),
            (
                any(w.size < SHORTEST or 0 < w.begin < SHORTEST for w in windows),
                f"a window, or what lies before it, is shorter than {SHORTEST} rows",
            ),
        ]
    )


register(
    "full_attention_rows",
    Backend("cudnn", "ssa.ops.full.row_kernels:CUDNN", _refuse_cudnn),
    Backend("flash", "ssa.ops.full.row_kernels:FLASH", backends.refuse_flash),
    Backend("cpu_flash", "ssa.ops.full.row_kernels:CPU_FLASH", backends.refuse_cpu_flash),
    Backend("reference", "ssa.ops.full.row_kernels:REFERENCE", always),
)


def row_kernel(q: Tensor, k: Tensor, rows: QueryRows, layout: DocumentLayout, backend: str = "auto") -> RowKernel:
    """The forward and backward that serve a call."""
    request = Request.of(q, k, layout=layout, rows=rows)
    return cast("RowKernel", choose("full_attention_rows", request, backend))


def full_attention_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: QueryRows,
    layout: DocumentLayout | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The rows of :func:`ssa.ops.full_attention` that ``rows`` names; no other row is computed.

    Args:
        q: ``[B, T, H, D]``.
        k, v: ``[B, T, K, D]``; H a multiple of K.
        rows: windows of the layout's documents, R rows in all, at least one.
        layout: documents of the batch; default one per row.
        scale: logit scale, default ``D ** -0.5``.
        backend: ``"auto"`` or a name that :func:`ssa.ops.explain` lists.

    Returns:
        Output ``[R, H, D]`` in the dtype of ``q``, and the log-sum-exp ``[R, H]``, which carries no gradient.

    Raises:
        InputError: wrong shapes, dtypes or devices; windows outside the documents or overlapping.
        BackendError: the named backend cannot serve the call.
    """
    where = "full_attention_rows"
    check_qkv(where, q, k, v)
    layout, scale = resolve_layout(where, q, layout), resolve_scale(where, q, scale)
    rows.check(where, layout)
    if not rows.count:
        raise InputError(f"{where}.rows", "no row at all", "at least one")
    return _Rows.apply(q, k, v, rows, row_kernel(q, k, rows, layout, backend), scale)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: QueryRows, kernel: RowKernel, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = kernel.forward(*(x.flatten(0, 1) for x in (q, k, v)), rows, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.arguments = rows, kernel, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        rows, kernel, scale = ctx.arguments
        q, k, v, out, lse = ctx.saved_tensors
        flat = (x.flatten(0, 1) for x in (q, k, v))
        grads = kernel.backward(d_out.contiguous(), *flat, out, lse, rows, scale)(())
        return *(x.view(y.shape) for x, y in zip(grads, (q, k, v), strict=True)), None, None, None
