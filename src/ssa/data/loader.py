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
from transformers import PreTrainedTokenizerFast

from ssa.data.packing import Row
from ssa.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from ssa.documents import IGNORE_INDEX, DocumentLayout
from ssa.errors import ConfigError, DataError, DataSourceError

SCHEMA = "ssa.data/1"
VERIFY_ROWS = 256  # read at once


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
        ConfigError: no such split, or no manifest (preparation did not finish).
        DataError: a folder of another format, or with other rows than its manifest says.
        DataSourceError: rows that cannot be read.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        self.path, self.split = Path(path), split
        self.manifest = _read_manifest(self.path / "manifest.json")
        try:
            splits = self.manifest["splits"]
            if split not in splits:
                raise ConfigError(f"{self.path}: split", repr(split), f"one of {sorted(splits)}")
            self.row_length, self.vocab_size = int(self.manifest["row_length"]), int(self.manifest["vocab_size"])
            self.fingerprint, rows = str(splits[split]["fingerprint"]), int(splits[split]["rows"])
        except (KeyError, TypeError) as error:
            got = f"a manifest with a part missing ({error})"
            raise DataError(str(self.path), got, f"schema {SCHEMA}", "preparing the data again") from error
        try:
            self._rows = datasets.load_from_disk(str(self.path / split)).with_format("numpy")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # absent, cut, or another JSON
            got = f"{type(error).__name__}: {error}"
            raise DataSourceError(str(self.path / split), got, "the rows of this split") from error
        if len(self._rows) != rows:
            got = f"{len(self._rows)} rows"
            raise DataError(str(self.path / split), got, f"{rows} rows", "preparing the data again")

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

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that made these rows.

        Raises:
            DataError: the one in the folder is another; both hashes are named.
        """
        folder = self.path / "tokenizer"
        found = load_tokenizer(str(folder))
        have, expected = tokenizer_fingerprint(found), self.manifest["tokenizer"]
        if have != expected:
            raise DataError(str(folder), f"hash {have}", f"{expected}, as the rows", "preparing the data again")
        return found

    def verify(self) -> None:
        """Read every row and compare with the fingerprint. Takes seconds per gigabyte.

        Raises:
            DataSourceError: the rows are not those that were written.
        """
        digest = hashlib.sha256()
        for found in self._rows.iter(VERIFY_ROWS):
            for ids, lengths in zip(found["input_ids"], found["lengths"], strict=True):
                digest.update(Row(np.asarray(ids, dtype=np.int32), tuple(map(int, lengths))).to_bytes())
        if digest.hexdigest() != self.fingerprint:
            where, got = str(self.path / self.split), f"fingerprint {digest.hexdigest()}"
            raise DataSourceError(where, got, self.fingerprint, "preparing the data again")


def _read_manifest(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(str(file.parent), "no manifest.json", "a folder that `ssa prepare` finished", "ssa prepare")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(str(file), f"unreadable JSON ({error})", f"schema {SCHEMA}") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise DataError(str(file), f"schema {schema!r}", SCHEMA, "preparing the data again")
    return manifest


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
        position = state.get("position")
        if not isinstance(position, int) or position < 0:
            raise DataSourceError(f"{self.dataset.path}: position", repr(position), "a number of rows", "another state")
        self.position = position

    def _row(self, index: int) -> int:
        epoch, offset = divmod(index, len(self.dataset))
        return int(_order(self.seed, epoch, len(self.dataset))[offset]) if self.shuffle else offset


@lru_cache(maxsize=4)  # a batch may span the end of an epoch
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """The rows in an epoch's order.

    Sorting by the generator's raw numbers, because numpy promises those, and not ``permutation``, for ever.
    """
    key = int.from_bytes(hashlib.blake2b(f"rows:{seed}:{epoch}".encode(), digest_size=16).digest(), "big")
    return np.argsort(np.random.Philox(key=key).random_raw(rows), kind="stable")
