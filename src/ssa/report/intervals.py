"""Intervals over seeds: Student's t, paired by seed where two variants are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: 97.5 % quantiles of Student's t by degrees of freedom; beyond the last the normal distribution's.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_NORMAL = 1.960


@dataclass(frozen=True)
class Interval:
    """A mean over ``count`` seeds with its 95 % interval; without one (infinite) where there is a single seed."""

    mean: float
    low: float
    high: float
    count: int


def interval(values: Sequence[float]) -> Interval:
    """The t interval of the finite values; NaN and count 0 if there are none."""
    usable = [value for value in values if math.isfinite(value)]
    count = len(usable)
    if not count:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(usable) / count
    if count == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in usable) / (count - 1))
    quantile = _T[count - 2] if count - 2 < len(_T) else _NORMAL
    reach = quantile * deviation / math.sqrt(count)
    return Interval(mean, mean - reach, mean + reach, count)


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Interval:
    """The interval of ``first - second`` over the seeds that both have."""
    return interval([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])
