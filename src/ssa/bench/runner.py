"""Runs cases: the check first, the time after. A case that fails its check has no time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from ssa.bench.operations import DIRECTIONS, Operation, check, failures, sdpa
from ssa.bench.suites import Entry
from ssa.bench.timing import measure
from ssa.bench.workloads import Tensors, Workload, draw
from ssa.errors import SSAError
from ssa.ops import explain

LADDER = (128, 256, 512, 1024, 2048, 4096, 8192)
Record = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How a suite is run."""

    device: torch.device
    budget_ms: float = 100.0
    say: Callable[[str], None] = print


def run_entry(entry: Entry, options: Options) -> list[Record]:
    """Records of an entry's cases, in order."""
    small = entry.workload.small()
    small_inputs, large_inputs = draw(small, options.device), draw(entry.workload, options.device)
    records = []
    for operation in entry.operations:
        record: Record = {"id": f"{entry.workload.name}, {entry.workload.inputs}: {operation.name}"}
        record |= {"workload": entry.workload.describe(), "family": operation.family}
        record |= {"direction": operation.direction, "backend": operation.backend}
        record |= run_case(operation, entry, small, small_inputs, large_inputs, options)
        options.say(one_line(record))
        records.append(record)
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    if entry.by_length:
        records += by_length(entry.workload, options)
    return records


def run_case(
    operation: Operation, entry: Entry, small: Workload, small_inputs: Tensors, inputs: Tensors, options: Options
) -> Record:
    """Check on the small shape, then time on the large one."""
    try:
        errors = check(operation, small, small_inputs)
        record: Record = {"check": {"workload": small.describe(), "errors": {n: list(e) for n, e in errors.items()}}}
        if wrong := failures(errors):
            return {**record, "status": "wrong", "reason": "; ".join(wrong)}
        function = operation.build(entry.workload, inputs)
        record["timing"] = asdict(measure(function, options.device, options.budget_ms))
        if entry.memory:
            record["peak_bytes"] = peak_bytes(function, options.device)
        if entry.stages and operation.family != "full":
            record["kernels"] = kernels(function, options.device)
    except (SSAError, RuntimeError, NotImplementedError) as error:  # the other cases still count
        status = "unavailable" if isinstance(error, SSAError) else "failed"
        return {"status": status, "reason": f"{type(error).__name__}: {error}".split("\n")[0][:300]}
    layout = entry.workload.layout
    if operation.family == "full" and operation.backend == "ssa cuda":
        shape = {"heads": entry.workload.heads, "kv_heads": entry.workload.kv_heads}
        head_dim, dtype = entry.workload.head_dim, entry.workload.dtype
        told = explain("full_attention", device=options.device, dtype=dtype, head_dim=head_dim, layout=layout, **shape)
        record["plan"] = told.reasons[0][1]
    return {**record, "status": "ok"}


def peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    """Most memory that a call holds beyond its inputs; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = function()
    torch.cuda.synchronize(device)
    del result
    return int(torch.cuda.max_memory_allocated(device) - before)


def kernels(function: Callable[[], object], device: torch.device, most: int = 20) -> list[Record]:
    """The device's kernels of one call, longest first: name, calls, milliseconds. Empty on a CPU."""
    if device.type != "cuda":
        return []
    activities = [torch.profiler.ProfilerActivity.CUDA]
    function()
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize(device)
    rows = [
        {"name": event.key, "calls": event.count, "ms": event.self_device_time_total / 1e3}
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(rows, key=lambda row: -float(row["ms"]))[:most]


def by_length(workload: Workload, options: Options) -> list[Record]:
    """What batched cuDNN would take for the documents of a mixed workload: the sum over documents.

    Measured on batches of about as many tokens at a ladder of lengths; a document's time per token is interpolated
    in the logarithm of its length. This is a bound that no packed kernel is given: every document in a full batch of
    its own length.
    """
    lengths = [n for row in workload.rows for n in row]
    cuda = options.device.type == "cuda"
    backend = SDPBackend.CUDNN_ATTENTION if cuda else SDPBackend.MATH
    rungs = [n for n in LADDER if n < 2 * max(lengths)] or [LADDER[0]]
    total = sum(lengths) if cuda else 2 * max(rungs)
    records = []
    for direction in DIRECTIONS:
        points = []
        for rung in rungs:
            batch = replace(workload, name="ladder", rows=((rung,),) * max(1, total // rung))
            function = sdpa(backend, direction).build(batch, draw(batch, options.device))
            timing = measure(function, options.device, options.budget_ms / 4)
            points.append((rung, timing.median / (len(batch.rows) * rung)))
        estimate = sum(n * interpolate(points, n) for n in lengths)
        record: Record = {"id": f"{workload.name}, {workload.inputs}: full {direction} [sum over documents]"}
        record |= {"workload": workload.describe(), "family": "full", "direction": direction, "status": "estimate"}
        record |= {"backend": "sum over documents", "estimate_ms": estimate}
        record |= {"ladder": [{"length": n, "us_per_token": 1e3 * t} for n, t in points]}
        options.say(f"{record['id']}: {estimate:.3f} ms")
        records.append(record)
    return records


def interpolate(points: Sequence[tuple[int, float]], length: int) -> float:
    """Piecewise linear in log length; constant outside."""
    if length <= points[0][0]:
        return points[0][1]
    for (a, y), (b, z) in pairwise(points):
        if length <= b:
            share = math.log(length / a) / math.log(b / a)
            return y + share * (z - y)
    return points[-1][1]


def milliseconds(record: Record, wall: bool = False) -> float | None:
    """Time of a record, None without one; ``wall``: the longer of device and wall time."""
    if record["status"] == "estimate":
        return float(record["estimate_ms"])
    if record["status"] != "ok":
        return None
    timing = record["timing"]
    return float(max(timing["median"], timing["wall"]) if wall else timing["median"])


def add_ratios(records: list[Record]) -> None:
    """Per case: its speed-up over the fastest full attention of the run on the same shape and direction."""
    for record in records:
        mine = milliseconds(record)
        if mine is None:
            continue
        direction = record["direction"]
        full = [
            (t, r["id"]) for r in records if same_shape(r, record) and is_full(r, direction) and (t := milliseconds(r))
        ]
        if full:
            best, baseline = min(full)
            record["ratio"] = {"value": best / mine, "baseline": baseline}


def same_shape(a: Record, b: Record) -> bool:
    """Whether full attention on ``a`` says what it takes on ``b``: it does not depend on the values of the inputs."""
    ignored = ("inputs", "block_size", "num_blocks", "name")
    strip = lambda r: {k: v for k, v in r["workload"].items() if k not in ignored}  # noqa: E731
    return strip(a) == strip(b)


def is_full(record: Record, direction: str) -> bool:
    """Whether a record is full attention in a direction."""
    return record["family"] == "full" and record["direction"] == direction


def one_line(record: Record) -> str:
    """A record for the terminal, as it is made."""
    if record["status"] != "ok":
        return f"{record['id']}: {record['status'].upper()}, {record['reason']}"
    timing = record["timing"]
    spread = f"{timing['low']:.3f}-{timing['high']:.3f}"
    return f"{record['id']}: {timing['median']:.3f} ms ({spread}), wall {timing['wall']:.3f}"
