"""Both streams and their alignment as one node of autograd."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssa.ops.dual import passes
from ssa.ops.dual.alignment import AlignmentSpec
from ssa.ops.dual.passes import Streams
from ssa.ops.dual.streams import SparseStream, Stream
from ssa.ops.full.query_rows import QueryRows
from ssa.ops.full.row_kernels import RowKernel
from ssa.ops.triton_support import beside, join


class Plan(NamedTuple):
    """How a call is computed: the full stream by ``full`` (all rows), or by ``row_kernel`` (``rows`` alone)."""

    main: str
    spec: AlignmentSpec
    scale: float
    sparse: SparseStream
    full: Stream | None
    rows: QueryRows | None
    row_kernel: RowKernel | None

    @property
    def passes(self) -> ModuleType:
        """The elementwise passes that go with the sparse stream's backend."""
        if self.sparse.backend == "reference":
            return passes
        from ssa.ops.dual import triton_passes

        return triton_passes

    def streams(self, full: Tensor, sparse: Tensor, gate: Tensor | None) -> Streams:
        """What the passes read; ``full [R, H, D]`` or ``[B, T, H, D]``, ``sparse [B, T, H, D]``, ``gate [B, T, H]``."""
        sparse_, gate_ = sparse.flatten(0, 1), None if gate is None else gate.flatten(0, 1)
        return Streams(full.reshape(-1, *sparse_.shape[1:]), sparse_, gate_, self.rows, self.main, self.spec)


class BothStreams(torch.autograd.Function):
    """``(q, k, v, gate, indices, plan)`` to the main stream's output, the weighted loss, the distance and the mass.

    A stream that no gradient reaches (one direction alone, the other stream main) is not differentiated.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, indices: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(q.device.type, enabled=False):
            size = math.prod(indices.shape[:3])
            sparse = beside(q.device, size, plan.sparse.forward, q, k, v, indices)
            full = _full_forward(plan, q, k, v, indices)
            join(q.device, size)
            streams = plan.streams(full[0], sparse[0], gate)
            out, distance, mass = plan.passes.forward(
                streams, full[1].reshape(streams.full.shape[:2]), sparse[1].flatten(0, 1)
            )
        loss = distance * (plan.spec.weight * (2 if plan.spec.directions == "both" else 1))
        ctx.save_for_backward(q, k, v, gate, indices, *full, *sparse)
        ctx.plan, ctx.split = plan, len(full)
        ctx.mark_non_differentiable(distance, mass)
        return out.view(q.shape), loss, distance, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        q, k, v, gate, indices, *results = ctx.saved_tensors
        full, sparse = tuple(results[: ctx.split]), tuple(results[ctx.split :])
        streams = plan.streams(full[0], sparse[0], gate)
        inflow = plan.passes.backward(streams, d_out.flatten(0, 1), d_loss)
        grads: tuple[Tensor, ...] = ()
        begun: tuple[Tensor, ...] = ()
        runs = plan.main == "sparse" or streams.pulls_sparse
        mine = (inflow.sparse.view(q.shape), inflow.delta.view(q.shape[:3]), q, k, v, indices, sparse)
        if runs:
            begun = plan.sparse.begin(*mine)
        if plan.full is not None and (plan.main == "full" or streams.pulls_full):
            grads = plan.full.backward(inflow.full.view(q.shape), q, k, v, indices, full)
        finish_rows = None
        if plan.row_kernel is not None and plan.rows is not None and plan.rows.count and streams.pulls_full:
            flats = (x.flatten(0, 1) for x in (q, k, v))
            finish_rows = plan.row_kernel.backward(inflow.full, *flats, *full, plan.rows, plan.scale)
        if runs:
            grads = plan.sparse.finish(*mine, begun, grads)
        if finish_rows is not None:
            flat = finish_rows([x.flatten(0, 1) for x in grads])
            grads = tuple(x.view(y.shape) for x, y in zip(flat, (q, k, v), strict=True))
        assert len(grads) == 3, "the main stream has gradients"
        d_gate = None if gate is None or inflow.gate is None else inflow.gate.view(gate.shape)
        return *grads, d_gate, None, None


def _full_forward(plan: Plan, q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
    if plan.full is not None:
        return tuple(plan.full.forward(q, k, v, indices))
    assert plan.rows is not None
    assert plan.row_kernel is not None
    if not plan.rows.count:  # documents with fewer tokens than tiles
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        return q.new_empty(0, *q.shape[2:]), q.new_empty(0, q.shape[2], dtype=wide)
    return plan.row_kernel.forward(*(x.flatten(0, 1) for x in (q, k, v)), plan.rows, plan.scale)
