"""The two elementwise passes over both streams' outputs, in plain PyTorch: the specification of ``triton_passes``.

N flat rows, H query heads, D head dim; R rows of the full stream (N, or a sample). With d = O_full - O_sparse, times
the gate if the gated outputs are compared, h the distance, psi its derivative, w the weight and M = N H D f:

    forward    out = gate * O_main,  distance = sum(h(d)) / M,  mass = mean of exp(lse_sparse - lse_full)
    backward   c = w dL psi(d) / M goes with + into the full stream and with - into the sparse one, each stopped where
               its direction is not trained; the upstream gradient goes into the main stream. Behind the gate (gated):
               dO = gate * (upstream + c),  dgate = sum over D of (upstream + c) * O, over both streams.

Over a sample of rows, distances are summed and divided by its fraction f: unbiased, see :mod:`ssa.ops.dual.sampling`.
The mass, which nothing is trained on, is the mean over the sample: never above 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssa.ops.dual.alignment import AlignmentSpec
from ssa.ops.full.query_rows import QueryRows


class Streams(NamedTuple):
    """What both passes read.

    Attributes:
        full: ``[R, H, D]``; sparse: ``[N, H, D]``; gate: ``[N, H]`` or None.
        rows: the sample, None for all rows.
        main: ``"full"`` (then R = N) or ``"sparse"``.
        spec: alignment.
    """

    full: Tensor
    sparse: Tensor
    gate: Tensor | None
    rows: QueryRows | None
    main: str
    spec: AlignmentSpec

    @property
    def elements(self) -> float:
        """M: what sums over the compared elements are divided by."""
        return self.sparse.numel() * (1.0 if self.rows is None else self.spec.query_fraction)

    @property
    def gates_difference(self) -> bool:
        """Whether the gated outputs are compared."""
        return self.gate is not None and self.spec.align_on == "gated"

    @property
    def pulls_full(self) -> bool:
        """Whether the alignment gives gradient to the full stream."""
        return self.spec.directions != "commitment"

    @property
    def pulls_sparse(self) -> bool:
        """Whether the alignment gives gradient to the sparse stream."""
        return self.spec.directions != "sparsity"


class Inflow(NamedTuple):
    """Gradients of both outputs and of the gate: ``[R, H, D]``, ``[N, H, D]``, ``[N, H]`` or None.

    ``delta [N, H]``: sums over D of the sparse output times its gradient.
    """

    full: Tensor
    sparse: Tensor
    gate: Tensor | None
    delta: Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _compared(x: Streams, *tensors: Tensor | None) -> list[Tensor]:
    """The compared rows of tensors over all rows; ones for None."""
    found = []
    for tensor in tensors:
        if tensor is None:
            found.append(torch.ones((), dtype=_wide(x.full).dtype, device=x.full.device))
        else:
            found.append(_wide(tensor if x.rows is None else tensor.index_select(0, x.rows.index(tensor.device))))
    return found


def _difference(x: Streams) -> Tensor:
    (sparse,) = _compared(x, x.sparse)
    d = _wide(x.full) - sparse
    return d * _compared(x, x.gate)[0][..., None] if x.gates_difference else d


def forward(x: Streams, lse_full: Tensor, lse_sparse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``[N, H, D]``, distance and mass (scalars); ``lse_full [R, H]``, ``lse_sparse [N, H]``."""
    d = _difference(x)
    h = torch.where(d.abs() < 1, 0.5 * d * d, d.abs() - 0.5) if x.spec.distance == "smooth_l1" else d * d
    mass = (_compared(x, lse_sparse)[0] - lse_full).exp().clamp(max=1.0)
    main = x.full if x.main == "full" else x.sparse
    out = main if x.gate is None else main * x.gate[..., None]
    return out, h.sum() / x.elements, mass.sum() / max(1, mass.numel())


def backward(x: Streams, d_out: Tensor, d_loss: Tensor) -> Inflow:
    """From ``d_out [N, H, D]`` and ``d_loss``, the gradient of the weighted loss (scalar)."""
    d, up, gates = _difference(x), _wide(d_out), _compared(x._replace(rows=None), x.gate)[0][..., None]
    pull = d.clamp(-1, 1) if x.spec.distance == "smooth_l1" else 2 * d
    pull = pull * (d_loss * (x.spec.weight / x.elements))
    outside = not x.gates_difference  # then the pull joins after the gate's gradient
    to_full, to_sparse = (pull if x.pulls_full else 0 * pull), (-pull if x.pulls_sparse else 0 * pull)
    full = torch.zeros_like(to_full) if x.main == "sparse" else up
    sparse = up if x.main == "sparse" else torch.zeros_like(up)
    if not outside:
        full, sparse = full + to_full, _add_rows(x, sparse, to_sparse)
    d_gate = None
    if x.gate is not None:
        d_gate = (sparse * _wide(x.sparse)).sum(-1)
        d_gate = _add_rows(x, d_gate, (full * _wide(x.full)).sum(-1)).to(x.gate.dtype)
    full, sparse = full * _compared(x, x.gate)[0][..., None] if x.gate is not None else full, sparse * gates
    if outside:
        full, sparse = full + to_full, _add_rows(x, sparse, to_sparse)
    sparse = sparse.to(x.sparse.dtype)
    return Inflow(full.to(x.full.dtype), sparse, d_gate, (_wide(sparse) * _wide(x.sparse)).sum(-1))


def _add_rows(x: Streams, total: Tensor, part: Tensor) -> Tensor:
    return total + part if x.rows is None else total.index_add(0, x.rows.index(total.device), part)
