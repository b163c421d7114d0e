"""Argument checks shared by the public operations.

Shapes, dtypes and devices are checked always. *Values* (block indices, finiteness) are read on the CPU always and on
a GPU only with ``SSA_CHECK=1`` in the environment, because reading them stops the device.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.errors import InputError
from ssa.ops.spec import BLOCK_SIZES, is_integer

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def reads_values(x: Tensor) -> bool:
    """Whether checks may look at the values of ``x``."""
    return x.device.type == "cpu" or os.environ.get("SSA_CHECK") == "1"


def check_qkv(where: str, q: Tensor, k: Tensor, v: Tensor | None = None) -> None:
    """``q [B, T, H, D]``, ``k`` and ``v`` ``[B, T, K, D]``: one dtype, one device, H a multiple of K."""
    named = [("q", q), ("k", k)] + ([("v", v)] if v is not None else [])
    for name, x in named:
        if x.dim() != 4:
            raise InputError(where, f"{name} of shape {tuple(x.shape)}", "4 dimensions [B, T, heads, D]")
        if x.dtype not in DTYPES:
            raise InputError(where, f"{name} of dtype {x.dtype}", f"one of {[str(d) for d in DTYPES]}")
        if x.dtype != q.dtype:
            raise InputError(where, f"q of dtype {q.dtype} and {name} of {x.dtype}", "one dtype", f"{name}.to(q.dtype)")
        if x.device != q.device:
            raise InputError(where, f"q on {q.device} and {name} on {x.device}", "one device")
        if 0 in x.shape:
            raise InputError(where, f"{name} of shape {tuple(x.shape)} (an empty dimension)", "no empty dimension")
        if x.shape[:2] != q.shape[:2] or x.shape[3] != q.shape[3]:
            raise InputError(
                where, f"q {tuple(q.shape)} and {name} {tuple(x.shape)}", "equal B, T and head dimension D"
            )
        if name != "q" and x.shape[2] != k.shape[2]:
            raise InputError(
                where, f"k with {k.shape[2]} heads and {name} with {x.shape[2]}", "equal numbers of KV heads"
            )
    if q.shape[2] % k.shape[2]:
        raise InputError(
            where, f"{q.shape[2]} query heads and {k.shape[2]} KV heads", "query heads divisible by KV heads"
        )
    if os.environ.get("SSA_CHECK") == "1":
        for name, x in named:
            bad = (~torch.isfinite(x)).nonzero()
            if len(bad):
                raise InputError(
                    where, f"non-finite {name} at [B, T, head, D] index {bad[0].tolist()}", "finite values"
                )


def resolve_layout(where: str, q: Tensor, layout: DocumentLayout | None) -> DocumentLayout:
    """The given layout, checked against ``q``, or one document per row."""
    if layout is None:
        return DocumentLayout.single(q.shape[0], q.shape[1])
    if not isinstance(layout, DocumentLayout):
        raise InputError(
            f"{where}.layout", type(layout).__name__, "a DocumentLayout or None", "DocumentLayout.from_cu_seqlens"
        )
    layout.check(q, where)
    return layout


def resolve_scale(where: str, q: Tensor, scale: float | None) -> float:
    """The logit scale: ``D ** -0.5`` unless given."""
    if scale is None:
        return float(q.shape[-1] ** -0.5)
    if not 0 < scale < float("inf"):
        raise InputError(f"{where}.scale", scale, "a positive finite number")
    return float(scale)


def check_positive(where: str, value: int) -> None:
    """``value`` is an integer of at least 1."""
    if not is_integer(value) or value < 1:
        raise InputError(where, repr(value), "an integer of at least 1")


def check_block_indices(where: str, block_indices: Tensor, k: Tensor, block_size: int, layout: DocumentLayout) -> None:
    """``block_indices [B, T, K, n]``: integers; -1 or a block of the query's document that is not in its future; none
    twice (its tokens would count twice in the softmax)."""
    if not is_integer(block_size) or block_size not in BLOCK_SIZES:
        raise InputError(f"{where}.block_size", repr(block_size), f"an integer out of {BLOCK_SIZES}")
    where = f"{where}.block_indices"
    if block_indices.dtype not in (torch.int32, torch.int64):
        raise InputError(where, f"dtype {block_indices.dtype}", "int32 or int64")
    if block_indices.dim() != 4 or block_indices.shape[:3] != k.shape[:3] or not block_indices.shape[3]:
        raise InputError(
            where,
            f"shape {tuple(block_indices.shape)}",
            f"[B, T, K, num_blocks] = {(*k.shape[:3], 'n >= 1')}",
        )
    if block_indices.device != k.device:
        raise InputError(where, f"device {block_indices.device}", f"the tensors' {k.device}")
    if not reads_values(block_indices):
        return
    own = (layout.positions(k.device) // block_size)[:, :, None, None]
    for bad, expected in (
        (block_indices < -1, "-1 (nothing) or a block index"),
        (block_indices > own, "no block after the query's own (causality)"),
    ):
        if bool(bad.any()):
            at = bad.nonzero()[0].tolist()
            raise InputError(
                where,
                f"index {int(block_indices[tuple(at)])} at [B, T, K, slot] {at} (own block {int(own[at[0], at[1]])})",
                expected,
            )
    empty = ~(block_indices >= 0).any(-1)
    if bool(empty.any()):
        raise InputError(
            where,
            f"no block at all for [B, T, K] {empty.nonzero()[0].tolist()}",
            "at least the own block for every query",
        )
    ascending = block_indices.sort(-1).values
    twice = (ascending[..., 1:] == ascending[..., :-1]) & (ascending[..., 1:] >= 0)
    if bool(twice.any()):
        at = twice.nonzero()[0].tolist()
        raise InputError(
            where,
            f"block {int(ascending[tuple(at)])} more than once at [B, T, K] {at[:3]}",
            "each block at most once (-1 fills unused slots)",
        )
