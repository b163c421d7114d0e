"""From what a caller passes (layout, cu_seqlens, padding mask, position ids) to one :class:`DocumentLayout`."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.errors import InputError


def resolve_documents(
    batch: int,
    tokens: int,
    layout: DocumentLayout | None = None,
    cu_seqlens: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> DocumentLayout:
    """The documents of a ``[batch, tokens]`` batch; the first of the sources that says something wins.

    Args:
        layout: taken as it is.
        cu_seqlens: see :meth:`DocumentLayout.from_cu_seqlens`.
        attention_mask: ``[batch, tokens]``, 1 for tokens, 0 for padding at one or both ends of a row; padding becomes
            documents of its own, so the block grid starts at each row's first real token.
        position_ids: ``[batch, tokens]`` or ``[1, tokens]``; a document starts wherever they do not rise by one.

    Raises:
        InputError: shapes that do not match, holes in the mask, positions that do not start at 0.
    """
    if layout is not None:
        if (layout.batch, layout.tokens) != (batch, tokens):
            raise InputError(
                "layout", f"({layout.batch}, {layout.tokens})", f"the input's [B, T] = ({batch}, {tokens})"
            )
        return layout
    if cu_seqlens is not None:
        return DocumentLayout.from_cu_seqlens(cu_seqlens, batch, tokens)
    if attention_mask is not None:
        if tuple(attention_mask.shape) != (batch, tokens):
            raise InputError(
                "attention_mask",
                f"shape {tuple(attention_mask.shape)}",
                f"[B, T] = ({batch}, {tokens}), 1 token, 0 padding",
            )
        if not bool(attention_mask.all()):
            return DocumentLayout.from_lengths([_padded_row(row, i) for i, row in enumerate(attention_mask.bool())])
    if position_ids is not None:
        return _from_positions(position_ids.expand(batch, tokens))
    return DocumentLayout.single(batch, tokens)


def _padded_row(mask: Tensor, row: int) -> list[int]:
    """Lengths of leading padding, text and trailing padding, without empty ones."""
    where = mask.nonzero().flatten().tolist()
    if not where:
        return [len(mask)]
    first, last = where[0], where[-1] + 1
    if last - first != len(where):
        raise InputError("attention_mask", f"a hole in row {row}", "padding at the ends of a row only")
    return [n for n in (first, last - first, len(mask) - last) if n]


def _from_positions(position_ids: Tensor) -> DocumentLayout:
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    first = position_ids[starts]
    if bool((first != 0).any()):
        raise InputError(
            "position_ids", f"a document starting at position {int(first[first != 0][0])}", "documents that start at 0"
        )
    bounds = [[*row.nonzero().flatten().tolist(), position_ids.shape[1]] for row in starts]
    return DocumentLayout.from_lengths([[b - a for a, b in pairwise(row)] for row in bounds])
