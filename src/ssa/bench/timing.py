"""Timing of one function: device time with a cold cache, and host time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

FLUSH_BYTES = 256 << 20  # several times the largest L2
FLUSH_MS = 0.05  # at least, on any GPU of today


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call.

    Attributes:
        median: device time (on a CPU: wall time), nothing of the arguments in the cache and the whole call queued
            before the device reaches it: where the device would wait for the host shows in ``wall`` only.
        low, high: 20th and 80th percentile.
        repeats: timed calls.
        wall: wall time per call of calls queued one after another; above ``median`` if the host cannot keep up.
        host: wall time until a call returns, the device's work not awaited.
    """

    median: float
    low: float
    high: float
    repeats: int
    wall: float
    host: float


@lru_cache(maxsize=4)
def _flush_buffer(device: torch.device) -> Tensor:
    return torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure(function: Callable[[], object], device: torch.device, budget_ms: float = 100.0) -> Timing:
    """Call ``function`` for about ``budget_ms`` of device time (3 to 100 times) after warming it up."""
    if device.type != "cuda":
        return _measure_cpu(function, budget_ms)
    function()  # compilation, plans, allocator
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    host_ms = 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize(device)
    once_ms = 1e3 * (time.perf_counter() - start)
    repeats = max(3 if once_ms > budget_ms else 5, min(100, int(budget_ms / once_ms)))
    flush = _flush_buffer(device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    host = []
    for before, after in events:
        for _ in range(min(100, 2 + int(1.5 * host_ms / FLUSH_MS))):  # keeps the device busy while the host queues
            flush.zero_()
        before.record()
        start = time.perf_counter()
        function()
        host.append(1e3 * (time.perf_counter() - start))
        after.record()
    torch.cuda.synchronize(device)
    times = [before.elapsed_time(after) for before, after in events]
    queued = 2 if once_ms > budget_ms else repeats
    start = time.perf_counter()
    for _ in range(queued):
        function()
    torch.cuda.synchronize(device)
    wall = 1e3 * (time.perf_counter() - start) / queued
    low, high = _percentile(times, 0.2), _percentile(times, 0.8)
    return Timing(statistics.median(times), low, high, repeats, wall, statistics.median(host))


def _measure_cpu(function: Callable[[], object], budget_ms: float) -> Timing:
    times: list[float] = []
    function()
    while len(times) < 5 or (sum(times) < budget_ms and len(times) < 100):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    median = statistics.median(times)
    return Timing(median, _percentile(times, 0.2), _percentile(times, 0.8), len(times), median, median)
