"""Speed of whole training steps: FullAttn against SSA, exact and with subsampled alignment, on one device.

A step is what ``ssa train`` does: forward, backward, gradient norm, clipping, AdamW, on random tokens. All variants
share one model, so that they differ in nothing else, and take turns, so that a drift of the clock meets all of them.
A method's time is the mean over its streams, weighted with the probability that a step draws them.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ssa.bench.result import header
from ssa.bench.runner import Record, kernels
from ssa.bench.targets import Target
from ssa.data import Batch
from ssa.documents import DocumentLayout
from ssa.errors import NumericError
from ssa.model import SSAConfig, SSAForCausalLM
from ssa.train.build import compile_layers, recompute_activations
from ssa.train.cost import GIB, attended_pairs, must_recompute, step_flops
from ssa.train.optimizer import StepGuard, apply_gradients, build_optimizer, gradient_norm
from ssa.train.recipe import Recipe
from ssa.train.recipe_file import load_recipe
from ssa.train.step import accumulate_gradients
from ssa.train.streams import Stream
from ssa.train.world import autocast

H200_FLOPS = 790e12  # what large bfloat16 products reach on an H200; the targets are stated against it
VOCABULARY = 512  # where the recipe leaves it to the data
SUBSAMPLING = "align_query_fraction"

KINDS = {  # of kernels, by name; the first that fits
    "communication": re.compile(r"nccl", re.I),
    "attention": re.compile(r"sdpa|flash|fmha|attention|^(?!triton_)\w+_kernel$", re.I),
    "matmul": re.compile(r"gemm|nvjet|cutlass|xmma|cublas|gemv", re.I),
    "optimizer": re.compile(r"multi_tensor|adam|lpnorm", re.I),
}


@dataclass(frozen=True)
class Variant:
    """A kind of step: a method and the stream it drew."""

    method: str
    stream: Stream
    changes: tuple[tuple[str, float], ...]

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.method}, {self.stream} step"


EXACT = (("alignment_weight", 10.0), (SUBSAMPLING, 1.0))
VARIANTS = (
    Variant("full", "full", (("alignment_weight", 0.0), (SUBSAMPLING, 1.0))),
    Variant("ssa", "full", EXACT),
    Variant("ssa", "sparse", EXACT),
    Variant("ssa 1/8", "sparse", (*EXACT[:1], (SUBSAMPLING, 0.125))),
)
DRAWN = {  # the equally likely steps of a method; sampling changes sparse steps alone
    "full": (("full", "full"),),
    "ssa": (("ssa", "full"), ("ssa", "sparse")),
    "ssa 1/8": (("ssa", "full"), ("ssa 1/8", "sparse")),
}


@dataclass(frozen=True)
class Size:
    """A batch, and how often a variant is timed: ``rounds`` turns of ``steps`` steps in a row, between which nothing
    waits for the device, as in training."""

    name: str
    rows: int
    tokens: int
    rounds: int
    steps: int


@dataclass(frozen=True)
class Suite:
    """What is trained, on which batches, and what makes it small enough to be checked against float32."""

    recipe: str
    sizes: tuple[Size, ...]
    small: dict[str, int]


SMALL = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 1024}
SUITES = {
    "training": Suite("1b/ssa", (Size("8k", 2, 8192, 3, 8), Size("32k", 1, 32768, 3, 3)), SMALL),
    "training-smoke": Suite("quickstart/ssa", (Size("8k", 2, 64, 1, 1), Size("32k", 1, 128, 1, 1)), {}),
}


def sized_recipe(suite: Suite, size: Size) -> Recipe:
    """The recipe with rows of this length, one micro-batch a step."""
    batch = {"training.micro_batch_rows": size.rows, "training.rows_per_step": size.rows}
    return load_recipe(suite.recipe, {"data.row_length": size.tokens, **batch})


def random_batch(rows: int, tokens: int, vocabulary: int, device: torch.device) -> Batch:
    """One document a row."""
    ids = torch.randint(vocabulary, (rows, tokens), device=device)
    return Batch(ids, ids, DocumentLayout.single(rows, tokens), rows * (tokens - 1), rows)


def build(config: SSAConfig, device: torch.device, compiled: bool) -> SSAForCausalLM:
    """A model made on the device, in training mode."""
    torch.manual_seed(0)
    with torch.device(device):
        model = SSAForCausalLM(config).train()
    if compiled:
        compile_layers(model)
    return model


class Steps:
    """Whole optimiser steps of one model, of any variant."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.model = build(recipe.model_config(VOCABULARY), device, device.type == "cuda")
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        self.guard = StepGuard(device)
        self.context = partial(autocast, "bf16", device)

    def step(self, variant: Variant, batch: Batch) -> Tensor:
        """One step; its loss."""
        set_variant(self.model, variant)
        sums = accumulate_gradients(self.model, [batch], variant.stream, self.device, self.context)
        norm = gradient_norm(self.optimizer)
        apply_gradients(self.optimizer, self.guard, self.recipe, 1, sums.loss, norm)
        return sums.loss


def set_variant(model: SSAForCausalLM, variant: Variant) -> None:
    """Make the model's configuration that of a variant."""
    for key, value in variant.changes:
        if hasattr(model.config, key):
            setattr(model.config, key, value)


def available(config: SSAConfig) -> list[Variant]:
    """Variants that this version can train."""
    return [v for v in VARIANTS if hasattr(config, SUBSAMPLING) or dict(v.changes)[SUBSAMPLING] == 1.0]


# ---------------------------------------------------------------------- correctness
def check(suite: Suite, device: torch.device) -> list[Record]:
    """A small model's loss and gradients in bfloat16 as they are timed, compiled on a GPU, against float32.

    Eager bfloat16 sets the limit. Both meet the same attention kernels, which their own tests prove; this is about
    everything else.
    """
    tokens = min(512, suite.sizes[0].tokens)
    shape = {f"model.{key}": value for key, value in suite.small.items()}
    config = load_recipe(suite.recipe, {"data.row_length": tokens, **shape}).model_config(VOCABULARY)
    batch = random_batch(2, tokens, config.vocab_size, device)
    eager, timed = (build(config, device, compiled) for compiled in (False, device.type == "cuda"))
    records = []
    for variant in available(config):
        exact = _gradients(eager, variant, batch, autocast("fp32", device))
        rounded, ours = (_gradients(model, variant, batch, autocast("bf16", device)) for model in (eager, timed))
        limits = {name: 2 * _distance(rounded[name], exact[name]) + 1e-3 for name in exact}
        errors = {name: (_distance(ours[name], exact[name]), limit) for name, limit in limits.items()}
        records.append({"variant": variant.name, "errors": errors, "ok": all(e <= l for e, l in errors.values())})
    return records


def _gradients(
    model: SSAForCausalLM, variant: Variant, batch: Batch, context: AbstractContextManager[object]
) -> dict[str, Tensor]:
    set_variant(model, variant)
    model.zero_grad()
    torch.manual_seed(0)
    sums = accumulate_gradients(model, [batch], variant.stream, batch.input_ids.device, lambda: context)
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return {"loss": sums.loss.view(1), "gradient": torch.cat(gradients)}


def _distance(x: Tensor, exact: Tensor) -> float:
    """``||x - exact|| / ||exact||``; NaN stays NaN and passes no limit."""
    return float((x.double() - exact.double()).norm() / exact.double().norm())


# ---------------------------------------------------------------------- timing
def _seconds(function: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_size(steps: Steps, size: Size, say: Callable[[str], None]) -> list[Record]:
    """Records of one batch size, a variant each."""
    device, config = steps.device, steps.model.config
    batch = random_batch(size.rows, size.tokens, config.vocab_size, device)
    variants = available(config)
    peaks: dict[str, int | None] = {}
    for variant in variants:  # compiles, fills the allocator, and then tells what a step takes
        start = time.perf_counter()
        steps.step(variant, batch)
        _wait(device)
        say(f"{size.name} {variant.name}: ready after {time.perf_counter() - start:.1f} s")
        peaks[variant.name] = _peak(partial(steps.step, variant, batch), device)
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(size.rounds):
        for variant in variants:
            several = lambda v=variant: [steps.step(v, batch) for _ in range(size.steps)]  # noqa: E731
            times[variant.name].append(1e3 * _seconds(several, device) / size.steps)
    workload = {"name": size.name, "rows": size.rows, "tokens": size.tokens, "model": steps.recipe.name}
    pairs = attended_pairs(batch.layout, config, "full")
    records: list[Record] = []
    for variant in variants:
        ms = statistics.median(times[variant.name])
        record: Record = {"workload": workload, "method": variant.method, "stream": variant.stream, "ms": ms}
        record |= {"all_ms": times[variant.name], "peak_bytes": peaks[variant.name]}
        record["recomputes"] = steps.model.model.layers[0].recomputes
        record["kinds"] = by_kind(kernels(partial(steps.step, variant, batch), device, most=10**6))
        if variant.method == "full":
            record["mfu"] = step_flops(config, size.rows * size.tokens, pairs) / (1e-3 * ms * H200_FLOPS)
        records.append(record)
    if not math.isfinite(loss := float(steps.step(variants[0], batch))):
        raise NumericError(f"ssa bench, {size.name}", f"a loss of {loss}", "a finite one: else the times say nothing")
    return records


def _peak(function: Callable[[], object], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device))


def by_kind(found: Sequence[Record]) -> dict[str, float]:
    """Milliseconds of a step's kernels by kind."""
    kinds: dict[str, float] = defaultdict(float)
    for kernel in found:
        kind = next((kind for kind, pattern in KINDS.items() if pattern.search(kernel["name"])), "rest")
        kinds[kind] += kernel["ms"]
    return dict(kinds)


def run(name: str, command: str, device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    """Check, then time. Without a passed check there are no times."""
    result = header(name, command)
    suite = SUITES[name]
    result["check"], result["cases"] = check(suite, device), []
    for record in result["check"]:
        worst = ", ".join(f"{n} {e:.1e} (limit {l:.1e})" for n, (e, l) in record["errors"].items())
        say(f"check {record['variant']}: {worst}: {'ok' if record['ok'] else 'WRONG'}")
    if not all(record["ok"] for record in result["check"]):
        return result
    steps = Steps(sized_recipe(suite, suite.sizes[-1]), device)
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    for size in suite.sizes:
        recipe = sized_recipe(suite, size)
        if must_recompute(recipe, recipe.model_config(VOCABULARY), 1, memory):
            recompute_activations(steps.model)
        result["cases"] += time_size(steps, size, say)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return result


# ---------------------------------------------------------------------- figures
def step_ms(records: Sequence[Record], size: str, method: str) -> float | None:
    """Mean time of a method's steps; None if one was not timed."""
    times = {(r["method"], r["stream"]): r["ms"] for r in records if r["workload"]["name"] == size}
    found = [times.get(drawn) for drawn in DRAWN[method]]
    return None if None in found else statistics.mean(ms for ms in found if ms is not None)


def relative_speed(size: str, method: str) -> Callable[[Sequence[Record]], float | None]:
    """Tokens per second of a method over FullAttn's."""

    def figure(records: Sequence[Record]) -> float | None:
        full, mine = step_ms(records, size, "full"), step_ms(records, size, method)
        return None if full is None or mine is None else full / mine

    return figure


def _mfu(records: Sequence[Record]) -> float | None:
    return next((r["mfu"] for r in records if r["workload"]["name"] == "8k" and r["method"] == "full"), None)


def _memory(records: Sequence[Record]) -> float | None:
    peaks: dict[str, list[int]] = defaultdict(list)
    for r in records:
        if r["workload"]["name"] == "8k" and r["peak_bytes"]:
            peaks[r["method"]].append(r["peak_bytes"])
    return max(peaks["ssa"]) / max(peaks["full"]) if peaks["ssa"] and peaks["full"] else None


TARGETS = (
    *(Target(f"train_tps_exact_{size}", value, "x", True, relative_speed(size, "ssa"))
      for size, value in (("8k", 0.95), ("32k", 0.96))),
    *(Target(f"train_tps_sub8_{size}", value, "x", True, relative_speed(size, "ssa 1/8"))
      for size, value in (("8k", 1.04), ("32k", 1.2))),
    Target("mfu_full_8k", 0.55, "", True, _mfu),
    Target("memory_ratio_8k", 1.1, "x", False, _memory),
)  # fmt: skip


def table(result: dict[str, Any]) -> Any:
    """The cases as a table of ``rich``: times per step, and where they go."""
    from rich.table import Table

    kinds = [*KINDS, "rest"]
    found = Table(title=f"{result['suite']}: {result['machine']['label']}", title_justify="left")
    for column in ("size", "method", "stream", "ms", "tokens/s", "vs full", "MFU", "peak GiB", *kinds):
        found.add_column(column, justify="left" if column in ("size", "method", "stream") else "right")
    for case in result["cases"]:
        work, ms = case["workload"], case["ms"]
        full = step_ms(result["cases"], work["name"], "full") or ms
        size = f"{work['name']}{' (recomputed)' if case['recomputes'] else ''}"
        cells = [size, case["method"], case["stream"], f"{ms:.1f}", f"{1e3 * work['rows'] * work['tokens'] / ms:,.0f}"]
        cells += [f"{full / ms:.3f}", f"{case['mfu']:.3f}" if "mfu" in case else ""]
        cells += [f"{case['peak_bytes'] / GIB:.1f}" if case["peak_bytes"] else ""]
        found.add_row(*cells, *(f"{case['kinds'].get(kind, 0.0):.1f}" for kind in kinds))
    return found
