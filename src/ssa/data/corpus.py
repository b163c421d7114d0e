"""Where text comes from: files, folders, patterns, hub datasets, and the sources of Python's standard library."""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ssa.data.files import is_document_file, read_documents, text_of
from ssa.errors import DataError, DataSourceError

STDLIB = "builtin:stdlib"
_STDLIB_SKIPS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

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


def iter_documents(
    sources: Sequence[str], *, text_key: str = "text", problems: Problems | None = None
) -> Iterator[Document]:
    """Documents of all sources, in a fixed order.

    Args:
        sources: each a file (``.txt .md .rst .py`` one document; ``.jsonl .parquet`` one per record; ``.gz .xz .zst``
            around any but parquet), a folder or a pattern of such files, ``hub:owner/name[:config][@split]`` (streamed
            with ``datasets``; also a local data set folder), or ``builtin:stdlib``.
        text_key: field of a record that holds the text.
        problems: what to do with malformed records; default raise.

    Raises:
        DataError: nothing to read at a source, or a malformed record.
        DataSourceError: a source that cannot be read.
    """
    problems = problems or Problems()
    for source in sources:
        if source == STDLIB:
            yield from _stdlib()
            continue
        records = _hub(source, text_key) if source.startswith("hub:") else _files(source, text_key)
        for where, text in records:
            if isinstance(text, DataError):
                problems.add(text)
            else:
                yield Document(text, where)


def source_files(source: str) -> list[Path]:
    """The files behind a path, folder or pattern, sorted.

    Raises:
        DataError: there are none.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and is_document_file(p))
    elif path.exists():
        found = [path]
    else:
        found = sorted(Path(p) for p in glob.glob(source, recursive=True) if Path(p).is_file())
    if not found:
        raise DataError(source, "no text, jsonl or parquet file", "a file, folder or pattern", "checking the path")
    return found


def split_of(source: str, valid_fraction: float) -> str:
    """``"valid"`` for about ``valid_fraction`` of the sources, by a hash, so that a document is wholly in one split."""
    digest = int.from_bytes(hashlib.blake2b(source.encode(), digest_size=8).digest(), "big")
    return "valid" if digest < valid_fraction * 2**64 else "train"


def _files(source: str, text_key: str) -> Iterator[tuple[str, str | DataError]]:
    for path in source_files(source):
        yield from read_documents(path, text_key)


def _stdlib() -> Iterator[Document]:
    """Every module of the standard library as one document; its own tests are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _STDLIB_SKIPS.isdisjoint(name.parts):
            for _, text in read_documents(path, "text"):
                if isinstance(text, str):  # a handful are in other encodings, on purpose
                    yield Document(text, f"stdlib/{name.as_posix()}")


def _hub(source: str, text_key: str) -> Iterator[tuple[str, str | DataError]]:
    import datasets

    name, _, split = source.removeprefix("hub:").partition("@")
    name, _, config = name.partition(":")
    try:
        stream = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataSourceError(
            source, f"{type(error).__name__}: {error}", "a data set that `datasets` can stream"
        ) from error
    for number, row in enumerate(stream):
        where = f"{source}:row {number}"
        yield where, text_of(row, where, text_key)
