"""Reading one file of documents: plain text, JSON lines (compressed or not), parquet. Nothing else is opened."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ssa.errors import DataError, DataSourceError, MissingDependencyError

MAGIC = {".gz": b"\x1f\x8b", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd", ".parquet": b"PAR1"}
COMPRESSED = (".gz", ".xz", ".zst")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".text")
CHUNK = 1 << 24
MAX_BYTES = 1 << 36  # a compressed file that expands beyond 64 GiB is taken for a bomb


def is_document_file(path: Path) -> bool:
    """Whether a folder's file would be read: a known suffix, compressed or not."""
    suffix = _inner_suffix(path)
    return suffix in (*TEXT_SUFFIXES, ".jsonl", ".parquet")


def read_documents(path: Path, text_key: str, max_bytes: int = MAX_BYTES) -> Iterator[tuple[str, str | DataError]]:
    """Documents of a file as ``(where, text)``; a malformed record comes as ``(where, error)``.

    A JSON-lines file has one document per line, a parquet file one per row; any other file is one document.

    Raises:
        DataError: not a regular file, or content that contradicts the suffix.
        DataSourceError: the file cannot be read.
    """
    try:
        kind = _check_kind(path)
        if kind == ".parquet":
            yield from _parquet(path, text_key)
        elif kind == ".jsonl":
            yield from _json_lines(path, text_key, max_bytes)
        else:
            yield str(path), _plain_text(path, max_bytes)
    except (OSError, EOFError, lzma.LZMAError) as error:
        if isinstance(error, DataSourceError):
            raise
        raise DataSourceError(str(path), str(error) or type(error).__name__, "a readable, complete file") from error


def _inner_suffix(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED else path.suffix.lower()


def _check_kind(path: Path) -> str:
    """Suffix that says how to read the file, after checking that its first bytes agree."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(str(path), "a folder, pipe or device", "a regular file")
    with path.open("rb") as file:
        head = file.read(6)
    outer = path.suffix.lower()
    actual = next((suffix for suffix, magic in MAGIC.items() if head.startswith(magic)), None)
    expected = outer if outer in MAGIC else None
    if head and actual != expected:
        found = f"{actual[1:]} data" if actual else "uncompressed data"
        raise DataError(
            str(path), found, f"what the suffix {outer!r} says", f"renaming the file to end in {actual or '.jsonl'}"
        )
    return _inner_suffix(path)


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if suffix == ".xz":
        return lzma.open(path)
    if suffix == ".zst":
        try:
            import zstandard
        except ModuleNotFoundError as error:
            hint = "pip install 'sparse-sparse-attention[train]'"
            raise MissingDependencyError(
                str(path), "no package 'zstandard'", "zstandard for .zst files", hint
            ) from error
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(path.open("rb")))
    return path.open("rb")


def _plain_text(path: Path, max_bytes: int) -> str | DataError:
    content = bytearray()
    with _open(path) as file:
        while piece := file.read(CHUNK):
            content += piece
            _check_size(path, len(content), max_bytes)
    return _decode(bytes(content), str(path))


def _check_size(path: Path, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise DataError(str(path), f"more than {max_bytes} bytes of text", "a smaller file", "splitting it")


def _json_lines(path: Path, text_key: str, max_bytes: int) -> Iterator[tuple[str, str | DataError]]:
    size = 0
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            size += len(line)
            _check_size(path, size, max_bytes)
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                where = f"{path}:{number}"
                yield where, _json_line(line, where, text_key)


def _json_line(line: bytes, where: str, text_key: str) -> str | DataError:
    decoded = _decode(line, where)
    if isinstance(decoded, DataError):
        return decoded
    try:
        row = json.loads(decoded)
    except json.JSONDecodeError as error:
        what = "a truncated line" if not line.endswith(b"\n") else "invalid JSON"
        return DataError(where, f"{what} ({error.msg} at column {error.colno})", "one JSON object per line")
    return text_of(row, where, text_key)


def _parquet(path: Path, text_key: str) -> Iterator[tuple[str, str | DataError]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(str(path), f"a broken parquet file ({error})", "a complete one") from error
    with file:
        if text_key not in file.schema_arrow.names:
            raise DataError(str(path), f"columns {file.schema_arrow.names}", f"a column {text_key!r}", "--text-key")
        number = 0
        for batch in file.iter_batches(columns=[text_key]):
            for row in batch.to_pylist():
                number += 1
                where = f"{path}:row {number}"
                yield where, text_of(row, where, text_key)


def text_of(row: Any, where: str, text_key: str) -> str | DataError:
    """The text of a record, or what is wrong with it."""
    if not isinstance(row, dict):
        return DataError(where, f"a {type(row).__name__}", "a JSON object")
    if row.get(text_key) is None:
        got = f"{text_key} null" if text_key in row else f"keys {sorted(row)[:8]}"
        return DataError(where, got, f"a text under {text_key!r}", "--text-key")
    text = row[text_key]
    if not isinstance(text, str):
        return DataError(where, f"{text_key} of type {type(text).__name__}", "text")
    return checked_text(text, where)


def checked_text(text: str, where: str) -> str | DataError:
    """The text itself unless it holds a NUL or half a surrogate pair, which no tokenizer gives back."""
    for position, character in enumerate(text) if "\0" in text or not _encodable(text) else ():
        if character == "\0" or "\ud800" <= character <= "\udfff":
            return DataError(
                where, f"character U+{ord(character):04X} at {position}", "text without NUL or lone surrogates"
            )
    return text


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decode(content: bytes, where: str) -> str | DataError:
    try:
        return checked_text(content.decode("utf-8-sig"), where)
    except UnicodeDecodeError as error:
        return DataError(where, f"byte 0x{content[error.start]:02x} at {error.start} that is not UTF-8", "UTF-8 text")
