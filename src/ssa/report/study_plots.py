"""Figures of a study: context length, needles, sharing between neighbouring tokens, variants."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from ssa.report import measures
from ssa.report.claims import label
from ssa.report.findings import FRACTIONS
from ssa.report.results import Evaluation
from ssa.report.runs import METHODS, Group, Spread
from ssa.report.study import Measure, Study
from ssa.report.style import COLOURS, MUTED, WIDTH, EndLabel, Figure, colour, draw, label_ends, line

Points = list[tuple[float, Spread]]


def study_figures(study: Study) -> list[Figure]:
    """Every figure for which there is something to draw."""
    found = [length_figure(study), needle_figure(study), union_figure(study), variant_figure(study)]
    return [figure for figure in found if figure is not None]


def length_figure(study: Study) -> Figure | None:
    """Sliding-window perplexity, AttnSparsity and entropy against context length, under full inference."""
    lengths = _lengths(study, lambda e: [x.length for x in e.suite.sliding])
    if len(lengths) < 2:
        return None
    trained = _trained(study)
    panels: dict[str, Callable[[int, Evaluation], float]] = {
        "Perplexity, sliding window": lambda n, e: measures.sliding(n, "none")(e),
        "AttnSparsity": lambda n, e: measures.sparsity_at(n)(e),
        "Perplexity, sparse ÷ full": lambda n, e: _ratio(n, e),
    }

    def paint(canvas: Canvas) -> None:
        for axes, (title, value) in zip(canvas.subplots(1, len(panels)), panels.items(), strict=True):
            ends = []
            for group in study.core:
                points = _points(group, lengths, value)
                _banded(axes, points, line(group))
                if points:
                    ends.append(EndLabel(points[-1][1].mean, group.label, colour(group)))
            if title == "Perplexity, sliding window":
                for group in study.core:
                    scaled = [n for n in lengths if trained and n >= trained]
                    points = _points(group, scaled, lambda n, e: _scaled(n, e, trained))
                    if len(points) > 1:
                        style = {**line(group), "linestyle": (0, (1.5, 1.5)), "markerfacecolor": "white"}
                        _banded(axes, points, style)
            _length_axis(axes, lengths, trained)
            axes.set_title(title)
            if ends:
                label_ends(axes, max(map(float, lengths)), ends, height=2.4)

    caption = (
        "Held-out documents read through a window of growing length; right of the grey line the window is longer than "
        "any document of training. Solid: positions go on as trained; dotted, open markers: RoPE scaled as in Llama 3. "
        "On the right, how much perplexity each model loses when it runs sparse at its training budget."
    )
    return draw("length", "Longer contexts", caption, (WIDTH, 3.3), paint)


def _ratio(length: int, evaluation: Evaluation) -> float:
    full = measures.sliding(length, "none")(evaluation)
    return measures.sliding(length, "none", "sparse")(evaluation) / full if full else math.nan


def _scaled(length: int, evaluation: Evaluation, trained: int | None) -> float:
    return measures.sliding(length, "none" if length == trained else "llama3")(evaluation)


def needle_figure(study: Study) -> Figure | None:
    """Needle accuracy by length, full and sparse inference, one panel per form."""
    forms = list(dict.fromkeys(x.form for e in _evaluations(study) for x in e.suite.needle))
    lengths = _lengths(study, lambda e: [x.length for x in e.suite.needle])
    if not forms or not lengths:
        return None
    chances = [x.chance for e in _evaluations(study) for x in e.suite.needle if math.isfinite(x.chance)]

    def paint(canvas: Canvas) -> None:
        grid = canvas.subplots(1, len(forms), squeeze=False, sharey=True)[0]
        for axes, form in zip(grid, forms, strict=True):
            for group in study.core:
                for mode, dashes in (("full", "-"), ("sparse", (0, (3.2, 1.4)))):
                    value = _accuracy(form, mode)
                    _banded(axes, _points(group, lengths, value), {**line(group), "linestyle": dashes})
            for chance in chances[:1]:
                axes.axhline(chance, color="#C9CFD6", linewidth=1, zorder=1)
            _length_axis(axes, lengths, _trained(study))
            axes.set_ylim(-0.02, 1.02)
            axes.set_title(form.replace("_", " "))
        handles = [Line2D([], [], label=group.label, **line(group)) for group in study.core]
        canvas.legend(handles=handles, loc="outside lower left", ncols=4, frameon=False)

    caption = (
        "Share of needle-in-a-haystack tasks whose right answer is the likeliest candidate (grey line: chance), "
        "by context length, over all depths. Solid: full inference; dashed: sparse at the training budget."
    )
    return draw("needle", "Needles in a haystack", caption, (WIDTH, 3.3), paint)


def _accuracy(form: str, mode: str) -> Callable[[int, Evaluation], float]:
    def value(length: int, evaluation: Evaluation) -> float:
        key = (form, mode, length, "none")
        found = [x.likelihood for x in evaluation.suite.needle if (x.form, x.mode, x.length, x.scaling) == key]
        return math.fsum(found) / len(found) if found else math.nan

    return value


def union_figure(study: Study) -> Figure | None:
    """Blocks that n neighbouring tokens read together, first layer and the others."""
    shown = [g for g in study.core if any(e.suite.selection for e in g.evaluations)]
    if not shown:
        return None

    def paint(canvas: Canvas) -> None:
        for axes, first in zip(canvas.subplots(1, 2, sharey=True), (True, False), strict=True):
            ends: list[EndLabel] = []
            points: Points = []
            for group in shown:
                points = _union_points(group, first) or points
                _banded(axes, points, line(group))
                if points:
                    ends.append(EndLabel(points[-1][1].mean, group.label, colour(group)))
            axes.set_xscale("log", base=2)
            axes.set_xticks([2, 4, 8, 16, 32], ["2", "4", "8", "16", "32"])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("neighbouring tokens")
            axes.set_title("First layer" if first else "Mean of the other layers")
            if ends:
                label_ends(axes, points[-1][0], ends, height=2.4)

    caption = (
        "Size of the union of the blocks that neighbouring tokens select, in blocks, under sparse inference. One token "
        "selects as many blocks as its budget; a flat line means that neighbours agree, and that a kernel may load "
        "their blocks once."
    )
    return draw("union", "What neighbouring tokens share", caption, (WIDTH, 3.2), paint)


def _union_points(group: Group, first: bool) -> Points:
    by_count: dict[int, list[float]] = {}
    for evaluation in group.evaluations:
        for selection in evaluation.suite.selection:
            unions = [dict(x.union) for x in selection.layers if (x.layer == 0) == first]
            if selection.mode != "sparse" or not unions:
                continue
            for n in unions[0]:
                values = [union[n] for union in unions if n in union]
                by_count.setdefault(n, []).append(math.fsum(values) / len(values))
    return [(float(n), Spread(tuple(values))) for n, values in sorted(by_count.items())]


def variant_figure(study: Study) -> Figure | None:
    """Perplexity and AttnSparsity of every variant, relative to SSA of the same seed."""
    names = [name for role in ("core", "fraction", "ablation") for name in study.variants(role)]
    panels = {
        "Perplexity, full": measures.full_perplexity,
        "Perplexity, sparse": measures.native_perplexity,
        "AttnSparsity, full inference": measures.attention_sparsity,
    }
    if len(names) < 3 or not all(study.values("ssa", measure) for measure in panels.values()):
        return None

    def paint(canvas: Canvas) -> None:
        grid = canvas.subplots(1, len(panels), sharey=True)
        for axes, (title, measure) in zip(grid, panels.items(), strict=True):
            _variant_panel(axes, study, names, measure)
            axes.set_title(title)
            axes.set_yticks(range(len(names)), [_row_label(name) for name in names])
        grid[0].invert_yaxis()

    caption = (
        "Every model of the study: dots are seeds, diamonds their means, the grey line is SSA's mean; what lies far "
        "outside is written at the edge. Lower perplexity "
        "is better; higher AttnSparsity means that less is lost by reading selected blocks alone."
    )
    return draw("variants", "Methods, fractions, ablations", caption, (WIDTH, 1.5 + 0.23 * len(names)), paint)


def _variant_panel(axes: Axes, study: Study, names: Sequence[str], measure: Measure) -> None:
    """One row per variant. What lies far outside the middle half of the variants is written at the edge, not drawn."""
    own = study.values("ssa", measure)
    low, high = _usual_range([list(study.values(name, measure).values()) for name in names])
    axes.axvline(math.fsum(own.values()) / len(own), color="#C9CFD6", linewidth=1, zorder=1)
    note: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "color": MUTED, "fontsize": 7.5}
    for row, name in enumerate(names):
        values = list(study.values(name, measure).values())
        mean = math.fsum(values) / len(values) if values else math.nan
        tone = COLOURS.get(name, COLOURS["ssa"])
        if low <= mean <= high:
            axes.plot(values, [row] * len(values), "o", color=tone, markersize=4, alpha=0.55, mew=0)
            axes.plot(mean, row, "D", color=tone, markersize=5)
        elif values:
            right = mean > high
            axes.text(0.99 if right else 0.01, row, f"{mean:.3g}", ha="right" if right else "left", **note)
        elif all(piece.status == "diverged" for piece in study.of(name)):
            axes.text(0.5, row, "diverged", ha="center", **note)
    axes.set_xlim(low, high)
    axes.grid(axis="x")


def _usual_range(rows: Sequence[list[float]]) -> tuple[float, float]:
    """A range for all rows whose mean lies within four times the middle half of all means from their median."""
    known = sorted((row for row in rows if row), key=statistics.fmean)
    first, middle, last = (statistics.fmean(known[len(known) * n // 4]) for n in (1, 2, 3))
    values = [v for row in known for v in row if abs(statistics.fmean(row) - middle) <= 4 * (last - first)]
    margin = 0.06 * (max(values) - min(values)) or 1.0
    return min(values) - margin, max(values) + margin


def _row_label(name: str) -> str:
    if name in METHODS:
        return label(name)
    return f"alignment on {FRACTIONS[name]}" if name in FRACTIONS else name


# ---------------------------------------------------------------------- shared
def _evaluations(study: Study) -> list[Evaluation]:
    return [evaluation for group in study.core for evaluation in group.evaluations]


def _lengths(study: Study, of: Callable[[Evaluation], Sequence[int]]) -> list[int]:
    return sorted({length for evaluation in _evaluations(study) for length in of(evaluation)})


def _trained(study: Study) -> int | None:
    return next((evaluation.data.row_length for evaluation in _evaluations(study)), None)


def _points(group: Group, lengths: Sequence[int], value: Callable[[int, Evaluation], float]) -> Points:
    spreads = [(float(n), group.spread(lambda e, n=n: value(n, e))) for n in lengths]  # type: ignore[misc]
    return [(n, spread) for n, spread in spreads if spread.finite]


def _banded(axes: Axes, points: Points, style: dict[str, Any]) -> None:
    """A line through the means and the range of the seeds as a band."""
    if not points:
        return
    x = [place for place, _ in points]
    axes.plot(x, [spread.mean for _, spread in points], **style)
    low, high = [spread.low for _, spread in points], [spread.high for _, spread in points]
    if low != high:
        axes.fill_between(x, low, high, color=str(style["color"]), alpha=0.14, linewidth=0)


def _length_axis(axes: Axes, lengths: Sequence[int], trained: int | None) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("context in tokens")
    if trained and trained < lengths[-1]:
        axes.axvline(trained, color="#C9CFD6", linewidth=1, zorder=1)
