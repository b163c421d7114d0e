"""Typed reading of the ``suite`` object of an evaluation (docs/architecture.md)."""

from __future__ import annotations

from dataclasses import dataclass

from ssa.report.fields import Fields

MODES = ("full", "sparse")


@dataclass(frozen=True)
class Sliding:
    """Sliding-window perplexity at one context length, beyond the trained one with a RoPE scaling."""

    mode: str
    length: int
    scaling: str
    perplexity: float


@dataclass(frozen=True)
class Needle:
    """Share of needle tasks whose right answer is the likeliest among the candidates, and the share by ``chance``."""

    mode: str
    form: str
    length: int
    scaling: str
    likelihood: float
    chance: float


@dataclass(frozen=True)
class LengthStatistics:
    """Mean attention statistics at one context length."""

    mode: str
    length: int
    scaling: str
    attention_sparsity: float
    entropy_bits: float


@dataclass(frozen=True)
class SelectionLayer:
    """Selection of one layer: mean union of neighbouring tokens' blocks by their number, and mass on sinks."""

    layer: int
    union: tuple[tuple[int, float], ...]
    first_token_mass: float


@dataclass(frozen=True)
class Selection:
    """Selection statistics under one inference mode."""

    mode: str
    num_blocks: int
    layers: tuple[SelectionLayer, ...]


@dataclass(frozen=True)
class Suite:
    """What the evaluation suite measured; every part may be empty.

    Attributes:
        rules: selection rule -> perplexity at the training budget, on the same text.
        words: inference mode -> word perplexity at the training budget.
    """

    sliding: tuple[Sliding, ...] = ()
    needle: tuple[Needle, ...] = ()
    attention: tuple[LengthStatistics, ...] = ()
    selection: tuple[Selection, ...] = ()
    rules: tuple[tuple[str, float], ...] = ()
    words: tuple[tuple[str, float], ...] = ()


def read_suite(fields: Fields) -> Suite:
    """Check and read the object."""
    return Suite(
        sliding=tuple(
            Sliding(x.choice("mode", MODES), x.count("length"), x.text("scaling"), x.number("perplexity"))
            for x in fields.children("sliding")
        ),
        needle=tuple(_needle(x) for x in fields.children("needle")),
        attention=tuple(
            LengthStatistics(
                x.choice("mode", MODES),
                x.count("length"),
                x.text("scaling"),
                x.number("attention_sparsity"),
                x.number("entropy_bits"),
            )
            for x in fields.children("attention")
        ),
        selection=tuple(_selection(x) for x in fields.children("selection")),
        rules=tuple((x.text("rule"), x.number("perplexity")) for x in fields.children("rules")),
        words=tuple((x.choice("mode", MODES), x.number("word_perplexity")) for x in fields.children("words")),
    )


def _needle(x: Fields) -> Needle:
    return Needle(
        x.choice("mode", MODES),
        x.text("form"),
        x.count("length"),
        x.text("scaling"),
        x.number("likelihood"),
        x.number("chance"),
    )


def _selection(x: Fields) -> Selection:
    layers = []
    for item in x.children("layers"):
        union = tuple((int(n), value) for n, value in item.numbers("union").items() if n.isdigit())
        layers.append(SelectionLayer(item.count("layer"), union, item.number("first_token_mass")))
    return Selection(x.choice("mode", MODES), x.count("num_blocks"), tuple(layers))
