"""Synthetic runs that look like real ones: written out as files, so that the tests read what users have."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

BLOCK_SIZE, NUM_BLOCKS, LAYERS, GRID = 16, 4, 6, 24
BUDGETS = (2, 4, 8, 16)
PERPLEXITY = {"full": (24.1, 1.30), "moba": (26.0, 0.97), "nsa": (25.0, 1.0), "ssa": (24.3, 1.09)}
SPARSITY = {"full": 0.62, "moba": 0.52, "nsa": 0.55, "ssa": 0.71}
ENTROPY = {"full": 6.3, "moba": 6.9, "nsa": 6.6, "ssa": 5.6}
KL = {"full": 0.149, "moba": 0.102, "nsa": None, "ssa": 0.066}


def _attention(method: str, mode: str, noise: random.Random) -> dict[str, Any]:
    layers = []
    for layer in range(LAYERS):
        depth = layer / (LAYERS - 1)
        sparsity = SPARSITY[method] + 0.16 * depth - 0.08 + noise.gauss(0, 0.008) - 0.02 * (mode == "sparse")
        layers.append(
            {
                "layer": layer,
                "attention_sparsity": sparsity,
                "dropped_mass": 1 - sparsity,
                "entropy_bits": ENTROPY[method] - 1.1 * depth + 0.4 * math.sin(3 * depth) + noise.gauss(0, 0.05),
                "bound_share": 1.0,
                "bound_tightness": 0.28 + 0.1 * depth + noise.gauss(0, 0.01),
            }
        )
    mean = {key: sum(item[key] for item in layers) / LAYERS for key in layers[0] if key != "layer"}
    return {"mode": mode, "block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS, "layers": layers, "mean": mean}


def _selection_map(method: str, noise: random.Random) -> dict[str, Any]:
    rows = []
    for i in range(GRID):
        weights = [math.exp(-(i - j) / (2 + 9 * (1 - SPARSITY[method]))) + 0.9 * (j == 0) for j in range(i)]
        total = sum(weights) or 1.0
        row = [min(1.0, (NUM_BLOCKS - 1) * w / total * noise.uniform(0.6, 1.4)) for w in weights]
        rows.append(row + [1.0] + [0.0] * (GRID - i - 1))
    return {"layer": 3, "kv_head": 0, "block_size": BLOCK_SIZE, "picked_share": rows}


def make_evaluation(method: str, seed: int, name: str | None = None) -> dict[str, Any]:
    """An ``ssa.evaluation/1`` document."""
    noise = random.Random(f"{method}{seed}")
    base, sparse_factor = PERPLEXITY[method]
    base *= 1 + noise.gauss(0, 0.008)
    common = {"block_size": BLOCK_SIZE, "tokens": 1_048_576, "seconds": 12.5}
    runs: list[dict[str, Any]] = []
    if method != "nsa":
        full = {"mode": "full", "num_blocks": None, "receptive_field": None, "kl_full_sparse": None}
        runs.append({**common, **full, "nll": math.log(base), "perplexity": base})
    for blocks in BUDGETS:
        ppl = base * (1 + (sparse_factor - 1) * (NUM_BLOCKS / blocks) ** 0.75 + 0.01 * noise.random() / blocks)
        kl = KL[method] * (NUM_BLOCKS / blocks) ** 0.8 if KL[method] else None
        sparse = {"mode": "sparse", "num_blocks": blocks, "receptive_field": blocks * BLOCK_SIZE}
        runs.append({**common, **sparse, "nll": math.log(ppl), "perplexity": ppl, "kl_full_sparse": kl})
    modes = ("sparse",) if method == "nsa" else ("full", "sparse")
    return {
        "schema": "ssa.evaluation/1",
        "created": f"2026-06-1{seed}T09:30:00+00:00",
        "command": f"ssa eval runs/{method}-seed{seed} --budgets 2 4 8 16",
        "machine": {
            "platform": "Linux-6.8-x86_64", "python": "3.11.7", "torch": "2.13.0", "cpu": "AMD EPYC 9654",
            "cpu_count": 2, "gpu": None,
        },
        "commit": "d8a8c3b5f0e1",
        "model": {
            "name": name or f"{method}-seed{seed}", "method": method, "parameters": 14_234_880, "layers": LAYERS,
            "seed": seed, "trained_tokens": 26_214_400, "block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS,
        },
        "data": {"name": "tiny-stories", "split": "valid", "rows": 2048, "row_length": 512, "tokens": 1_048_576},
        "runs": runs,
        "attention": [_attention(method, mode, noise) for mode in modes],
        "selection_map": _selection_map(method, noise),
    }  # fmt: skip


def make_metrics(method: str, seed: int, name: str | None = None, steps: int = 400) -> list[dict[str, Any]]:
    """The events of an ``ssa.metrics/1`` file."""
    noise = random.Random(f"metrics{method}{seed}")
    start = {"schema": "ssa.metrics/1", "event": "start", "name": name or f"{method}-seed{seed}", "method": method}
    events: list[dict[str, Any]] = [{**start, "seed": seed, "parameters": 14_234_880, "machine": {}}]
    floor = math.log(PERPLEXITY[method][0])
    for step in range(1, steps + 1):
        stream = {"full": "full", "ssa": "full" if noise.random() < 0.5 else "sparse"}.get(method, "sparse")
        loss = floor + 5.2 * math.exp(-step / 45) + 0.5 * math.exp(-step / 180) + noise.gauss(0, 0.06)
        loss += 0.07 * (method == "ssa" and stream == "sparse")
        alignment = 0.004 + 0.02 * math.exp(-step / 60) + abs(noise.gauss(0, 0.0008)) if method == "ssa" else None
        sparsity = 0.71 - 0.35 * math.exp(-step / 90) + noise.gauss(0, 0.01) if method == "ssa" else None
        events.append(
            {
                "event": "step", "step": step, "tokens": step * 65536, "stream": stream, "learning_rate": 1e-3,
                "loss": loss + 10 * (alignment or 0), "cross_entropy": loss, "alignment": alignment,
                "sparsity_loss": None, "commitment_loss": None, "attention_sparsity": sparsity,
                "gradient_norm": 0.8, "tokens_per_second": 30000.0, "seconds": 2.2,
            }
        )  # fmt: skip
        if step % 100 == 0:
            events.append({"event": "validation", "step": step, "mode": "full", "cross_entropy": loss})
    return [*events, {"event": "end", "step": steps, "seconds": 880.0, "reason": "finished"}]


def write_run(folder: Path, evaluation: dict[str, Any] | None, metrics: list[dict[str, Any]] | None = None) -> Path:
    """Write a run folder the way ``ssa train`` and ``ssa eval`` do."""
    folder.mkdir(parents=True)
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation, indent=1), encoding="utf-8")
    if metrics is not None:
        text = "".join(json.dumps(event) + "\n" for event in metrics)
        (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def write_runs(folder: Path, methods: Sequence[str], seeds: Sequence[int], steps: int = 400) -> Path:
    """One run folder per method and seed."""
    for method in methods:
        for seed in seeds:
            evaluation, metrics = make_evaluation(method, seed), make_metrics(method, seed, steps=steps)
            write_run(folder / f"{method}-seed{seed}", evaluation, metrics)
    return folder


@pytest.fixture(name="evaluation")
def _evaluation() -> Callable[..., dict[str, Any]]:
    return make_evaluation


@pytest.fixture(name="metrics")
def _metrics() -> Callable[..., list[dict[str, Any]]]:
    return make_metrics


@pytest.fixture(name="write_run")
def _write_run() -> Callable[..., Path]:
    return write_run


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods, two seeds each, with training metrics."""
    return write_runs(tmp_path_factory.mktemp("runs") / "all", ("full", "moba", "ssa"), (1, 2))
