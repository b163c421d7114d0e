"""Forward and backward of each stream as plain functions, out of the backends that the public operations register.

``ssa_attention`` is one node of autograd, so it calls these and not the operations, which are nodes themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.ops.dispatch import Request, find
from ssa.ops.full import backends
from ssa.ops.full import reference as full_reference
from ssa.ops.sparse import reference as sparse_reference

Results = tuple[Tensor, ...]  # output, log-sum-exp, and what else the backward pass wants
Gradients = tuple[Tensor, Tensor, Tensor]


class Stream(NamedTuple):
    """``forward(q, k, v, indices)`` gives :data:`Results`; ``backward(d_out, q, k, v, indices, results)`` gives
    :data:`Gradients`. The full stream reads no indices. ``backend``: who computes it."""

    backend: str
    forward: Callable[[Tensor, Tensor, Tensor, Tensor], Results]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Results], Gradients]


class SparseStream(NamedTuple):
    """As :class:`Stream`, but the backward pass has two halves, so that the full stream's can run beside the first.

    ``begin(d_out, delta, q, k, v, indices, results)`` takes what :class:`~ssa.ops.dual.passes.Inflow` has and gives
    tensors for ``finish(d_out, delta, q, k, v, indices, results, begun, others)``, which gives :data:`Gradients` with
    ``others`` added unless they are empty.
    """

    backend: str
    forward: Callable[[Tensor, Tensor, Tensor, Tensor], Results]
    begin: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Results], Results]
    finish: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Results, Results, Results], Gradients]


def full_stream(q: Tensor, k: Tensor, layout: DocumentLayout, scale: float, backend: str) -> Stream:
    """Full attention of all rows. See :func:`ssa.ops.full_attention` for ``backend``."""
    request = Request.of(q, k, layout=layout)
    found = find("full_attention", request, backend)
    if found.name == "reference":
        return Stream(
            found.name,
            lambda q, k, v, _: full_reference.forward(q, k, v, layout, scale),
            lambda d_out, q, k, v, _, results: full_reference.backward(d_out, q, k, v, results[0], layout, scale),
        )
    found.load()  # declares the custom operations
    kernel = backends.usable(request) if found.name == "cuda" else found.name
    lengths, op = layout.lengths, torch.ops.ssa
    return Stream(
        found.name,
        lambda q, k, v, _: op.full_forward(q, k, v, lengths, scale, kernel),
        lambda d_out, q, k, v, _, results: op.full_backward(d_out, q, k, v, *results, lengths, scale, kernel),
    )


def sparse_stream(
    q: Tensor, k: Tensor, block_size: int, slots: int, layout: DocumentLayout, scale: float, backend: str
) -> SparseStream:
    """Attention over given blocks. See :func:`ssa.ops.sparse_attention` for ``backend``."""
    found = find("sparse_attention", Request.of(q, k, block_size=block_size, num_blocks=slots, layout=layout), backend)
    if found.name == "reference":
        rest: tuple[Any, ...] = (block_size, layout, scale)

        def finish(
            d_out: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, i: Tensor, results: Results, _: Results,
            others: Results,
        ) -> Gradients:  # fmt: skip
            mine = sparse_reference.backward(d_out, q, k, v, i, results[0], *rest)
            for gradient, other in zip(mine, others, strict=False):  # all three, or none
                gradient.add_(other)
            return mine

        return SparseStream(
            found.name, lambda q, k, v, i: sparse_reference.forward(q, k, v, i, *rest), lambda *_: (), finish
        )
    found.load()
    op = torch.ops.ssa
    rest = (layout.lengths, block_size, scale)
    return SparseStream(
        found.name,
        lambda q, k, v, i: op.sparse_forward(q, k, v, i, *rest),
        lambda d_out, delta, q, k, v, i, results: op.sparse_begin(d_out, delta, q, k, v, i, results[1], *rest),
        lambda d_out, delta, q, k, v, i, results, begun, others: op.sparse_finish(
            d_out, delta, q, k, v, i, *results, *begun, *rest, *others
        ),
    )
