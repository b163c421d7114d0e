"""``full_attention``: exact causal attention inside documents."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.ops.checks import check_qkv, resolve_layout, resolve_scale
from ssa.ops.dispatch import Backend, Request, always, choose, register
from ssa.ops.full import backends

register(
    "full_attention",
    Backend("cuda", "ssa.ops.full.ops:planned", backends.refuse_planned, backends.describe),
    Backend("cudnn", "ssa.ops.full.ops:cudnn", backends.refuse_cudnn),
    Backend("packed", "ssa.ops.full.ops:cudnn_packed", backends.refuse_packed),
    Backend("flash", "ssa.ops.full.ops:flash", backends.refuse_flash),
    Backend("cpu_flash", "ssa.ops.full.ops:cpu", backends.refuse_cpu_flash),
    Backend("reference", "ssa.ops.full.reference:full_attention", always),
)


@overload
def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: DocumentLayout | None = None,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: DocumentLayout | None = None,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: DocumentLayout | None = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal softmax attention; a token sees its own document up to itself. Costs the sum of squared lengths.

    Args:
        q: ``[B, T, H, D]``.
        k, v: ``[B, T, K, D]``; H a multiple of K.
        layout: documents of the batch; default one per row.
        scale: logit scale, default ``D ** -0.5``.
        return_lse: also return the log-sum-exp (natural log) of the scaled logits; it carries no gradient.
        backend: ``"auto"`` or a name that :func:`ssa.ops.explain` lists.

    Returns:
        Output ``[B, T, H, D]`` in the dtype of ``q``; with ``return_lse`` also float32 (float64 for float64 inputs)
        ``[B, T, H]``.

    Raises:
        InputError: wrong shapes, dtypes or devices.
        BackendError: the named backend cannot serve the call.
    """
    where = "full_attention"
    check_qkv(where, q, k, v)
    layout = resolve_layout(where, q, layout)
    implementation = choose(where, Request.of(q, k, layout=layout), backend)
    out, lse = implementation(q, k, v, layout, resolve_scale(where, q, scale))
    return (out, lse) if return_lse else out
