"""Reading one file of documents: plain text, JSON lines (compressed or not), parquet. Nothing else is opened."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ssa.errors import DataError, DataSourceError

MAGIC = {".gz": b"\x1f\x8b", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd", ".parquet": b"PAR1"}
COMPRESSED = (".gz", ".xz", ".zst")
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".text")
NOT_TEXT = (".json", ".csv", ".tsv", ".arrow")  # records that would pass for one document of plain text
CHUNK = 1 << 20
PARQUET_ROWS = 256  # read at once


@dataclass(frozen=True)
class Limits:
    """What reading may cost, so that a bomb is an error and not a full memory.

    Attributes:
        document_bytes: of one document. Tokenising takes about 150 bytes of memory per byte (measured with a byte-level
            BPE), so the default of 64 MiB asks for 10 GB at most.
        expanded_bytes: of one compressed file when expanded. Default 64 GiB. Other files have no limit.
    """

    document_bytes: int = 1 << 26
    expanded_bytes: int = 1 << 36


Found = tuple[int, str | DataError]  # number of the line or row from 1, 0 for a whole file; its text or what is wrong


def is_document_file(path: Path) -> bool:
    """Whether a folder's file would be read: a known suffix, compressed or not."""
    suffix = _inner_suffix(path)
    return suffix in (*TEXT_SUFFIXES, ".jsonl", ".parquet")


def read_documents(path: Path, text_key: str, limits: Limits | None = None) -> Iterator[Found]:
    """Documents of a file as ``(number, text)``; a malformed record comes as ``(number, error)``.

    A JSON-lines file has one document per line, a parquet file one per row; any other file is one document.

    Raises:
        DataError: not a regular file, content that contradicts the suffix, or more text than ``limits`` allows.
        DataSourceError: the file cannot be read or is not complete.
    """
    limits = limits or Limits()
    try:
        kind = _check_kind(path)
        if kind == ".parquet":
            yield from _parquet(path, text_key)
        elif kind == ".jsonl":
            yield from _json_lines(path, text_key, limits)
        else:
            yield 0, _plain_text(path, limits)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataSourceError(str(path), str(error) or type(error).__name__, "a readable, complete file") from error


def _inner_suffix(path: Path) -> str:
    return Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED else path.suffix.lower()


def _check_kind(path: Path) -> str:
    """Suffix that says how to read the file, after checking that its first bytes agree."""
    if path.is_symlink():
        raise DataError(str(path), "a symbolic link", "a regular file", f"its target {path.resolve()}")
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(str(path), "a folder, pipe or device", "a regular file")
    kind, outer = _inner_suffix(path), path.suffix.lower()
    if kind in NOT_TEXT:
        hint = "renaming it to .jsonl if each line is a JSON object, else converting it"
        raise DataError(str(path), f"a {kind} file", "text, JSON lines or parquet", hint)
    with path.open("rb") as file:
        head = file.read(6)
    actual = next((suffix for suffix, magic in MAGIC.items() if head.startswith(magic)), None)
    expected = outer if outer in MAGIC else None
    if head and actual != expected:
        found = f"{actual[1:]} data" if actual else "uncompressed data"
        hint = f"renaming the file to end in {actual or '.jsonl'}"
        raise DataError(str(path), found, f"what the suffix {outer!r} says", hint)
    return kind


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if suffix == ".xz":
        return lzma.open(path)
    if suffix == ".zst":
        import pyarrow  # its reader, unlike that of `zstandard`, tells a cut file from a complete one

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _check_expanded(path: Path, size: int, limits: Limits) -> None:
    if size > limits.expanded_bytes and path.suffix.lower() in COMPRESSED:
        got = f"a compressed file that expands to more than {limits.expanded_bytes} bytes"
        raise DataError(str(path), got, "less", "--max-expanded-gib, if it is no bomb")


def _check_document(where: str, size: int, limits: Limits) -> None:
    if size > limits.document_bytes:
        got = f"a document of more than {limits.document_bytes} bytes"
        raise DataError(where, got, "a smaller one", "splitting it, or --max-document-mib")


def _plain_text(path: Path, limits: Limits) -> str | DataError:
    content = bytearray()
    with _open(path) as file:
        while piece := file.read(CHUNK):
            content += piece
            _check_expanded(path, len(content), limits)
            _check_document(str(path), len(content), limits)
    return _decode(bytes(content), str(path))


def _json_lines(path: Path, text_key: str, limits: Limits) -> Iterator[Found]:
    size = number = 0
    with _open(path) as file:
        while line := file.readline(limits.document_bytes + 1):
            number, size = number + 1, size + len(line)
            where = f"{path}:{number}"
            _check_expanded(path, size, limits)
            _check_document(where, len(line), limits)
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, _json_line(line, where, text_key)


def _json_line(line: bytes, where: str, text_key: str) -> str | DataError:
    decoded = _decode(line, where)
    if isinstance(decoded, DataError):
        return decoded
    try:
        row = json.loads(decoded)
    except json.JSONDecodeError as error:
        what = "a truncated line" if not line.endswith(b"\n") else "invalid JSON"
        return DataError(where, f"{what} ({error.msg} at column {error.colno})", "one JSON object per line")
    except (ValueError, RecursionError) as error:  # integers of thousands of digits, thousands of brackets
        return DataError(where, f"JSON beyond the parser's limits ({error})", "an ordinary JSON object")
    return text_of(row, where, text_key)


def _parquet(path: Path, text_key: str) -> Iterator[Found]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names:
                raise DataError(str(path), f"columns {file.schema_arrow.names}", f"a column {text_key!r}", "--text-key")
            for batch in file.iter_batches(PARQUET_ROWS, columns=[text_key]):
                for cell in _cells(batch.column(0), text_key):
                    number += 1
                    where = f"{path}:row {number}"
                    yield number, _decode(cell, where) if isinstance(cell, bytes) else text_of(cell, where, text_key)
    except pyarrow.ArrowException as error:
        raise DataError(str(path), f"a broken parquet file ({error})", "a complete one") from error


def _cells(column: Any, text_key: str) -> Iterator[Any]:
    """Text as its bytes, because parquet does not promise UTF-8; anything else as a record to complain about."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    is_text = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
    for cell in (column.cast(pyarrow.large_binary()) if is_text else column).to_pylist():
        yield cell if is_text and cell is not None else {text_key: cell}


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
        start = error.start + len(content) - len(error.object)  # utf-8-sig counts from behind the byte order mark
        return DataError(where, f"byte 0x{content[start]:02x} at {start} that is not UTF-8", "UTF-8 text")
