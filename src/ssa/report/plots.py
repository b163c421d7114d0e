"""The figures of the report. They read groups of runs and nothing else; what was not measured is not drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from ssa.report import formats
from ssa.report.curves import Curve, training_curve
from ssa.report.measures import perplexity_at
from ssa.report.results import AttentionStatistics, SelectionMap
from ssa.report.runs import Group, Spread
from ssa.report.style import (
    MUTED,
    WIDTH,
    EndLabel,
    Figure,
    colour,
    crowded,
    draw,
    label_ends,
    legend_below,
    line,
    short,
)
from ssa.report.table import budgets

PICKED = LinearSegmentedColormap.from_list("picked", ["#F6FAFA", "#B9DCDC", "#5FA9AF", "#1F7480", "#08303C"])
FUTURE = "#ECEEF1"
TITLE_LIMIT = 24  # characters over a map
LOG_FROM = 4.0  # a ratio of largest to smallest perplexity above which a linear axis hides the small ones


def all_figures(groups: Sequence[Group]) -> list[Figure]:
    """Every figure for which there is something to draw, in the order of the page."""
    figures = [
        budget_figure(groups),
        training_figure(groups),
        layer_figure(groups),
        selection_figure(groups),
    ]
    return [figure for figure in figures if figure]


def budget_figure(groups: Sequence[Group]) -> Figure | None:
    """Perplexity against the number of tokens a query may read; full attention as the right-most point."""
    found = budgets(groups)
    shown = [group for group in groups if any(group.spread(perplexity_at(budget)).finite for budget in found)]
    if not shown:
        return None
    full_x = 2.0 * found[-1].receptive_field

    def paint(canvas: Canvas) -> None:
        axes = canvas.add_subplot()
        axes.set_xscale("log", base=2)
        ends = [_budget_line(axes, group, full_x) for group in shown]
        _budget_axes(axes, shown, full_x)
        for place in {x for x, _ in ends}:
            label_ends(axes, place, [label for x, label in ends if x == place], height=3.2)

    caption = (
        "Each line is one set of weights, run with more and more blocks; the right-most point is full attention. "
        "Look at how far a line climbs to the left of its full-attention point: that climb is the attention gap. "
        "A good model for sparse inference is flat and low."
    )
    return draw("budget", "Perplexity against budget", caption + _band_note(shown), (WIDTH, 4.1), paint)


def _budget_line(axes: Axes, group: Group, full_x: float) -> tuple[float, EndLabel]:
    """Draw one group: a line per block size (the trained one filled), then dashed to full attention.

    Returns where the line ends, and its label.
    """
    style = line(group)
    trained = group.training_budget.block_size if group.training_budget else None
    end = (math.nan, math.nan)
    # The trained block size comes last: it is the line that full attention continues.
    for size in sorted({budget.block_size for budget in budgets([group])}, key=lambda size: (size == trained, size)):
        points = [budget for budget in budgets([group]) if budget.block_size == size]
        spreads = [(budget.receptive_field, group.spread(perplexity_at(budget))) for budget in points]
        drawn = [(float(x), spread) for x, spread in spreads if spread.finite]
        if drawn:
            _banded(
                axes,
                drawn,
                style if size == trained else {**style, "markerfacecolor": "white", "markeredgecolor": style["color"]},
            )
            end = (drawn[-1][0], drawn[-1][1].mean)
    full = group.spread(perplexity_at(None))
    if full.finite:
        dashes: dict[str, Any] = {"linestyle": (0, (2, 2)), "linewidth": 1.2, "zorder": 2}
        axes.plot([end[0], full_x], [end[1], full.mean], color=style["color"], **dashes)
        _banded(axes, [(full_x, full)], {**style, "markersize": 7})
        end = (full_x, full.mean)
    return end[0], EndLabel(end[1], group.label, style["color"])


def _budget_axes(axes: Axes, groups: Sequence[Group], full_x: float) -> None:
    fields = sorted({budget.receptive_field for budget in budgets(groups)})
    axes.set_xticks([*fields, full_x], [*(f"{field:,}" for field in fields), "full"])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(fields[0] / 2**0.25, full_x * 2**0.08)
    axes.set_xlabel("tokens a query may read (receptive field)")
    axes.set_title("Perplexity")
    values = [y for artist in axes.lines for y in np.asarray(artist.get_ydata(), dtype=float)]
    if max(values) > LOG_FROM * min(values):
        axes.set_yscale("log")
    trained = {group.training_budget for group in groups}
    if len(trained) == 1 and (budget := trained.pop()) and budget.receptive_field in fields:
        axes.axvline(budget.receptive_field, color="#C9CFD6", linewidth=1, zorder=1)
        note: dict[str, Any] = {
            "xytext": (5, -3),
            "textcoords": "offset points",
            "va": "top",
            "fontsize": 8,
            "color": MUTED,
        }
        axes.annotate("budget of training", (budget.receptive_field, 1), xycoords=axes.get_xaxis_transform(), **note)


def _banded(axes: Axes, points: Sequence[tuple[float, Spread]], style: dict[str, Any]) -> None:
    """A line through the means, and the range of the seeds as a band (a bar where there is one point)."""
    x = [place for place, _ in points]
    axes.plot(x, [spread.mean for _, spread in points], **style)
    low, high = [spread.low for _, spread in points], [spread.high for _, spread in points]
    if low == high:
        return
    if len(points) == 1:
        axes.vlines(x, low, high, color=str(style["color"]), linewidth=1.2)
    else:
        axes.fill_between(x, low, high, color=str(style["color"]), alpha=0.16, linewidth=0)


def _band_note(groups: Sequence[Group]) -> str:
    several = any(len(group.evaluations) > 1 or len(group.metrics) > 1 for group in groups)
    return " Lines are means over seeds, bands span the seeds." if several else ""


def training_figure(groups: Sequence[Group]) -> Figure | None:
    """Cross-entropy against training tokens by stream; beside it alignment loss and AttnSparsity, where known."""
    losses = [
        (group, stream, curve)
        for group in groups
        for stream in ("full", "sparse")
        if (curve := training_curve(group.metrics, "cross_entropy", stream))
    ]
    if not losses:
        return None
    small = {
        title: curves
        for title, field in (("Alignment loss", "alignment"), ("AttnSparsity in training", "attention_sparsity"))
        if (curves := [(group, curve) for group in groups if (curve := training_curve(group.metrics, field))])
    }

    def paint(canvas: Canvas) -> None:
        grid = canvas.add_gridspec(len(small) or 1, 2 if small else 1, width_ratios=(2.1, 1) if small else None)
        _loss_panel(canvas.add_subplot(grid[:, 0]), losses)
        for row, (title, curves) in enumerate(small.items()):
            _small_panel(canvas.add_subplot(grid[row, 1]), title, curves, last=row + 1 == len(small))
        drawn = [group for curves in small.values() for group, _ in curves]
        if crowded(drawn):
            legend_below(canvas, list(dict.fromkeys(drawn)))

    caption = (
        "Training cross-entropy by the stream of the step: solid for full attention, dashed for sparse. Faint dots are "
        "single steps of one seed. Where a method trains both streams, look at how close its two lines are."
    )
    if small:
        caption += " On the right, what ties the streams together."
    return draw("training", "Training", caption + _band_note(groups), (WIDTH, 4.3), paint)


def _loss_panel(axes: Axes, losses: Sequence[tuple[Group, str, Curve]]) -> None:
    ends = []
    for group, stream, curve in losses:
        dashed = stream == "sparse"
        axes.plot(curve.raw_tokens, curve.raw, ".", color=colour(group), alpha=0.16, markersize=2.5, zorder=1, mew=0)
        style = {"linestyle": (0, (3.2, 1.4)) if dashed else "-", "linewidth": 1.7}
        _curve(axes, group, curve, style)
        ends.append(EndLabel(float(curve.mean[-1]), f"{short(group.label)}, {stream}", colour(group)))
    # The first steps fall from log(vocabulary); showing them would press everything else together.
    settled = [curve.mean[len(curve.mean) // 8 :] for _, _, curve in losses]
    low, high = min(part.min() for part in settled), max(part.max() for part in settled)
    axes.set_ylim(low - 0.08 * (high - low) - 1e-9, high + 0.04 * (high - low) + 1e-9)
    axes.set_title("Cross-entropy in nats a token")
    _token_axis(axes)
    label_ends(axes, max(float(curve.tokens[-1]) for _, _, curve in losses), ends, height=3.4)


def _small_panel(axes: Axes, title: str, curves: Sequence[tuple[Group, Curve]], last: bool) -> None:
    for group, curve in curves:
        _curve(axes, group, curve, {"linestyle": line(group)["linestyle"], "linewidth": 1.5})
    low = min(float(curve.mean.min()) for _, curve in curves)
    axes.set_ylim(bottom=0 if low >= 0 else None)
    axes.set_title(title)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    _token_axis(axes, label=last)
    if not crowded([group for group, _ in curves]):
        ends = [EndLabel(float(curve.mean[-1]), group.label, colour(group)) for group, curve in curves]
        label_ends(axes, max(float(curve.tokens[-1]) for _, curve in curves), ends, height=1.4)


def _curve(axes: Axes, group: Group, curve: Curve, style: dict[str, Any]) -> None:
    axes.plot(curve.tokens, curve.mean, color=colour(group), zorder=line(group)["zorder"], **style)
    if not np.array_equal(curve.low, curve.high):
        axes.fill_between(curve.tokens, curve.low, curve.high, color=colour(group), alpha=0.16, linewidth=0)


def _token_axis(axes: Axes, label: bool = True) -> None:
    axes.set_xlim(left=0)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formats.large(round(max(value, 0)))))
    if label:
        axes.set_xlabel("training tokens")


Field = Callable[[AttentionStatistics], float]


LAYER_PANELS: dict[str, Field] = {
    "AttnSparsity": lambda layer: layer.attention_sparsity,
    "Entropy in bits": lambda layer: layer.entropy_bits,
    "Error ÷ bound (Theorem 1)": lambda layer: layer.bound_tightness,
}


def layer_figure(groups: Sequence[Group]) -> Figure | None:
    """AttnSparsity, entropy and tightness of Theorem 1 per layer, under full inference."""
    found = {
        title: [(group, points) for group in groups if (points := _layer_series(group, field))]
        for title, field in LAYER_PANELS.items()
    }
    panels = {title: series for title, series in found.items() if series}
    if not panels:
        return None

    def paint(canvas: Canvas) -> None:
        for axes, (title, series) in zip(
            canvas.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            _layer_panel(axes, title, series)
        drawn = list(dict.fromkeys(group for series in panels.values() for group, _ in series))
        if crowded(drawn):
            legend_below(canvas, drawn)

    caption = (
        "Under full inference. AttnSparsity is the share of attention on the blocks that a sparse query would keep: "
        "the higher, the less is lost by dropping the rest. Low entropy means that attention gathers on few tokens. "
        "Error ÷ bound is the distance between full and sparse output as a fraction of what Theorem 1 allows."
    )
    title = "Where attention gathers, layer by layer"
    return draw("layers", title, caption + _band_note(groups), (WIDTH, 3.2), paint)


def _layer_panel(axes: Axes, title: str, series: Sequence[tuple[Group, list[tuple[float, Spread]]]]) -> None:
    for group, points in series:
        _banded(axes, points, {**line(group), "linewidth": 1.5, "markersize": 4.5})
    axes.set_title(title)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if not crowded([group for group, _ in series]):
        ends = [EndLabel(points[-1][1].mean, group.label, colour(group)) for group, points in series]
        label_ends(axes, max(points[-1][0] for _, points in series), ends, height=2.3)


def _layer_series(group: Group, field: Field) -> list[tuple[float, Spread]]:
    by_layer: dict[int, list[float]] = {}
    for evaluation in group.evaluations:
        run = evaluation.attention_in("full")
        for index, layer in run.layers if run else ():
            by_layer.setdefault(index, []).append(field(layer))
    spreads = ((float(index), Spread(tuple(values))) for index, values in sorted(by_layer.items()))
    return [(index, spread) for index, spread in spreads if spread.finite]


def selection_figure(groups: Sequence[Group]) -> Figure | None:
    """Which blocks the queries of a block select: one panel per group, from its first seed with a map."""
    maps = [
        (group, found)
        for group in groups
        if (found := next((e.selection_map for e in group.evaluations if e.selection_map), None)) and found.picked_share
    ]
    if not maps:
        return None
    columns = min(len(maps), 4)
    rows = math.ceil(len(maps) / columns)
    size = min(WIDTH, 3.0 * columns + 0.7)

    def paint(canvas: Canvas) -> None:
        grid = canvas.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(maps) :]:
            axes.set_visible(False)
        for axes, (group, found) in zip(grid.flat, maps, strict=False):
            image = axes.imshow(visible_shares(found), cmap=PICKED.with_extremes(bad=FUTURE), vmin=0, vmax=1)
            axes.set_title(short(group.label, TITLE_LIMIT), color=colour(group))
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(5, integer=True))
            axes.set_xlabel("block that is read")
        for row in grid:
            row[0].set_ylabel("block of the query")
        bar = canvas.colorbar(image, ax=grid, shrink=0.7, aspect=22, pad=0.015)
        bar.set_label("share of queries")
        bar.outline.set_visible(False)

    where = {(found.layer, found.kv_head, found.block_size) for _, found in maps}
    caption = _selection_caption(where)
    height = rows * (size - 1.2) / columns + 0.6
    return draw("selection", "Which blocks are picked", caption, (size, height), paint)


def visible_shares(found: SelectionMap) -> NDArray[np.float64]:
    """The map with the future (blocks after the query's own) as NaN, so that it is not taken for "never picked"."""
    shares = np.array(found.picked_share, dtype=np.float64)
    shares[np.triu_indices(len(shares), 1)] = np.nan
    return shares


def _selection_caption(where: set[tuple[int, int, int]]) -> str:
    place = "one layer and key-value head of each model"
    if len(where) == 1:
        layer, head, size = next(iter(where))
        place = f"layer {layer}, key-value head {head}, blocks of {size} tokens"
    return (
        f"For {place}: the share of the queries of one block (row) that pick another block (column). The diagonal is "
        "the query's own block, always read; what lies above it is the future (grey). A dark first column is an "
        "attention sink, dark bands along the diagonal are local reading, scattered dark cells are content."
    )
