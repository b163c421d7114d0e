"""``ssa_attention``: both streams on the same q, k, v, and their alignment."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.errors import InputError
from ssa.ops.bound import attention_sparsity
from ssa.ops.checks import check_qkv, resolve_layout, resolve_scale
from ssa.ops.dual.alignment import Alignment, AlignmentSpec, align
from ssa.ops.full.api import full_attention
from ssa.ops.selection.api import select_blocks
from ssa.ops.sparse.api import sparse_attention
from ssa.ops.spec import SparseSpec

Stream = Literal["full", "sparse"]


def ssa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    main: Stream = "full",
    *,
    spec: SparseSpec | None = None,
    alignment: AlignmentSpec | None = None,
    layout: DocumentLayout | None = None,
    block_indices: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    full_backend: str = "auto",
) -> tuple[Tensor, Alignment]:
    """Attention of the main stream, and the alignment with its counterpart (paper Algorithm 1).

    Args:
        q: ``[B, T, H, D]``, after RoPE.
        k, v: ``[B, T, K, D]``, k after RoPE.
        gate: ``[B, T, H]``, multiplies each head's output (the model passes ``sigmoid(W_g x)``); None for no gate.
        main: the stream that is returned. The counterpart only enters the alignment.
        spec: selection; default ``SparseSpec()`` (16 blocks of 16).
        alignment: weight, distance, what is compared; default ``AlignmentSpec()``.
        layout: documents of the batch; default one per row.
        block_indices: use these instead of selecting.
        scale: logit scale, default ``D ** -0.5``.
        backend: for selection and sparse attention.
        full_backend: for full attention.

    Returns:
        Output ``[B, T, H, D]`` (gated) and :class:`Alignment`. Both streams receive gradient through it.

    Raises:
        InputError: wrong shapes, dtypes, devices or values.
        BackendError: the named backend cannot serve the call.
    """
    if main not in ("full", "sparse"):
        raise InputError("ssa_attention.main", repr(main), "'full' or 'sparse'")
    check_qkv("ssa_attention", q, k, v)
    if gate is not None and (gate.shape != q.shape[:3] or gate.device != q.device or not gate.is_floating_point()):
        raise InputError(
            "ssa_attention.gate",
            f"{gate.dtype} of shape {tuple(gate.shape)} on {gate.device}",
            f"floating point [B, T, H] = {tuple(q.shape[:3])} on {q.device}",
        )
    layout, scale = resolve_layout("ssa_attention", q, layout), resolve_scale("ssa_attention", q, scale)
    spec, alignment = spec or SparseSpec(), alignment or AlignmentSpec()
    if block_indices is None:
        block_indices = select_blocks(q, k, spec, layout, scale=scale, backend=backend)
    full, full_lse = full_attention(q, k, v, layout, scale=scale, return_lse=True, backend=full_backend)
    sparse, sparse_lse = sparse_attention(
        q, k, v, block_indices, spec.block_size, layout, scale=scale, return_lse=True, backend=backend
    )
    mass = attention_sparsity(sparse_lse, full_lse).mean()
    if gate is None:
        losses = align(full, sparse, alignment)
    else:
        weight = gate[..., None].to(q.dtype)
        if alignment.align_on == "raw":
            losses = align(full, sparse, alignment)
        full, sparse = full * weight, sparse * weight
        if alignment.align_on == "gated":
            losses = align(full, sparse, alignment)
    return (full if main == "full" else sparse), Alignment(*losses, mass)
