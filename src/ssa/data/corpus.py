"""Where text comes from: files, folders, patterns, hub datasets, and the sources of Python's standard library."""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory

from ssa.data.files import Limits, is_document_file, read_documents, text_of
from ssa.errors import DataError, DataSourceError

STDLIB = "builtin:stdlib"
HUB = "hub:"
_STDLIB_SKIPS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One text and where it came from.

    Attributes:
        text: the whole text, perhaps empty.
        source: file (relative to its folder) and line or row: equal on every machine, from every working directory.
    """

    text: str
    source: str


@dataclass
class Problems:
    """Malformed records: raised at once, or skipped and counted up to a cap.

    Attributes:
        max_skips: how many may be skipped; 0 raises the first.
        skipped: messages of those skipped so far.
    """

    max_skips: int = 0
    skipped: list[str] = field(default_factory=list)

    def add(self, error: DataError) -> None:
        """Skip the record of ``error``, or raise it."""
        if len(self.skipped) >= self.max_skips:
            raise error
        self.skipped.append(str(error))


@dataclass(frozen=True, order=True)
class SourceFile:
    """A file behind a source, and its name relative to the source's folder."""

    name: str
    path: Path


def iter_documents(
    sources: Sequence[str],
    *,
    text_key: str = "text",
    problems: Problems | None = None,
    limits: Limits | None = None,
) -> Iterator[Document]:
    """Documents of all sources, in a fixed order.

    Args:
        sources: each a file (``.txt .md .rst .py`` one document; ``.jsonl .parquet`` one per record; ``.gz .xz .zst``
            around any but parquet), a folder or a pattern of such files, ``hub:owner/name[:config][@split]`` (streamed
            with ``datasets``; also a local data set folder), or ``builtin:stdlib``.
        text_key: field of a record that holds the text.
        problems: what to do with malformed records; default raise.
        limits: what a file may cost; see :class:`ssa.data.files.Limits`.

    Raises:
        DataError: nothing to read at a source, or a malformed record.
        DataSourceError: a source that cannot be read.
    """
    problems, limits = problems or Problems(), limits or Limits()
    for source in sources:
        found = _hub(source, text_key) if source.startswith(HUB) else _files(source, text_key, limits)
        for name, text in found:
            if isinstance(text, DataError):
                problems.add(text)
            elif len(text) > limits.document_bytes:  # what is not a file of lines has no bound but this
                problems.add(DataError(name, f"a document of {len(text)} characters", f"{limits.document_bytes}"))
            else:
                yield Document(text, name)


def source_files(source: str) -> list[SourceFile]:
    """The files behind a source, sorted by name; none behind a ``hub:`` source. Linked folders are not entered.

    Raises:
        DataError: there are none.
        DataSourceError: a folder cannot be read.
    """
    if source.startswith(HUB):
        return []
    if source == STDLIB:
        return _stdlib_files()
    path = Path(source)
    if path.is_dir():
        base, found = path, [file for file in _walk(path) if is_document_file(file)]
    elif path.exists() or path.is_symlink():
        base, found = path.parent, [path]
    else:
        base = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = [match for name in glob.glob(source, recursive=True) if not (match := Path(name)).is_dir()]
    if not found:
        raise DataError(source, "no text, jsonl or parquet file", "a file, folder or pattern", "checking the path")
    return sorted(SourceFile(file.relative_to(base).as_posix(), file) for file in found)


def split_of(source: str, valid_fraction: float) -> str:
    """``"valid"`` for about ``valid_fraction`` of the document names, by a hash of the name alone.

    A document is thus wholly in one split, and stays there when others come or go.
    """
    name = source.encode(errors="surrogateescape")  # a file name need not be UTF-8
    digest = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
    return "valid" if digest < valid_fraction * 2**64 else "train"


def _files(source: str, text_key: str, limits: Limits) -> Iterator[tuple[str, str | DataError]]:
    for file in source_files(source):
        for number, text in read_documents(file.path, text_key, limits):
            if source == STDLIB and isinstance(text, DataError):
                continue  # a handful of modules are in other encodings, on purpose
            yield f"{file.name}:{number}" if number else file.name, text


def _walk(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise DataSourceError(str(error.filename), str(error.strerror), "a readable folder") from error

    for parent, _, names in os.walk(folder, onerror=fail):
        yield from (Path(parent, name) for name in names)


def _stdlib_files() -> list[SourceFile]:
    """Every module of the standard library; its own tests are left out, and what a distribution links into it."""
    root = Path(sysconfig.get_path("stdlib"))
    names = ((path, path.relative_to(root)) for path in root.rglob("*.py") if not path.is_symlink())
    files = (SourceFile(f"stdlib/{n.as_posix()}", path) for path, n in names if _STDLIB_SKIPS.isdisjoint(n.parts))
    return sorted(files)


def _hub(source: str, text_key: str) -> Iterator[tuple[str, str | DataError]]:
    import datasets
    import pyarrow

    name, _, split = source.removeprefix(HUB).partition("@")
    name, _, config = name.partition(":")
    try:
        with TemporaryDirectory(prefix="ssa-hub-") as cache:  # streaming leaves only locks there
            stream = datasets.load_dataset(
                name, config or None, split=split or "train", streaming=True, cache_dir=cache
            )
            for number, row in enumerate(stream, start=1):
                where = f"{source}:row {number}"
                yield where, text_of(row, where, text_key)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataSourceError(source, reason, "a data set that `datasets` can stream") from error
