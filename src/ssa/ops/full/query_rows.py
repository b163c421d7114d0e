"""A subset of a batch's query rows: the same window in some equally long neighbouring documents, several times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.errors import InputError


class Window(NamedTuple):
    """Rows ``[begin, end)`` of each of ``documents`` neighbouring documents of ``length`` tokens.

    Attributes:
        first: flat row where the first of the documents begins.
        documents, length: how many, how long each.
        begin, end: places inside each document; ``0 <= begin < end <= length``.
    """

    first: int
    documents: int
    length: int
    begin: int
    end: int

    @property
    def size(self) -> int:
        """Rows in one document."""
        return self.end - self.begin

    def documents_first(self) -> range:
        """Flat row where each of the documents begins."""
        return range(self.first, self.first + self.documents * self.length, self.length)

    def keys(self, x: Tensor, stop: int) -> Tensor:
        """The first ``stop`` rows of each document, ``[documents, stop, ...]``, of a flat ``x [N, ...]``; a view."""
        rows = x[self.first : self.first + self.documents * self.length]
        return rows.unflatten(0, (self.documents, self.length))[:, :stop]


def ranges(spans: Sequence[tuple[int, int]]) -> Tensor:
    """int64: the numbers from each first, as many as its size says, one after another; ``spans`` of (first, size)."""
    if not spans:
        return torch.empty(0, dtype=torch.int64)
    first, size = torch.tensor(spans, dtype=torch.int64).unbind(1)
    before = size.cumsum(0) - size
    return torch.arange(sum(n for _, n in spans)) + (first - before).repeat_interleave(size)


@dataclass(frozen=True)
class QueryRows:
    """Windows whose rows, window by window and document by document, are the R rows of the subset; none twice.

    Attributes:
        windows: in order.
    """

    windows: tuple[Window, ...]
    _cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def count(self) -> int:
        """R."""
        return sum(w.documents * w.size for w in self.windows)

    def spans(self) -> Iterator[tuple[Window, slice]]:
        """Each window and its rows of the subset."""
        ends = list(accumulate(w.documents * w.size for w in self.windows))
        for w, end in zip(self.windows, ends, strict=True):
            yield w, slice(end - w.documents * w.size, end)

    def squares(self) -> Iterator[tuple[int, slice]]:
        """Runs of windows of one size: the size, and their rows of the subset."""
        for size, run in groupby(self.spans(), key=lambda x: x[0].size):
            spans = [span for _, span in run]
            yield size, slice(spans[0].start, spans[-1].stop)

    def index(self, device: torch.device) -> Tensor:
        """int64 ``[R]``: flat row of each row of the subset."""

        spans = [(first + w.begin, w.size) for w in self.windows for first in w.documents_first()]
        return self.on(device, "index", lambda: ranges(spans))

    def place(self, total: int, device: torch.device) -> Tensor:
        """int32 ``[total]``: row of the subset of each flat row, -1 outside."""
        key = ("place", total, device)  # batches of other lengths may share the windows
        if key not in self._cache:
            place = torch.full((total,), -1, dtype=torch.int32, device=device)
            numbers = torch.arange(self.count, dtype=torch.int32, device=device)
            self._cache[key] = place.index_copy_(0, self.index(device), numbers)
        return self._cache[key]

    def on(self, device: torch.device, name: str, make: Callable[[], Tensor]) -> Tensor:
        """A tensor made once on the host and copied without waiting for the device."""
        if (name, device) not in self._cache:
            x = make()
            self._cache[name, device] = (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)
        return self._cache[name, device]

    def check(self, where: str, layout: DocumentLayout) -> None:
        """Raise :class:`InputError` unless every window lies in documents of ``layout`` and no row comes twice."""
        starts = dict(zip(accumulate(layout.lengths, initial=0), layout.lengths, strict=False))
        taken: dict[int, list[tuple[int, int]]] = {}
        for w in self.windows:
            documents = w.documents_first()
            if not 0 <= w.begin < w.end <= w.length or any(starts.get(d) != w.length for d in documents):
                raise InputError(f"{where}.rows", repr(w), "a window inside documents of the layout")
            for d in documents:
                taken.setdefault(d, []).append((w.begin, w.end))
        for d, windows in taken.items():
            ordered = sorted(windows)
            if any(a[1] > b[0] for a, b in pairwise(ordered)):
                raise InputError(f"{where}.rows", f"overlapping windows of the document at row {d}", "every row once")
