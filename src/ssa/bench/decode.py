"""Speed of one layer's attention at a step of decoding: sparse against the fastest full attention of the same run.

A case is captured in a CUDA graph that walks over the caches of several layers, as a model does, and the device's cache
is flushed before each replay: nothing is warm that would not be warm in a model, and the host plays no part. The sparse
time includes the update of the pooled keys.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssa.bench.result import header
from ssa.bench.runner import Record, kernels
from ssa.bench.targets import Target
from ssa.bench.timing import FLUSH_BYTES, measure
from ssa.errors import NumericError
from ssa.ops import SparseSpec
from ssa.ops.decode import decode_attention, full_decode_attention, select_blocks_cached, update_pooled

CALLS = 16  # of the operation in a graph
CACHE_BYTES = 12 << 30  # of all layers together, but at least two
REPLAYS = 12
# other designs of the launches, by the private constants of ssa.ops.decode.triton: which one is right where
DESIGNS: dict[str, dict[str, object]] = {
    "launched in turn": {"DEPENDENT_SELECTION": 0},
    "launched early": {"DEPENDENT_SELECTION": 2},
    "smaller tiles": {"SELECT_BYTES": 16384},
    "larger tiles": {"SELECT_BYTES": 65536},
    "attention apart": {"FUSED_KEYS": 16},
}


@dataclass(frozen=True)
class Workload:
    """A batch of sequences that end at the same length."""

    name: str
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int = 16
    num_blocks: int = 16
    dtype: str = "bfloat16"

    @property
    def spec(self) -> SparseSpec:
        """Selection."""
        return SparseSpec(self.block_size, self.num_blocks)

    @property
    def cache_bytes(self) -> int:
        """Keys and values of a layer."""
        return 2 * self.batch * self.tokens * self.kv_heads * self.head_dim * getattr(torch, self.dtype).itemsize

    @property
    def sparse_bytes(self) -> int:
        """Least that a sparse step reads: every pooled key, and keys and values of the chosen blocks."""
        return self.cache_bytes // 2 // self.block_size + self.cache_bytes // self.tokens * self.spec.receptive_field


@dataclass(frozen=True)
class Cache:
    """One layer: ``q [B, 1, H, D]``, ``k``, ``v`` ``[B, C, K, D]``, ``pooled [B, P, K, D]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    pooled: Tensor
    lengths: Tensor


_WORKLOADS = (
    Workload("1b_128k_b1", 1, 131072, 32, 2, 64),
    Workload("1b_64k_b16", 16, 65536, 32, 2, 64),
    Workload("1b_128k_b32", 32, 131072, 32, 2, 64),
    Workload("8b_128k_b1", 1, 131072, 32, 8, 128),
    Workload("8b_128k_b16", 16, 131072, 32, 8, 128),
)
SUITES = {
    "decode": _WORKLOADS,
    "decode-designs": _WORKLOADS,
    "decode-smoke": (Workload("tiny", 2, 512, 4, 2, 16, num_blocks=4, dtype="float32"),),
}
PROMISED = {"1b_128k_b1": 2.5, "1b_128k_b32": 15.0, "8b_128k_b1": 8.0, "8b_128k_b16": 15.0}


def _speed_up(name: str, records: Sequence[Record]) -> float | None:
    def fastest(kind: str) -> float | None:
        found = [r["ms"] for r in records if r["workload"]["name"] == name and r["kind"] == kind and "ms" in r]
        return min(found, default=None)

    full, sparse = fastest("full"), fastest("sparse")
    return full / sparse if full and sparse else None


TARGETS = tuple(Target(f"decode_{name}", x, "x", True, partial(_speed_up, name)) for name, x in PROMISED.items())


def draw(workload: Workload, device: torch.device) -> list[Cache]:
    """Caches of as many layers as fit, random, pooled keys by our operation."""
    dtype = getattr(torch, workload.dtype)
    B, C, K, D, S = workload.batch, workload.tokens, workload.kv_heads, workload.head_dim, workload.block_size
    layers = max(2, min(CALLS, CACHE_BYTES // workload.cache_bytes))
    generator = torch.Generator(device).manual_seed(0)
    lengths = torch.full((B,), C, dtype=torch.int32, device=device)
    found = []
    for _ in range(layers if device.type == "cuda" else 1):
        k, v = (torch.empty(B, C, K, D, dtype=dtype, device=device).normal_(generator=generator) for _ in range(2))
        q = torch.empty(B, 1, workload.heads, D, dtype=dtype, device=device).normal_(generator=generator)
        pooled = torch.zeros(B, -(-C // S), K, D, dtype=dtype, device=device)
        update_pooled(pooled, k, lengths, C, None, S)
        found.append(Cache(q, k, v, pooled, lengths))
    return found


# ---------------------------------------------------------------------- what is timed
def sparse(workload: Workload, x: Cache) -> Tensor:
    """Update of the pooled keys, selection, attention."""
    return decode_attention(x.q, x.k, x.v, x.pooled, x.lengths, workload.spec, update=True)


def without_update(workload: Workload, x: Cache) -> Tensor:
    """Selection and attention."""
    return decode_attention(x.q, x.k, x.v, x.pooled, x.lengths, workload.spec)


def full(workload: Workload, x: Cache) -> Tensor:
    """Our full decoding."""
    return full_decode_attention(x.q, x.k, x.v, x.lengths)


def sdpa(backend: SDPBackend, grouped: bool, workload: Workload, x: Cache) -> Tensor:
    """PyTorch's attention; ``grouped``: the heads of a group are queries of one head, keys are read once."""
    q, k, v = x.q.transpose(1, 2), x.k.transpose(1, 2), x.v.transpose(1, 2)
    if grouped:
        q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=not grouped)
    return out.reshape(x.q.shape)


@contextmanager
def design(constants: dict[str, object]) -> Iterator[None]:
    """Run with other private constants of the launches."""
    launches = import_module("ssa.ops.decode.triton")
    before = {name: getattr(launches, name) for name in constants}

    def put(values: dict[str, object]) -> None:
        for name, value in values.items():
            setattr(launches, name, value)
        launches.forget_launches()

    put(constants)
    try:
        yield
    finally:
        put(before)


Run = Callable[[Workload, Cache], Tensor]
Operation = tuple[str, str, Run, dict[str, object]]  # kind, backend, function, private constants
SDPA = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)


def operations(suite: str, device: torch.device) -> list[Operation]:
    """What a suite times."""
    if suite == "decode-designs":
        others = [(f"sparse, {name}", "ssa", sparse, constants) for name, constants in DESIGNS.items()]
        return [("sparse", "ssa", sparse, {}), *others]
    backends = SDPA if device.type == "cuda" else (SDPBackend.MATH,)
    rivals: list[Operation] = [
        ("full", f"sdpa {b.name.lower()}{', grouped' if grouped else ''}", partial(sdpa, b, grouped), {})
        for b in backends
        for grouped in (True, False)
        if not (grouped and b == SDPBackend.CUDNN_ATTENTION)  # 20 to 40 times slower
    ]
    ours: list[Operation] = [("full", "ssa", full, {}), ("sparse", "ssa", sparse, {})]
    return [*ours, ("sparse, pooled keys up to date", "ssa", without_update, {}), *rivals]


# ---------------------------------------------------------------------- what is right
def oracle(workload: Workload, x: Cache, row: int, blocks: Tensor | None) -> Tensor:
    """Output ``[H, D]`` of one sequence in float64; over ``blocks [K, k]`` or over everything."""
    K, S = workload.kv_heads, workload.block_size
    q = x.q[row, 0].double().unflatten(0, (K, -1))
    logits = torch.einsum("kgd,lkd->kgl", q, x.k[row].double()) * workload.head_dim**-0.5
    if blocks is not None:
        picked = torch.zeros(K, x.pooled.shape[1] + 1, dtype=torch.bool, device=q.device)
        picked.scatter_(1, torch.where(blocks >= 0, blocks, x.pooled.shape[1]).long(), True)
        seen = picked[:, :-1].repeat_interleave(S, 1)[:, : workload.tokens]
        logits = logits.masked_fill(~seen[:, None], -torch.inf)
    return torch.einsum("kgl,lkd->kgd", logits.softmax(-1), x.v[row].double()).flatten(0, 1)


def check(kind: str, function: Run, workload: Workload, x: Cache) -> float:
    """Relative error of the first and the last sequence against float64.

    Raises:
        NumericError: it is more than rounding, or the blocks are not the reference's.
    """
    out = function(workload, x)
    limit = 1e-5 if workload.dtype == "float32" else 2**-7
    worst = 0.0
    for row in {0, workload.batch - 1}:
        blocks = None
        if kind != "full":
            one = slice(row, row + 1)
            given = (x.q[one], x.pooled[one], x.lengths[one], workload.spec)
            blocks = select_blocks_cached(*given, backend="reference")[0, 0]
            mine = select_blocks_cached(*given)[0, 0]
            if float((mine != blocks).any(-1).float().mean()) > 0.5:  # a head may differ by a tie of float32 scores
                raise NumericError(f"{workload.name}, {kind}", "blocks other than the reference's", "the same")
            blocks = select_blocks_cached(x.q, x.pooled, x.lengths, workload.spec)[row, 0]
        exact = oracle(workload, x, row, blocks)
        error = float((out[row, 0].double() - exact).norm() / exact.norm())
        worst = max(worst, error if error == error else float("inf"))
    if worst > limit:
        raise NumericError(f"{workload.name}, {kind}", f"a relative error of {worst:.1e}", f"at most {limit:.1e}")
    return worst


# ---------------------------------------------------------------------- how it is timed
def time_graph(calls: list[Callable[[], object]], device: torch.device) -> tuple[float, float]:
    """Milliseconds per call, median and fastest, of a captured sequence of calls on a cold cache."""
    if device.type != "cuda":
        timing = measure(calls[0], device, 1.0)
        return timing.median, timing.low
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]
    graph.replay()
    for before, after in events:
        flush.zero_()
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize(device)
    times = [before.elapsed_time(after) / len(calls) for before, after in events]
    return statistics.median(times), min(times)


def run_case(kind: str, backend: str, function: Run, workload: Workload, layers: list[Cache]) -> Record:
    """Check, then time; a baseline that cannot serve the shape says why."""
    record: Record = {"workload": asdict(workload), "kind": kind, "backend": backend}
    device = layers[0].q.device
    try:
        record["error"] = check(kind, function, workload, layers[0])
        calls = [partial(function, workload, layers[i % len(layers)]) for i in range(CALLS)]
        median, fastest = time_graph(list(calls), device)
        least = workload.cache_bytes if kind == "full" else workload.sparse_bytes
        record |= {"status": "ok", "ms": median, "fastest_ms": fastest, "least_bytes": least}
        record["gigabytes_per_second"] = least / median / 1e6
        if backend == "ssa":
            record["kernels"] = kernels(calls[0], device)
    except Exception as error:  # Triton's are no RuntimeError
        failed = "wrong" if isinstance(error, NumericError) else "failed" if backend == "ssa" else "unavailable"
        record |= {"status": failed, "reason": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
    return record


def run(suite: str, command: str, device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    """The result of a suite; cases with a wrong output have no time."""
    result = header(suite, command)
    cases: list[Record] = []
    for workload in SUITES[suite]:
        layers = draw(workload, device)
        for kind, backend, function, constants in operations(suite, device):
            with torch.no_grad(), design(constants) if constants else nullcontext():
                cases.append(run_case(kind, backend, function, workload, layers))
            say(one_line(cases[-1]))
        del layers
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for case in cases:
        if case["kind"] == "sparse" and "ms" in case:
            case["over_fastest_full"] = _speed_up(case["workload"]["name"], cases)
    return {**result, "cases": cases}


def one_line(case: Record) -> str:
    """A case for the terminal."""
    name = f"{case['workload']['name']}: {case['kind']} [{case['backend']}]"
    if case["status"] != "ok":
        return f"{name}: {case['status'].upper()}, {case['reason']}"
    speed = f"{1e3 * case['ms']:.1f} us, {case['gigabytes_per_second']:.0f} GB/s, error {case['error']:.1e}"
    return f"{name}: {speed}" + "".join(f", {r['name'][:16]} {1e3 * r['ms']:.1f}" for r in case.get("kernels", ()))


def table(result: dict[str, Any]) -> Any:
    """The cases as a table of ``rich``."""
    from rich.table import Table

    found = Table(title=f"{result['suite']}: {result['machine']['label']}", title_justify="left")
    for column in ("workload", "kind", "backend", "us", "GB/s of the least bytes", "over fastest full", "kernels, us"):
        found.add_column(column, justify="right" if column in ("us", "GB/s of the least bytes") else "left")
    for case in result["cases"]:
        cells = [case["workload"]["name"], case["kind"], case["backend"]]
        if case["status"] != "ok":
            found.add_row(*cells, case["status"], "", "", case["reason"][:60])
            continue
        over = case.get("over_fastest_full")
        stages = ", ".join(f"{row['name'][:24]} {1e3 * row['ms']:.1f}" for row in case.get("kernels", [])[:4])
        speed = f"{case['gigabytes_per_second']:.0f}"
        found.add_row(*cells, f"{1e3 * case['ms']:.1f}", speed, f"{over:.2f}x" if over else "", stages)
    return found
