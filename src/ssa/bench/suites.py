"""The registry: which workloads a suite has and what is timed on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from ssa.bench.operations import DIRECTIONS, Operation, full, peer, sdpa, selection, sparse, sparse_given
from ssa.bench.workloads import Workload, realistic_rows
from ssa.errors import InputError

Peers = dict[str, Callable[..., Tensor]]


@dataclass(frozen=True)
class Entry:
    """One workload of a suite.

    Attributes:
        workload: shapes and inputs.
        operations: what is timed.
        stages: also list the kernels of the sparse forward and backward with their times.
        memory: also record peak memory.
        by_length: also time batched cuDNN at a ladder of lengths, to compare mixed documents with.
    """

    workload: Workload
    operations: tuple[Operation, ...]
    stages: bool = False
    memory: bool = False
    by_length: bool = False


SMALL = Workload("1B 4x8K", ((8192,),) * 4)
LARGE = Workload("8B 8K", ((8192,),), heads=32, kv_heads=8, head_dim=128)
ONE_ROW = {"32K": 32768, "128K": 131072}
PACKED = Workload("1B packed 32x1K", ((1024,) * 32,))
RF_1024 = replace(SMALL, name="1B 4x8K RF 1024", block_size=32, num_blocks=32)
MIXED = Workload("1B packed mix", realistic_rows(4, 8192))
OURS = ("cuda", "cudnn", "packed", "flash")


def _rows(workload: Workload, name: str, tokens: int) -> Workload:
    return replace(workload, name=name, rows=((tokens,),))


def _full(*backends: str, sdpas: tuple[SDPBackend, ...] = (SDPBackend.CUDNN_ATTENTION,)) -> tuple[Operation, ...]:
    named = [full(backend, d) for backend in backends for d in DIRECTIONS]
    return (*named, *(sdpa(backend, d) for backend in sdpas for d in DIRECTIONS))


def _sparse(peers: Peers, backend: str = "auto") -> tuple[Operation, ...]:
    return (
        selection(backend),
        *(sparse(backend, d) for d in DIRECTIONS),
        *(sparse_given(backend, d) for d in DIRECTIONS),
        *(peer(name, function, d) for name, function in peers.items() for d in DIRECTIONS),
    )


def _random(workload: Workload) -> Workload:
    return replace(workload, inputs="random")


def _long(workload: Workload, prefix: str, names: tuple[str, ...]) -> list[Workload]:
    return [_rows(workload, f"{prefix} {name}", ONE_ROW[name]) for name in names]


def smoke(peers: Peers) -> list[Entry]:
    """Every kind of case at a size that a CPU runs in seconds."""
    tiny = Workload("tiny", ((96,), (96,)), 4, 2, 8, block_size=8, num_blocks=3, dtype=torch.float32)
    packed = replace(tiny, name="tiny packed", rows=((40, 24), (32, 32)))
    operations = (*_full("reference", "auto", sdpas=(SDPBackend.MATH,)), *_sparse(peers))
    return [
        Entry(tiny, operations, stages=True, memory=True),
        Entry(_random(tiny), _sparse({})),
        Entry(packed, (*_full("auto", sdpas=()), *_sparse({})), by_length=True),
    ]


def full_suite(peers: Peers) -> list[Entry]:
    """Every backend of the full stream, on batches and on packed documents."""
    both = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    large_mix = replace(LARGE, name="8B packed mix", rows=MIXED.rows)
    wide = replace(SMALL, name="D 256 packed mix", heads=16, kv_heads=4, head_dim=256, rows=MIXED.rows)
    return [
        Entry(PACKED, _full(*OURS, sdpas=both)),
        Entry(MIXED, _full(*OURS, sdpas=()), by_length=True),
        Entry(SMALL, _full(*OURS, sdpas=both)),
        Entry(large_mix, _full(*OURS, sdpas=()), by_length=True),
        Entry(wide, _full(*OURS, sdpas=()), by_length=True),
        Entry(LARGE, _full(*OURS, sdpas=both)),
        *(Entry(w, _full("cuda", "packed", sdpas=both)) for w in _long(SMALL, "1B", ("32K",))),
        *(Entry(w, _full("cuda", "packed", sdpas=both)) for w in _long(LARGE, "8B", ("32K",))),
    ]


def targets(peers: Peers) -> list[Entry]:
    """What the rows of ``targets.json`` need, and no more."""
    flash = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
    best = lambda sdpas=flash[:1]: _full("cuda", sdpas=sdpas)  # noqa: E731
    pair = tuple(sparse("auto", d) for d in DIRECTIONS)
    others = tuple(peer(name, function, "forward+backward") for name, function in peers.items())
    workloads = [SMALL, *_long(SMALL, "1B", ("32K", "128K"))]
    entries = [Entry(PACKED, best()), Entry(MIXED, _full("cuda", sdpas=()), by_length=True)]
    for workload in workloads:
        longest = workload.name == "1B 128K"
        entries.append(Entry(workload, (*best(flash if longest else flash[:1]), *pair, *others), memory=longest))
        entries.append(Entry(_random(workload), pair))
    entries.append(Entry(RF_1024, pair))  # the ratio is to full attention of the same rows
    return entries + [Entry(w, (*best(), *pair)) for w in (LARGE, *_long(LARGE, "8B", ("32K",)))]


def kernels(peers: Peers) -> list[Entry]:
    """Selection and sparse attention at every shape of the record, with stages."""
    entries = []
    for workload in (SMALL, *_long(SMALL, "1B", ("32K", "128K")), LARGE, *_long(LARGE, "8B", ("32K",))):
        entries.append(Entry(workload, (*_full("cuda"), *_sparse(peers)), stages=True, memory=True))
        entries.append(Entry(_random(workload), _sparse({})))
    entries.append(Entry(RF_1024, (*_full("cuda"), *_sparse(peers)), stages=True))
    return [*entries, Entry(MIXED, (*_full("cuda", sdpas=()), *_sparse({})), by_length=True)]


SUITES: dict[str, Callable[[Peers], list[Entry]]] = {
    "smoke": smoke,
    "full": full_suite,
    "kernels": kernels,
    "targets": targets,
}


def suite(name: str, peers: Peers) -> list[Entry]:
    """Entries of a suite."""
    if name not in SUITES:
        raise InputError("ssa bench --suite", repr(name), f"one of {sorted(SUITES)}")
    return SUITES[name](peers)
