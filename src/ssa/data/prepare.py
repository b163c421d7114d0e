"""``prepare``: text to tokenised, packed rows on disk."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import transformers
from transformers import PreTrainedTokenizerFast

from ssa._version import __version__
from ssa.data.corpus import STDLIB, Document, Problems, iter_documents, split_of
from ssa.data.files import Limits
from ssa.data.loader import SCHEMA
from ssa.data.lock import LOCK, folder_lock
from ssa.data.packing import Packer
from ssa.data.provenance import check_held_out, check_unchanged, describe, stamps
from ssa.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer, vocabulary_size
from ssa.data.writing import Account, SplitWriter, disk_errors, sync
from ssa.errors import ConfigError, DataError

SPLITS = ("train", "valid")
TOKENIZER, MANIFEST, SCRATCH = "tokenizer", "manifest.json", ".tmp"
TOKENIZE_DOCUMENTS, TOKENIZE_CHARACTERS = 64, 1 << 22  # at once; whichever is reached first


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
    limits: Limits | None = None,
    overwrite: bool = False,
    download: bool = False,
) -> dict[str, Any]:
    """Tokenise, split and pack ``sources`` into the folder ``out``; returns its manifest (``ssa.data/1``).

    Nothing in ``out`` changes before the new data are complete; then they take the place of the old, manifest last.

    Args:
        sources: see :func:`ssa.data.iter_documents`.
        out: folder to write. Finished data in it are only replaced with ``overwrite``, half-written ones always.
        valid_sources: the validation text; without it ``valid_fraction`` of the documents, chosen by a hash.
        row_length: tokens per row T.
        tokenizer: folder or cached hub name; None trains a byte-level BPE of ``vocab_size`` on the training text.
        text_key: field of a record that holds the text.
        max_skips: malformed records to skip and count before giving up.
        limits: what one file may cost to read.
        download: allow fetching a tokenizer by hub name.

    Raises:
        ConfigError: values out of range, a finished output folder, validation text that is training text.
        DataError, DataSourceError: what is wrong with the input.
        DiskError: ``out`` cannot be written.
    """
    out = Path(out)
    plan = _Plan(tuple(sources), tuple(valid_sources), valid_fraction, text_key, max_skips, limits or Limits())
    plan.check()
    Packer(row_length)  # refuse the length before any work
    _check_out(out, overwrite)
    before = stamps(plan.all_sources)
    problems = Problems(max_skips)
    with disk_errors(out), _workshop(out) as scratch:
        encoder = _tokenizer(plan, tokenizer, vocab_size, download)
        accounts = _write_splits(plan, encoder, row_length, scratch, problems)
        encoder.save_pretrained(scratch / TOKENIZER)
        check_unchanged(before, stamps(plan.all_sources))
        manifest = {
            "schema": SCHEMA,
            "row_length": row_length,
            "vocab_size": vocabulary_size(encoder),
            "tokenizer": tokenizer_fingerprint(load_tokenizer(str(scratch / TOKENIZER))),  # as readers will see it
            "splits": {name: asdict(account) for name, account in accounts.items()},
            "skipped_records": problems.skipped,
            "sources": [entry for source in plan.all_sources for entry in describe(source)],
            "options": {**asdict(plan), "tokenizer": tokenizer, "vocab_size": vocab_size},
            "versions": {
                "ssa": __version__,
                "python": platform.python_version(),
                **{module.__name__: module.__version__ for module in (datasets, tokenizers, transformers)},
            },
        }
        _publish(scratch, out, manifest)
    return manifest


@dataclass(frozen=True)
class _Plan:
    """What is read, and which split it goes to."""

    sources: tuple[str, ...]
    valid_sources: tuple[str, ...]
    valid_fraction: float
    text_key: str
    max_skips: int
    limits: Limits

    @property
    def all_sources(self) -> tuple[str, ...]:
        return (*self.sources, *self.valid_sources)

    def check(self) -> None:
        if not self.sources:
            raise ConfigError("sources", "none", "at least one", f"{STDLIB}, a file or a folder")
        if not 0.0 <= self.valid_fraction < 1.0:
            raise ConfigError("valid_fraction", self.valid_fraction, "at least 0 and below 1")
        if self.max_skips < 0:
            raise ConfigError("max_skips", self.max_skips, "at least 0")
        if min(self.limits.document_bytes, self.limits.expanded_bytes) < 1:
            raise ConfigError("limits", self.limits, "at least 1 byte")
        check_held_out(self.sources, self.valid_sources)

    def documents(self, problems: Problems | None = None) -> Iterator[tuple[str, Document]]:
        """``(split, document)`` in order; read twice if a tokenizer is trained."""
        problems = problems or Problems(self.max_skips)
        for sources, given in ((self.sources, None), (self.valid_sources, "valid")):
            read = iter_documents(sources, text_key=self.text_key, problems=problems, limits=self.limits)
            share = 0.0 if self.valid_sources else self.valid_fraction
            for document in read:
                yield given or split_of(document.source, share), document


def _tokenizer(plan: _Plan, name: str | None, vocab_size: int, download: bool) -> PreTrainedTokenizerFast:
    if name is not None:
        return load_tokenizer(name, download=download)
    return train_tokenizer((document.text for split, document in plan.documents() if split == "train"), vocab_size)


def _check_out(out: Path, overwrite: bool) -> None:
    """Only nothing, our own half-written data, or our finished data with ``overwrite`` may be in the way."""
    if out.exists() and not out.is_dir():
        raise ConfigError(str(out), "a file", "an empty or new folder", "another --out")
    present = sorted(part.name for part in out.iterdir()) if out.exists() else []
    if MANIFEST in present and not overwrite:
        raise ConfigError(str(out), "finished data", "an empty or new folder", "--overwrite or another --out")
    if strangers := set(present) - {*SPLITS, TOKENIZER, MANIFEST, SCRATCH, LOCK}:
        got = f"a folder that holds {min(strangers)!r}"
        raise ConfigError(str(out), got, "an empty or new folder", "another --out")


@contextmanager
def _workshop(out: Path) -> Iterator[Path]:
    """A folder inside ``out`` to build in, on the same disk; gone afterwards, as is ``out`` if nothing came of it.

    Raises:
        ConfigError: another process prepares data there.
    """
    is_new = not out.exists()
    scratch = out / SCRATCH
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            if is_new and {part.name for part in out.iterdir()} == {LOCK}:
                shutil.rmtree(out)


def _write_splits(
    plan: _Plan, encoder: PreTrainedTokenizerFast, row_length: int, scratch: Path, problems: Problems
) -> dict[str, Account]:
    """Pack both splits in one pass over the text; a validation split without documents is left out."""
    writers = {name: SplitWriter(scratch / f"{name}.arrow", row_length, encoder) for name in SPLITS}
    for chunk in _chunks(plan.documents(problems)):
        for name, writer in writers.items():
            writer.add([document.text for split, document in chunk if split == name])
    accounts = {name: writer.close() for name, writer in writers.items()}
    if not accounts["train"].documents:
        hint = "--valid-fraction 0" if accounts["valid"].documents and not plan.valid_sources else None
        raise DataError(", ".join(plan.sources), "no document with text for training", "at least one", hint)
    if plan.valid_sources and not accounts["valid"].documents:
        raise DataError(", ".join(plan.valid_sources), "no document with text for validation", "at least one")
    accounts = {name: account for name, account in accounts.items() if account.documents}
    for name in accounts:
        datasets.Dataset.from_file(str(writers[name].path)).save_to_disk(str(scratch / name))
    return accounts


def _chunks(documents: Iterator[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    """Documents in groups that are worth a call of the tokenizer and fit into memory."""
    chunk: list[tuple[str, Document]] = []
    characters = 0
    for split, document in documents:
        chunk.append((split, document))
        characters += len(document.text)
        if len(chunk) == TOKENIZE_DOCUMENTS or characters >= TOKENIZE_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _publish(scratch: Path, out: Path, manifest: dict[str, Any]) -> None:
    """Put finished parts in place. Killed on the way, it leaves a folder without manifest, which is no data."""
    file = scratch / MANIFEST
    file.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    sync(scratch)
    (out / MANIFEST).unlink(missing_ok=True)
    for name in (*SPLITS, TOKENIZER):
        if (out / name).exists():
            shutil.rmtree(out / name)
        if (scratch / name).exists():
            os.replace(scratch / name, out / name)
    os.replace(file, out / MANIFEST)
    sync(out)
