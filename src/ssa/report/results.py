"""Typed reading of result files: ``ssa.evaluation/1`` (JSON) and ``ssa.metrics/1`` (JSON lines).

The schemas are written down in ``docs/architecture.md``. A measurement that is missing, null or not finite is
kept as it is read (missing and null as NaN) and shown as "n/a"; anything else that does not fit is an error.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

from ssa.errors import DataError
from ssa.report.fields import Fields, parse_json, read_text
from ssa.report.suite import Suite, read_suite

EVALUATION_SCHEMA = "ssa.evaluation"
METRICS_SCHEMA = "ssa.metrics"
MAJOR = 1
MODES = ("full", "sparse")


@dataclass(frozen=True)
class ModelInfo:
    """The model that was evaluated. ``block_size`` and ``num_blocks`` are its training budget.

    Of a bare model folder, seed and trained tokens are not known.
    """

    name: str
    method: str
    parameters: int
    layers: int
    seed: int | None
    trained_tokens: int | None
    block_size: int | None
    num_blocks: int | None


@dataclass(frozen=True)
class DataInfo:
    """The text it was evaluated on."""

    name: str
    split: str
    rows: int
    row_length: int
    tokens: int


@dataclass(frozen=True, order=True)
class Budget:
    """What a query may read: ``num_blocks`` blocks of ``block_size`` tokens."""

    receptive_field: int
    block_size: int
    num_blocks: int


@dataclass(frozen=True)
class ModeRun:
    """Perplexity of one inference mode. ``budget`` is ``None`` for full attention; ``kl`` is in nats a token."""

    mode: str
    budget: Budget | None
    perplexity: float
    kl: float


@dataclass(frozen=True)
class AttentionStatistics:
    """Statistics of one layer, or their mean: shares in [0, 1], entropy in bits."""

    attention_sparsity: float
    entropy_bits: float
    bound_share: float
    bound_tightness: float


@dataclass(frozen=True)
class AttentionRun:
    """Attention statistics under one inference mode, at one budget."""

    mode: str
    block_size: int
    num_blocks: int
    layers: tuple[tuple[int, AttentionStatistics], ...]
    mean: AttentionStatistics


@dataclass(frozen=True)
class SelectionMap:
    """``picked_share[i][j]``: the share of the queries of block i that select block j."""

    layer: int
    kv_head: int
    block_size: int
    picked_share: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Evaluation:
    """One ``evaluation.json``."""

    source: str
    created: str | None
    command: str | None
    commit: str | None
    machine: tuple[tuple[str, str], ...]
    model: ModelInfo
    data: DataInfo
    runs: tuple[ModeRun, ...]
    attention: tuple[AttentionRun, ...]
    selection_map: SelectionMap | None
    suite: Suite = field(default_factory=Suite)

    @property
    def training_budget(self) -> Budget | None:
        """The budget the model was trained with."""
        size, blocks = self.model.block_size, self.model.num_blocks
        return Budget(size * blocks, size, blocks) if size and blocks else None

    def run(self, budget: Budget | None) -> ModeRun | None:
        """The run at a budget; ``None`` asks for full attention."""
        mode = "sparse" if budget else "full"
        return next((run for run in self.runs if run.mode == mode and run.budget == budget), None)

    def perplexity(self, budget: Budget | None) -> float:
        """Perplexity at a budget, or under full attention; NaN where it was not measured."""
        run = self.run(budget)
        return run.perplexity if run else math.nan

    def attention_in(self, mode: str) -> AttentionRun | None:
        """Attention statistics of an inference mode: at the training budget, else the first that there is."""
        candidates = [run for run in self.attention if run.mode == mode]
        wanted = (self.model.block_size, self.model.num_blocks)
        exact = [run for run in candidates if (run.block_size, run.num_blocks) == wanted]
        return next(iter(exact or candidates), None)


@dataclass(frozen=True)
class Step:
    """One optimiser step: which stream was the main one, and its losses (nats)."""

    step: int
    tokens: int
    stream: str
    cross_entropy: float
    alignment: float
    attention_sparsity: float


@dataclass(frozen=True)
class Metrics:
    """One ``metrics.jsonl``: the steps that led to the final weights, in order."""

    source: str
    name: str
    method: str
    seed: int
    parameters: int
    steps: tuple[Step, ...]


def read_evaluation(path: Path) -> Evaluation:
    """Read and check one ``evaluation.json``. Raises ``ConfigError`` for an unknown version, else ``DataError``."""
    return parse_evaluation(parse_json(read_text(path), str(path)), str(path))


def parse_evaluation(document: object, source: str) -> Evaluation:
    """Check a document that is already parsed; ``source`` is named in errors and as provenance."""
    fields = Fields(document, source)
    fields.require_schema(EVALUATION_SCHEMA, MAJOR)
    return Evaluation(
        source=source,
        created=fields.text_or_none("created"),
        command=fields.text_or_none("command"),
        commit=fields.text_or_none("commit"),
        machine=fields.described("machine"),
        model=_model(fields.child("model")),
        data=_data(fields.child("data")),
        runs=tuple(_mode_run(item) for item in fields.children("runs")),
        attention=tuple(_attention_run(item) for item in fields.children("attention")),
        selection_map=_selection_map(fields.child("selection_map")) if "selection_map" in fields else None,
        suite=read_suite(fields.child("suite")) if "suite" in fields else Suite(),
    )


def _model(fields: Fields) -> ModelInfo:
    return ModelInfo(
        name=fields.text("name"),
        method=fields.text("method"),
        parameters=fields.count("parameters"),
        layers=fields.count("layers"),
        seed=fields.count_or_none("seed"),
        trained_tokens=fields.count_or_none("trained_tokens"),
        block_size=fields.count_or_none("block_size"),
        num_blocks=fields.count_or_none("num_blocks"),
    )


def _data(fields: Fields) -> DataInfo:
    return DataInfo(
        name=fields.text("name"),
        split=fields.text("split"),
        rows=fields.count("rows"),
        row_length=fields.count("row_length"),
        tokens=fields.count("tokens"),
    )


def _mode_run(fields: Fields) -> ModeRun:
    mode = fields.choice("mode", MODES)
    budget = None
    if mode == "sparse":
        size, blocks = fields.count("block_size"), fields.count("num_blocks")
        budget = Budget(size * blocks, size, blocks)
        if not budget.receptive_field:
            raise DataError(fields.where, f"{blocks} blocks of {size} tokens", "at least one block of one token")
    return ModeRun(mode, budget, fields.number("perplexity"), fields.number("kl_full_sparse"))


def _attention_run(fields: Fields) -> AttentionRun:
    return AttentionRun(
        mode=fields.choice("mode", MODES),
        block_size=fields.count("block_size"),
        num_blocks=fields.count("num_blocks"),
        layers=tuple((item.count("layer"), _statistics(item)) for item in fields.children("layers")),
        mean=_statistics(fields.child("mean")),
    )


def _statistics(fields: Fields) -> AttentionStatistics:
    return AttentionStatistics(
        **{item.name: fields.number(item.name) for item in dataclasses.fields(AttentionStatistics)}
    )


def _selection_map(fields: Fields) -> SelectionMap:
    counts = {name: fields.count(name) for name in ("layer", "kv_head", "block_size")}
    return SelectionMap(**counts, picked_share=fields.matrix("picked_share"))


def read_metrics(path: Path) -> Metrics:
    """Read and check one ``metrics.jsonl``.

    Steps that a resumed run did again count once, as they were done last; the error of a bad line names the line.
    """
    lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(str(path), "an empty file", "a start event", "`ssa train` to write one")
    records = [Fields(parse_json(line, f"{path}:{number}"), f"{path}:{number}") for number, line in lines]
    start = records[0]
    start.require_schema(METRICS_SCHEMA, MAJOR)
    steps: dict[int, Step] = {}
    for record in records[1:]:
        event = record.text("event")
        if event == "resume":
            resumed = record.count("step")
            steps = {number: step for number, step in steps.items() if number <= resumed}
        elif event == "step":
            step = _step(record)
            steps[step.step] = step
    return Metrics(
        source=str(path),
        name=start.text("name"),
        method=start.text("method"),
        seed=start.count("seed"),
        parameters=start.count("parameters"),
        steps=tuple(steps[number] for number in sorted(steps)),
    )


def _step(fields: Fields) -> Step:
    return Step(
        step=fields.count("step"),
        tokens=fields.count("tokens"),
        stream=fields.choice("stream", MODES),
        cross_entropy=fields.number("cross_entropy"),
        alignment=fields.number("alignment"),
        attention_sparsity=fields.number("attention_sparsity"),
    )
