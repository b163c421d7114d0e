"""One model in every mode and at every budget: the ``ssa.evaluation/1`` result."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ssa.data.loader import Loader, PackedDataset
from ssa.environment import commit, machine
from ssa.errors import ConfigError, DataError, DiskError
from ssa.evaluate.perplexity import perplexity
from ssa.evaluate.running import Setting
from ssa.evaluate.statistics import attention_statistics, selection_map
from ssa.evaluate.suite import SuitePlan, run_suite
from ssa.model import SSAForCausalLM
from ssa.ops import SparseSpec

SCHEMA = "ssa.evaluation/1"


@dataclass(frozen=True)
class Plan:
    """What to evaluate.

    Attributes:
        budgets: blocks per query of the sparse runs.
        block_size: tokens per block; None takes the model's.
        rows: validation rows for perplexity; None takes all.
        statistics_rows: rows for the attention statistics, which cost more.
        rows_per_batch: rows at a time.
        rule: selection rule of the sparse runs; None keeps the model's.
        suite: what of the evaluation suite to measure; None leaves it out.
        suite_budgets: blocks per query of the suite's sparse runs; None takes ``budgets``.
    """

    budgets: Sequence[int]
    block_size: int | None = None
    rows: int | None = None
    statistics_rows: int = 8
    rows_per_batch: int = 8
    rule: str | None = None
    suite: SuitePlan | None = None
    suite_budgets: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name, budgets in (("budgets", self.budgets), ("suite_budgets", self.suite_budgets)):
            if budgets is not None and (not budgets or min(budgets) < 1):
                raise ConfigError(name, list(budgets), "block counts of at least 1")
        for name in ("rows", "statistics_rows", "rows_per_batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(name, value, "at least 1")

    def settings(self, model: SSAForCausalLM, budgets: Sequence[int] | None = None) -> list[Setting]:
        """Full first (where the model can), then the budgets in rising order."""
        size = self.block_size or model.config.block_size
        full = [] if model.config.method == "nsa" else [Setting("full", size)]
        return full + [Setting("sparse", size, n, self.rule) for n in sorted(set(budgets or self.budgets))]


@dataclass(frozen=True)
class RunFacts:
    """What a result says of the training run: its name, and seed and trained tokens where known."""

    name: str
    seed: int | None = None
    trained_tokens: int | None = None


def run_facts(folder: Path) -> RunFacts:
    """Facts of a run folder, read from its ``metrics.jsonl``; a bare model folder has only its name."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        return RunFacts(folder.resolve().name)
    try:
        events = [json.loads(line) for line in metrics.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(str(metrics), f"unreadable metrics ({error})", "JSON lines that `ssa train` wrote") from error
    start: dict[str, Any] = next((e for e in events if e.get("event") == "start"), {})
    tokens = [e["tokens"] for e in events if e.get("event") == "step" and "tokens" in e]
    return RunFacts(start.get("name") or folder.name, start.get("seed"), max(tokens, default=None))


def evaluate(
    model: SSAForCausalLM,
    dataset: PackedDataset,
    plan: Plan,
    *,
    facts: RunFacts | None = None,
    command: str = "",
    on_batch: Callable[[], None] = lambda: None,
    haystack: str | None = None,
    say: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Perplexity of every setting, KL, attention statistics in both modes, a selection map, and the suite if planned.

    Args:
        model: any :class:`SSAForCausalLM`, on its device.
        dataset: packed rows; see :mod:`ssa.data`.
        plan: budgets and sizes.
        facts: name, seed and tokens of the training run, see :func:`run_facts`.
        command: what produced this, for the record.
        on_batch: progress callback, called ``batches * settings`` times.
        haystack, say: see :func:`ssa.evaluate.run_suite`.

    Returns:
        A JSON-able object of schema ``ssa.evaluation/1`` (docs/architecture.md).
    """
    config, facts = model.config, facts or RunFacts(model.config.method)
    rows = len(dataset) if plan.rows is None else min(plan.rows, len(dataset))

    def batches(count: int) -> Loader:
        return Loader(dataset, plan.rows_per_batch, shuffle=False, epochs=1, limit=count)

    say("perplexity")
    measured = perplexity(model, lambda: batches(rows), plan.settings(model), on_batch)
    say("attention statistics")
    spec = SparseSpec(plan.block_size or config.block_size, config.num_blocks)
    modes = ["sparse"] if config.method == "nsa" else ["full", "sparse"]
    attention = []
    for mode in modes:
        statistics = attention_statistics(model, batches(min(rows, plan.statistics_rows)), spec, mode)
        budget = {"mode": mode, "block_size": spec.block_size, "num_blocks": spec.num_blocks}
        attention.append({**budget, "layers": statistics.rows(), "mean": statistics.mean()})
    settings = plan.settings(model, plan.suite_budgets)
    suite = plan.suite and {"suite": run_suite(model, dataset, plan.suite, settings, haystack, say)}
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "machine": machine(),
        "commit": commit(),
        "model": {
            "name": facts.name,
            "method": config.method,
            "parameters": sum(p.numel() for p in model.parameters()),
            "layers": config.num_hidden_layers,
            "seed": facts.seed,
            "trained_tokens": facts.trained_tokens,
            "block_size": config.block_size,
            "num_blocks": config.num_blocks,
        },
        "data": {
            "name": dataset.path.name,
            "split": dataset.split,
            "rows": rows,
            "row_length": dataset.row_length,
            "tokens": measured[0].tokens,
        },
        "runs": [m.row() for m in measured],
        "attention": attention,
        "selection_map": selection_map(model, next(iter(batches(1))), spec, layer=config.num_hidden_layers // 2),
        **(suite or {}),
    }


def write_result(result: dict[str, Any], path: Path) -> None:
    """Write a result file whole or not at all.

    Raises:
        DiskError: the place is not writable, or full.
    """
    check_writable(path)
    temporary = _temporary(path)
    try:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise DiskError(str(path), error.strerror, "a writable place with free space", "another --out") from error


def check_writable(path: Path) -> None:
    """Raise :class:`DiskError` unless a result can be written to ``path``; before hours of measuring, not after."""
    if path.is_dir():
        raise DiskError(str(path), "a folder", "a file to write", f"--out {path / 'result.json'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _temporary(path).touch()
        _temporary(path).unlink()
    except OSError as error:
        raise DiskError(str(path), error.strerror, "a writable place", "another --out") from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
