"""Output projection and cross-entropy in one operation that never holds all logits.

``[tokens, vocabulary]`` logits are the largest tensor of a small language model: 4 GiB for 16384 tokens of Llama 3's
vocabulary in bfloat16, and several times that for their softmax and gradient. Here rows of tokens are done a chunk at
a time, and a chunk's gradient is taken while its logits are there, so that nothing is computed twice.

Shapes: N tokens, C hidden size, V vocabulary.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssa.documents import IGNORE_INDEX
from ssa.errors import InputError

CHUNK_LOGITS = 1 << 29  # 1 GiB in bfloat16; smaller chunks read and write the head's gradient more often


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_rows: int | None = None, compiled: bool = False
) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T`` against ``targets``, summed over the targets; nats.

    Under autocast the products run in its dtype and everything else, the gradient of ``weight`` included, in float32.

    Args:
        hidden: ``[..., C]``.
        weight: ``[V, C]``; may be tied to an embedding.
        targets: integers ``[...]`` in ``[0, V)``, or ``IGNORE_INDEX`` (-100), which counts for nothing.
        chunk_rows: tokens whose logits exist at once; None: about 1 GiB of them.
        compiled: fuse the arithmetic on the logits with ``torch.compile``.

    Returns:
        A scalar, float32 (float64 for float64 inputs). Differentiable once.

    Raises:
        InputError: shapes that do not fit.
    """
    if weight.dim() != 2 or hidden.shape[-1:] != weight.shape[1:] or targets.shape != hidden.shape[:-1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (hidden, weight, targets))
        raise InputError("linear_cross_entropy", f"shapes {shapes}", "hidden [..., C], weight [V, C], targets [...]")
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    rows = chunk_rows or max(1, CHUNK_LOGITS // weight.shape[0])
    arguments = hidden.flatten(0, -2), weight, targets.flatten(), dtype, rows, compiled, torch.is_grad_enabled()
    total: Tensor = _LinearCrossEntropy.apply(*arguments)
    return total


def loss_and_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of ``logits [n, V]``, which become its gradient in place."""
    wide = logits.to(_wide(logits.dtype))
    counts = targets != IGNORE_INDEX
    column = torch.where(counts, targets, 0)[:, None]
    lse = wide.logsumexp(-1, keepdim=True)
    loss = torch.where(counts, (lse - wide.gather(1, column))[:, 0], 0).sum()
    hit = torch.arange(logits.shape[1], device=logits.device) == column
    logits.copy_(torch.where(counts[:, None], (wide - lse).exp() - hit.to(wide.dtype), 0))
    return loss


@cache
def _compiled() -> Any:
    return torch.compile(loss_and_gradient, dynamic=False)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """``a @ b``, summed and returned in ``wide``."""
    if a.dtype == wide:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [N, C]
        weight: Tensor,
        targets: Tensor,  # [N]
        dtype: torch.dtype,
        rows: int,
        compiled: bool,
        differentiates: bool,
    ) -> Tensor:
        needs_hidden, needs_weight = (differentiates and x for x in ctx.needs_input_grad[:2])
        work = _compiled() if compiled else loss_and_gradient
        wide = _wide(dtype)
        count = max(1, -(-len(hidden) // rows))
        rows = max(1, -(-len(hidden) // count))  # chunks of one size, so that one graph serves them
        total = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden, dtype=dtype) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            low = weight.to(dtype)
            for start in range(0, len(hidden), rows):
                part = slice(start, start + rows)
                x = hidden[part].to(dtype)
                gradient = x @ low.T  # logits, until `work` has been at them
                total += work(gradient, targets[part])
                if d_hidden is not None:
                    torch.mm(gradient, low, out=d_hidden[part])
                if d_weight is not None:
                    d_weight += _product(gradient.T, x, wide)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (
            None if saved is None else (saved.to(scale.dtype) * scale).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, *(None,) * 5)
