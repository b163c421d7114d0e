"""``sparse_attention``: causal attention over given blocks."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.errors import InputError
from ssa.ops.checks import check_block_indices, check_qkv, resolve_layout, resolve_scale
from ssa.ops.dispatch import Backend, Request, always, choose, register
from ssa.ops.spec import BLOCK_SIZES
from ssa.ops.triton_support import refuse

register(
    "sparse_attention",
    Backend("triton", "ssa.ops.sparse.triton:sparse_attention", refuse),
    Backend("reference", "ssa.ops.sparse.reference:sparse_attention", always),
)


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int,
    layout: DocumentLayout | None = None,
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...
@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int,
    layout: DocumentLayout | None = None,
    *,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_size: int,
    layout: DocumentLayout | None = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the tokens of the selected blocks that are not in the query's future (paper section 3).

    Args:
        q: ``[B, T, H, D]``.
        k, v: ``[B, T, K, D]``; H a multiple of K.
        block_indices: int32 or int64 ``[B, T, K, n]`` from :func:`ssa.ops.select_blocks` or of your own: blocks of
            the query's document, no block twice, -1 for nothing. All query heads of a KV head share them.
        block_size: tokens per block S.
        layout: documents of the batch; default one per row.
        scale: logit scale, default ``D ** -0.5``.
        return_lse: also return the log-sum-exp (natural log) of the scaled logits; it carries no gradient.
        backend: ``"auto"`` or a name that :func:`ssa.ops.explain` lists.

    Returns:
        Output ``[B, T, H, D]`` in the dtype of ``q``; with ``return_lse`` also float32 (float64 for float64 inputs)
        ``[B, T, H]``.

    Raises:
        InputError: wrong shapes, dtypes, devices or indices (indices on a GPU are read only with ``SSA_CHECK=1``).
        BackendError: the named backend cannot serve the call.
    """
    where = "sparse_attention"
    check_qkv(where, q, k, v)
    if block_size not in BLOCK_SIZES:
        raise InputError(f"{where}.block_size", block_size, f"one of {BLOCK_SIZES}")
    layout = resolve_layout(where, q, layout)
    check_block_indices(where, block_indices, k, block_size, layout)
    request = Request.of(q, k, block_size=block_size, num_blocks=block_indices.shape[3], layout=layout)
    implementation = choose(where, request, backend)
    out, lse = implementation(q, k, v, block_indices, block_size, layout, resolve_scale(where, q, scale))
    return (out, lse) if return_lse else out
