"""A small recipe, and what its runs leave behind."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ssa.data import prepare
from ssa.model import SSAForCausalLM
from ssa.train import faults, loop
from ssa.train.recipe import Recipe
from ssa.train.recipe_file import load_recipe

ROW, VOCABULARY = 64, 259  # tokens a row; every byte and three special tokens

TINY: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "data.row_length": 64,
    "model.num_key_value_heads": 1,
    "model.hidden_size": 32,
    "model.intermediate_size": 48,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.head_dim": 16,
    "model.block_size": 8,
    "model.num_blocks": 2,
    "model.window_size": 8,
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_steps": 1,
    "training.device": "cpu",
    "training.precision": "fp32",
    "training.tokens": None,
    "training.steps": 12,
    "training.rows_per_step": 4,
    "training.micro_batch_rows": 2,
    "training.log_every": 1,
    "training.validate_every": 5,
    "training.validate_rows": 4,
    "training.checkpoint_every": 4,
    "training.keep_checkpoints": 2,
}
CLOCKS = ("seconds", "tokens_per_second", "machine")


def make_data(folder: Path, seed: int = 0) -> Path:
    """Prepare text of short documents: 22 training rows, the last partly filled, and 6 validation rows of 64 tokens."""
    rng = random.Random(seed)
    for split, rows in (("train", 21.6), ("valid", 5.5)):
        documents, tokens = [], 0.0
        while tokens < rows * ROW:
            length = min(rng.randint(1, 60), int(rows * ROW - tokens) or 1)
            first = rng.randrange(26)
            documents.append("".join(chr(97 + (first + 3 * i) % 26) for i in range(length)))
            tokens += length + 2  # bos and eos
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.with_name(f"{split}.jsonl").write_text(lines)
    train, valid = (str(folder.with_name(f"{split}.jsonl")) for split in ("train", "valid"))
    manifest = prepare([train], folder, valid_sources=[valid], row_length=ROW, vocab_size=VOCABULARY)
    assert [manifest["splits"][split]["rows"] for split in ("train", "valid")] == [22, 6]
    assert manifest["splits"]["train"]["padding"] > 0
    return folder


def tiny(data: Path, method: str = "ssa", **changes: Any) -> Recipe:
    """A recipe that trains in about a second. ``changes`` by dotted key with ``__`` for the dot."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return load_recipe(f"quickstart/{method}", TINY | {"data.path": str(data)} | dotted)


def metrics(run: Path) -> list[dict[str, Any]]:
    """Records of a run without clocks."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in CLOCKS} for record in records]


def results(run: Path) -> list[dict[str, Any]]:
    """What a resumed run must share with an uninterrupted one: steps, skips and validations."""
    return [record for record in metrics(run) if record["event"] in ("step", "skip", "validation")]


def checkpoints(run: Path) -> list[str]:
    """Names in the folder of checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def same_bits(a: Path, b: Path, step: int) -> bool:
    """True if two runs have the same weights and moments after ``step``."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, two = (load_file(run / "checkpoints" / f"step-{step:08d}" / name) for run in (a, b))
        if one.keys() != two.keys() or not all(one[key].equal(two[key]) for key in one):
            return False
    return True


def run_forked(action: Callable[[], int], fault: str | None = None) -> int:
    """Run ``action`` in a forked process, perhaps killed at a fault point; its exit code, ``-9`` if killed."""
    child = os.fork()
    if child == 0:
        if fault is not None:
            os.environ[faults.VARIABLE] = fault
        os._exit(action())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


KILLED = -signal.SIGKILL


def poison(monkeypatch: pytest.MonkeyPatch, calls: set[int], what: str) -> None:
    """Spoil the loss or a gradient of the given calls of the forward and backward pass, counted from 1."""
    original, count = loop.accumulate_gradients, 0

    def spoilt(model: SSAForCausalLM, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        sums = original(model, *arguments)
        if count in calls and what == "loss":
            sums.loss = sums.loss * math.nan
        elif count in calls:
            gradient = next(model.parameters()).grad
            assert gradient is not None
            gradient[0] = math.inf
        return sums

    monkeypatch.setattr(loop, "accumulate_gradients", spoilt)
