"""Batches from packed rows, resumable from one integer at any number of processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from ssa.documents import IGNORE_INDEX, DocumentLayout
from ssa.errors import ConfigError, DataError, DataSourceError

SCHEMA = "ssa.data/1"


@dataclass(frozen=True)
class Batch:
    """Rows for one forward pass.

    Attributes:
        input_ids: int64 ``[B, T]``.
        labels: int64 ``[B, T]``, the ids themselves (the model shifts), -100 on padding.
        layout: documents; a row's padding is one document.
        targets: next-token targets that count.
        rows: B.
    """

    input_ids: Tensor
    labels: Tensor
    layout: DocumentLayout
    targets: int
    rows: int


class PackedDataset:
    """A split that ``ssa prepare`` wrote, memory-mapped.

    Attributes:
        path, split: where it is.
        manifest: the whole ``manifest.json``.
        fingerprint: hash of the split's content.
        row_length: tokens per row.
        vocab_size: ids are below it.

    Raises:
        ConfigError: no such folder or split.
        DataError: a folder of another format, or without a manifest (preparation did not finish).
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        self.path, self.split = Path(path), split
        file = self.path / "manifest.json"
        if not file.is_file():
            raise ConfigError(str(self.path), "no manifest.json", "a folder that `ssa prepare` finished", "ssa prepare")
        try:
            self.manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(str(file), f"unreadable JSON ({error})", f"schema {SCHEMA}") from error
        if self.manifest.get("schema") != SCHEMA:
            raise DataError(str(file), f"schema {self.manifest.get('schema')!r}", SCHEMA, "preparing the data again")
        if split not in self.manifest["splits"]:
            raise ConfigError(f"{self.path}: split", repr(split), f"one of {sorted(self.manifest['splits'])}")
        self.row_length = int(self.manifest["row_length"])
        self.vocab_size = int(self.manifest["vocab_size"])
        self.fingerprint = str(self.manifest["splits"][split]["fingerprint"])
        try:
            self._rows = datasets.load_from_disk(str(self.path / split)).with_format("numpy")
        except (OSError, ValueError) as error:
            raise DataSourceError(str(self.path / split), str(error), "the rows of this split") from error
        if len(self._rows) != self.manifest["splits"][split]["rows"]:
            expected = f"{self.manifest['splits'][split]['rows']} rows"
            raise DataError(str(self.path / split), f"{len(self._rows)} rows", expected, "preparing the data again")

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows with these numbers, in this order."""
        found = self._rows[list(rows)]
        ids = np.stack(found["input_ids"]).astype(np.int64)
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            bad = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise DataError(
                str(self.path), f"token id {bad}", f"0 <= id < {self.vocab_size}", "preparing the data again"
            )
        input_ids = torch.from_numpy(ids)
        labels, lengths, targets = input_ids.clone(), [], 0
        for i, documents in enumerate(found["lengths"]):
            text = int(sum(documents))
            labels[i, text:] = IGNORE_INDEX
            padding = [self.row_length - text] if text < self.row_length else []
            lengths.append([*map(int, documents), *padding])
            targets += text - len(documents)
        return Batch(input_ids, labels, DocumentLayout.from_lengths(lengths), targets, len(lengths))


class Loader:
    """Batches of one process; an iterator.

    The rows of all processes form one stream: epoch after epoch, each in an order that is a pure function of
    ``(seed, epoch)``. The position is the number of rows that all processes have taken, so a run resumes exactly, at
    another number of processes too.

    Args:
        dataset: what to read.
        rows_per_batch: rows per batch of this process.
        seed: of the order.
        rank, world_size: this process among all.
        start: position to start from, in rows.
        shuffle: False reads in the stored order.
        epochs: None goes on for ever; else the last batch may be smaller.
        limit: with ``epochs``, stop after so many rows.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        rows_per_batch: int,
        seed: int = 0,
        *,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        limit: int | None = None,
    ) -> None:
        if rows_per_batch < 1 or not 0 <= rank < world_size or start < 0:
            got = f"rows_per_batch {rows_per_batch}, rank {rank} of {world_size}, start {start}"
            raise ConfigError("Loader", got, "rows_per_batch >= 1, 0 <= rank < world_size, start >= 0")
        self.dataset, self.rows_per_batch, self.seed, self.shuffle = dataset, rows_per_batch, seed, shuffle
        self.rank, self.world_size, self.position = rank, world_size, start
        end = None if epochs is None else epochs * len(dataset)
        self.end = end if limit is None else min(limit, len(dataset) if end is None else end)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self.position + self.rank * self.rows_per_batch
        last = first + self.rows_per_batch
        if self.end is not None:
            last = min(last, self.end)
            if first >= last:
                raise StopIteration
        batch = self.dataset.batch([self._row(i) for i in range(first, last)])
        self.position += self.rows_per_batch * self.world_size
        return batch

    def state(self) -> dict[str, Any]:
        """Where the stream is, JSON-able."""
        return {"position": self.position, "seed": self.seed, "fingerprint": self.dataset.fingerprint}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`.

        Raises:
            DataSourceError: it belongs to other data or another order.
        """
        for name, have in (("fingerprint", self.dataset.fingerprint), ("seed", self.seed)):
            if state.get(name) != have:
                raise DataSourceError(
                    f"{self.dataset.path}: {name}",
                    have,
                    f"{state.get(name)}, as when the run was saved",
                    "the same data",
                )
        self.position = int(state["position"])

    def _row(self, index: int) -> int:
        epoch, offset = divmod(index, len(self.dataset))
        return int(_order(self.seed, epoch, len(self.dataset))[offset]) if self.shuffle else offset


@lru_cache(maxsize=4)  # a batch may span the end of an epoch
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    key = int.from_bytes(hashlib.blake2b(f"rows:{seed}:{epoch}".encode(), digest_size=16).digest(), "big")
    return np.random.Generator(np.random.Philox(key=key)).permutation(rows)
