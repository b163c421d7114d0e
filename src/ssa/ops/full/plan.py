"""Which kernel serves which documents of a full-attention call, at what estimated time. Host arithmetic only.

The rule is a cost model fitted to measurements (:data:`ssa.ops.full.rates.RATES`): a document of L tokens costs the
device ``heads * (square * L**2 + linear * L)``, a kernel call costs the host a constant, and the longer of both sums
counts. Kernels differ in what they make of documents of mixed lengths:

``cudnn``   batches of one length. Other documents are copied into batches of a padded length: under causal masking
            keys after a document's end are never read by its queries, so padding changes nothing.
``packed``  cuDNN on documents where they lie, as many groups of similar length as pay for their launches.
``flash``   one call for all documents where they lie.

cuDNN builds a plan for every new (documents, length) of a call, tens of milliseconds each. So that packed training
meets few of them, both numbers come from short ladders, except where all documents of a batch are equally long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any, Literal, NamedTuple

Direction = Literal["forward", "backward"]
TILE = 128  # tokens that a kernel's program computes at once


class Rate(NamedTuple):
    """Fitted cost of one kernel in one direction at one head dimension.

    Attributes:
        call: microseconds of the host per call.
        square: picoseconds per query head and squared token of a document.
        linear: picoseconds per query head and token of a document.
        copied: microseconds of the host per call on copied documents.
        copy: picoseconds per byte, read or written, of documents that must be copied.
        empty: picoseconds per query head and token of a call's grid in which there is no document: kernels that read
            documents where they lie launch every document at the longest one's length.
    """

    call: float
    square: float
    linear: float
    copied: float = 0.0
    copy: float = 0.0
    empty: float = 0.0

    def documents(self, heads: int, count: int, length: int) -> float:
        """Microseconds of the device for ``count`` documents of ``length`` tokens; a shorter one costs a whole tile."""
        length = max(length, TILE)
        return 1e-6 * heads * count * length * (self.square * length + self.linear)


class Shape(NamedTuple):
    """Query heads, key-value heads, head dimension."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Call:
    """Documents that one kernel call serves, each taken as ``length`` tokens.

    Attributes:
        length: at least the longest document's.
        starts: first flat row of each document.
        lengths: length of each document.
        copied: whether they are copied into a padded batch; else they are read where they lie.
    """

    length: int
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    copied: bool = False


@dataclass(frozen=True, eq=False)
class Plan:
    """Calls of one kernel that together serve every document once.

    Attributes:
        kernel: ``"cudnn"``, ``"packed"`` or ``"flash"``.
        calls: what it is called with.
        microseconds: estimated time.
        total: flat rows of the batch.
        cache: device tensors that the kernel made for this plan.
    """

    kernel: str
    calls: tuple[Call, ...]
    microseconds: float
    total: int
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        copied = sum(len(call.lengths) for call in self.calls if call.copied)
        padding = sum(call.length * len(call.lengths) for call in self.calls if call.copied)
        padding -= sum(sum(call.lengths) for call in self.calls if call.copied)
        moved = f", {copied} documents copied ({padding} tokens of padding)" if copied else ""
        calls = "1 call" if len(self.calls) == 1 else f"{len(self.calls)} calls"
        return f"{self.kernel}: {calls}{moved}, about {self.microseconds / 1000:.3g} ms"


def padded_length(length: int) -> int:
    """The next rung: multiples of 64 up to 1024, then eight rungs per octave (at most one eighth of padding)."""
    step = 64
    while 16 * step < length:
        step *= 2
    return -(-length // step) * step


def batch_sizes(count: int) -> list[int]:
    """``count`` as a sum of few sizes out of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: 13 is 12 + 1."""
    sizes = []
    while count:
        power = 1 << (count.bit_length() - 1)
        size = power * 3 // 2 if power > 1 and power * 3 // 2 <= count else power
        sizes.append(size)
        count -= size
    return sizes


def power_of_two(n: int) -> int:
    """The next power of two: what the sizes of packed calls are rounded up to, so that they need few plans."""
    return 1 << max(0, n - 1).bit_length()


def partition(items: int, cost: Callable[[int, int], float]) -> list[tuple[int, int]]:
    """Cut ``range(items)`` into intervals ``[a, b)`` of least total ``cost(a, b)``."""
    best, cut = [0.0] + [float("inf")] * items, [0] * (items + 1)
    for b in range(1, items + 1):
        for a in range(b):
            if (total := best[a] + cost(a, b)) < best[b]:
                best[b], cut[b] = total, a
    intervals, b = [], items
    while b:
        intervals.append((cut[b], b))
        b = cut[b]
    return intervals[::-1]


Document = tuple[int, int]  # length, first flat row


def _classes(documents: Sequence[Document]) -> list[tuple[int, list[Document]]]:
    """Documents by padded length, longest first."""
    ordered = sorted(documents, key=lambda d: (-padded_length(d[0]), d[1]))
    return [(length, list(group)) for length, group in groupby(ordered, key=lambda d: padded_length(d[0]))]


def _groups(documents: Sequence[Document], cost: Callable[[int, int, int], float]) -> Iterator[tuple[int, list]]:
    """Documents in groups of least total ``cost(length, documents, tokens)``; every group has one padded length."""
    classes = _classes(documents)
    counts = [0, *accumulate(len(group) for _, group in classes)]
    tokens = [0, *accumulate(sum(d[0] for d in group) for _, group in classes)]
    costs = lambda a, b: cost(classes[a][0], counts[b] - counts[a], tokens[b] - tokens[a])  # noqa: E731
    for a, b in partition(len(classes), costs):
        yield classes[a][0], [d for _, group in classes[a:b] for d in group]


def _call(length: int, documents: Sequence[Document], copied: bool = False) -> Call:
    return Call(length, tuple(d[1] for d in documents), tuple(d[0] for d in documents), copied)


def _plan_cudnn(lengths: tuple[int, ...], shape: Shape, rate: Rate, bytes_per_token: float) -> Plan:
    calls: list[Call] = []
    loose: list[Document] = []
    row = 0
    runs = [(length, sum(1 for _ in group)) for length, group in groupby(lengths)]
    for length, count in runs:
        documents = [(length, row + i * length) for i in range(count)]
        row += length * count
        exact = len(runs) == 1 and length > 1  # cuDNN refuses batches of length 1
        if not exact and padded_length(length) != length:
            loose += documents
            continue
        for size in [count] if exact else batch_sizes(count):
            calls.append(_call(length, documents[:size]))
            documents = documents[size:]
    host = rate.call * len(calls)
    device = sum(rate.documents(shape.heads, len(call.starts), call.length) for call in calls)

    def device_time(length: int, count: int) -> float:
        return rate.documents(shape.heads, count, length) + 1e-6 * rate.copy * bytes_per_token * length * count

    def cost(length: int, count: int, _: int) -> float:
        return rate.copied * len(batch_sizes(count)) + device_time(length, count)

    for length, documents in _groups(loose, cost):
        device += device_time(length, len(documents))
        for size in batch_sizes(len(documents)):
            calls.append(_call(length, documents[:size], copied=True))
            documents = documents[size:]
            host += rate.copied
    return Plan("cudnn", tuple(calls), max(host, device), sum(lengths))


def _plan_packed(lengths: tuple[int, ...], shape: Shape, rate: Rate) -> Plan:
    def empty(length: int, count: int, tokens: int) -> float:
        grid = power_of_two(count) * power_of_two(length)
        return 1e-6 * rate.empty * shape.heads * (grid - tokens)

    documents = list(zip(lengths, accumulate(lengths, initial=0), strict=False))
    calls, device = [], sum(rate.documents(shape.heads, 1, length) for length in lengths)
    for length, group in _groups(documents, lambda *size: rate.call + empty(*size)):
        calls.append(_call(length, group))
        device += empty(length, len(group), sum(d[0] for d in group))
    return Plan("packed", tuple(calls), max(rate.call * len(calls), device), sum(lengths))


def _plan_flash(lengths: tuple[int, ...], shape: Shape, rate: Rate) -> Plan:
    documents = list(zip(lengths, accumulate(lengths, initial=0), strict=False))
    device = sum(rate.documents(shape.heads, 1, length) for length in lengths)
    device += 1e-6 * rate.empty * shape.heads * (len(lengths) * max(lengths) - sum(lengths))
    return Plan("flash", (_call(max(lengths), documents),), max(rate.call, device), sum(lengths))


@lru_cache(maxsize=64)
def plan(lengths: tuple[int, ...], shape: Shape, direction: Direction, rates: tuple[tuple[str, Rate], ...]) -> Plan:
    """The plan of least estimated time among the kernels in ``rates`` (name and cost of each that may be used)."""
    # forward reads q, k, v and writes out; backward reads those and d_out and writes dq, dk, dv; two bytes, both ways
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    bytes_per_token = 2 * 2 * (2 * query + 2 * key if direction == "forward" else 4 * query + 4 * key)
    plans = []
    for name, rate in rates:
        if name == "cudnn":
            plans.append(_plan_cudnn(lengths, shape, rate, bytes_per_token))
        elif name == "packed":
            plans.append(_plan_packed(lengths, shape, rate))
        else:
            plans.append(_plan_flash(lengths, shape, rate))
    return min(plans, key=lambda p: p.microseconds)
