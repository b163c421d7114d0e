"""Whole documents out of packed rows, and windows of one length out of documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssa.data.loader import Batch, PackedDataset
from ssa.documents import DocumentLayout
from ssa.errors import DataError


def read_documents(dataset: PackedDataset, bos: int | None, max_tokens: int | None = None) -> list[Tensor]:
    """The documents of a split, int64 ``[tokens]`` each, with the pieces that packing cut at row ends joined again.

    Args:
        dataset: packed rows.
        bos: id that begins every document; None if the tokenizer has none. Then a document that ends exactly at a
            row's end is joined with the next.
        max_tokens: cut each document after so many tokens.
    """
    parts: list[list[Tensor]] = []
    for row in range(len(dataset)):
        batch = dataset.batch([row])
        ids, first = batch.input_ids[0], 0
        for number, length in enumerate(batch.layout.lengths):
            piece, labels = ids[first : first + length], batch.labels[0, first : first + length]
            first += length
            if int(labels[0]) < 0:
                continue  # padding
            continues = number == 0 and parts and (bos is None or int(piece[0]) != bos)
            if continues:
                parts[-1].append(piece)
            else:
                parts.append([piece])
    return [torch.cat(pieces)[:max_tokens] for pieces in parts]


def windows(documents: Sequence[Tensor], length: int, count: int) -> Batch:
    """``count`` rows of ``length`` tokens, each one document, taken in turn from ``documents``.

    Raises:
        DataError: no document has ``length`` tokens.
    """
    found: list[Tensor] = []
    longest = max((len(document) for document in documents), default=0)
    for start in range(0, longest, length):
        found += [d[start : start + length] for d in documents if len(d) >= start + length]
        if len(found) >= count:
            break
    if not found:
        raise DataError("documents", f"at most {longest} tokens", f"one of at least {length}", "shorter lengths")
    ids = torch.stack(found[:count])
    rows = ids.shape[0]
    return Batch(ids, ids.clone(), DocumentLayout.single(rows, length), rows * (length - 1), rows)


def grouped(items: Sequence[Any], length: int, tokens_per_batch: int) -> list[Sequence[Any]]:
    """``items`` of ``length`` tokens each in groups of at most ``tokens_per_batch`` tokens, at least one a group."""
    size = max(1, tokens_per_batch // max(length, 1))
    return [items[i : i + size] for i in range(0, len(items), size)]
