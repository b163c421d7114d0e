"""``ssa_attention``: both streams on the same q, k, v, and their alignment."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.errors import InputError
from ssa.ops.checks import check_block_indices, check_qkv, resolve_layout, resolve_scale
from ssa.ops.dual.alignment import Alignment, AlignmentSpec
from ssa.ops.dual.node import BothStreams, Plan
from ssa.ops.dual.sampling import sample_rows
from ssa.ops.dual.streams import full_stream, sparse_stream
from ssa.ops.full.api import full_attention
from ssa.ops.full.rows import row_kernel
from ssa.ops.selection.api import select_blocks
from ssa.ops.spec import SparseSpec, is_integer
from ssa.ops.triton_support import beside

Stream = Literal["full", "sparse"]
WHOLE = ("cuda", "packed")  # full backends of whole documents, which "auto" replaces for sampled rows


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
    seed: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
    full_backend: str = "auto",
) -> tuple[Tensor, Alignment]:
    """Attention of the main stream, and the alignment with its counterpart (paper Algorithm 1).

    One node of autograd. It saves q, k, v, gate, both outputs, their log-sum-exps and the blocks, nothing else of
    that size. :mod:`ssa.ops.dual.reference` is what it computes.

    Args:
        q: ``[B, T, H, D]``, after RoPE.
        k, v: ``[B, T, K, D]``, k after RoPE.
        gate: ``[B, T, H]``, multiplies each head's output (the model passes ``sigmoid(W_g x)``); None for no gate.
        main: the stream that is returned. The counterpart only enters the alignment.
        spec: selection; default ``SparseSpec()`` (16 blocks of 16).
        alignment: weight, distance, what is compared; default ``AlignmentSpec()``.
        layout: documents of the batch; default one per row.
        block_indices: use these instead of selecting.
        seed: of the sampled rows, where ``main`` is ``"sparse"`` and ``alignment.query_fraction`` below 1; another one
            for every step and layer, see :func:`ssa.ops.dual.sampling.sample_rows`.
        scale: logit scale, default ``D ** -0.5``.
        backend: for selection and sparse attention. Under "auto" neither runs where every document fits the budget:
            there both streams are equal, and one is computed.
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
    if block_indices is None and backend == "auto" and spec.reads_all(layout.max_length):
        return _one_stream(q, k, v, gate, layout, scale, full_backend)
    if block_indices is None:
        select = partial(select_blocks, q, k, spec, layout, scale=scale, backend=backend)
        block_indices = beside(q.device, layout.total * k.shape[2], select)
    else:
        check_block_indices("ssa_attention", block_indices, k, spec.block_size, layout)
    sparse = sparse_stream(q, k, spec.block_size, block_indices.shape[3], layout, scale, backend)
    plan = Plan(main, alignment, scale, sparse, None, None, None)
    if main == "sparse" and alignment.query_fraction < 1:
        if not is_integer(seed):
            raise InputError("ssa_attention.seed", repr(seed), "an integer where query_fraction is below 1")
        rows = sample_rows(layout, alignment.query_fraction, seed or 0)
        row_backend = "auto" if full_backend in WHOLE else full_backend
        plan = plan._replace(rows=rows, row_kernel=row_kernel(q, k, rows, layout, row_backend))
    else:
        plan = plan._replace(full=full_stream(q, k, layout, scale, full_backend))
    weight = None if gate is None else gate.to(q.dtype)
    out, loss, distance, mass = BothStreams.apply(q, k, v, weight, block_indices, plan)
    return out, Alignment(loss, distance, distance, mass)


def _one_stream(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, layout: DocumentLayout, scale: float, backend: str
) -> tuple[Tensor, Alignment]:
    """Both streams of documents whose every prefix fits the budget: they are equal, so one is computed."""
    out = full_attention(q, k, v, layout, scale=scale, backend=backend)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    distance, mass = (torch.full((), x, dtype=wide, device=q.device) for x in (0.0, 1.0))
    loss = 0.0 * v[0, 0, 0, 0].to(wide)  # of the graph, as the loss of two streams is; v is the smallest that will do
    gated = out if gate is None else out * gate.to(q.dtype)[..., None]
    return gated, Alignment(loss, distance, distance, mass)
