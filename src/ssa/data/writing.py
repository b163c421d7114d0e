"""Writing a split: tokenise, pack, account for every token, all within a bounded amount of memory."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerFast

from ssa.data.packing import Packer, Row
from ssa.errors import DiskError, SSAError

FEATURES = datasets.Features(
    {"input_ids": datasets.Sequence(datasets.Value("int32")), "lengths": datasets.Sequence(datasets.Value("int32"))}
)
BUFFER_TOKENS = 1 << 22  # rows that wait to be written, in tokens


@dataclass
class Account:
    """What became of a split's text; every token is in one of the counts.

    Attributes:
        documents: documents written; empty_documents: left out because they had no text.
        characters: of the documents written.
        text_tokens: from the text; special_tokens: bos and eos; padding: in the last row.
        rows: ``rows * row_length == text_tokens + special_tokens + padding``.
        fingerprint: SHA-256 of all rows.
    """

    documents: int = 0
    empty_documents: int = 0
    characters: int = 0
    text_tokens: int = 0
    special_tokens: int = 0
    padding: int = 0
    rows: int = 0
    fingerprint: str = ""


class SplitWriter:
    """Rows of one split, written to an Arrow file as documents come."""

    def __init__(self, path: Path, row_length: int, encoder: PreTrainedTokenizerFast) -> None:
        padding = encoder.pad_token_id if encoder.pad_token_id is not None else 0
        self.path, self.encoder = path, encoder
        self.account, self.packer = Account(), Packer(row_length, padding)
        buffer = max(1, min(1000, BUFFER_TOKENS // row_length))
        self.writer = ArrowWriter(path=str(path), features=FEATURES, writer_batch_size=buffer)
        self.digest = hashlib.sha256()
        self.before = [] if encoder.bos_token_id is None else [encoder.bos_token_id]
        self.after = [] if encoder.eos_token_id is None else [encoder.eos_token_id]

    def add(self, texts: Sequence[str]) -> None:
        """Tokenise and pack; a document becomes ``bos text eos``. Text that spells a special token stays text."""
        self.account.empty_documents += sum(not text for text in texts)
        if not (filled := [text for text in texts if text]):
            return
        encoded = self.encoder(filled, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for text, ids in zip(filled, encoded, strict=True):
            if not ids:  # some tokenizers drop white space
                self.account.empty_documents += 1
                continue
            self.account.documents += 1
            self.account.characters += len(text)
            self.account.text_tokens += len(ids)
            self.account.special_tokens += len(self.before) + len(self.after)
            self._write(self.packer.add([*self.before, *ids, *self.after]))

    def close(self) -> Account:
        """Write the last row and return what was written."""
        self._write(self.packer.flush())
        self.writer.finalize()
        self.account.fingerprint = self.digest.hexdigest()
        return self.account

    def _write(self, rows: Iterator[Row]) -> None:
        for row in rows:
            self.writer.write({"input_ids": row.input_ids, "lengths": np.asarray(row.lengths, dtype=np.int32)})
            self.digest.update(row.to_bytes())
            self.account.rows += 1
            self.account.padding += len(row.input_ids) - sum(row.lengths)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what a full or closed disk raises into :class:`DiskError`. Sources have errors of their own by then."""
    try:
        yield
    except SSAError:
        raise
    except OSError as error:
        hint = "freeing space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "another --out"
        raise DiskError(str(folder), str(error), "a folder that can be written", hint) from error


def sync(path: Path) -> None:
    """Wait until a file, or a folder with all its files, is on the disk, so that the manifest cannot precede it."""
    for inner in path.iterdir() if path.is_dir() else ():
        sync(inner)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
