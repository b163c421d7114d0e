"""Adaptive budgets against fixed ones on a trained model: perplexity and dropped mass at equal mean cost.

    python benchmarks/adaptive.py RUN DATA --out OUT.json [--rows 16] [--seconds 55] [--coarse] [--device auto]

For every fixed budget, and every limit of both flavours: perplexity, blocks per query, the true dropped mass (mean over
heads, and of the worst head of a group), how often it exceeds the limit, per layer. Dropped mass is measured on the
queries and keys that the run itself produces. A limit that its flavour exceeds although it is certified makes the exit
code 1. With ``--seconds`` what would begin later is left out, and with ``--coarse`` two of three budgets and limits. On
a GPU each budget compiles kernels of its own the first time. ``docs/budgets.md`` discusses the result.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssa.data.loader import Loader, PackedDataset
from ssa.documents import IGNORE_INDEX, DocumentLayout
from ssa.environment import commit, default_device, machine
from ssa.model import SSAForCausalLM, load_model
from ssa.ops import SparseSpec, adaptive_blocks, dropped_mass, full_attention, select_blocks, sparse_attention

SCHEMA = "ssa.adaptive/1"
LIMITS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)
BLOCK_LIMITS = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1)  # of one block
QUANTILE = 0.95  # of true over estimated odds: the safety that makes 5 % of the queries exceed their limit
FEWEST = 4  # a query with fewer blocks in its past has nothing to choose


@dataclass
class Layer:
    """Sums over queries that have a choice."""

    queries: float = 0.0
    blocks: float = 0.0
    mean_mass: float = 0.0
    worst_mass: float = 0.0
    exceeded: float = 0.0
    ratios: list[Tensor] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        """Means."""
        n = max(self.queries, 1.0)
        return {
            "blocks": self.blocks / n, "dropped_mass": self.mean_mass / n, "worst_dropped_mass": self.worst_mass / n,
            "exceeded": self.exceeded / n,
        }  # fmt: skip


def observe_into(layers: list[Layer], spec: SparseSpec, calibrate: bool) -> Any:
    """Observer of the model that measures one layer."""

    def observe(index: int, q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout) -> None:
        q, k, v = q.float(), k.float(), v.float()
        layer, K = layers[index], k.shape[2]
        limit = spec.max_dropped_mass
        found = None if limit is None else adaptive_blocks(q, k, spec, layout)
        indices = select_blocks(q, k, spec, layout) if found is None else found.indices
        lse = sparse_attention(q, k, v, indices, spec.block_size, layout, return_lse=True)[1]
        whole = full_attention(q, k, v, layout, return_lse=True)[1]
        mass = dropped_mass(lse, whole).unflatten(2, (K, -1))
        worst = mass.amax(-1)
        choice = (layout.positions(q.device) >= FEWEST * spec.block_size)[..., None].expand_as(worst)
        layer.queries += float(choice.sum())
        layer.blocks += float(((indices >= 0).sum(-1) * choice).sum())
        layer.mean_mass += float((mass.mean(-1) * choice).sum())
        layer.worst_mass += float((worst * choice).sum())
        if limit is not None and spec.flavour != "per_block":
            layer.exceeded += float(((worst > limit + 1e-5) & choice).sum())  # 1e-5: rounding of two float32 lse
        if calibrate and found is not None:
            drops = choice & (found.bound > 1e-6) & (worst > 1e-6)
            odds = lambda x: x / (1 - x).clamp(min=1e-6)  # noqa: E731
            layer.ratios.append((odds(worst) / odds(found.bound))[drops].cpu())

    return observe


@torch.no_grad()
def measure(
    model: SSAForCausalLM, dataset: PackedDataset, rows: int, spec: SparseSpec, calibrate: bool = False
) -> dict[str, Any]:
    """Perplexity, blocks and dropped mass of the model under ``spec``."""
    config = model.config
    config.block_size, config.num_blocks = spec.block_size, spec.num_blocks
    config.max_dropped_mass, config.budget_flavour = spec.max_dropped_mass, spec.flavour
    config.budget_safety = spec.safety
    layers = [Layer() for _ in range(config.num_hidden_layers)]
    nll, targets = 0.0, 0
    with model.attention_mode("sparse"), model.observe_attention(observe_into(layers, spec, calibrate)):
        for batch in Loader(dataset, 2, shuffle=False, epochs=1, limit=rows):
            labels = batch.layout.next_token_labels(batch.labels).to(model.device)
            logits = model(batch.input_ids.to(model.device), layout=batch.layout).logits
            nll += float(F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"))
            targets += int((labels != IGNORE_INDEX).sum())
    total = Layer(*(sum(getattr(x, n) for x in layers) for n in ("queries", "blocks", "mean_mass", "worst_mass")))
    total.exceeded = sum(x.exceeded for x in layers)
    result = {"perplexity": math.exp(nll / targets), **total.row(), "layers": [x.row() for x in layers]}
    if calibrate:
        result["safety"] = max(1.0, float(torch.cat([r for x in layers for r in x.ratios]).quantile(QUANTILE)))
    return result


def full_perplexity(model: SSAForCausalLM, dataset: PackedDataset, rows: int) -> float:
    """Of the full mode on the same rows."""
    nll, targets = 0.0, 0
    with torch.no_grad(), model.attention_mode("full"):
        for batch in Loader(dataset, 2, shuffle=False, epochs=1, limit=rows):
            labels = batch.layout.next_token_labels(batch.labels).to(model.device)
            logits = model(batch.input_ids.to(model.device), layout=batch.layout).logits
            nll += float(F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"))
            targets += int((labels != IGNORE_INDEX).sum())
    return math.exp(nll / targets)


def at_equal_cost(fixed: list[dict[str, Any]], blocks: float, what: str) -> float | None:
    """``what`` of the fixed budgets, interpolated at a mean number of blocks; None outside their range."""
    points = sorted((run["blocks"], run[what]) for run in fixed)
    for (a, y), (b, z) in pairwise(points):
        if a <= blocks <= b:
            return y + (z - y) * (blocks - a) / max(b - a, 1e-9)
    return None


def evaluate(
    model: SSAForCausalLM, dataset: PackedDataset, rows: int, deadline: float = math.inf, coarse: bool = False
) -> dict[str, Any]:
    """Every fixed budget, both flavours, and the estimated flavour with the safety measured on other rows.

    Args:
        deadline: of ``time.monotonic``; no run begins after it but the first.
        coarse: leave out two of three budgets and limits.
    """
    S = model.config.block_size
    every = -(-dataset.row_length // S)
    powers = [n for n in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128) if n < every][:: 3 if coarse else 1]
    fixed: list[dict[str, Any]] = []
    for n in (every, *powers):
        if not fixed or time.monotonic() <= deadline:
            fixed.append({"num_blocks": n, **measure(model, dataset, rows, SparseSpec(S, n))})
            told = fixed[-1]
            print(
                f"fixed {n} blocks  perplexity {told['perplexity']:.3f}  dropped {told['dropped_mass']:.4f}", flush=True
            )
    half = PackedDataset(dataset.path, "train")  # the safety is fitted on text that the comparison does not see
    fitted = measure(model, half, max(2, rows // 2), SparseSpec(S, every, max_dropped_mass=0.1), calibrate=True)
    adaptive = []
    flavours = (("per_block", 1.0), ("estimated", 1.0), ("estimated", fitted["safety"]), ("certified", 1.0))
    for flavour, safety in flavours:
        limits = BLOCK_LIMITS if flavour == "per_block" else LIMITS
        for limit in limits[1::3] if coarse else limits:
            if time.monotonic() > deadline:
                continue
            spec = SparseSpec(S, every, max_dropped_mass=limit, flavour=flavour, safety=safety)  # type: ignore[arg-type]
            run = {"flavour": flavour, "limit": limit, "safety": safety, **measure(model, dataset, rows, spec)}
            for what in ("perplexity", "dropped_mass", "worst_dropped_mass"):
                run[f"fixed_{what}"] = at_equal_cost(fixed, run["blocks"], what)
            adaptive.append(run)
            print(line(run), flush=True)
    return {"full_perplexity": full_perplexity(model, dataset, rows), "fixed": fixed, "adaptive": adaptive}


def line(run: dict[str, Any]) -> str:
    """A row of the table; in brackets the fixed budgets at equal mean cost."""
    other = lambda what, form: "-" if run[f"fixed_{what}"] is None else format(run[f"fixed_{what}"], form)  # noqa: E731
    return (
        f"{run['flavour']:<10} safety {run['safety']:<6.2f} limit {run['limit']:<5g} blocks {run['blocks']:6.2f}  "
        f"perplexity {run['perplexity']:.3f} ({other('perplexity', '.3f')})  "
        f"dropped {run['dropped_mass']:.4f} ({other('dropped_mass', '.4f')})  "
        f"worst head {run['worst_dropped_mass']:.4f} ({other('worst_dropped_mass', '.4f')})  "
        f"exceeded {100 * run['exceeded']:.2f} %"
    )


def main() -> int:
    """Exit code 1 if a certified limit was exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--coarse", action="store_true")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    deadline = time.monotonic() + given.seconds
    device = default_device(given.device)
    model, dataset = load_model(given.model).to(device).eval(), PackedDataset(given.data, "valid")
    shown = f"python benchmarks/adaptive.py {given.model.name} {given.data.name} --rows {given.rows}"
    shown += " --coarse" * given.coarse
    result = {
        "schema": SCHEMA, "created": datetime.now(UTC).isoformat(timespec="seconds"), "command": shown,
        "commit": commit(), "machine": machine(),
        "model": {"name": given.model.name, "method": model.config.method, "block_size": model.config.block_size},
        "data": {"rows": given.rows, "row_length": dataset.row_length},
        **evaluate(model, dataset, given.rows, deadline, given.coarse),
    }  # fmt: skip
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"full mode: perplexity {result['full_perplexity']:.3f}; written to {given.out}")
    return int(any(run["flavour"] == "certified" and run["exceeded"] for run in result["adaptive"]))


if __name__ == "__main__":
    sys.exit(main())
