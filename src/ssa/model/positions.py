"""Where the sequences of a key-value cache stand (:mod:`ssa.model.cache`).

Shapes: B sequences, N new tokens. Every sequence has the same number of rows, as in transformers; ``starts`` says where
its left padding ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssa.errors import InputError
from ssa.ops.checks import reads_values


@dataclass
class Positions:
    """Where the sequences of a cache stand; one object for all its layers.

    The host knows how many rows are filled, because all sequences grow alike; the device holds the same number, so
    that kernels and captured graphs read it there and nobody waits.

    Attributes:
        capacity: rows of a static cache, None for a dynamic one.
        length: filled rows; first: the smallest start; begun: whether each sequence has had a token.
        lengths: int32 ``[B]``, ``length`` on the device; changed in place only.
        starts: int32 ``[B]``, each sequence's first real row, None where nothing is padded.
        rows: int64 ``[N]``, where the newest tokens are written in a static cache.
    """

    capacity: int | None
    length: int = 0
    first: int = 0
    begun: bool = True
    lengths: Tensor | None = None
    starts: Tensor | None = None
    rows: Tensor | None = None

    def advance(self, batch: int, new: int, device: torch.device) -> None:
        """Make room for ``new`` tokens of each sequence. Their rows hold nothing yet."""
        if self.lengths is None:
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        if len(self.lengths) != batch or self.lengths.device != device:
            raise InputError(
                "BlockCache",
                f"{batch} sequences on {device}",
                f"the cache's {len(self.lengths)} on {self.lengths.device}",
                "a new cache, cache.batch_select_indices or cache.batch_repeat_interleave",
            )
        if self.capacity is not None and self.length + new > self.capacity:
            raise InputError(
                "BlockCache",
                f"{self.length} + {new} tokens",
                f"at most its capacity of {self.capacity}",
                "a larger one",
            )
        self.length += new
        self.lengths.add_(new)
        if self.capacity is not None:
            self.rows = self.lengths[0].long() - new + torch.arange(new, device=device)

    def places(self, new: int) -> Tensor:
        """Place of each of the newest tokens in its sequence (RoPE positions), int64 ``[B, new]``; 0 in the padding."""
        assert self.lengths is not None
        first = self.lengths - new if self.starts is None else self.lengths - new - self.starts
        return (first.long()[:, None] + torch.arange(new, device=first.device)).clamp(min=0)

    def set_padding(self, mask: Tensor | None, new: int) -> None:
        """Take the left padding from a mask over all rows, those of the ``new`` tokens included (not yet advanced).

        Reads the mask on the host where several tokens are new or some sequence had none so far; a mask beside a
        single token says nothing new.

        Args:
            mask: ``[B, length + new]``, 1 for tokens, 0 for padding; None for no padding.

        Raises:
            InputError: another shape, padding after a token.
        """
        if mask is None or (new == 1 and self.begun and self.length and not reads_values(mask)):
            return
        rows = self.length + new
        if mask.dim() != 2 or mask.shape[1] != rows:
            raise InputError(
                "attention_mask",
                f"shape {tuple(mask.shape)}",
                f"[B, {rows}]: {self.length} cached and {new} new tokens, 1 token, 0 padding",
            )
        starts = (mask == 0).long().cumprod(1).sum(1)
        holes = (mask != 0).sum(1) != rows - starts
        if bool(holes.any()):
            raise InputError(
                "attention_mask",
                f"padding after the first token of row {int(holes.nonzero()[0])}",
                "padding on the left only, where a cache is used",
                "padding_side='left'",
            )
        before = 0 if self.starts is None else self.starts
        if self.length and bool((starts.clamp(max=self.length) != before).any()):
            raise InputError("attention_mask", "other padding than the cached tokens had", "the same left padding")
        self.begun, self.first = bool((starts < rows).all()), int(starts.min())
        if self.starts is not None:
            self.starts.copy_(starts)
        elif bool(starts.any()):
            self.starts = starts.to(torch.int32)

    def crop(self, length: int) -> None:
        """Forget the rows from ``length`` on."""
        if self.lengths is not None and length < self.length:
            self.lengths.sub_(self.length - length)
            self.length = length

    def select(self, index: Tensor) -> None:
        """Sequences ``index`` in the place of all; in place where their number stays."""
        self.lengths, self.starts = selected(self.lengths, index), selected(self.starts, index)

    def reset(self) -> None:
        """No tokens; the tensors keep their addresses."""
        self.length, self.first, self.begun = 0, 0, True
        for x in (self.lengths, self.starts):
            if x is not None:
                x.zero_()


def selected(x: Tensor | None, index: Tensor, rows: int | None = None) -> Tensor | None:
    """``x[index]``, written over ``x`` (its first ``rows`` rows) where the number of sequences stays."""
    if x is None:
        return None
    if len(index) != len(x):
        return x.index_select(0, index)
    part = x if rows is None else x[:, :rows]
    part.copy_(part.index_select(0, index))
    return x
