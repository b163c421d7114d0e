"""Numbers as text, for tables, checks and figures alike. What is not finite reads "n/a"."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from ssa.report.runs import Spread

Format = Callable[[float], str]

MISSING = "n/a"


def perplexity(value: float) -> str:
    """Four significant digits up to 1000, whole numbers above."""
    if not math.isfinite(value):
        return MISSING
    if value >= 1000:
        return f"{value:,.0f}" if value < 1e6 else f"{value:.2e}"
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def share(value: float) -> str:
    """A share in [0, 1], as the paper prints AttnSparsity."""
    return f"{value:.3f}" if math.isfinite(value) else MISSING


def bits(value: float) -> str:
    """Entropy."""
    return f"{value:.2f}" if math.isfinite(value) else MISSING


def nats(value: float) -> str:
    """A divergence."""
    return f"{value:.4f}" if math.isfinite(value) else MISSING


def signed_percent(value: float) -> str:
    """A relative difference, with its sign; below 1 % with two digits after the point."""
    digits = 1 if abs(value) >= 1 else 2
    return f"{value:+.{digits}f} %".replace("-", "−") if math.isfinite(value) else MISSING


def percent(value: float) -> str:
    """A share of cases as whole percent."""
    return f"{100 * value:.0f} %" if math.isfinite(value) else MISSING


def percent_met(value: float) -> str:
    """A share of cases that meet a promise. Rounded down, so that "100 %" means every one."""
    if not math.isfinite(value):
        return MISSING
    return "100 %" if value >= 1 else f"{math.floor(value * 10000) / 100:.2f} %"


def large(count: int | None) -> str:
    """A count in the unit a reader would use: 64.2 M, 1.5 B."""
    if count is None:
        return MISSING
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return str(count)


def listed(items: Iterable[str], conjunction: str = "and") -> str:
    """Items in words: "64, 128 and 256"."""
    *first, last = items
    return f"{', '.join(first)} {conjunction} {last}" if first else last


def spread_text(spread: Spread, show: Format) -> tuple[str, str]:
    """The mean, and beside it what a reader must know of the seeds: their range, or how many are finite."""
    count = len(spread.finite)
    if not count:
        return MISSING, ""
    notes = []
    if count > 1 and show(spread.low) != show(spread.high):
        low, high = (show(value).removesuffix(" %") for value in (spread.low, spread.high))
        notes.append(f"{low} to {high}" if low[0] in "+−" else f"{low}–{high}")
    if count < len(spread.values):
        notes.append(f"{count} of {len(spread.values)} seeds")
    return show(spread.mean), ", ".join(notes)
