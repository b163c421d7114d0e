"""Time the full-attention kernels on this GPU and fit the cost model of ``ssa.ops.full.rates`` to them.

    python benchmarks/calibrate_full.py OUT.json

Prints the fitted entries of ``RATES`` and, for a realistic mix of document lengths, what the model says and what was
measured. The kernels' correctness is the business of ``tests/ops/test_full_backends.py``. About a minute on an H200.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssa.bench.timing import measure
from ssa.bench.workloads import realistic_rows
from ssa.environment import commit, machine
from ssa.ops.dispatch import Request
from ssa.ops.full import ops
from ssa.ops.full.backends import choose_plan, usable
from ssa.ops.full.plan import Direction, Plan, Shape

DEVICE = torch.device("cuda")
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 32768)
SHAPES = {
    32: Shape(16, 4, 32),
    64: Shape(32, 2, 64),
    96: Shape(16, 4, 96),
    128: Shape(32, 8, 128),
    256: Shape(16, 4, 256),
}
TOKENS = 32768


def inputs(shape: Shape) -> tuple[Tensor, ...]:
    """q, k, v, d_out of 32K tokens, flat."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    draw = lambda n: torch.randn(TOKENS, n, shape.head_dim, device=DEVICE, generator=generator)  # noqa: E731
    return tuple(draw(n).bfloat16() for n in heads)


def timed(kernel: str, plans: dict[Direction, Plan], x: tuple[Tensor, ...]) -> dict[str, float]:
    """Milliseconds of both directions; ``host`` of the forward and backward call as well."""
    q, k, v, d_out = x
    scale = q.shape[2] ** -0.5
    out, lse = ops.FORWARD[kernel](q, k, v, plans["forward"], scale)
    forward = measure(lambda: ops.FORWARD[kernel](q, k, v, plans["forward"], scale), DEVICE, 25)
    backward = measure(lambda: ops.BACKWARD[kernel](d_out, q, k, v, out, lse, plans["backward"], scale), DEVICE, 25)
    return {
        "forward": forward.median, "forward host": forward.host,
        "backward": backward.median, "backward host": backward.host,
    }  # fmt: skip


def fit(rows: list[dict[str, Any]], heads: int, direction: Direction) -> tuple[float, float, float]:
    """Least relative squares of ``square`` and ``linear``; and the largest relative error."""
    lengths = torch.tensor([float(row["length"]) for row in rows], dtype=torch.float64)
    per_token = torch.tensor([1e9 * row[direction] / TOKENS / heads for row in rows], dtype=torch.float64)  # ps
    terms = torch.stack([lengths, torch.ones_like(lengths)], 1) / per_token[:, None]
    solution = torch.linalg.lstsq(terms, torch.ones(len(rows), 1, dtype=torch.float64)).solution[:, 0]
    return (*solution.tolist(), float((terms @ solution - 1).abs().max()))


def one_shape(shape: Shape, result: dict[str, Any]) -> None:
    """Grid of lengths, fit, mixed lengths."""
    x = inputs(shape)
    mix = tuple(n for row in realistic_rows(4, TOKENS // 4) for n in row)
    for kernel in usable(Request(DEVICE, torch.bfloat16, *shape)).split("+"):
        rows = []
        for length in LENGTHS:
            documents = (length,) * (TOKENS // length)
            plans = {d: choose_plan(documents, shape, d, kernel) for d in DIRECTIONS}
            rows.append({"kernel": kernel, "shape": shape, "length": length, **timed(kernel, plans, x)})
        plans = {d: choose_plan(mix, shape, d, kernel) for d in DIRECTIONS}
        measured = timed(kernel, plans, x)
        for direction in DIRECTIONS:
            square, linear, worst = fit(rows, shape.heads, direction)
            print(
                f"{kernel:>7} {direction:>8} {shape.head_dim}: square {square:.3f}, linear {linear:.0f} "
                f"(largest error {worst:.0%}); mix {plans[direction]}, measured {measured[direction]:.3f} ms",
                flush=True,
            )
        result["grid"] += rows
        result["mix"].append({"kernel": kernel, "shape": shape, "lengths": mix, **measured})


def main() -> None:
    result: dict[str, Any] = {"machine": machine(), "commit": commit(), "grid": [], "mix": []}
    for shape in SHAPES.values():
        one_shape(shape, result)
    Path(sys.argv[1]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
