"""``select_blocks``: which key blocks each query reads."""

from __future__ import annotations

import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.ops.budget.api import adaptive_blocks, refuse_kernels
from ssa.ops.checks import check_qkv, resolve_layout, resolve_scale
from ssa.ops.dispatch import Backend, Request, always, choose, register
from ssa.ops.spec import SparseSpec
from ssa.ops.triton_support import refuse

register(
    "select_blocks",
    Backend("triton", "ssa.ops.selection.triton:select_blocks", refuse),
    Backend("reference", "ssa.ops.selection.reference:select_blocks", always),
)


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k: Tensor,
    spec: SparseSpec,
    layout: DocumentLayout | None = None,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Choose the blocks of keys that each query reads (paper section 3). Carries no gradient.

    The score of block n for KV head g is the sum over the group's query heads h of
    ``softmax_n(q_h . kbar_n * scale)``, with ``kbar_n`` the mean of the block's keys (after RoPE) and the softmax
    over the blocks that are complete at the query. Top-k of the previous blocks by that score, in float32; equal
    scores go to the lower index; the own block is always taken.

    Args:
        q: ``[B, T, H, D]``, after RoPE.
        k: ``[B, T, K, D]``, after RoPE; H a multiple of K.
        spec: block size, budget, rule.
        layout: documents of the batch; default one per row.
        scale: logit scale, default ``D ** -0.5``.
        backend: ``"auto"`` or a name that :func:`ssa.ops.explain` lists.

    Returns:
        int32 ``[B, T, K, spec.num_blocks]``: blocks of the query's own document, ascending, padded with -1.
        With ``spec.max_dropped_mass`` the last dimension is the largest number of blocks that a query took.

    Raises:
        InputError: wrong shapes, dtypes or devices.
        BackendError: the named backend cannot serve the call.
    """
    where = "select_blocks"
    if spec.max_dropped_mass is not None:
        refuse_kernels(where, backend)
        return adaptive_blocks(q, k, spec, layout, scale=scale).indices
    check_qkv(where, q, k)
    layout = resolve_layout(where, q, layout)
    request = Request.of(q, k, block_size=spec.block_size, num_blocks=spec.num_blocks, layout=layout)
    return choose(where, request, backend)(q, k, spec, layout, resolve_scale(where, q, scale))
