"""Document boundaries of a packed batch: the one object that both attention streams, positions, labels and the
block grid read, so that they cannot disagree about which tokens belong together.

A batch has ``B`` rows of ``T`` tokens. Rows are cut into documents; a document never crosses a row. Seen flat,
a batch is ``B * T`` tokens and a list of document lengths that sums to it.

Block grid: blocks of ``S`` tokens restart at every document (paper section 3). Block ``n`` of a query means the
tokens ``[n*S, (n+1)*S)`` of the *query's own document*. Indices are therefore the same whether a document is
packed, padded or alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby, pairwise
from typing import Any, cast

import torch
from torch import Tensor

from ssa.errors import InputError

IGNORE_INDEX = -100  # label value that the losses skip (PyTorch's and transformers' convention)


Run = tuple[int, int, int]  # first flat row, number of documents, their common length


def run_view(x: Tensor, run: Run) -> Tensor:
    """``x [B, T, ...]`` restricted to a run of equally long documents, ``[documents, length, ...]``.

    A view, so it can be written to, if ``x`` is contiguous.
    """
    first, count, length = run
    return x.reshape(-1, *x.shape[2:])[first : first + count * length].unflatten(0, (count, length))


@dataclass(frozen=True)
class BlockGrid:
    """Blocks of one size over a flat batch; ids count the blocks of all documents in order.

    Attributes:
        num_blocks: number of blocks in the batch.
        block_start: int32 ``[num_blocks + 1]``, flat row of each block's first token; the last entry is ``B*T``.
            Blocks tile the batch, so block ``i`` ends where ``i + 1`` starts (a document's last may be short).
        first_block: int32 ``[B*T]``, id of block 0 of each token's document: global id = ``first_block + n``.
        row_blocks: ids of each row's first block and, last, ``num_blocks``; ``B + 1`` host integers.
    """

    num_blocks: int
    block_start: Tensor
    first_block: Tensor
    row_blocks: tuple[int, ...]


@dataclass(frozen=True)
class DocumentLayout:
    """Which tokens of a ``[B, T]`` batch form a document. Host-side and immutable; tensors are made on demand.

    Attributes:
        lengths: document lengths in flat order; each at least 1; sum ``batch * tokens``.
        batch: rows B.
        tokens: tokens per row T.

    Build one with :meth:`single`, :meth:`from_lengths` or :meth:`from_cu_seqlens`.
    """

    lengths: tuple[int, ...]
    batch: int
    tokens: int
    _cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.batch < 1 or self.tokens < 1:
            raise InputError(
                "DocumentLayout",
                f"batch {self.batch}, tokens {self.tokens}",
                "both at least 1 (an empty sequence has no attention)",
            )
        filled = 0
        for i, n in enumerate(self.lengths):
            if n < 1:
                raise InputError(
                    "DocumentLayout.lengths",
                    f"length {n} of document {i}",
                    "at least 1",
                    "dropping empty documents",
                )
            if filled + n > self.tokens:
                raise InputError(
                    "DocumentLayout.lengths",
                    f"document {i} crossing the end of a row of {self.tokens} tokens",
                    "documents inside one row",
                    "packing the batch into rows first, each row starting a document",
                )
            filled = (filled + n) % self.tokens
        if sum(self.lengths) != self.batch * self.tokens:
            raise InputError(
                "DocumentLayout.lengths",
                f"sum {sum(self.lengths)}",
                f"batch * tokens = {self.batch * self.tokens}",
            )

    # ------------------------------------------------------------------ construction
    @classmethod
    def single(cls, batch: int, tokens: int) -> DocumentLayout:
        """Every row is one document."""
        return cls((tokens,) * max(batch, 0), batch, tokens)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | Sequence[Sequence[int]]) -> DocumentLayout:
        """From the document lengths of one row, or of each row (rows must have equal sums)."""
        where = "DocumentLayout.from_lengths"
        if not len(lengths):
            raise InputError(where, "no lengths", "at least one document")
        rows = cast("list[Sequence[int]]", list(lengths) if isinstance(lengths[0], Sequence) else [lengths])
        for i, row in enumerate(rows):
            if not isinstance(row, Sequence) or not all(isinstance(n, int) for n in row):
                raise InputError(where, f"{row!r} as row {i}", "document lengths as Python integers", "x.tolist()")
        sums = {sum(row) for row in rows}
        if len(sums) != 1:
            raise InputError(
                where,
                f"rows of {sorted(sums)} tokens",
                "rows of equal length",
                "padding the shorter rows with a document of their own",
            )
        return cls(tuple(n for row in rows for n in row), len(rows), sums.pop())

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, batch: int = 1, tokens: int | None = None) -> DocumentLayout:
        """From cumulative lengths over the flat batch, ``[0, n0, n0+n1, ..., batch * tokens]``, integer, 1-D.

        With ``batch > 1`` the row boundaries ``tokens, 2*tokens, ...`` must be among the entries.
        Copies the values to the host once (a device synchronisation if they live on a GPU).
        """
        where = "DocumentLayout.from_cu_seqlens"
        if batch < 1:
            raise InputError(where, f"batch {batch}", "at least 1")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
            raise InputError(where, f"shape {tuple(cu_seqlens.shape)}", "1-D with at least two entries")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise InputError(where, f"dtype {cu_seqlens.dtype}", "int32 or int64", "cu_seqlens.to(torch.int32)")
        cu = cu_seqlens.tolist()
        if cu[0] != 0:
            raise InputError(where, f"first entry {cu[0]}", "0")
        for i in range(1, len(cu)):
            if cu[i] <= cu[i - 1]:
                what = "duplicate entry (an empty document)" if cu[i] == cu[i - 1] else "decreasing entry"
                raise InputError(where, f"{what} {cu[i]} at index {i}", "strictly increasing entries")
        total = cu[-1] if tokens is None else batch * tokens
        if cu[-1] != total or total % batch:
            raise InputError(
                where, f"last entry {cu[-1]}", f"the number of tokens {total}, a multiple of batch {batch}"
            )
        return cls(tuple(b - a for a, b in pairwise(cu)), batch, total // batch)

    # ------------------------------------------------------------------ what it says
    @property
    def total(self) -> int:
        """Tokens in the batch, ``B * T``."""
        return self.batch * self.tokens

    @property
    def max_length(self) -> int:
        """Length of the longest document."""
        return max(self.lengths)

    @property
    def is_single(self) -> bool:
        """True if every row is one document."""
        return len(self.lengths) == self.batch

    def cu_seqlens(self, device: torch.device | str = "cpu") -> Tensor:
        """int32 ``[documents + 1]``: flat offset of each document."""
        return self._on(device, "cu", lambda: torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32))

    def starts(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 ``[B, T]``: flat row of the first token of each token's document."""

        def make() -> Tensor:
            first = torch.tensor([0, *accumulate(self.lengths)][:-1])
            return first.repeat_interleave(torch.tensor(self.lengths)).view(self.batch, self.tokens)

        return self._on(device, "starts", make)

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 ``[B, T]``: position of each token inside its document, from 0 (RoPE positions)."""
        return self._on(
            device,
            "positions",
            lambda: torch.arange(self.total).view(self.batch, self.tokens) - self.starts(),
        )

    def document_ids(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 ``[B, T]``: number of each token's document, counted over the flat batch."""

        def make() -> Tensor:
            lengths = torch.tensor(self.lengths)
            return torch.arange(len(self.lengths)).repeat_interleave(lengths).view(self.batch, self.tokens)

        return self._on(device, "ids", make)

    def next_token_labels(self, input_ids: Tensor) -> Tensor:
        """Targets ``[B, T]``: the next token, ``IGNORE_INDEX`` at each document's last token (nothing crosses)."""
        self.check(input_ids, "DocumentLayout.next_token_labels")
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        labels[:, :-1] = input_ids[:, 1:]
        last = self.cu_seqlens(input_ids.device)[1:].long() - 1
        return labels.view(-1).index_fill(0, last, IGNORE_INDEX).view_as(input_ids)

    def block_grid(self, block_size: int, device: torch.device | str = "cpu") -> BlockGrid:
        """The grid of blocks of ``block_size`` tokens over all documents of the batch."""
        if block_size < 1:
            raise InputError("DocumentLayout.block_grid.block_size", block_size, "at least 1")

        def make() -> BlockGrid:
            lengths = torch.tensor(self.lengths)
            counts = (lengths + block_size - 1) // block_size
            first = torch.cumsum(counts, 0) - counts
            inside = torch.arange(int(counts.sum())) - first.repeat_interleave(counts)
            offsets = torch.cumsum(lengths, 0) - lengths
            start = offsets.repeat_interleave(counts) + inside * block_size
            start = torch.cat([start, torch.tensor([self.total])]).to(torch.int32)
            first_block = first.repeat_interleave(lengths).to(torch.int32)
            row_blocks = (*first_block[:: self.tokens].tolist(), len(inside))
            start, first_block = (x.to(device, non_blocking=True) for x in (start, first_block))
            return BlockGrid(len(inside), start, first_block, row_blocks)

        key = ("grid", block_size, str(device))
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def runs(self) -> Iterator[Run]:
        """Runs of equally long neighbouring documents, ``(first flat row, documents, length)``; see :func:`run_view`.

        Dense operations work run by run, so that they cost the sum of squared document lengths without padding.
        """
        row = 0
        for length, group in groupby(self.lengths):
            count = sum(1 for _ in group)
            yield row, count, length
            row += count * length

    def check(self, x: Tensor, where: str) -> None:
        """Raise :class:`InputError` unless the first two dimensions of ``x`` are ``[B, T]``."""
        if tuple(x.shape[:2]) != (self.batch, self.tokens):
            raise InputError(
                where,
                f"a tensor of {tuple(x.shape[:2])} [B, T]",
                f"the layout's ({self.batch}, {self.tokens})",
            )

    def _on(self, device: torch.device | str, name: str, make: Any) -> Tensor:
        key = (name, str(device))
        if key not in self._cache:
            self._cache[key] = make().to(device, non_blocking=True)
        return self._cache[key]
