"""The attention of one layer in a training step, forward and backward: SSA exact and sampled against full alone.

All cases get the same q, k, v, gate and upstream gradient. A step of SSA is the mean over its two main streams, as the
training draws them with probability 1/2; of the full-only step the faster of two ways to apply the gate counts. Sampled
cases change their sample with every call.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ssa.bench.operations import WIDE_FLOOR, WORSE, Results, _error, failures, full, sparse, visible
from ssa.bench.result import header
from ssa.bench.runner import Record, kernels
from ssa.bench.targets import Target
from ssa.bench.timing import Timing, measure
from ssa.bench.workloads import Tensors, Workload, draw
from ssa.errors import SSAError
from ssa.ops import AlignmentSpec, full_attention, full_attention_rows, select_blocks, ssa_attention
from ssa.ops.dual.alignment import align
from ssa.ops.dual.api import Stream
from ssa.ops.dual.sampling import sample_rows

FRACTION = 1 / 8
SEEDS = 16  # samples that the timed calls go through; all are warmed up, since cuDNN plans every new shape
TURNS = 7
SHAPE = Workload("8k", ((8192,),) * 4)
LIMITS = WORSE | {"dgate": 3.0}


@dataclass(frozen=True)
class Inputs:
    """Inputs of a layer: q, k, v and upstream gradient, gate ``[B, T, H]``."""

    x: Tensors
    gate: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What gradients are taken of."""
        return *self.x.leaves, self.gate


@dataclass(frozen=True)
class Case:
    """A way to compute the layer; ``main`` None: full attention alone, whose gate may be compiled."""

    name: str
    main: Stream | None = None
    fraction: float = 1.0
    compiled: bool = False
    full_backend: str = "auto"


FULL = (Case("full only"), Case("full only, gate compiled", compiled=True))
EXACT = (Case("ssa, full main", "full"), Case("ssa, sparse main", "sparse"))
SAMPLED = Case("ssa 1/8, sparse main", "sparse", FRACTION)
CASES = (*FULL, *EXACT, SAMPLED)

_small = replace(SHAPE, name="checked", rows=((1024,),) * 2)
_packed = replace(SHAPE, name="packed, checked", rows=((500, 37, 287, 200), (1, 600, 320, 103)))
_long = replace(SHAPE, name="long enough to fold heads, checked", rows=((2048,),) * 2)
_tiny = Workload("tiny", ((128,), (128,)), 4, 2, 16, block_size=16, num_blocks=3, dtype=torch.float32)
CHECKS = (
    *((_small, case) for case in (*EXACT, SAMPLED)),
    (_small, Case("ssa 1/8 through flash, sparse main", "sparse", FRACTION, full_backend="flash")),
    (_long, SAMPLED),
    *((_packed, case) for case in (*EXACT, SAMPLED)),
)
SUITES: dict[str, tuple[tuple[tuple[Workload, Case], ...], tuple[Workload, ...]]] = {
    "layer": (CHECKS, (SHAPE, replace(SHAPE, name="32k", rows=((32768,),)))),
    "layer-smoke": (tuple((_tiny, case) for case in (*EXACT, SAMPLED)), (_tiny,)),
}


def draw_inputs(workload: Workload, device: torch.device) -> Inputs:
    """Inputs of a workload, with a gate in (0, 1)."""
    x = draw(workload, device)
    generator = torch.Generator(device).manual_seed(1)
    gate = torch.rand(x.q.shape[:3], generator=generator, device=device).to(workload.dtype)
    return Inputs(x, gate.requires_grad_())


def _gated(out: Tensor, gate: Tensor) -> Tensor:
    return out * gate[..., None]


def build(
    case: Case, workload: Workload, inputs: Inputs, spec: AlignmentSpec | None = None, indices: Tensor | None = None
) -> Callable[[], Results]:
    """Forward and backward of a case; ``indices``: of the check, which no selection shall disturb."""
    layout, x, seeds = workload.layout, inputs.x, count()
    spec = replace(spec or AlignmentSpec(), query_fraction=case.fraction)
    apply_gate = torch.compile(_gated, dynamic=False) if case.compiled else _gated

    def run() -> Results:
        if case.main is None:
            out = apply_gate(full_attention(*x.leaves, layout), inputs.gate)
            grads = torch.autograd.grad(out, inputs.leaves, x.d_out)
        else:
            out, alignment = ssa_attention(
                *inputs.leaves, case.main, spec=workload.spec, alignment=spec, layout=layout, block_indices=indices,
                seed=0 if indices is not None else next(seeds) % SEEDS, full_backend=case.full_backend,
            )  # fmt: skip
            grads = torch.autograd.grad(
                [out, alignment.loss], inputs.leaves, [x.d_out, torch.ones_like(alignment.loss)]
            )
        return {"out": out.detach(), **dict(zip(("dq", "dk", "dv", "dgate"), grads, strict=True))}

    return run


# ---------------------------------------------------------------------- checks
def expected(
    case: Case, workload: Workload, inputs: Inputs, spec: AlignmentSpec, masks: Sequence[Tensor], dtype: torch.dtype
) -> Results:
    """Both streams under dense masks in eager PyTorch, and the alignment on the sampled rows, through autograd."""
    q, k, v, gate = (y.detach().to(dtype).requires_grad_() for y in inputs.leaves)
    group = q.shape[2] // k.shape[2]
    query, key, value = q.transpose(1, 2), *(y.repeat_interleave(group, 2).transpose(1, 2) for y in (k, v))
    logits = query @ key.mT * q.shape[-1] ** -0.5
    streams = {}
    for name, mask in zip(("full", "sparse"), masks, strict=True):
        seen = logits.masked_fill(~mask.repeat_interleave(group, 1), float("-inf")).softmax(-1)
        streams[name] = (seen @ value).transpose(1, 2) * gate[..., None]
    compared, share = (streams["full"], streams["sparse"]), 1.0
    if case.fraction < 1:
        rows = sample_rows(workload.layout, case.fraction, 0)
        index = rows.index(q.device)
        compared = (compared[0].flatten(0, 1)[index], compared[1].flatten(0, 1)[index])
        share = rows.count / workload.layout.total / case.fraction
    out, loss = streams[str(case.main)], align(*compared, spec)[0] * share
    upstream = [inputs.x.d_out.to(dtype), torch.ones_like(loss)]
    grads = torch.autograd.grad([out, loss], (q, k, v, gate), upstream)
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv", "dgate"), grads, strict=True))}


def check(case: Case, workload: Workload, inputs: Inputs) -> dict[str, tuple[float, float]]:
    """Per result its error against float64, and its limit, a multiple of eager PyTorch's error in the same dtype.

    The alignment is weighted so much that its gradients are as large as the upstream's.
    """
    spec = AlignmentSpec(weight=float(inputs.x.q.numel()))
    indices = select_blocks(inputs.x.q, inputs.x.k, workload.spec, workload.layout, backend="reference")
    results = build(case, workload, inputs, spec, indices)()
    masks = [visible(stream("auto", "forward"), workload, inputs.x) for stream in (full, sparse)]
    exact, rounded = (expected(case, workload, inputs, spec, masks, dtype) for dtype in (torch.float64, workload.dtype))
    floor = WIDE_FLOOR if workload.dtype == torch.float32 else 0.0
    limits = {name: max(floor, LIMITS[name] * _error(rounded[name], exact[name])) for name in results}
    return {name: (_error(value, exact[name]), limits[name]) for name, value in results.items()}


# ---------------------------------------------------------------------- times
def rows_alone(workload: Workload, inputs: Inputs) -> Callable[[], object]:
    """Full attention of the sampled rows alone: what a sparse step adds, without the comparison."""
    layout, seeds = workload.layout, count()
    samples = [sample_rows(layout, FRACTION, seed) for seed in range(SEEDS)]
    d_outs = inputs.x.d_out.flatten(0, 1)[: max(rows.count for rows in samples)].contiguous()

    def run() -> object:
        rows = samples[next(seeds) % SEEDS]
        out, _ = full_attention_rows(*inputs.x.leaves, rows, layout)
        return torch.autograd.grad(out, inputs.x.leaves, d_outs[: rows.count])

    return run


def functions(workload: Workload, inputs: Inputs) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """Name, calls that warm it up, and function of every timed case."""
    layout = workload.layout
    for case in CASES:
        if not case.compiled or inputs.gate.is_cuda:  # for a CPU it would compile C++
            yield case.name, SEEDS if case.fraction < 1 else 1, build(case, workload, inputs)
    yield "1/8 of the rows alone", SEEDS, rows_alone(workload, inputs)

    def full_alone() -> object:
        out = full_attention(*inputs.x.leaves, layout)
        return torch.autograd.grad(out, inputs.x.leaves, inputs.x.d_out)

    yield "full alone, no gate", 1, full_alone


def time_cases(workload: Workload, inputs: Inputs, device: torch.device) -> list[Record]:
    """Times of every case, and its kernels on a GPU. Cases take turns, so that a clock that slows down as the GPU
    warms up meets all of them; the turn with the middle median counts."""
    records: list[Record] = []
    running: list[tuple[Record, Callable[[], object], list[Timing]]] = []
    for name, warm_up, function in functions(workload, inputs):
        record: Record = {"workload": workload.describe(), "name": name, "status": "ok"}
        records.append(record)
        try:
            for _ in range(warm_up):
                function()
            running.append((record, function, []))
        except (SSAError, RuntimeError) as error:
            record |= {"status": "failed", "reason": f"{type(error).__name__}: {error}".split("\n")[0][:300]}
    for _ in range(TURNS):
        for _, function, timings in running:
            timings.append(measure(function, device, 100.0 if device.type == "cuda" else 1.0))
    for record, function, timings in running:
        middle = sorted(timings, key=lambda timing: timing.median)[TURNS // 2]
        record |= {"timing": asdict(middle), "turns": [timing.median for timing in timings]}
        record["kernels"] = kernels(function, device)
    return records


def run(name: str, command: str, device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    """Check, then time. If a check fails there are no times."""
    result = header(name, command)
    checks, workloads = SUITES[name]
    result["check"], result["cases"] = [], []
    for workload, case in checks:
        errors = check(case, workload, draw_inputs(workload, device))
        wrong = failures(errors)
        result["check"].append({"workload": workload.describe(), "case": case.name, "errors": errors, "ok": not wrong})
        worst = ", ".join(f"{n} {e:.1e} (limit {l:.1e})" for n, (e, l) in errors.items())
        say(f"check {workload.name}, {case.name}: {worst}: {'WRONG' if wrong else 'ok'}")
    if not all(found["ok"] for found in result["check"]):
        return result
    for workload in workloads:
        inputs = draw_inputs(workload, device)
        result["cases"] += time_cases(workload, inputs, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return result


# ---------------------------------------------------------------------- figures
def _ms(records: Sequence[Record], workload: str, name: str) -> float | None:
    found = [r for r in records if r["workload"]["name"] == workload and r["name"] == name and r["status"] == "ok"]
    return float(found[0]["timing"]["median"]) if found else None


def over_full(workload: str, sparse_main: str) -> Callable[[Sequence[Record]], float | None]:
    """Mean of both main streams over the faster full-only step."""

    def figure(records: Sequence[Record]) -> float | None:
        full = [ms for case in FULL if (ms := _ms(records, workload, case.name)) is not None]
        mine = [_ms(records, workload, name) for name in (EXACT[0].name, sparse_main)]
        known = [ms for ms in mine if ms is not None]
        return statistics.mean(known) / min(full) if full and len(known) == len(mine) else None

    return figure


TARGETS = (
    *(Target(f"ssa_layer_{size}", value, "x", False, over_full(size, EXACT[1].name))
      for size, value in (("8k", 1.20), ("32k", 1.07))),
    *(Target(f"ssa_layer_sub8_{size}", value, "x", False, over_full(size, SAMPLED.name))
      for size, value in (("8k", 0.80), ("32k", 0.65))),
)  # fmt: skip


def table(result: dict[str, Any]) -> Any:
    """The cases as a table of ``rich``: times, share of the faster full-only step, longest kernels."""
    from rich.table import Table

    found = Table(title=f"{result['suite']}: {result['machine']['label']}", title_justify="left")
    for column in ("workload", "case", "ms", "wall", "host", "over full only", "kernels, ms"):
        found.add_column(column, justify="left" if column in ("workload", "case", "kernels, ms") else "right")
    for case in result["cases"]:
        work = case["workload"]["name"]
        if case["status"] != "ok":
            found.add_row(work, case["name"], case["status"], "", "", "", case["reason"][:60])
            continue
        full = [ms for c in FULL if (ms := _ms(result["cases"], work, c.name)) is not None]
        timing = case["timing"]
        stages = ", ".join(f"{row['name'][:28]} {row['ms']:.2f}" for row in case["kernels"][:6])
        share = f"{timing['median'] / min(full):.3f}" if full else ""
        figures = (f"{timing[key]:.3f}" for key in ("median", "wall", "host"))
        found.add_row(work, case["name"], *figures, share, stages)
    return found
