"""How every figure looks: one colour and marker per method, labels beside the lines, and the way to PNG.

The palette keeps its colours apart under protanopia, deuteranopia and tritanopia, and legible on white. Variants
of a method share marker and hue and differ in lightness and line.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.transforms import ScaledTranslation, blended_transform_factory

from ssa.report.runs import Group

COLOURS = {"full": "#2F6DB5", "moba": "#C77D0A", "nsa": "#8A8F99", "ssa": "#A01048"}
MARKERS = {"full": "o", "moba": "s", "nsa": "^", "ssa": "D"}
OTHER_COLOUR, OTHER_MARKER = "#4A4A4A", "v"
VARIANT_LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1, 1.2)))

INK, MUTED, FAINT = "#1C2430", "#626B77", "#E6E9ED"
WIDTH = 9.2  # inches: the width of the page's text at 96 pixels an inch
SCALE = 2  # image pixels per page pixel, for fine screens and for print
LABEL_LIMIT = 28  # characters; a longer label would squeeze the axes
PANEL_LIMIT = 12  # the same where several panels share the width

_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so every machine draws the same figure
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a name with dollar signs is a name
    "axes.labelcolor": MUTED,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": "#B4BBC4",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Figure:
    """A drawn figure: file name, title, what to look for, the image and its size on the page in pixels."""

    name: str
    title: str
    caption: str
    png: bytes
    width: int
    height: int


@dataclass(frozen=True)
class EndLabel:
    """A label to stand to the right of a line's last point."""

    y: float
    text: str
    colour: str


def draw(name: str, title: str, caption: str, size: tuple[float, float], paint: Callable[[Canvas], None]) -> Figure:
    """Paint a canvas of ``size`` inches in the house style. No global figure or backend is touched."""
    with matplotlib.rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.04, hspace=0.06)
        canvas = Canvas(figsize=size, layout=layout, facecolor="white")
        paint(canvas)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", dpi=96 * SCALE, metadata={"Software": None})
    width, height = (round(96 * inches) for inches in size)
    return Figure(name, title, caption, buffer.getvalue(), width, height)


def colour(group: Group) -> str:
    """The method's colour; lighter for the method's further variants."""
    base = np.array(to_rgb(COLOURS.get(group.method, OTHER_COLOUR)))
    red, green, blue = base + (1 - base) * min(0.28 * group.variant, 0.56)
    return to_hex((red, green, blue))


def line(group: Group) -> dict[str, Any]:
    """Colour, marker and line style of a group, for ``Axes.plot``."""
    return {
        "color": colour(group),
        "marker": MARKERS.get(group.method, OTHER_MARKER),
        "linestyle": VARIANT_LINES[group.variant % len(VARIANT_LINES)],
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
        # The paper's own method is drawn over the others where lines cross.
        "zorder": 4 if group.method == "ssa" and not group.variant else 3,
    }


def short(text: str, limit: int = LABEL_LIMIT) -> str:
    """A label cut to fit beside the axes."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def crowded(groups: Sequence[Group]) -> bool:
    """Whether labels beside the lines would squeeze several panels, so that a legend below serves better."""
    return any(len(group.label) > PANEL_LIMIT for group in groups)


def legend_below(canvas: Canvas, groups: Sequence[Group]) -> None:
    """One legend for all panels."""
    handles = [Line2D([], [], label=short(group.label), **line(group)) for group in groups]
    canvas.legend(handles=handles, loc="outside lower left", ncols=3, frameon=False, handlelength=3)


def label_ends(axes: Axes, x: float, labels: Sequence[EndLabel], height: float) -> None:
    """Write labels to the right of ``x``, each at its line's height, moved apart where they would overlap.

    ``height`` is the height of the axes in inches. Call it when everything is drawn and the limits are final.
    """
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    ordered = sorted(labels, key=lambda label: label.y)
    places = _spread([float(to_axes.transform((x, label.y))[1]) for label in ordered], gap=12.5 / (72 * height))
    offset = ScaledTranslation(8 / 72, 0, axes.figure.dpi_scale_trans)
    transform = blended_transform_factory(axes.transData + offset, axes.transAxes)
    for label, place in zip(ordered, places, strict=True):
        look: dict[str, Any] = {"color": label.colour, "fontweight": "bold", "fontsize": 8.5, "zorder": 6}
        text = axes.text(x, place, short(label.text), transform=transform, va="center", **look)
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # legible where it crosses a line


def _spread(places: list[float], gap: float) -> list[float]:
    """Move ascending places apart until neighbours are ``gap`` away, each cluster staying about its middle."""
    clusters = [[place] for place in places]
    centres = list(places)
    index = 0
    while index + 1 < len(clusters):
        reach = gap * (len(clusters[index]) + len(clusters[index + 1])) / 2
        if centres[index + 1] - centres[index] >= reach:
            index += 1
            continue
        clusters[index] += clusters.pop(index + 1)
        centres.pop(index + 1)
        centres[index] = sum(clusters[index]) / len(clusters[index])
        index = max(index - 1, 0)
    return [
        centre + gap * (place - (len(cluster) - 1) / 2)
        for centre, cluster in zip(centres, clusters, strict=True)
        for place in range(len(cluster))
    ]
