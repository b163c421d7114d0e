"""The figure of a study that says which differences are resolved: intervals against FullAttn, paired by seed."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from ssa.report import measures
from ssa.report.claims import label, relative_percent
from ssa.report.intervals import Interval, paired
from ssa.report.own_claims import FRACTIONS
from ssa.report.study import Measure, Study
from ssa.report.style import COLOURS, WIDTH, Figure, draw

BASE = "full"
PANELS: dict[str, tuple[Measure, bool]] = {
    "Perplexity, full, %": (measures.full_perplexity, True),
    "Perplexity, sparse, %": (measures.native_perplexity, True),
    "AttnSparsity": (measures.attention_sparsity, False),
    "Attention gap, % points": (measures.gap_percent, False),
}


def difference(study: Study, variant: str, measure: Measure, relative: bool) -> Interval:
    """How far ``variant`` lies above FullAttn of the same seed; in percent if ``relative``."""
    if relative:
        return relative_percent(study, variant, BASE, measure)
    return paired(study.values(variant, measure), study.values(BASE, measure))


def interval_figure(study: Study) -> Figure | None:
    """Means and 95 % t intervals of every variant that has at least two seeds in common with FullAttn."""
    names = ["ssa", *(n for n in FRACTIONS if n != "ssa"), "moba", "nsa"]
    first = PANELS["Perplexity, sparse, %"]
    shown = [name for name in names if difference(study, name, *first).count > 1]
    if not shown:
        return None

    def paint(canvas: Canvas) -> None:
        grid = canvas.subplots(1, len(PANELS), sharey=True)
        for axes, (title, what) in zip(grid, PANELS.items(), strict=True):
            _panel(axes, [difference(study, name, *what) for name in shown], shown)
            axes.set_title(title)
            axes.set_yticks(range(len(shown)), [_name(name) for name in shown])
        grid[0].invert_yaxis()

    caption = (
        "Difference to FullAttn of the same seed: mean over seeds and 95 % t interval. An interval that crosses the "
        "grey line is not resolved. Perplexity and gap: to the left is better; AttnSparsity: to the right."
    )
    return draw("intervals", "What is resolved", caption, (WIDTH, 1.2 + 0.32 * len(shown)), paint)


def _panel(axes: Axes, found: list[Interval], names: list[str]) -> None:
    axes.axvline(0, color="#C9CFD6", linewidth=1, zorder=1)
    for row, (value, name) in enumerate(zip(found, names, strict=True)):
        if value.count > 1:
            tone = COLOURS.get(name, COLOURS["ssa"])
            axes.plot([value.low, value.high], [row, row], color=tone, linewidth=2, solid_capstyle="butt")
            axes.plot(value.mean, row, "D", color=tone, markersize=5)
    axes.grid(axis="x")


def _name(variant: str) -> str:
    return f"SSA, {FRACTIONS[variant]}" if variant in FRACTIONS and variant != "ssa" else label(variant)
