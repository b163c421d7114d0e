"""Inverted index: for every block, the tokens that read it. Built on the GPU, deterministic, without the host.

Four neighbouring blocks form a super-block. Blocks that are read by nearly the same tokens are better served together
(their queries are loaded once), so the super-blocks of a document and KV head are cut into groups of 1, 2 or 4 blocks,
whichever costs least by the lengths of the merged lists: one size for all of them, because each size is a launch that
passes over the queries. Groups are numbered by size, then (KV head, super-block, place):

    size 1: [0, 4 Z)    size 2: [4 Z, 6 Z)    size 4: [6 Z, 7 Z)    with Z = K * super-blocks

Two ways to the lists. A bitmap (one bit per block and later token of its document; setting bits commutes, so it is
deterministic) is fast and costs T^2 / 16 S bytes per KV head and document; a stable sort by block takes over where
that would be too much, without merged groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa.ops.triton_support import Launch, Launcher, ceil_div

BITMAP_BYTES = 1 << 30  # at most; beyond it the index is sorted
SEGMENT = 256  # readers per work item: bounds the work of a block that everybody reads
WORDS = 128  # bitmap words per step of a program


@triton.jit
def _bits_set(x):
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["N", "words", "slots"])
def mark_kernel(
    indices_ptr,  # [N, K, slots]
    bitmap_ptr,  # [K, words] int32, zero
    super_of_document_ptr,  # [N]: first super-block of each token's document
    super_start_ptr,  # [supers + 1]
    word_offset_ptr,  # [supers + 1] int64: first bitmap word; 4 rows of equal length per super-block
    N,
    words,
    K,
    slots,
    ENTRIES: tl.constexpr,
):
    """Set bit (t - first row of the super-block) in the row of every block that token t reads."""
    e = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    exists = e < N * K * slots
    block = tl.load(indices_ptr + e, mask=exists, other=-1).to(tl.int32)
    head, t = (e // slots) % K, e // slots // K
    read = exists & (block >= 0)
    place = tl.load(super_of_document_ptr + t, mask=read, other=0) + block // 4
    bit = t - tl.load(super_start_ptr + place, mask=read, other=0)
    base = tl.load(word_offset_ptr + place, mask=read, other=0)
    length = (tl.load(word_offset_ptr + place + 1, mask=read, other=0) - base) // 4
    word = head.to(tl.int64) * words + base + (block % 4) * length + bit // 32
    tl.atomic_or(bitmap_ptr + word, 1 << (bit % 32), mask=read, sem="relaxed")


@triton.jit(do_not_specialize=["supers", "words"])
def count_kernel(
    bitmap_ptr,  # [K, words]
    word_offset_ptr,  # [supers + 1]
    super_of_document_ptr,  # [N]
    super_start_ptr,  # [supers + 1]
    count_ptr,  # [7 Z] int32: readers per group
    readers_ptr,  # [K, supers, 3] int64, zero: readers of a document's groups by size, at its first super-block
    supers,
    words,
    K,
    LEVELS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Readers of every group of one super-block."""
    place, head = tl.program_id(0), tl.program_id(1)
    base = tl.load(word_offset_ptr + place)
    length = ((tl.load(word_offset_ptr + place + 1) - base) // 4).to(tl.int32)
    rows = bitmap_ptr + head.to(tl.int64) * words + base
    w = tl.arange(0, WORDS)
    c0 = tl.zeros([WORDS], tl.int32)
    c1, c2, c3, c01, c23, c0123 = c0, c0, c0, c0, c0, c0
    for i in range(0, length, WORDS):
        inside = i + w < length
        x0 = tl.load(rows + i + w, mask=inside, other=0).to(tl.uint32, bitcast=True)
        x1 = tl.load(rows + length + i + w, mask=inside, other=0).to(tl.uint32, bitcast=True)
        x2 = tl.load(rows + 2 * length + i + w, mask=inside, other=0).to(tl.uint32, bitcast=True)
        x3 = tl.load(rows + 3 * length + i + w, mask=inside, other=0).to(tl.uint32, bitcast=True)
        c0 += _bits_set(x0)
        c1 += _bits_set(x1)
        c2 += _bits_set(x2)
        c3 += _bits_set(x3)
        if LEVELS > 1:
            c01 += _bits_set(x0 | x1)
            c23 += _bits_set(x2 | x3)
            c0123 += _bits_set(x0 | x1 | x2 | x3)
    n0, n1, n2, n3 = tl.sum(c0), tl.sum(c1), tl.sum(c2), tl.sum(c3)
    n01, n23, n0123 = tl.sum(c01), tl.sum(c23), tl.sum(c0123)
    nth, Z = head * supers + place, K * supers
    tl.store(count_ptr + nth * 4, n0)
    tl.store(count_ptr + nth * 4 + 1, n1)
    tl.store(count_ptr + nth * 4 + 2, n2)
    tl.store(count_ptr + nth * 4 + 3, n3)
    tl.store(count_ptr + 4 * Z + nth * 2, n01)
    tl.store(count_ptr + 4 * Z + nth * 2 + 1, n23)
    tl.store(count_ptr + 6 * Z + nth, n0123)
    if LEVELS > 1:
        first = tl.load(super_of_document_ptr + tl.load(super_start_ptr + place))
        total = readers_ptr + (head * supers + first) * 3
        tl.atomic_add(total, n0.to(tl.int64) + n1 + n2 + n3, sem="relaxed")
        tl.atomic_add(total + 1, n01.to(tl.int64) + n23, sem="relaxed")
        tl.atomic_add(total + 2, n0123.to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["supers", "words"])
def compact_kernel(
    bitmap_ptr,  # [K, words]
    word_offset_ptr,
    super_start_ptr,
    entry_offset_ptr,  # [7 Z + 1]
    level_ptr,
    entry_ptr,  # token * 16 + bit per block of the group, ascending by token
    work_offset_ptr,  # [7 Z + 1]
    work_ptr,  # [works, 3]
    supers,
    words,
    K,
    SEGMENT: tl.constexpr,
    WORDS: tl.constexpr,
):
    """List the readers of one block, or of the group that begins with it, and their work items."""
    place, head, j = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    nth, Z = head * supers + place, K * supers
    level = tl.load(level_ptr + nth)
    members = 1 << level
    if j % members != 0:
        return
    region = tl.where(level == 0, 0, tl.where(level == 1, 4 * Z, 6 * Z))
    group = region + (nth * 4 + j) // members
    at = tl.load(entry_offset_ptr + group)
    end = tl.load(entry_offset_ptr + group + 1)
    if end == at:
        return
    _cut(work_ptr, tl.load(work_offset_ptr + group), group, at, end, SEGMENT)
    base = tl.load(word_offset_ptr + place)
    length = ((tl.load(word_offset_ptr + place + 1) - base) // 4).to(tl.int32)
    rows = bitmap_ptr + head.to(tl.int64) * words + base + j * length
    token0 = tl.load(super_start_ptr + place)
    length2, length4 = tl.where(level > 0, length, 0), tl.where(level > 1, length, 0)
    w = tl.arange(0, WORDS)
    for i in range(0, length, WORDS):
        x0 = tl.load(rows + i + w, mask=i + w < length, other=0).to(tl.uint32, bitcast=True)
        x1 = tl.load(rows + length + i + w, mask=i + w < length2, other=0).to(tl.uint32, bitcast=True)
        x2 = tl.load(rows + 2 * length + i + w, mask=i + w < length4, other=0).to(tl.uint32, bitcast=True)
        x3 = tl.load(rows + 3 * length + i + w, mask=i + w < length4, other=0).to(tl.uint32, bitcast=True)
        left = x0 | x1 | x2 | x3
        found = _bits_set(left)
        slot = at + tl.cumsum(found) - found
        for _ in range(tl.max(found)):
            bit = _bits_set((left ^ (left & (left - 1))) - 1)  # place of the lowest bit that is left
            flags = ((x0 >> bit) & 1) | (((x1 >> bit) & 1) << 1) | (((x2 >> bit) & 1) << 2) | (((x3 >> bit) & 1) << 3)
            token = token0 + (i + w) * 32 + bit
            tl.store(entry_ptr + slot, token * 16 + flags.to(tl.int32), mask=left != 0)
            slot += 1
            left = left & (left - 1)
        at += tl.sum(found)


@triton.jit
def _cut(work_ptr, work, group, first, end, SEGMENT: tl.constexpr):
    """Work items of one list: group, first entry, end."""
    for e in range(first, end, SEGMENT):
        tl.store(work_ptr + work * 3, group)
        tl.store(work_ptr + work * 3 + 1, e)
        tl.store(work_ptr + work * 3 + 2, tl.minimum(e + SEGMENT, end))
        work += 1


@triton.jit
def work_kernel(entry_offset_ptr, work_offset_ptr, work_ptr, SEGMENT: tl.constexpr):
    """Cut the list of one group into work items, where `compact_kernel` does not run."""
    group = tl.program_id(0)
    first, end = tl.load(entry_offset_ptr + group), tl.load(entry_offset_ptr + group + 1)
    _cut(work_ptr, tl.load(work_offset_ptr + group), group, first, end, SEGMENT)


@triton.jit(do_not_specialize=["supers"])
def offset_kernel(
    count_ptr,  # [7 Z] readers
    readers_ptr,  # [K, supers, 3], see `count_kernel`
    super_of_document_ptr,  # [N]
    super_start_ptr,  # [supers + 1]
    level_ptr,  # [Z] log2 of the blocks per group, written here
    entry_offset_ptr,  # [7 Z + 1]
    work_offset_ptr,  # [7 Z + 1]
    supers,
    K,
    LEVELS: tl.constexpr,
    COST1: tl.constexpr,
    COST2: tl.constexpr,
    COST4: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Choose the size of groups; where the list of each group and its work items begin. One program."""
    i = tl.arange(0, BLOCK)
    entries = tl.zeros([], tl.int32)
    works = tl.zeros([], tl.int32)
    Z = K * supers
    groups = 7 * Z
    for g0 in range(0, groups + 1, BLOCK):
        group = g0 + i
        inside = group < groups
        size = tl.where(group < 4 * Z, 0, tl.where(group < 6 * Z, 1, 2))
        nth = tl.where(size == 0, group // 4, tl.where(size == 1, (group - 4 * Z) // 2, group - 6 * Z))
        level = tl.zeros([BLOCK], tl.int32)
        if LEVELS > 1:  # ties go to the smaller group
            token = tl.load(super_start_ptr + nth % supers, mask=inside, other=0)
            document = tl.load(super_of_document_ptr + token, mask=inside, other=0)
            total = readers_ptr + (nth - nth % supers + document) * 3
            cost1 = tl.load(total, mask=inside, other=0) * COST1
            cost2 = tl.load(total + 1, mask=inside, other=0) * COST2
            cost4 = tl.load(total + 2, mask=inside, other=0) * COST4
            level = tl.where((cost4 < cost1) & (cost4 < cost2), 2, tl.where(cost2 < cost1, 1, 0))
        tl.store(level_ptr + nth, level, mask=inside & (size == 0) & (group % 4 == 0))
        count = tl.load(count_ptr + group, mask=inside & (level == size), other=0)
        items = (count + SEGMENT - 1) // SEGMENT
        tl.store(entry_offset_ptr + group, entries + tl.cumsum(count) - count, mask=group <= groups)
        tl.store(work_offset_ptr + group, works + tl.cumsum(items) - items, mask=group <= groups)
        entries += tl.sum(count)
        works += tl.sum(items)


class ReaderIndex(NamedTuple):
    """The lists and work items of one selection, on the device; the numbers of launches are host-side bounds."""

    entry: Tensor  # int32: readers of every group, one list after the other
    work: Tensor  # int32 [capacity, 3]: group, first entry, end
    work_offset: Tensor  # int32 [7 Z + 1]: first work item of each group
    level: Tensor  # int32 [Z]: log2 of the blocks per group of each (KV head, super-block)
    most_works: tuple[int, ...]  # bound of the work items of size 1, 2, 4
    units: int  # bound of the blocks that all work items cover


class IndexSizes(NamedTuple):
    """Host-side bounds, by shapes alone.

    Attributes:
        bitmap: whether the lists come from one.
        segments: work items if every list were full.
        most_works: work items of size 1, 2, 4.
        units: blocks that all work items cover.
    """

    bitmap: bool
    segments: int
    most_works: tuple[int, ...]
    units: int


def index_sizes(entries: int, Z: int, words: int, cost: tuple[int, ...]) -> IndexSizes:
    """Of ``entries`` slots, Z super-blocks over all KV heads, and ``words`` of bitmap."""
    fits = 4 * words <= BITMAP_BYTES
    levels, segments = len(cost) if fits else 1, ceil_div(entries, SEGMENT)
    # groups of b blocks are taken only if their readers are fewer than this multiple of the blocks' readers together
    most = [min(1.0, cost[0] / x) for x in cost[:levels]]
    excess = max(b * share for b, share in zip((1, 2, 4), most, strict=False))
    most_works = (4 * Z + segments, 2 * Z + segments, Z + segments)[:levels]
    return IndexSizes(fits, segments, most_works, 4 * Z + int(excess * segments) + 1)


def reader_index(
    indices: Tensor,  # [N, K, slots]
    super_of_document: Tensor,  # [N]
    super_start: Tensor,  # [supers + 1]
    word_offset: Tensor,  # [supers + 1]
    words: int,
    cost: tuple[int, ...],
) -> ReaderIndex:
    """Build the index; ``cost``: of a reader of a group of 1, 2 and 4 blocks, or of one block alone if never merged."""
    N, K, slots = indices.shape
    supers, entries, device = super_start.numel() - 1, N * K * slots, indices.device
    Z = K * supers
    sizes = index_sizes(entries, Z, K * words, cost)
    levels = len(sizes.most_works)
    costs = (*cost, 0, 0)[:3]
    launch = Launcher(device, indices.dtype, K, slots)
    integers = lambda *shape: torch.empty(shape, dtype=torch.int32, device=device)  # noqa: E731
    entry_offset, work_offset = integers(7 * Z + 1), integers(7 * Z + 1)
    work, level = integers(4 * Z + sizes.segments, 3), integers(Z)
    readers = torch.zeros(3 * Z, dtype=torch.int64, device=device)
    if sizes.bitmap:
        count, entry = integers(7 * Z), integers(entries)
        bitmap = torch.zeros(K * words, dtype=torch.int32, device=device)
        arguments: tuple[Any, ...] = (indices, bitmap, super_of_document, super_start, word_offset, N, words, K, slots)
        launch(mark_kernel, (ceil_div(entries, 1024), 1, 1), arguments, (1024,), Launch(4))
        arguments = (bitmap, word_offset, super_of_document, super_start, count, readers, supers, words, K)
        launch(count_kernel, (supers, K, 1), arguments, (levels, WORDS), Launch(1))
    else:
        count, entry = _sorted_lists(indices, super_of_document, supers)
    arguments = (
        count, readers, super_of_document, super_start, level, entry_offset, work_offset, supers, K,
    )  # fmt: skip
    launch(offset_kernel, (1, 1, 1), arguments, (levels, *costs, SEGMENT, 4096), Launch(16))
    if sizes.bitmap:
        arguments = (
            bitmap, word_offset, super_start, entry_offset, level, entry, work_offset, work, supers, words, K,
        )  # fmt: skip
        launch(compact_kernel, (supers, K, 4), arguments, (SEGMENT, WORDS), Launch(1))
    else:
        launch(work_kernel, (7 * Z, 1, 1), (entry_offset, work_offset, work), (SEGMENT,), Launch(1))
    return ReaderIndex(entry, work, work_offset, level, sizes.most_works, sizes.units)


def _sorted_lists(indices: Tensor, super_of_document: Tensor, supers: int) -> tuple[Tensor, Tensor]:
    """Readers per group and the lists, by a stable sort (tokens stay in order), all groups of size 1."""
    N, K, slots = indices.shape
    Z = K * supers
    head = torch.arange(K, dtype=torch.int32, device=indices.device)[:, None] * (4 * supers)
    block = super_of_document.view(N, 1, 1) * 4 + indices.to(torch.int32) + head
    key, order = torch.where(indices >= 0, block, 4 * Z).flatten().sort(stable=True)
    bound = torch.arange(4 * Z + 1, dtype=torch.int32, device=indices.device)
    count = torch.zeros(7 * Z, dtype=torch.int32, device=indices.device)
    count[: 4 * Z] = torch.searchsorted(key, bound, out_int32=True).diff()
    return count, (order // (K * slots) * 16 + 1).to(torch.int32)
