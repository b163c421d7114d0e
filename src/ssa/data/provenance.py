"""What went into prepared data: name, size and hash of every local file, and proof that none changed meanwhile."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssa.data.corpus import STDLIB, source_files
from ssa.errors import ConfigError, DataSourceError

Stamps = dict[Path, tuple[int, int]]  # size in bytes, time of the last change in ns


def stamps(sources: Sequence[str]) -> Stamps:
    """Size and time of every local file behind ``sources``, to compare before and after reading."""
    try:
        found = {file.path: file.path.lstat() for source in sources for file in source_files(source)}
    except FileNotFoundError as error:
        raise DataSourceError(str(error.filename), "a file that is gone", "sources that stay as they are") from error
    return {path: (state.st_size, state.st_mtime_ns) for path, state in found.items()}


def check_unchanged(before: Stamps, after: Stamps) -> None:
    """Refuse sources that changed while they were read; the tokenizer and the rows may have seen different text.

    Raises:
        DataSourceError: naming the first changed, new or missing file.
    """
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    if changed:
        got = "a file that changed while it was read"
        raise DataSourceError(str(changed[0]), got, "sources that stay as they are", "preparing again")


def check_held_out(sources: Sequence[str], valid_sources: Sequence[str]) -> None:
    """Refuse validation text that is training text too.

    Raises:
        ConfigError: naming the first file or hub source on both sides.
    """

    def keys(names: Sequence[str]) -> set[str]:
        files = {str(file.path.resolve()) for name in names for file in source_files(name)}
        return files | {name for name in names if not source_files(name)}

    if common := sorted(keys(sources) & keys(valid_sources)):
        got = f"{common[0]}, which is training text too"
        raise ConfigError("valid", got, "text that the model does not train on", "naming the training files one by one")


def describe(source: str) -> list[dict[str, Any]]:
    """Name, bytes and SHA-256 of each local file; one entry for the whole standard library."""
    files = source_files(source)
    if not files:
        return [{"source": source}]
    if source == STDLIB:
        digest, size = hashlib.sha256(), 0
        for file in files:
            content = file.path.read_bytes()
            digest.update(content)
            size += len(content)
        return [{"source": source, "files": len(files), "bytes": size, "sha256": digest.hexdigest()}]
    return [_describe_file(file.name, file.path) for file in files]


def _describe_file(name: str, path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"source": name, "bytes": path.stat().st_size, "sha256": digest}
