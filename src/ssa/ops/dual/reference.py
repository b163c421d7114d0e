"""Both streams and their alignment, composed from the public operations: the specification of ``ssa_attention``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.ops.bound import attention_sparsity
from ssa.ops.dual.alignment import Alignment, AlignmentSpec, align
from ssa.ops.full.api import full_attention
from ssa.ops.sparse.api import sparse_attention


def ssa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    main: str,
    block_indices: Tensor,
    block_size: int,
    alignment: AlignmentSpec,
    layout: DocumentLayout,
    **keywords: Any,
) -> tuple[Tensor, Alignment]:
    """See :func:`ssa.ops.ssa_attention` at ``query_fraction`` 1. Every step is differentiated by autograd."""
    full, full_lse = full_attention(q, k, v, layout, return_lse=True, **keywords)
    sparse, sparse_lse = sparse_attention(q, k, v, block_indices, block_size, layout, return_lse=True, **keywords)
    mass = attention_sparsity(sparse_lse, full_lse).mean()
    compared = full, sparse
    if gate is not None:
        full, sparse = (x * gate[..., None].to(q.dtype) for x in (full, sparse))
        if alignment.align_on == "gated":
            compared = full, sparse
    losses = align(*compared, alignment)
    return (full if main == "full" else sparse), Alignment(*losses, mass)
