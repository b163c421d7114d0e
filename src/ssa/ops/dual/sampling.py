"""Which query rows the full counterpart of a sparse step is computed for: a stratified random sample of tiles.

The rows of the batch are cut into tiles that lie inside documents, every 1/f neighbouring tiles form a stratum, and one
tile of each stratum is drawn, each with the same chance. So every row is drawn with probability exactly f, and a sum
over the drawn rows divided by f is an unbiased estimate of the sum over all rows (Horvitz and Thompson, 1952).
A row's cost, and how far its streams are apart, grow with its place in the document. So both strata of a document
share one draw, and the second is read backwards: early tiles come with late ones, and every draw costs the same.

No generator state exists: the sample is a function of the layout, the fraction and a seed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache
from hashlib import blake2b

from ssa.documents import DocumentLayout
from ssa.ops.full.query_rows import QueryRows, Window

MOST_RUNS = 4  # a batch of at most so many runs of equally long documents is sampled run by run
TILE = 128  # rows that a kernel's program computes at once


def tiles_per_stratum(fraction: float) -> int:
    """1/f."""
    return round(1 / fraction)


def draw_tile(seed: int, stratum: int, tiles: int) -> int:
    """Uniform in ``range(tiles)``: a hash of ``seed`` (any 64 bits) and the stratum's number."""
    message = struct.pack("<Qq", seed % 2**64, stratum)
    return int.from_bytes(blake2b(message, digest_size=8, person=b"ssa.rows").digest(), "little") % tiles


def sample_rows(layout: DocumentLayout, fraction: float, seed: int) -> QueryRows:
    """Rows of ``layout``, each with probability ``fraction`` = 1/n.

    A pure function: ranks and recomputed layers that pass equal arguments draw equal rows. Where a batch has few runs
    of equally long documents, the documents of a run share their windows, so that these form batches.
    """
    tiles = tiles_per_stratum(fraction)
    return choose_rows(layout, tiles, lambda stratum: draw_tile(seed, stratum, tiles))


def choose_rows(layout: DocumentLayout, tiles: int, pick: Callable[[int], int]) -> QueryRows:
    """One of ``tiles`` tiles of each stratum: number ``pick(stratum)``."""
    runs = list(layout.runs())
    if len(runs) > MOST_RUNS:
        return _choose_tiles(layout, tiles, pick)
    windows = []
    for stratum, (first, documents, length) in enumerate(runs):
        drawn = pick(stratum)
        strata = 2 if length >= 2 * tiles * TILE else 1
        for tile in (drawn, 2 * tiles - 1 - drawn)[:strata]:
            begin, end = (n * length // (strata * tiles) for n in (tile, tile + 1))
            if begin < end:
                windows.append(Window(first, documents, length, begin, end))
    return _remembered(tuple(windows))


@lru_cache(maxsize=64)  # few runs have few samples, which other layers and steps draw again: their tensors are there
def _remembered(windows: tuple[Window, ...]) -> QueryRows:
    return QueryRows(windows)


def _choose_tiles(layout: DocumentLayout, tiles: int, pick: Callable[[int], int]) -> QueryRows:
    """Strata over documents: tiles of up to TILE rows in the order of the batch; the last stratum may be short."""
    found = _tiles(layout.lengths, TILE)
    numbers = (stratum * tiles + pick(stratum) for stratum in range(-(-len(found) // tiles)))
    return QueryRows(tuple(found[i] for i in numbers if i < len(found)))


@lru_cache(maxsize=8)  # all layers of a batch ask for the same
def _tiles(lengths: tuple[int, ...], size: int) -> tuple[Window, ...]:
    found, row = [], 0
    for length in lengths:
        found += [Window(row, 1, length, a, min(a + size, length)) for a in range(0, length, size)]
        row += length
    return tuple(found)
