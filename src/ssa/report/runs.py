"""Find run folders, and put the seeds of one configuration together."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from ssa.errors import ConfigError, DataError
from ssa.report.results import Budget, Evaluation, Metrics, ModelInfo, read_evaluation, read_metrics

EVALUATION_FILE = "evaluation.json"
METRICS_FILE = "metrics.jsonl"
SEARCH_DEPTH = 3  # runs/METHOD/SEED is as deep as people nest; deeper lie checkpoints and data

#: The methods of the paper, in the order of every table and figure, and how the paper writes them.
METHODS = {"full": "FullAttn", "moba": "MoBA", "nsa": "NSA", "ssa": "SSA"}


@dataclass(frozen=True)
class Run:
    """One run folder: an evaluation, the metrics of its training, or both."""

    evaluation: Evaluation | None
    metrics: Metrics | None = None

    @property
    def head(self) -> ModelInfo | Metrics:
        """Where name, method, seed and parameters are written."""
        head = self.evaluation.model if self.evaluation else self.metrics
        assert head is not None, "a run has at least one file"
        return head

    @property
    def source(self) -> str:
        """A file of the run; for naming it in errors."""
        return next(item.source for item in (self.evaluation, self.metrics) if item)


@dataclass(frozen=True)
class Spread:
    """One measurement over the seeds of a group; NaN where a seed lacks it."""

    values: tuple[float, ...]

    @property
    def finite(self) -> tuple[float, ...]:
        """The values that are numbers."""
        return tuple(value for value in self.values if math.isfinite(value))

    @property
    def mean(self) -> float:
        """Mean of the finite values; NaN if there are none."""
        return math.fsum(self.finite) / len(self.finite) if self.finite else math.nan

    @property
    def low(self) -> float:
        """Smallest finite value."""
        return min(self.finite, default=math.nan)

    @property
    def high(self) -> float:
        """Largest finite value."""
        return max(self.finite, default=math.nan)


@dataclass(frozen=True)
class Group:
    """The seeds of one configuration; ``variant`` counts the configurations of a method, from 0."""

    label: str
    method: str
    variant: int
    runs: tuple[Run, ...]

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """The evaluations, one a seed."""
        return tuple(run.evaluation for run in self.runs if run.evaluation)

    @property
    def metrics(self) -> tuple[Metrics, ...]:
        """The training metrics, one a seed."""
        return tuple(run.metrics for run in self.runs if run.metrics)

    @property
    def training_budget(self) -> Budget | None:
        """The budget of training; part of what makes a group, so the seeds agree on it."""
        return self.evaluations[0].training_budget if self.evaluations else None

    def spread(self, measure: Callable[[Evaluation], float]) -> Spread:
        """A measurement over the seeds."""
        return Spread(tuple(measure(evaluation) for evaluation in self.evaluations))


def discover(paths: Sequence[Path]) -> list[Run]:
    """Read the runs in ``paths``: run folders, folders of run folders, or result files in a run folder."""
    folders: dict[Path, None] = {}
    for path in paths:
        start = path.parent if path.name in (EVALUATION_FILE, METRICS_FILE) else path
        if not start.is_dir():
            raise ConfigError(str(path), "no such folder", "a run folder, or a folder of run folders")
        found = list(_run_folders(start, SEARCH_DEPTH))
        if not found:
            files = f"{EVALUATION_FILE} or {METRICS_FILE}"
            raise ConfigError(str(path), f"no {files} in it", "finished runs", "`ssa train`, then `ssa eval`")
        folders.update((folder.resolve(), None) for folder in found)
    return [_read_run(folder) for folder in folders]


def _run_folders(folder: Path, depth: int) -> Iterable[Path]:
    if (folder / EVALUATION_FILE).exists() or (folder / METRICS_FILE).exists():
        yield folder
    elif depth:
        for child in sorted(folder.iterdir()):
            if child.is_dir():
                yield from _run_folders(child, depth - 1)


def _read_run(folder: Path) -> Run:
    # `ssa eval RUN/model` leaves its result beside the weights.
    places = [folder / EVALUATION_FILE, folder / "model" / EVALUATION_FILE]
    evaluation = next((place for place in places if place.exists()), places[0])
    metrics = folder / METRICS_FILE
    run = Run(
        read_evaluation(evaluation) if evaluation.exists() else None,
        read_metrics(metrics) if metrics.exists() else None,
    )
    return _joined(run.evaluation, run.metrics) if run.evaluation and run.metrics else run


def _joined(evaluation: Evaluation, metrics: Metrics) -> Run:
    """An evaluation with the metrics of its training, which know the seed where the evaluation does not."""
    model = evaluation.model
    if model.seed is None:
        tokens = metrics.steps[-1].tokens if metrics.steps else None
        model = replace(model, name=metrics.name, seed=metrics.seed, trained_tokens=model.trained_tokens or tokens)
    if (model.method, model.seed) != (metrics.method, metrics.seed):
        got = f"an evaluation of method {model.method!r}, seed {model.seed}"
        expected = f"method {metrics.method!r}, seed {metrics.seed}, as in {metrics.source}"
        raise DataError(evaluation.source, got, expected, "`ssa eval` on this run again")
    return Run(replace(evaluation, model=model), metrics)


def _stem(head: ModelInfo | Metrics) -> str:
    """The run's name without its seed: "ssa-seed1" and "ssa-seed2" are the same configuration."""
    if head.seed is None:
        return head.name
    return re.sub(rf"[-_. /]+(?:seed|s)?[-_=]?{head.seed}$", "", head.name) or head.name


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Group the seeds of each configuration: same method, name (but for the seed), size and training budget.

    Raises :class:`ConfigError` where one seed of one configuration appears twice: it would count double.
    """
    grouped: dict[tuple[object, ...], list[Run]] = {}
    unevaluated: list[Run] = []
    for run in runs:
        if run.evaluation:
            model = run.evaluation.model
            budget = (model.block_size, model.num_blocks)
            full_key = (model.method, _stem(model), model.parameters, model.trained_tokens, *budget)
            grouped.setdefault(full_key, []).append(run)
        else:
            unevaluated.append(run)
    for run in unevaluated:
        # The start event says no more than this, so such a run joins the evaluated seeds where that is unambiguous.
        key = (run.head.method, _stem(run.head), run.head.parameters)
        matches = [known for known in grouped if known[:3] == key]
        grouped.setdefault(matches[0] if len(matches) == 1 else key, []).append(run)
    members = [_by_seed(group) for group in grouped.values()]
    return _labelled(sorted(members, key=_order))


def seed_order(seed: int | None) -> int:
    """Sorting key of a seed; unknown ones first."""
    return -1 if seed is None else seed


def _by_seed(runs: list[Run]) -> list[Run]:
    runs = sorted(runs, key=lambda run: seed_order(run.head.seed))
    for first, second in pairwise(runs):
        if first.head.seed == second.head.seed:
            seed = "an unknown seed" if first.head.seed is None else f"seed {first.head.seed}"
            got = f"{seed} of {first.head.name!r} twice, also in {second.source}"
            raise ConfigError(first.source, got, "every seed once", "giving one of the runs another name")
    return runs


def _order(runs: list[Run]) -> tuple[int, str, str]:
    """The paper's order, then by name; a variant that is named like its method comes first of its kind."""
    head = runs[0].head
    known = list(METHODS)
    place = known.index(head.method) if head.method in known else len(known)
    return place, head.method, "" if _stem(head) == head.method else _stem(head)


def _labelled(members: list[list[Run]]) -> list[Group]:
    """Name each group by its method; where a method comes in several variants, also by what tells them apart."""
    groups: list[Group] = []
    for runs in members:
        method = runs[0].head.method
        variant = sum(group.method == method for group in groups)
        groups.append(Group(METHODS.get(method, method), method, variant, tuple(runs)))
    for describe in (lambda group: _stem(group.runs[0].head), _configuration):
        labels = [group.label for group in groups]
        groups = [
            replace(group, label=f"{group.label} · {describe(group)}") if labels.count(group.label) > 1 else group
            for group in groups
        ]
    return groups


def _configuration(group: Group) -> str:
    if not group.evaluations:
        return "not evaluated"
    model = group.evaluations[0].model
    budget = f"{model.num_blocks}×{model.block_size}"
    tokens = "unknown" if model.trained_tokens is None else f"{model.trained_tokens:,}"
    return f"{model.parameters:,} parameters, {tokens} tokens, {budget}"
