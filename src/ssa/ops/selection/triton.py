"""Block selection on the GPU: launches of :mod:`ssa.ops.selection.triton_kernels` as one custom operation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.ops.selection.triton_kernels import lse_kernel, pool_kernel
from ssa.ops.selection.triton_scores import resident_score_kernel, score_kernel
from ssa.ops.selection.triton_topk import refine_kernel, select_kernel, select_official_kernel
from ssa.ops.spec import SparseSpec
from ssa.ops.triton_support import (
    LOG2E,
    Launch,
    Launcher,
    capability,
    ceil_div,
    layout_of,
    next_power_of_two,
    on_device,
    rows,
)

SLAB_ELEMENTS = 1 << 27  # float32 scores held at a time: 512 MiB
GRID_LIMIT = 65535  # largest second or third dimension of a CUDA grid
COARSE_BLOCKS = 8  # blocks behind one key of a guess
#: Documents of so many tokens, times S / G, are selected in one pass: it saves an exponential for every head and block,
#: and costs a list for every row (docs/kernels.md). By document, so that a packed one gets the bits of a separate one.
ONE_PASS_TOKENS = 32768


class TileConfig(NamedTuple):
    """Tile of tokens x blocks and how its kernel is launched."""

    tokens: int
    blocks: int
    how: Launch


@cache
def lse_config(D: int, device_capability: tuple[int, int]) -> TileConfig:
    """Measured on an H200 (docs/kernels.md); smaller tiles where shared memory is smaller or rows are longer."""
    if D > 128 or device_capability < (9, 0):
        return TileConfig(64, 32 if D > 128 else 64, Launch(4, 2))
    return TileConfig(128, 64, Launch(4, 3, 96) if D <= 64 else Launch(4, 2))


@cache
def score_config(D: int, device_capability: tuple[int, int]) -> TileConfig:
    """As :func:`lse_config`."""
    if D > 128 or device_capability < (9, 0):
        return TileConfig(64, 64, Launch(4, 2))
    return TileConfig(64, 64, Launch(4, 3, 96) if D <= 64 else Launch(4, 2))


@cache
def resident_config(
    D: int, G: int, itemsize: int, device_capability: tuple[int, int], guess: bool
) -> TileConfig | None:
    """Of the kernel that keeps the queries of all G heads of a tile in shared memory, which one pass needs. None: it
    would be slower, or G is no power of two."""
    serves = itemsize == 2 and device_capability[0] == 9 and G in (4, 8, 16, 32, 64)
    if not serves or D > 128 or (D > 64 and not guess):
        return None
    return TileConfig(256 // G, 32, Launch(4, 3, 128 if D <= 64 else None))


@cache
def refine_config(D: int, free: int) -> tuple[int, int | None]:
    """Blocks scored again at a time, of which ``free`` are kept; registers per thread."""
    return max(32, 2 * next_power_of_two(free)), 64 if D <= 64 and free <= 16 else None


class _Rule(NamedTuple):
    """What to select; plain numbers, as the operation takes them."""

    block_size: int
    num_blocks: int
    first_blocks: int
    local_blocks: int
    official: bool

    @property
    def free(self) -> int:
        """Most blocks that scores decide about at a time."""
        if self.official:
            return min(self.block_size // 2, self.num_blocks)
        return self.num_blocks - self.first_blocks - self.local_blocks


class _Slab(NamedTuple):
    """Tiles of tokens whose scores are held together, their rows, and the blocks that a row may see."""

    tile: int
    tiles: int
    row: int
    rows: int
    seen: int


def select_blocks(q: Tensor, k: Tensor, spec: SparseSpec, layout: DocumentLayout, scale: float) -> Tensor:
    """See :func:`ssa.ops.select_blocks`."""
    return torch.ops.ssa.select_blocks(
        q,
        k,
        layout.lengths,
        spec.block_size,
        spec.num_blocks,
        spec.first_blocks,
        spec.local_blocks,
        spec.rule == "official",
        scale,
    )


class _Run(NamedTuple):
    """Neighbouring documents that are selected alike, as flat rows."""

    row: int
    end: int
    guess: bool


@lru_cache(maxsize=64)
def _runs(layout: DocumentLayout, long: int) -> tuple[_Run, ...]:
    """The batch cut where documents of at least ``long`` tokens, which take one pass, meet shorter ones."""
    runs, row = [], 0
    for guess, lengths in groupby(layout.lengths, lambda n: n >= long):
        end = row + sum(lengths)
        runs.append(_Run(row, end, guess))
        row = end
    return tuple(runs)


@lru_cache(maxsize=64)
def _tiles(layout: DocumentLayout, tokens: int, run: _Run) -> tuple[int, int]:
    """A run's first tile of ``tokens``, and how many it has."""
    start = layout.block_grid(tokens).block_start
    first, after = torch.searchsorted(start, torch.tensor([run.row, run.end], dtype=start.dtype)).tolist()
    return first, after - first


@lru_cache(maxsize=64)
def _slabs(layout: DocumentLayout, S: int, K: int, width: int, tokens: int, run: _Run) -> tuple[_Slab, ...]:
    """A run cut into slabs of at most ``SLAB_ELEMENTS`` scores, ``width`` for each row and KV head."""
    start = layout.block_grid(tokens).block_start.long()
    first_row, end_row = start[:-1], start[1:]
    seen = (end_row - layout.starts().view(-1)[first_row] + S - 1) // S  # blocks up to each tile's last token
    rows_at_most = max(tokens, SLAB_ELEMENTS // (K * width))
    tile, tiles = _tiles(layout, tokens, run)
    plan, last = [], tile + tiles
    while tile < last:
        row = int(first_row[tile])
        after = int(torch.searchsorted(end_row, row + rows_at_most, right=True))
        after = min(max(after, tile + 1), tile + GRID_LIMIT, last)
        plan.append(_Slab(tile, after - tile, row, int(end_row[after - 1]) - row, int(seen[tile:after].max())))
        tile = after
    return tuple(plan)


class _Call:
    """One call of the operation: what its launches share, and the launches in order."""

    def __init__(self, q: Tensor, k: Tensor, lengths: Sequence[int], rule: _Rule, scale: float) -> None:
        B, T, self.H, self.D = q.shape
        self.K, self.N, self.S, device = k.shape[2], B * T, rule.block_size, q.device
        self.rule, self.layout = rule, layout_of(tuple(lengths), B, T)
        self.grid, self.starts = self.layout.block_grid(self.S, device), self.layout.starts(device)
        (self.q, self.q_stride), (self.k, self.k_stride) = rows(q), rows(k)
        self.DP, self.c, self.G = max(16, next_power_of_two(self.D)), scale * LOG2E, self.H // self.K
        long = ceil_div(ONE_PASS_TOKENS * self.S, self.G)
        self.where = capability(device.index)
        kind = self.D, self.G, q.dtype.itemsize, self.where
        one, self.resident = resident_config(*kind, True), resident_config(*kind, False)
        self.runs = _runs(self.layout, self.layout.max_length + 1 if rule.official or not one else long)
        two = self.resident or score_config(self.D, self.where)
        self.tiles = two, one or two  # without and with a guess
        self.sizes = (self.D, self.DP, self.S)
        self.launch = Launcher(device, q.dtype, self.H, self.K, self.D, self.q_stride, self.k_stride)
        self.out = torch.empty(B, T, self.K, rule.num_blocks, dtype=torch.int32, device=device)

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def select(self) -> Tensor:
        """All launches; int32 ``[B, T, K, num_blocks]``."""
        self.pool()
        widest = max(self.tiles[run.guess].blocks for run in self.runs)
        self.width = ceil_div(self.layout.max_length, self.S * widest) * widest
        self.chunk = chunk_blocks(self.width, self.S, self.rule.official)
        slabs = {
            run: _slabs(self.layout, self.S, self.K, self.width, self.tiles[run.guess].tokens, run) for run in self.runs
        }
        held = max(slab.rows for plan in slabs.values() for slab in plan)
        self.score = self.floats(held, self.K, self.width)
        chunks = self.width // self.chunk
        self.chunk_max = torch.empty(held, self.K, chunks, dtype=torch.int32, device=self.q.device)
        self.lse = self.share = self.score  # unused in two passes
        if any(run.guess for run in self.runs):
            self.lse, self.share = self.floats(held, self.H), self.floats(held, self.K)
        for run, plan in slabs.items():
            self.tile_start = self.layout.block_grid(self.tiles[run.guess].tokens, self.q.device).block_start
            resident = run.guess or self.resident
            lse = None if resident else self.log_sums(run)
            for slab in plan:
                if lse is None:
                    self.scores_of_resident(slab, run.guess)
                else:
                    self.scores(slab, lse)
                if run.guess:
                    self.refine(slab)
                else:
                    self.choose(slab)
        return self.out

    def pool(self) -> None:
        """Mean keys of blocks and of chunks of blocks."""
        grid = self.layout.block_grid(self.S * COARSE_BLOCKS, self.q.device)
        self.pooled, self.coarse = (
            torch.empty(n, self.K, self.D, dtype=self.k.dtype, device=self.k.device)
            for n in (self.grid.num_blocks, grid.num_blocks)
        )
        arguments = (
            self.k, self.pooled, self.coarse, grid.block_start, self.starts, self.grid.first_block, *self.k_stride,
            self.K, grid.num_blocks,
        )  # fmt: skip
        self.launch(pool_kernel, (grid.num_blocks, self.K, 1), arguments, (*self.sizes, COARSE_BLOCKS), Launch(4))

    def log_sums(self, run: _Run) -> Tensor:
        """L ``[H, N]`` of every query and head of a run."""
        first = lse_config(self.D, self.where)
        lse, tile_start = self.floats(self.H, self.N), self.layout.block_grid(first.tokens, self.q.device).block_start
        tile, tiles = _tiles(self.layout, first.tokens, run)
        arguments = (
            self.q, self.pooled, lse, tile_start, self.starts, self.grid.first_block, tile, tiles, *self.q_stride,
            self.N, self.K, self.c, self.G,
        )  # fmt: skip
        self.launch(lse_kernel, (tiles, self.H, 1), arguments, (*self.sizes, first.tokens, first.blocks), first.how)
        return lse

    def scores(self, slab: _Slab, lse: Tensor) -> None:
        """Scores and their maxima by chunk."""
        tile, rule = self.tiles[False], self.rule
        arguments = (
            self.q, self.pooled, lse, self.score, self.chunk_max, self.tile_start, self.starts, self.grid.first_block,
            slab.tile, slab.tiles, slab.row, *self.q_stride, self.N, self.K, self.width, self.c, rule.first_blocks,
            rule.local_blocks, self.G,
        )  # fmt: skip
        constants = (*self.sizes, tile.tokens, tile.blocks, self.chunk)
        grid = (ceil_div(slab.seen, tile.blocks), slab.tiles, self.K)
        self.launch(score_kernel, grid, arguments, constants, tile.how)

    def scores_of_resident(self, slab: _Slab, guess: bool) -> None:
        """L, or a guess of it, scores and their maxima by chunk; with a guess, then L."""
        tile, rule = self.tiles[guess], self.rule
        first_chunk = self.layout.block_grid(self.S * COARSE_BLOCKS, self.q.device).first_block
        arguments = (
            self.q, self.pooled, self.coarse, self.score, self.chunk_max, self.lse, self.share, self.tile_start,
            self.starts, self.grid.first_block, first_chunk, slab.tile, slab.tiles, slab.row, *self.q_stride, self.K,
            self.width, self.c, rule.first_blocks, rule.local_blocks,
        )  # fmt: skip
        constants = (*self.sizes, tile.tokens, tile.blocks, self.chunk, COARSE_BLOCKS, guess, self.G)
        self.launch(resident_score_kernel, (slab.tiles, self.K, 1), arguments, constants, tile.how)

    def top(self, slab: _Slab) -> tuple[tuple[int, ...], int]:
        """Constants of a top-k over the slab's rows, and warps of a row."""
        rule = self.rule
        kept = next_power_of_two(rule.free)
        kept = max(kept, self.S // self.chunk) if rule.official else kept
        chunks = max(4, next_power_of_two(ceil_div(slab.seen, self.chunk)))
        warps = min(8, max(1, max(chunks, kept * self.chunk) // 1024))
        return (chunks, self.chunk, kept, next_power_of_two(rule.num_blocks)), warps

    def choose(self, slab: _Slab) -> None:
        """Top-k of scores."""
        rule, (constants, warps) = self.rule, self.top(slab)
        forced = () if rule.official else (rule.first_blocks, rule.local_blocks)
        arguments = (
            self.score, self.chunk_max, self.out, self.starts, slab.row, self.K, self.width, rule.num_blocks, *forced,
        )  # fmt: skip
        kernel = select_official_kernel if rule.official else select_kernel
        self.launch(kernel, (slab.rows, self.K, 1), arguments, (self.S, *constants), Launch(warps))

    def refine(self, slab: _Slab) -> None:
        """Top-k of scores under a guess: what may be among the best again."""
        rule, (constants, warps) = self.rule, self.top(slab)
        arguments = (
            self.q, self.pooled, self.lse, self.share, self.score, self.chunk_max, self.out, self.starts,
            self.grid.first_block, slab.row, *self.q_stride, self.K, self.width, rule.num_blocks, self.c,
            rule.first_blocks, rule.local_blocks, self.G,
        )  # fmt: skip
        at_a_time, registers = refine_config(self.D, rule.free)
        constants = (*self.sizes, *constants, max(16, next_power_of_two(self.G)), at_a_time)
        self.launch(refine_kernel, (slab.rows, self.K, 1), arguments, constants, Launch(warps, 2, registers))


def _select(
    q: Tensor,  # [B, T, H, D]
    k: Tensor,  # [B, T, K, D]
    lengths: Sequence[int],
    block_size: int,
    num_blocks: int,
    first_blocks: int,
    local_blocks: int,
    official: bool,
    scale: float,
) -> Tensor:
    rule = _Rule(block_size, num_blocks, first_blocks, local_blocks, official)
    with on_device(q):
        return _Call(q, k, lengths, rule, scale).select()


def _select_fake(q: Tensor, k: Tensor, lengths: Sequence[int], block_size: int, num_blocks: int, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:2], k.shape[2], num_blocks, dtype=torch.int32)


LIBRARY = torch.library.Library("ssa", "FRAGMENT")  # cheaper per call than `custom_op`
LIBRARY.define(
    "select_blocks(Tensor q, Tensor k, int[] lengths, int block_size, int num_blocks, int first_blocks, "
    "int local_blocks, bool official, float scale) -> Tensor"
)
LIBRARY.impl("select_blocks", _select, "CompositeExplicitAutograd")
torch.library.register_fake("ssa::select_blocks", _select_fake, lib=LIBRARY)


def chunk_blocks(width: int, S: int, official: bool) -> int:
    """Blocks per chunk maximum: about ``sqrt(width / k)`` balances both levels. The published merge needs chunks that
    do not straddle its own (of S blocks)."""
    size = 8 if width <= 512 else 16 if width <= 4096 else 32
    return min(size, S) if official else size
