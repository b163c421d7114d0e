"""The CUDA kernels behind the full stream: each runs a :class:`~ssa.ops.full.plan.Plan`, forward or backward.

Flat tensors: N rows of all documents, H query heads, K key-value heads, D head dim; n documents of a call, P their
padded length. Every kernel gives the natural-log log-sum-exp ``[N, H]``, so forward and backward may use different
kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssa.ops.full.plan import Call, Plan

aten = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without waiting for it: pinned memory, asynchronous."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


# ---------------------------------------------------------------------- cuDNN on batches of one length
class Rows(NamedTuple):
    """Where the rows of the copied batches of a plan come from, flat over all copied calls.

    Attributes:
        source: int64, row to read; padding repeats the document's last row.
        target: int64, row to write; padding goes to the spare row N.
        padding: bool ``[rows, 1]``.
    """

    source: Tensor
    target: Tensor
    padding: Tensor


def copied_rows(plan: Plan, device: torch.device) -> Rows:
    """:class:`Rows` of a plan, made once per device."""
    key = ("rows", device)
    if key not in plan.cache:
        source, target = [], []
        for call in plan.calls:
            if call.copied:
                start, length = torch.tensor(call.starts)[:, None], torch.tensor(call.lengths)[:, None]
                inside = torch.arange(call.length)
                rows = start + torch.minimum(inside, length - 1)
                source.append(rows.flatten())
                target.append(torch.where(inside < length, rows, plan.total).flatten())
        rows, targets = torch.cat(source), torch.cat(target)
        parts = (rows, targets, (targets == plan.total)[:, None])
        plan.cache[key] = Rows(*(upload(x, device) for x in parts))
    return plan.cache[key]


def batches(plan: Plan, *tensors: Tensor) -> list[tuple[Call, slice | Tensor, list[Tensor]]]:
    """Per call its rows in the result (``[N + 1, ...]``) and each tensor ``[N, ...]`` as ``[n, P, ...]``."""
    copied: list[Tensor] = []
    if any(call.copied for call in plan.calls):
        rows = copied_rows(plan, tensors[0].device)
        copied = [x.index_select(0, rows.source) for x in tensors]
    found, used = [], 0
    for call in plan.calls:
        size = call.length * len(call.starts)
        where: slice | Tensor
        if call.copied:
            parts = [x[used : used + size] for x in copied]
            where = rows.target[used : used + size]
            used += size
        else:
            where = slice(call.starts[0], call.starts[0] + size)
            parts = [x[where] for x in tensors]
        found.append((call, where, [x.unflatten(0, (-1, call.length)) for x in parts]))
    return found


def put(target: Tensor, where: slice | Tensor, value: Tensor) -> None:
    """Write ``value [n, P, ...]`` to rows of ``target [N + 1, ...]``."""
    if isinstance(where, slice):
        target[where].unflatten(0, value.shape[:2]).copy_(value)
    else:
        target.index_copy_(0, where, value.flatten(0, 1))


def _spare(x: Tensor, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
    """Uninitialised ``[N + 1, ...]``: the spare row takes what padding writes."""
    return x.new_empty((x.shape[0] + 1, *(x.shape[1:] if shape is None else shape)), dtype=dtype)


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """``q [N, H, D]``, ``k`` and ``v`` ``[N, K, D]`` to output ``[N, H, D]`` and log-sum-exp ``[N, H]``."""
    N, H, _ = q.shape
    results = []
    for call, where, parts in batches(plan, q, k, v):
        heads_first = [x.transpose(1, 2) for x in parts]
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(*heads_first, None, True, 0.0, True, False, scale=scale)
        lse = lse.view(-1, H, call.length).transpose(1, 2)
        if len(plan.calls) == 1 and not call.copied:
            return out.transpose(1, 2).reshape(q.shape), lse.reshape(N, H)
        results.append((where, out.transpose(1, 2), lse))
    all_out, all_lse = _spare(q), _spare(q, torch.float32, (H,))
    for where, out, lse in results:
        put(all_out, where, out)
        put(all_lse, where, lse)
    return all_out[:N], all_lse[:N]


def cudnn_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, scale: float
) -> Gradients:
    """Gradients of ``q``, ``k``, ``v`` from ``d_out [N, H, D]`` and the forward's results."""
    N = q.shape[0]
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # dropout's random state
    targets: Gradients | None = None
    padding_seen = 0
    for call, where, (*parts, lse_) in batches(plan, d_out, q, k, v, out, lse):
        if call.copied:  # probability exp(logit - inf) = 0: padding adds nothing to dk and dv
            rows = copied_rows(plan, q.device)
            size = call.length * len(call.starts)
            pad = rows.padding[padding_seen : padding_seen + size].view(-1, call.length, 1)
            lse_ = lse_.masked_fill(pad, float("inf"))
            padding_seen += size
        do_, q_, k_, v_, out_ = (x.transpose(1, 2) for x in parts)
        stats = lse_.transpose(1, 2).contiguous()[..., None]
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            do_, q_, k_, v_, out_, stats, unused, unused, None, None, None, call.length, call.length, 0.0, True,
            scale=scale,
        )  # fmt: skip
        if len(plan.calls) == 1 and not call.copied:
            return tuple(g.transpose(1, 2).reshape(x.shape) for g, x in zip(grads, (q, k, v), strict=True))
        if targets is None:
            targets = (_spare(q), _spare(k), _spare(v))
        for target, grad in zip(targets, grads, strict=True):
            put(target, where, grad.transpose(1, 2))
    assert targets is not None
    return tuple(x[:N] for x in targets)  # type: ignore[return-value]


# ---------------------------------------------------------------------- Flash on documents where they lie
def _cumulative(plan: Plan, device: torch.device) -> Tensor:
    """int32 ``[documents + 1]``: flat offset of each document."""
    key = ("cumulative", device)
    if key not in plan.cache:
        ends = torch.tensor([*plan.calls[0].starts, plan.total], dtype=torch.int32)
        plan.cache[key] = upload(ends, device)
    return plan.cache[key]


def flash_forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """As :func:`cudnn_forward`."""
    offsets, longest = _cumulative(plan, q.device), plan.calls[0].length
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, offsets, offsets, longest, longest, 0.0, True, False, scale=scale
    )
    return out, lse.t().contiguous()


def flash_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, scale: float
) -> Gradients:
    """As :func:`cudnn_backward`."""
    offsets, longest = _cumulative(plan, q.device), plan.calls[0].length
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # dropout's random state, unused
    unused = torch.empty(0, device=q.device)
    return aten._flash_attention_backward(
        d_out, q, k, v, out, lse.t().contiguous(), offsets, offsets, longest, longest, 0.0, True, state, unused,
        scale=scale,
    )  # fmt: skip
