"""Tries launch configurations of the sparse stream's kernels on this GPU: checked first, then timed kernel by kernel.

    python benchmarks/tune_kernels.py --out tune.json [--shapes 1B-8K 8B-8K] [--workers 12]

Every variant changes one kernel of the shipped configuration. Worker processes compile the variants side by side and
compare their results with the shipped configuration's on a small input (which `ssa bench` compares with float64); the
ones that agree are timed with the profiler on the large inputs. Prints, per shape and kernel, the best ones.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssa.bench.operations import full
from ssa.bench.timing import measure
from ssa.bench.workloads import Workload, draw
from ssa.ops import select_blocks, sparse_attention
from ssa.ops.selection import triton as selection
from ssa.ops.selection.triton import TileConfig
from ssa.ops.sparse import triton as sparse
from ssa.ops.sparse import triton_index
from ssa.ops.sparse.triton import Tile
from ssa.ops.triton_support import Launch

WIDE = Workload("8B-8K", ((8192,),), heads=32, kv_heads=8, head_dim=128)
SHAPES = {
    w.name: w
    for w in (
        Workload("1B-8K", ((8192,),) * 4),
        Workload("1B-32K", ((32768,),)),
        WIDE,
        replace(WIDE, name="8B-32K", rows=((32768,),)),
        Workload("1B-128K", ((131072,),)),
        Workload("1B-8K-random", ((8192,),) * 4, inputs="random"),
    )
}
SELECTING = ("lse", "score", "resident", "refine", "slab", "passes")  # variants that change the selection's kernels
AGREE = 4e-3  # relative difference of results in bfloat16
Variant = tuple[str, str, dict[str, Any]]  # kernel, label, what to change


# ---------------------------------------------------------------------- variants
def variants(D: int) -> list[Variant]:
    """All of a head dim; ``shipped`` first."""
    found: list[Variant] = [("shipped", "", {})]
    narrow = D <= 64
    for BT, BN, *how in ((128, 64, 4, 3), (128, 64, 4, 3, 96), (128, 32, 4, 3), (128, 32, 4, 3, 80), (64, 32, 4, 3)):
        found.append(("lse", f"{BT}x{BN} {how}", {"resident": None, "lse": TileConfig(BT, BN, Launch(*how))}))
    tiles = tuple(
        TileConfig(BT, BN, Launch(*how)) for BT, BN, *how in (
            (64, 64, 4, 3, 96), (64, 64, 4, 3, 112), (64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 3, 168),
            (64, 128, 4, 3), (64, 128, 4, 2), (128, 64, 4, 3, 168), (128, 128, 8, 3),
        )
    )  # fmt: skip
    for tile in tiles:
        label = f"{tile.tokens}x{tile.blocks} {list(tile.how)}"
        found.append(("score", label, {"resident": None, "score": tile}))
    G = 16 if narrow else 4
    for BN, *how in ((32, 4, 3, 128), (32, 4, 2, 128), (32, 4, 3), (32, 8, 3), (64, 4, 3), (64, 8, 3), (16, 8, 3)):
        found.append(("resident", f"{BN} {how}", {"resident": TileConfig(64 * how[0] // G, BN, Launch(*how))}))
    for CT, registers in ((32, 64), (32, 72), (32, 80), (64, 96)):
        found.append(("refine", f"{CT} {registers}", {"refine": (CT, registers)}))
    found.append(("passes", "one", {"one_pass": 0}))
    found.append(("passes", "two", {"one_pass": 1 << 30}))
    found.append(("passes", "two, not resident", {"resident": None}))
    for bits in (26, 28):
        found.append(("slab", f"2^{bits}", {"slab": 1 << bits}))
    unions = (
        (4, 64, 4, 2, 128), (4, 32, 4, 2, 96), (4, 32, 4, 3, 96), (4, 64, 4, 3, 128), (8, 32, 4, 2), (8, 64, 8, 2, 128),
    ) if narrow else (
        (16, 64, 4, 2), (16, 32, 4, 3), (16, 32, 4, 2), (16, 32, 4, 3, 168), (32, 64, 8, 3),
    )  # fmt: skip
    for TT, BN, *how in unions:
        tile = Tile(BN, Launch(*how))
        change = {"tokens": TT, "union_forward": tile, "union_dq": tile}
        found.append(("union", f"TT{TT} BN{BN} {how}", change))
    for BN, *how in ((32, 1, 2), (64, 1, 2), (32, 1, 3)):
        tile = Tile(BN, Launch(*how))
        found.append(("token", f"BN{BN} {how}", {"limit": -1, "token_forward": tile, "token_dq": tile}))
    for segment in (128, 512):
        found.append(("segment", str(segment), {"segment": segment}))
    return found


@contextmanager
def applied(change: dict[str, Any]) -> Iterator[None]:
    """Run the operations with a change of their configuration."""
    named = ("lse_config", "score_config", "resident_config", "refine_config", "SLAB_ELEMENTS", "ONE_PASS_TOKENS")
    settings = {name: getattr(selection, name) for name in named}
    old = sparse.strategy, triton_index.SEGMENT
    fields = {k: v for k, v in change.items() if k in sparse.Strategy._fields}

    def strategy(H: int, K: int, D: int, S: int, slots: int, small: bool = False) -> sparse.Strategy:
        plan = old[0](H, K, D, S, slots, small)._replace(**fields)
        return plan if "limit" in fields else plan._replace(limit=max(slots * 3 // 2, plan.tokens * slots // 2))

    for name, key in zip(named, ("lse", "score", "resident", "refine", "slab", "one_pass"), strict=True):
        if key in change:
            setattr(selection, name, (lambda *_, x=change[key]: x) if name.endswith("config") else change[key])
    sparse.strategy = strategy
    triton_index.SEGMENT = change.get("segment", old[1])
    selection._slabs.cache_clear()
    try:
        yield
    finally:
        for name, value in settings.items():
            setattr(selection, name, value)
        sparse.strategy, triton_index.SEGMENT = old
        selection._slabs.cache_clear()


# ---------------------------------------------------------------------- running
class Case:
    """A workload's inputs and the stages as functions."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.x, self.layout, self.spec = draw(workload, device), workload.layout, workload.spec
        self.indices = self.select()

    def select(self) -> Tensor:
        return select_blocks(self.x.q, self.x.k, self.spec, self.layout, backend="triton")

    def forward(self) -> Tensor:
        return sparse_attention(*self.x.leaves, self.indices, self.spec.block_size, self.layout, backend="triton")

    def both(self) -> list[Tensor]:
        out = self.forward()
        return [out.detach(), *torch.autograd.grad(out, self.x.leaves, self.x.d_out)]

    def of(self, kernel: str) -> Callable[[], Any]:
        """What runs the kernels that a variant changes."""
        if kernel == "shipped":
            return lambda: (self.select(), self.both())
        return self.select if kernel in SELECTING else self.both


def disagreement(mine: Any, expected: Any) -> float:
    """Largest relative difference of results; share of other blocks for a selection."""
    if isinstance(mine, Tensor):
        return 4 * float((mine != expected).any(-1).float().mean())
    return max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(mine, expected, strict=True))


def check_share(D: int, part: int, parts: int, out: Path, kernels: Sequence[str]) -> None:
    """A worker's share of the variants: errors as text, by the number of the variant."""
    device = torch.device("cuda")
    shape = SHAPES["1B-8K"] if D == 64 else SHAPES["8B-8K"]
    lengths = (1024, 9000, 70000)[: 3 if D == 64 else 2]  # each has its own chunks of scores
    cases = [Case(replace(shape, rows=((n,),)), device) for n in lengths]
    expected = {kernel: [case.of(kernel)() for case in cases] for kernel in ("lse", "union")}
    results: dict[int, str] = {}
    for i, (kernel, _, change) in enumerate(variants(D)):
        if i % parts != part or kernel == "shipped" or (kernels and kernel not in kernels):
            continue
        try:
            with applied(change):
                selecting = kernel in SELECTING
                wanted = expected["lse" if selecting else "union"]
                pairs = zip(cases if selecting else cases[:1], wanted, strict=False)
                error = max(disagreement(case.of(kernel)(), right) for case, right in pairs)
            results[i] = "" if error <= AGREE else f"off by {error:.1e}"
        except Exception as error:  # any failure rules the variant out, and the others still count
            results[i] = f"{type(error).__name__}: {error}".split("\n")[0][:120]
    out.write_text(json.dumps(results))


def kernel_times(function: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Milliseconds per call of every kernel; launches of one kernel that overlap count once."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            function()
        torch.cuda.synchronize()
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans.setdefault(event.name, []).append((event.time_range.start, event.time_range.end))
    times = {}
    for name, intervals in spans.items():
        busy, done = 0.0, float("-inf")
        for start, end in sorted(intervals):
            busy += max(0.0, end - max(start, done))
            done = max(done, end)
        times[name] = busy / 1e3 / repeats
    return times


SELECTION = ("lse_kernel", "score_kernel", "resident_score_kernel", "refine_kernel", "select_kernel")
COUNTED = {
    "lse": ("lse_kernel",), "score": ("score_kernel",), "resident": SELECTION,
    "refine": ("refine_kernel",), "slab": SELECTION, "passes": SELECTION,
    "union": ("union_kernel", "union_forward_kernel", "union_dq_kernel"),
    "token": ("token_forward_kernel", "token_dq_kernel"), "segment": ("dkv_kernel", "dkv_reduce_kernel"),
}  # fmt: skip


def counted(kernel: str, times: dict[str, float]) -> dict[str, float]:
    """The times that a variant is judged by."""
    names = COUNTED.get(kernel, ("dkv_kernel", "dkv_reduce_kernel"))
    return {name: times.get(name, 0.0) for name in names}


def time_shape(name: str, valid: dict[int, str], budget_s: float) -> dict[str, Any]:
    """Times of the shipped configuration and of every variant that agrees."""
    workload, device = SHAPES[name], torch.device("cuda")
    start = time.perf_counter()
    case = Case(workload, device)
    repeats = 2 if workload.rows[0][0] > 100000 else 4
    base = kernel_times(case.of("shipped"), repeats)
    record: dict[str, Any] = {"kernels": base, "variants": {}}
    print(f"== {name}: " + ", ".join(f"{k[:24]} {v:.3f}" for k, v in sorted(base.items(), key=lambda x: -x[1])[:18]))
    for label, function in (("select", case.select), ("forward", case.forward), ("both", case.both)):
        timing = measure(function, device)
        record[label] = {"device": timing.median, "host": timing.host, "wall": timing.wall}
        print(f"   {label}: {timing.median:.3f} ms, host {timing.host:.3f}, wall {timing.wall:.3f}")
    for direction in ("forward", "forward+backward"):
        if workload.inputs == "correlated":
            record[f"full {direction}"] = measure(full("cuda", direction).build(workload, case.x), device, 30).median
            print(f"   full {direction}: {record[f'full {direction}']:.3f}")
    for i, (kernel, label, change) in enumerate(variants(workload.head_dim)):
        if kernel == "shipped" or valid.get(i, "not run") or time.perf_counter() - start > budget_s:
            continue
        try:
            with applied(change):
                times = counted(kernel, kernel_times(case.of(kernel), repeats))
            record["variants"][f"{kernel} {label}"] = times
        except RuntimeError as error:
            print(f"   {kernel} {label}: {str(error)[:80]}")
        torch.cuda.empty_cache()
    return record


def report(name: str, record: dict[str, Any]) -> None:
    """Per kernel the variants, best first."""
    kernels: dict[str, list[tuple[float, str]]] = {}
    for label, times in record["variants"].items():
        kernel, rest = label.split(" ", 1)
        each = "+".join(f"{t:.3f}" for t in times.values())
        kernels.setdefault(kernel, []).append((sum(times.values()), f"{rest} ({each})"))
    for kernel, found in kernels.items():
        best = sorted(found)[:7]
        print(f"{name} {kernel}: " + " | ".join(f"{t:.3f} {label}" for t, label in best))


def main() -> None:
    """Compile and check side by side, then time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--budget", type=float, default=18.0, help="seconds per shape")
    parser.add_argument("--kernels", nargs="*", default=[], help="try variants of these alone; default all")
    parser.add_argument("--share", nargs=3, type=int, help=argparse.SUPPRESS)  # head dim, part, parts: a worker
    arguments = parser.parse_args()
    if arguments.share:
        check_share(*arguments.share, arguments.out, arguments.kernels)
        return
    start = time.perf_counter()
    half = max(1, arguments.workers // 2)
    files = {(D, i): arguments.out.with_suffix(f".{D}.{i}.tmp") for D in (64, 128) for i in range(half)}
    again = [sys.executable, __file__, "--kernels", *arguments.kernels]
    workers = [
        subprocess.Popen([*again, "--out", str(f), "--share", str(D), str(i), str(half)]) for (D, i), f in files.items()
    ]
    for worker in workers:
        worker.wait()
    valid: dict[int, dict[int, str]] = {64: {}, 128: {}}
    for (D, _), f in files.items():
        if f.exists():
            valid[D] |= {int(k): v for k, v in json.loads(f.read_text()).items()}
            f.unlink()
    for D, found in valid.items():
        bad = {i: text for i, text in found.items() if text}
        print(f"D {D}: {len(found) - len(bad)} variants agree, checked in {time.perf_counter() - start:.0f} s")
        for i, text in bad.items():
            print(f"   {' '.join(variants(D)[i][:2])}: {text}")
    records = {}
    for name in arguments.shapes:
        records[name] = time_shape(name, valid[SHAPES[name].head_dim], arguments.budget)
        arguments.out.write_text(json.dumps(records, indent=1))
    for name, record in records.items():
        report(name, record)
    print(f"{torch.cuda.get_device_name()}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
