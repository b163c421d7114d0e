"""Draw the pictures of the documentation: ``python docs/pictures.py``. What they show is computed by ``ssa.ops``."""

from __future__ import annotations

from pathlib import Path

import torch

from ssa.documents import DocumentLayout
from ssa.ops import SparseSpec, select_blocks

IMAGES = Path(__file__).parent / "images"
INK, GREY, PALE, BLUE, ORANGE = "#222222", "#8a8a8a", "#e6e6e6", "#3b6fb6", "#d9822b"
LENGTHS, BLOCK, PICKED = (40, 24), 8, 3  # two documents in a row of 64 tokens; 3 blocks of 8 tokens per query


def svg(width: int, height: int, body: list[str]) -> str:
    """A picture with a white ground, so that it can be read on dark pages too."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
    head += 'font-family="sans-serif" font-size="13">'
    return "\n".join([head, rectangle(0, 0, width, height, "#ffffff"), *body, "</svg>", ""])


def rectangle(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> str:
    """One rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{stroke}"/>'


def text(x: float, y: float, words: str, anchor: str = "start", fill: str = INK) -> str:
    """One line of text; ``y`` is its base line."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}">{words}</text>'


def arrow(x: float, y: float, to_x: float, to_y: float, colour: str = INK, dashed: bool = False) -> str:
    """A straight arrow to the right, down or up."""
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    line = f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{colour}" stroke-width="1.5"{dash}/>'
    if to_x != x:
        tip = f"{to_x:g},{to_y:g} {to_x - 8:g},{to_y - 4:g} {to_x - 8:g},{to_y + 4:g}"
    else:
        back = to_y - 8 if to_y > y else to_y + 8
        tip = f"{to_x:g},{to_y:g} {to_x - 4:g},{back:g} {to_x + 4:g},{back:g}"
    return f'{line}<polygon points="{tip}" fill="{colour}"/>'


def box(x: float, y: float, width: float, words: str, colour: str = INK) -> str:
    """A framed word, 34 high, centred at ``y``."""
    return rectangle(x, y - 17, width, 34, "#ffffff", colour) + text(x + width / 2, y + 4, words, "middle", colour)


def directions() -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys ``[1, 64, 1, 2]`` that turn at different speeds, so that picks move about. No random numbers."""
    time = torch.arange(sum(LENGTHS), dtype=torch.float64)
    q, k = 0.61 * time + torch.sin(time / 5), 0.23 * time
    return tuple(1.5 * torch.stack([a.cos(), a.sin()], -1).view(1, -1, 1, 2) for a in (q, k))  # type: ignore[return-value]


def blocks() -> str:
    """Which keys each query reads: two documents in one row, blocks counted from each document's start."""
    q, k = directions()
    layout = DocumentLayout.from_lengths([list(LENGTHS)])
    indices = select_blocks(q, k, SparseSpec(BLOCK, PICKED), layout)[0, :, 0].tolist()
    cell, left, top, body = 6, 70, 40, []
    start = 0
    for length in LENGTHS:
        for query in range(length):
            y = top + (start + query) * cell
            body.append(rectangle(left + start * cell, y, (query + 1) * cell, cell, PALE))
            for block in sorted(n for n in indices[start + query] if n >= 0):
                first = block * BLOCK
                seen = min(first + BLOCK, query + 1) - first
                own = block == query // BLOCK
                colour = ORANGE if own else BLUE
                body.append(rectangle(left + (start + first) * cell, y, seen * cell, cell, colour))
        start += length
    side = start * cell
    body += [
        text(left, 26, "keys"),
        text(60, top + 12, "queries", "end"),
        text(60, top + 45 * cell, "2nd document", "end"),
    ]
    legend = [(PALE, "full attention"), (ORANGE, "own block, always"), (BLUE, f"best {PICKED - 1} earlier blocks")]
    for i, (colour, words) in enumerate(legend):
        body += [rectangle(left + side + 20, top + 24 * i, 14, 14, colour)]
        body += [text(left + side + 42, top + 12 + 24 * i, words)]
    return svg(left + side + 220, top + side + 16, body)


def selection() -> str:
    """How one query picks: scores of the means of earlier blocks, the best ones are read."""
    q, k = directions()
    query, count = 39, LENGTHS[0] // BLOCK
    means = k[0, : LENGTHS[0], 0].view(count, BLOCK, 2).mean(1)
    scores = (means @ q[0, query, 0] / 2**0.5).softmax(0).tolist()
    picked = select_blocks(q, k, SparseSpec(BLOCK, PICKED), DocumentLayout.from_lengths([list(LENGTHS)]))[
        0, query, 0
    ].tolist()
    body, width, base = [text(20, 26, f"query {query} scores the mean key of each block of its document")], 90, 170
    for n, score in enumerate(scores):
        own, x = n == count - 1, 20 + n * (width + 10)
        colour = ORANGE if own else BLUE if n in picked else PALE
        height = 100 * score / max(scores)
        body += [rectangle(x, base - height, width, height, colour), rectangle(x, base, width, 22, "#ffffff", GREY)]
        body += [text(x + width / 2, base + 16, f"block {n}", "middle")]
        verdict = "own: read" if own else "read" if n in picked else "left out"
        body += [text(x + width / 2, base + 40, verdict, "middle", GREY)]
    return svg(30 + count * (width + 10), base + 56, body)


def streams() -> str:
    """One attention layer in training: both streams on the same q, k, v; alignment pulls from both sides."""
    body = [box(20, 110, 70, "x"), arrow(90, 110, 120, 110), box(120, 110, 80, "q, k, v")]
    body += [arrow(200, 110, 240, 60), box(240, 60, 130, "full attention", BLUE), arrow(370, 60, 420, 60, BLUE)]
    body += [arrow(200, 110, 240, 160), box(240, 160, 130, "sparse attention", ORANGE)]
    body += [arrow(370, 160, 420, 160, ORANGE), box(420, 60, 70, "h full", BLUE), box(420, 160, 80, "h sparse", ORANGE)]
    body += [arrow(440, 77, 440, 143, BLUE, True), arrow(470, 143, 470, 77, ORANGE, True)]
    body += [
        text(482, 106, "alignment: each pulled to the other,"),
        text(482, 124, "which stands still (stop-gradient)"),
    ]
    body += [arrow(490, 60, 560, 60), text(568, 64, "drawn stream: gate, output projection, next layer")]
    body += [
        text(
            20, 214, "Every step draws which stream goes on (here full); the other is computed for the alignment only."
        )
    ]
    return svg(880, 234, body)


PICTURES = {"blocks.svg": blocks, "selection.svg": selection, "streams.svg": streams}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (IMAGES / name).write_text(draw())
