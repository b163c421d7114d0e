"""``prepare``: text to tokenised, packed rows on disk."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerFast

from ssa._version import __version__
from ssa.data.corpus import STDLIB, Document, Problems, iter_documents, source_files, split_of
from ssa.data.loader import SCHEMA
from ssa.data.packing import Packer
from ssa.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from ssa.errors import ConfigError, DataError

SPLITS = ("train", "valid")
TOKENIZE_AT_ONCE = 64  # documents

FEATURES = datasets.Features(
    {"input_ids": datasets.Sequence(datasets.Value("int32")), "lengths": datasets.Sequence(datasets.Value("int32"))}
)


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


def prepare(
    sources: Sequence[str],
    out: str | Path,
    *,
    valid_sources: Sequence[str] = (),
    row_length: int = 1024,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    valid_fraction: float = 0.02,
    text_key: str = "text",
    max_skips: int = 0,
    overwrite: bool = False,
    download: bool = False,
) -> dict[str, Any]:
    """Tokenise, split and pack ``sources`` into the folder ``out``; returns its manifest (``ssa.data/1``).

    Args:
        sources: see :func:`ssa.data.iter_documents`.
        out: folder to write. A finished one is only replaced with ``overwrite``; the manifest is written last, so a
            half-written one is never taken for finished.
        valid_sources: the validation text; without it ``valid_fraction`` of the documents, chosen by a hash.
        row_length: tokens per row T.
        tokenizer: folder or cached hub name; None trains a byte-level BPE of ``vocab_size`` on the training text.
        text_key: field of a record that holds the text.
        max_skips: malformed records to skip and count before giving up.
        download: allow fetching a tokenizer by hub name.

    Raises:
        ConfigError: values out of range, a finished output folder.
        DataError, DataSourceError: what is wrong with the input.
    """
    out = Path(out)
    if not 0.0 <= valid_fraction < 1.0:
        raise ConfigError("valid_fraction", valid_fraction, "at least 0 and below 1")
    if not sources:
        raise ConfigError("sources", "none", "at least one", f"{STDLIB}, a file or a folder")
    Packer(row_length)  # refuse the length before any work
    _clear(out, overwrite)
    plan = _Plan(tuple(sources), tuple(valid_sources), valid_fraction, text_key, max_skips)
    if tokenizer is None:
        encoder = train_tokenizer((d.text for split, d in plan.documents() if split == "train"), vocab_size)
    else:
        encoder = load_tokenizer(tokenizer, download=download)
    out.mkdir(parents=True, exist_ok=True)
    problems = Problems(max_skips)
    accounts = _write_splits(plan, encoder, row_length, out, problems)
    encoder.save_pretrained(out / "tokenizer")
    manifest = {
        "schema": SCHEMA,
        "row_length": row_length,
        "vocab_size": len(encoder),
        "tokenizer": tokenizer_fingerprint(encoder),
        "splits": {name: asdict(account) for name, account in accounts.items()},
        "skipped_records": problems.skipped,
        "sources": [entry for source in (*sources, *valid_sources) for entry in _describe(source)],
        "options": {"valid_fraction": valid_fraction, "text_key": text_key, "tokenizer": tokenizer},
        "versions": {"ssa": __version__, "datasets": datasets.__version__},
    }
    temporary = out / ".manifest.json.tmp"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, out / "manifest.json")
    return manifest


@dataclass(frozen=True)
class _Plan:
    sources: tuple[str, ...]
    valid_sources: tuple[str, ...]
    valid_fraction: float
    text_key: str
    max_skips: int

    def documents(self, problems: Problems | None = None) -> Iterator[tuple[str, Document]]:
        """``(split, document)`` in order; read twice if a tokenizer is trained."""
        problems = problems or Problems(self.max_skips)
        for document in iter_documents(self.sources, text_key=self.text_key, problems=problems):
            by_hash = not self.valid_sources and split_of(document.source, self.valid_fraction) == "valid"
            yield ("valid" if by_hash else "train"), document
        for document in iter_documents(self.valid_sources, text_key=self.text_key, problems=problems):
            yield "valid", document


def _clear(out: Path, overwrite: bool) -> None:
    """Make way: nothing there, a half-written preparation, or a finished one with ``overwrite``."""
    if not out.exists():
        return
    if (out / "manifest.json").is_file():
        if not overwrite:
            raise ConfigError(str(out), "finished data", "an empty or new folder", "--overwrite or another --out")
        (out / "manifest.json").unlink()
    strangers = [p.name for p in out.iterdir() if p.name not in (*SPLITS, "tokenizer", ".manifest.json.tmp", ".tmp")]
    if strangers:
        raise ConfigError(str(out), f"a folder that holds {strangers[0]!r}", "an empty or new folder", "another --out")
    for part in out.iterdir():
        shutil.rmtree(part) if part.is_dir() else part.unlink()


def _write_splits(
    plan: _Plan, encoder: PreTrainedTokenizerFast, row_length: int, out: Path, problems: Problems
) -> dict[str, Account]:
    """Pack both splits in one pass over the text; splits without documents are left out."""
    scratch = out / ".tmp"
    scratch.mkdir(exist_ok=True)
    padding = encoder.pad_token_id if encoder.pad_token_id is not None else 0
    writers = {name: _SplitWriter(scratch / f"{name}.arrow", Packer(row_length, padding), encoder) for name in SPLITS}
    stream = plan.documents(problems)
    while chunk := list(islice(stream, TOKENIZE_AT_ONCE)):
        for name in SPLITS:
            writers[name].add([document.text for split, document in chunk if split == name])
    accounts = {name: writer.close() for name, writer in writers.items()}
    if not accounts["train"].documents:
        raise DataError(", ".join(plan.sources), "no document with text for training", "at least one")
    accounts = {name: account for name, account in accounts.items() if account.documents}
    for name in accounts:
        datasets.Dataset.from_file(str(scratch / f"{name}.arrow")).save_to_disk(str(out / name))
    shutil.rmtree(scratch)
    return accounts


class _SplitWriter:
    def __init__(self, path: Path, packer: Packer, encoder: PreTrainedTokenizerFast) -> None:
        self.account, self.packer, self.encoder = Account(), packer, encoder
        self.writer = ArrowWriter(path=str(path), features=FEATURES)
        self.digest = hashlib.sha256()
        self.before = [] if encoder.bos_token_id is None else [encoder.bos_token_id]
        self.after = [] if encoder.eos_token_id is None else [encoder.eos_token_id]

    def add(self, texts: list[str]) -> None:
        """Tokenise and pack; a document becomes ``bos text eos``."""
        filled = [text for text in texts if text]
        self.account.empty_documents += len(texts) - len(filled)
        if not filled:
            return
        for text, ids in zip(filled, self.encoder(filled, add_special_tokens=False)["input_ids"], strict=True):
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

    def _write(self, rows: Iterator[Any]) -> None:
        for row in rows:
            self.writer.write({"input_ids": row.input_ids, "lengths": np.asarray(row.lengths, dtype=np.int32)})
            self.digest.update(row.input_ids.tobytes() + repr(row.lengths).encode())
            self.account.rows += 1
            self.account.padding += len(row.input_ids) - sum(row.lengths)


def _describe(source: str) -> list[dict[str, Any]]:
    """Name, size and SHA-256 of each local file, so that a result can name its input."""
    if source == STDLIB or source.startswith("hub:"):
        return [{"source": source}]
    entries = []
    for path in source_files(source):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        entries.append({"source": path.name, "bytes": path.stat().st_size, "sha256": digest})
    return entries
