"""``ssa::full_forward`` and ``ssa::full_backward``: the full stream as custom operations of PyTorch.

Opaque to ``torch.compile`` and visible to activation checkpointing. Document lengths travel as host integers;
``kernel`` is a name out of ``FORWARD`` or
``"cpu_flash"``, or several names joined by ``+`` of which the cost model takes the best.

Declared through ``Library`` and not ``custom_op``, which costs a quarter of a millisecond of host time at 512
documents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.ops.dispatch import Request
from ssa.ops.full import cpu_flash, kernels, packed
from ssa.ops.full.backends import choose_plan, usable
from ssa.ops.full.plan import Shape

LIBRARY = torch.library.Library("ssa", "FRAGMENT")
LIBRARY.define(
    "full_forward(Tensor q, Tensor k, Tensor v, int[] lengths, float scale, str kernel) -> (Tensor out, Tensor lse)"
)
LIBRARY.define(
    "full_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int[] lengths, float scale, "
    "str kernel) -> (Tensor dq, Tensor dk, Tensor dv)"
)

FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "cudnn": kernels.cudnn_forward,
    "packed": packed.packed_forward,
    "flash": kernels.flash_forward,
}
BACKWARD: dict[str, Callable[..., kernels.Gradients]] = {
    "cudnn": kernels.cudnn_backward,
    "packed": packed.packed_backward,
    "flash": kernels.flash_backward,
}


def _shape(q: Tensor, k: Tensor) -> Shape:
    return Shape(q.shape[2], k.shape[2], q.shape[3])


def _forward(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, kernel: str) -> tuple[Tensor, Tensor]:
    if kernel == "cpu_flash":
        return cpu_flash.forward(q, k, v, DocumentLayout(tuple(lengths), *q.shape[:2]), scale)
    chosen = choose_plan(tuple(lengths), _shape(q, k), "forward", kernel)
    out, lse = FORWARD[chosen.kernel](*(x.flatten(0, 1) for x in (q, k, v)), chosen, scale)
    return out.view(q.shape), lse.view(q.shape[:3])


def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: list[int],
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if kernel == "cpu_flash":
        return cpu_flash.backward(d_out, q, k, v, out, lse, DocumentLayout(tuple(lengths), *q.shape[:2]), scale)
    chosen = choose_plan(tuple(lengths), _shape(q, k), "backward", kernel)
    d_out = d_out.contiguous()  # the gradient of a sum is a stride-0 view, which the kernels do not take
    grads = BACKWARD[chosen.kernel](*(x.flatten(0, 1) for x in (d_out, q, k, v, out, lse)), chosen, scale)
    dq, dk, dv = (g.view(x.shape) for g, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide)


def _backward_fake(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, lengths, scale, kernel = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.arguments = lengths, scale, kernel
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.ssa.full_backward(d_out, *ctx.saved_tensors, *ctx.arguments)
    return (*grads, None, None, None)


LIBRARY.impl("full_forward", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("full_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("ssa::full_forward", _forward_fake, lib=LIBRARY)
torch.library.register_fake("ssa::full_backward", _backward_fake, lib=LIBRARY)
torch.library.register_autograd("ssa::full_forward", _gradients, setup_context=_setup, lib=LIBRARY)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, scale: float, kernel: str
) -> tuple[Tensor, Tensor]:
    return torch.ops.ssa.full_forward(q, k, v, layout.lengths, scale, kernel)


def planned(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, scale: float) -> tuple[Tensor, Tensor]:
    """See :func:`ssa.ops.full_attention`; the kernel is chosen by the cost model."""
    return _attend(q, k, v, layout, scale, usable(Request.of(q, k)))


def cudnn(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, scale: float) -> tuple[Tensor, Tensor]:
    """See :func:`ssa.ops.full_attention`."""
    return _attend(q, k, v, layout, scale, "cudnn")


def cudnn_packed(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, scale: float) -> tuple[Tensor, Tensor]:
    """See :func:`ssa.ops.full_attention`."""
    return _attend(q, k, v, layout, scale, "packed")


def flash(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, scale: float) -> tuple[Tensor, Tensor]:
    """See :func:`ssa.ops.full_attention`."""
    return _attend(q, k, v, layout, scale, "flash")


def cpu(q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, scale: float) -> tuple[Tensor, Tensor]:
    """See :func:`ssa.ops.full_attention`."""
    return _attend(q, k, v, layout, scale, "cpu_flash")
