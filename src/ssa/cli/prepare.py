"""``ssa prepare``: text to tokenised, packed rows."""

from __future__ import annotations

from pathlib import Path

import tyro


def run(argv: list[str]) -> int:
    """Parse flags, prepare, print the account; exit code 0."""
    return tyro.cli(command, args=argv, prog="ssa prepare")


def command(
    sources: tyro.conf.Positional[tuple[str, ...]],
    out: Path,
    valid: tuple[str, ...] = (),
    row_length: int = 1024,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    valid_fraction: float = 0.02,
    text_key: str = "text",
    max_skips: int = 0,
    max_document_mib: int = 64,
    max_expanded_gib: int = 64,
    overwrite: bool = False,
    download: bool = False,
) -> int:
    """Tokenise and pack text into rows with document boundaries, on disk and memory-mapped.

    A source is a file or folder of .txt .md .rst .py (one document each), .jsonl or .parquet (one per record), with .gz
    .xz .zst around any but parquet; a pattern of such files; hub:owner/name[:config][@split]; or builtin:stdlib, the
    sources of Python's standard library.

    Args:
        sources: where the text comes from
        out: folder to write
        valid: validation sources; default a share of the documents
        row_length: tokens per row, the training context
        tokenizer: folder or cached hub name of a Hugging Face tokenizer; default: train one
        vocab_size: size of the byte-level BPE tokenizer that is trained
        valid_fraction: share of the documents for validation
        text_key: field of a record that holds the text
        max_skips: malformed records to skip and count before giving up
        max_document_mib: largest document to accept; tokenising takes 150 times its size of memory
        max_expanded_gib: most that one compressed file may expand to
        overwrite: replace finished data in --out
        download: allow fetching a tokenizer by hub name
    """
    from rich.console import Console
    from rich.table import Table

    from ssa.data import Limits, prepare

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
        limits=Limits(max_document_mib << 20, max_expanded_gib << 30),
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
    if "valid" not in manifest["splits"]:
        console.print("No document fell into the validation split: give --valid, or a larger --valid-fraction.")
    return 0
