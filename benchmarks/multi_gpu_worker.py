"""What a process of `multi_gpu.py` does: runs of `ssa train`, or timed steps of the 1B model."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd import DeviceType

from ssa.bench.training import VOCABULARY, build, random_batch
from ssa.train.cost import GIB, must_reshard
from ssa.train.loop import Trainer, train
from ssa.train.optimizer import StepGuard, apply_gradients, build_optimizer, gradient_norm
from ssa.train.ranks import Ranks, open_ranks
from ssa.train.recipe import Recipe
from ssa.train.recipe_file import load_recipe
from ssa.train.sharding import shard_model
from ssa.train.step import StepSize, accumulate_gradients, sum_over_ranks
from ssa.train.world import autocast, read_world, resolve_device

Span = tuple[float, float]


def runs(recipes: Sequence[tuple[str, str]]) -> None:
    """Train recipe files one after the other, each into its folder. Their numbers are wanted: nothing is saved."""
    nothing = lambda trainer: None  # noqa: E731
    for recipe, out in recipes:
        with patch.multiple(Trainer, _save=nothing, _export=nothing):
            train(load_recipe(recipe), out)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# ---------------------------------------------------------------------- timed steps
def scaling(recipe_file: str, out: str, rounds: int, steps: int) -> None:
    """Whole steps on all processes, weights sharded over them; rank 0 writes times, memory and communication."""
    recipe, world = load_recipe(recipe_file), read_world()
    device = resolve_device(recipe.training.device, world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with open_ranks(world, device, 100.0) as ranks:
        step = _stepper(recipe, ranks, device)
        for _ in range(2):
            step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = [_timed(step, steps, ranks, device) for _ in range(rounds)]
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        peaks = [row[0] for row in ranks.agree("memory", {}, [peak])]
        communication = communicated(step, device)
        if ranks.leads:
            tokens = recipe.tokens_per_step
            result = {"processes": world.size, "step_ms": 1e3 * statistics.median(seconds), "all_ms": seconds}
            result |= {"tokens_per_second": tokens / statistics.median(seconds)}
            result |= {"peak_gib": [n / GIB for n in peaks], "communication": communication}
            Path(out).write_text(json.dumps(result))


def _stepper(recipe: Recipe, ranks: Ranks, device: torch.device) -> Callable[[], None]:
    config, rows = recipe.model_config(VOCABULARY), recipe.training.micro_batch_rows
    model = build(config, device, device.type == "cuda")
    if ranks.world.size > 1:
        precision, reshard = recipe.training.precision, must_reshard(recipe, config)
        shard_model(model, ranks, ranks.world.size, precision, reshard, device)
    optimizer, guard = build_optimizer(model, recipe.optimizer), StepGuard(device)
    torch.manual_seed(ranks.world.rank)
    batch = random_batch(rows, recipe.data.row_length, config.vocab_size, device)
    size = StepSize(batch.targets * ranks.world.size, rows * ranks.world.size)
    context = partial(autocast, recipe.training.precision, device)

    def step() -> None:
        sums = accumulate_gradients(model, [batch], "full", device, context, size)
        sums, norm = sum_over_ranks(sums, gradient_norm(optimizer), 1, ranks)
        apply_gradients(optimizer, guard, recipe, 1, sums.loss, norm)

    return step


def _timed(step: Callable[[], None], steps: int, ranks: Ranks, device: torch.device) -> float:
    """Seconds a step, from when all ranks are ready."""
    _wait(device)
    ranks.agree("start", {}, [0])
    start = time.perf_counter()
    for _ in range(steps):
        step()
    _wait(device)
    return (time.perf_counter() - start) / steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def communicated(step: Callable[[], None], device: torch.device) -> dict[str, Any] | None:
    """Milliseconds of a step in which NCCL's kernels run, in which nothing else does, by kernel too, and of all."""
    if device.type != "cuda":
        step()  # the other ranks take part in every step
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize(device)
    nccl: dict[str, list[Span]] = {}
    others: list[Span] = []
    for event in profile.events():
        if event.device_type == DeviceType.CUDA:
            spans = nccl.setdefault(event.name.split("(")[0], []) if "nccl" in event.name.lower() else others
            spans.append((event.time_range.start, event.time_range.end))
    busy = _length(_union(others))
    all_nccl = [span for spans in nccl.values() for span in spans]
    whole = _union([*all_nccl, *others])
    return {
        "nccl_ms": _length(_union(all_nccl)) / 1e3,
        "exposed_ms": (_length(whole) - busy) / 1e3,
        "exposed_by": {name: (_length(_union([*spans, *others])) - busy) / 1e3 for name, spans in nccl.items()},
        "step_ms": (whole[-1][1] - whole[0][0]) / 1e3,
    }


def _union(spans: Sequence[Span]) -> list[Span]:
    """Disjoint spans that cover the same time, in order."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def _length(spans: Sequence[Span]) -> float:
    return sum(end - begin for begin, end in spans)


if __name__ == "__main__":
    kind, arguments = sys.argv[1], json.loads(sys.argv[2])
    workers: dict[str, Callable[..., Any]] = {"runs": runs, "scaling": scaling}
    workers[kind](**arguments)
