"""Training curves: noisy steps of several seeds as one smooth line with a band."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ssa.report.results import Metrics

Array = NDArray[np.float64]
GRID = 240  # points a curve is drawn with
WINDOWS = 40  # a smoothing window is this fraction of the run


@dataclass(frozen=True)
class Curve:
    """A measurement over training tokens: smoothed mean and range of the seeds, and the steps of the first seed."""

    tokens: Array
    mean: Array
    low: Array
    high: Array
    raw_tokens: Array
    raw: Array


def training_curve(seeds: Sequence[Metrics], field: str, stream: str | None = None) -> Curve | None:
    """The curve of a field of :class:`~ssa.report.results.Step`, over the steps of one stream or of both.

    Steps without a finite value are left out; ``None`` where no seed has two steps to draw.
    """
    series = [points for points in (_points(metrics, field, stream) for metrics in seeds) if len(points[0]) > 1]
    if not series:
        return None
    # Seeds draw their streams at different steps, so that their curves meet on a common grid only.
    start, end = max(tokens[0] for tokens, _ in series), min(tokens[-1] for tokens, _ in series)
    if start >= end:
        series, start, end = series[:1], series[0][0][0], series[0][0][-1]
    grid = np.linspace(start, end, GRID)
    smooth = np.stack([np.interp(grid, tokens, _smoothed(values)) for tokens, values in series])
    return Curve(grid, smooth.mean(0), smooth.min(0), smooth.max(0), *series[0])


def _points(metrics: Metrics, field: str, stream: str | None) -> tuple[Array, Array]:
    steps = [step for step in metrics.steps if stream is None or step.stream == stream]
    values = np.array([getattr(step, field) for step in steps], dtype=np.float64)
    tokens = np.array([step.tokens for step in steps], dtype=np.float64)
    return tokens[np.isfinite(values)], values[np.isfinite(values)]


def _smoothed(values: Array) -> Array:
    """Centred moving average; near the ends the window is cut to the steps that there are."""
    count, reach = len(values), max(1, len(values) // WINDOWS)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(count)
    first, end = np.maximum(index - reach, 0), np.minimum(index + reach + 1, count)
    return np.asarray((sums[end] - sums[first]) / (end - first))
