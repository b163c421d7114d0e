"""Documents to rows of a fixed number of tokens, with nothing lost and every boundary kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ssa.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """One packed row.

    Attributes:
        input_ids: int32 ``[row_length]``; padding after ``sum(lengths)`` tokens in the last row of a split.
        lengths: lengths of the documents in the row, in order, each at least 1.
    """

    input_ids: np.ndarray
    lengths: tuple[int, ...]

    def to_bytes(self) -> bytes:
        """What fingerprints hash."""
        return self.input_ids.astype("<i4", copy=False).tobytes() + repr(self.lengths).encode()


@dataclass
class Packer:
    """Puts documents one after the other and cuts every ``row_length`` tokens.

    A document that crosses the end of a row goes on in the next row as a document of its own: its rest does not see its
    beginning. Invariant: the unpadded rows, joined, are the token stream.

    Attributes:
        row_length: tokens per row T, at least 2.
        padding_id: fills the last row.
    """

    row_length: int
    padding_id: int = 0
    _ids: list[np.ndarray] = field(default_factory=list)
    _lengths: list[int] = field(default_factory=list)
    _filled: int = 0

    def __post_init__(self) -> None:
        if self.row_length < 2:
            raise ConfigError("row_length", self.row_length, "at least 2 tokens")

    def add(self, tokens: Sequence[int] | np.ndarray) -> Iterator[Row]:
        """Append a document; yields the rows that it completes."""
        rest = np.asarray(tokens, dtype=np.int32)
        while len(rest):
            piece, rest = np.split(rest, [self.row_length - self._filled])
            self._ids.append(piece)
            self._lengths.append(len(piece))
            self._filled += len(piece)
            if self._filled == self.row_length:
                yield self._row()

    def flush(self) -> Iterator[Row]:
        """The last, partly filled row, padded; nothing if the stream ended with a full one."""
        if self._filled:
            self._ids.append(np.full(self.row_length - self._filled, self.padding_id, dtype=np.int32))
            yield self._row()

    def _row(self) -> Row:
        row = Row(np.concatenate(self._ids), tuple(self._lengths))
        self._ids, self._lengths, self._filled = [], [], 0
        return row
