"""``ssa prepare``: text to tokenised, packed rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def run(argv: list[str]) -> int:
    """Parse flags, prepare, print the account; exit code 0."""
    return tyro.cli(command, args=argv, prog="ssa prepare")


def command(
    sources: Annotated[tuple[str, ...], tyro.conf.Positional],
    out: Annotated[Path, "folder to write"],
    valid: Annotated[tuple[str, ...], "validation sources; default a share of the documents"] = (),
    row_length: Annotated[int, "tokens per row, the training context"] = 1024,
    tokenizer: Annotated[
        str | None, "folder or cached hub name of a Hugging Face tokenizer; default: train one"
    ] = None,
    vocab_size: Annotated[int, "size of the byte-level BPE tokenizer that is trained"] = 4096,
    valid_fraction: Annotated[float, "share of the documents for validation"] = 0.02,
    text_key: Annotated[str, "field of a record that holds the text"] = "text",
    max_skips: Annotated[int, "malformed records to skip and count before giving up"] = 0,
    overwrite: Annotated[bool, "replace finished data in --out"] = False,
    download: Annotated[bool, "allow fetching a tokenizer by hub name"] = False,
) -> int:
    """Tokenise and pack text into rows with document boundaries, on disk and memory-mapped.

    A source is a file or folder of .txt .md .rst .py (one document each), .jsonl or .parquet (one per record), with .gz
    .xz .zst around them; a pattern of such files; hub:owner/name[:config][@split]; or builtin:stdlib, the sources of
    Python's standard library.
    """
    from rich.console import Console
    from rich.table import Table

    from ssa.data import prepare

    manifest = prepare(
        sources,
        out,
        valid_sources=valid,
        row_length=row_length,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        valid_fraction=valid_fraction,
        text_key=text_key,
        max_skips=max_skips,
        overwrite=overwrite,
        download=download,
    )
    table = Table(title=f"{out}: rows of {row_length} tokens, vocabulary {manifest['vocab_size']}")
    table.add_column("")
    for split in manifest["splits"]:
        table.add_column(split, justify="right")
    for key in ("documents", "empty_documents", "characters", "text_tokens", "special_tokens", "padding", "rows"):
        table.add_row(key.replace("_", " "), *(f"{account[key]:,}" for account in manifest["splits"].values()))
    console = Console()
    console.print(table)
    if manifest["skipped_records"]:
        console.print(f"{len(manifest['skipped_records'])} malformed records skipped, listed in manifest.json")
    return 0
