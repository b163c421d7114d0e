"""Where tokens stand: from what transformers hands to an attention function to documents or cache lengths.

Shapes: B sequences, Q new tokens, C rows of keys (more than Q when there is a cache).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.errors import InputError
from ssa.model.interface.settings import remember
from ssa.ops.checks import reads_values

Value = TypeVar("Value")


def causal_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    config: Any = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """The mask that our attention receives: bool ``[B, C]``, True where a row of keys holds a token, or None for all.

    Never ``[Q, C]``: causality and documents are known otherwise. Registered with
    ``transformers.AttentionMaskInterface``, whose keyword arguments these are.

    Raises:
        InputError: a mask of another form, or a pattern other than causal.
    """
    where = 'attn_implementation="ssa"'
    if config is not None:
        remember(config)
    if use_vmap:
        raise InputError(where, "a mask function added to the causal one", "plain causal attention")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise InputError("attention_mask", f"{attention_mask.dim()} dimensions", "[B, T], 1 for tokens, 0 for padding")
    if mask_function is not None and q_length > 1 and not torch.compiler.is_compiling():
        _refuse_future(mask_function, q_length, q_offset, device, where)
    if attention_mask is None and not isinstance(q_offset, Tensor) and q_offset + q_length == kv_length:
        return None
    row = torch.arange(kv_length, device=device)
    filled = (row < q_offset + q_length).expand(batch_size, -1)
    if attention_mask is None:
        return filled
    given = attention_mask[:, :kv_length].to(device=device, dtype=torch.bool)
    return torch.nn.functional.pad(given, (0, kv_length - given.shape[1])) & filled


def _refuse_future(
    mask_function: Callable[..., Any], new: int, offset: int | Tensor, device: torch.device | str, where: str
) -> None:
    """Bidirectional patterns and overlays for images let a token see the next one."""
    query = torch.arange(new - 1, device=device) + offset
    zero = torch.zeros_like(query)
    if bool(torch.as_tensor(mask_function(zero, zero, query, query + 1)).any()):
        raise InputError(where, "a mask in which a token sees a later one", "plain causal attention")


class Memo:
    """The last result for the same tensors. Every layer of a forward pass receives the same mask and positions, and
    reading their values stops a GPU."""

    def __init__(self) -> None:
        self._last: tuple[tuple[Any, ...], Any] | None = None

    def get(self, tensors: tuple[Tensor | None, ...], key: tuple[Any, ...], make: Callable[[], Value]) -> Value:
        """``make()``, or its last result if ``tensors`` are the same unchanged objects and ``key`` is equal."""
        if any(x is not None and x.is_inference() for x in tensors):  # these do not tell whether they changed
            return make()
        last = self._last
        now = tuple((None, 0) if x is None else (x, x._version) for x in tensors)
        if last is not None and last[0][0] == key:
            same = zip(last[0][1], now, strict=True)
            if all((ref and ref()) is x and version == new for (ref, version), (x, new) in same):
                return last[1]
        value = make()
        held = tuple((None if x is None else weakref.ref(x), version) for x, version in now)
        self._last = ((key, held), value)
        return value


def documents(
    batch: int, tokens: int, mask: Tensor | None, position_ids: Tensor | None, cu_seqlens: Tensor | None
) -> DocumentLayout:
    """Documents of a forward pass without a past.

    A document starts where positions do not rise by one and where text meets padding, so the block grid of each row
    starts at its first real token. transformers' own rule for packed rows is the same.

    Args:
        mask: bool ``[B, T]``, False for padding; None for no padding.
        position_ids: ``[B, T]`` or ``[1, T]``; any first value, since RoPE is relative.
        cu_seqlens: cumulative lengths over the flat batch; wins over the others.

    Raises:
        InputError: shapes that do not match.
    """
    if cu_seqlens is not None:
        return DocumentLayout.from_cu_seqlens(cu_seqlens, batch, tokens)
    starts: Tensor | None = None
    if position_ids is not None:
        if position_ids.dim() != 2 or position_ids.shape[1] != tokens or position_ids.shape[0] not in (1, batch):
            raise InputError("position_ids", f"shape {tuple(position_ids.shape)}", f"[B, T] = ({batch}, {tokens})")
        position = position_ids.expand(batch, tokens)
        starts = position[:, 1:] != position[:, :-1] + 1
    if mask is not None:
        text = mask[:, 1:] & mask[:, :-1]
        edge = mask[:, 1:] != mask[:, :-1]
        starts = edge if starts is None else edge | (starts & text)
    if starts is None:
        return DocumentLayout.single(batch, tokens)
    starts = torch.nn.functional.pad(starts, (1, 0), value=True).cpu()
    bounds = [[*row.nonzero().flatten().tolist(), tokens] for row in starts]
    return DocumentLayout.from_lengths([[b - a for a, b in pairwise(row)] for row in bounds])


class CacheRows(NamedTuple):
    """Filled rows of a cache: ``lengths`` and ``starts`` int32 ``[B]``, see :mod:`ssa.ops.decode`.

    ``is_empty``: the new tokens are the first ones, whose documents are known, so this is no decoding.
    """

    lengths: Tensor
    starts: Tensor | None
    is_empty: bool


def cache_rows(batch: int, new: int, rows: int, mask: Tensor | None, device: torch.device) -> CacheRows:
    """Which of the ``rows`` rows of a cache are filled, ``new`` of them by this pass.

    transformers fills the rows of all sequences alike, so the lengths are equal; only the left padding differs.

    Raises:
        InputError: padding between tokens, as right padding leaves it when generation goes on.
    """
    if mask is None:
        return CacheRows(torch.full((batch,), rows, dtype=torch.int32, device=device), None, False)
    row = torch.arange(rows, device=device)
    last = (mask * (row + 1)).amax(1)
    lengths = last.amax().clamp(min=new).expand(batch)
    starts = torch.where(mask, row, rows).amin(1).minimum(lengths)
    if reads_values(mask):
        holes = (last > starts + mask.sum(1)).nonzero().flatten().tolist()
        if holes:
            raise InputError(
                "attention_mask", f"padding between the tokens of row {holes[0]}", "left padding", "padding_side='left'"
            )
    is_empty = new > 1 and int(lengths[0]) == new  # asks the device, in a prompt's passes only
    return CacheRows(lengths.to(torch.int32), starts.to(torch.int32), is_empty)
