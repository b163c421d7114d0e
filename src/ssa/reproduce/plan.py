"""What is trained and evaluated: variants, seeds, and their order of importance."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ssa.errors import ConfigError
from ssa.evaluate import Plan, SuitePlan
from ssa.evaluate.needle import Form
from ssa.train.recipe import ModelSection, Recipe
from ssa.train.recipe_file import load_recipe

Role = Literal["core", "fraction", "ablation"]

#: Compared with every seed; NSA, the dearest, has the first seeds alone.
METHODS = ("ssa", "full", "moba")
#: Shipped recipes of `ablations/` that align on a fraction of the queries.
FRACTIONS = ("sampled-8", "sampled-4", "sampled-16")
#: Shipped recipes of `ablations/` that a claim of the paper is about.
CLAIMED = ("sparsity-only", "commitment-only", "layer-streams", "no-alignment")
#: The others, in order of importance.
ABLATIONS = (
    "alpha-160",
    "official-top-k",
    "p-0",
    "p-1",
    "alpha-1",
    "alpha-40",
    "raw",
    "p-025",
    "p-075",
    "alpha-5",
    "alpha-20",
    "l2",
    "blocks-8x16",
    "blocks-8x32",
    "blocks-16x32",
    "blocks-16x64",
)


@dataclass(frozen=True)
class Scale:
    """A size of the whole study.

    Attributes:
        name: folder of its recipes.
        seconds: expected duration of a piece, for the first estimate; then the measured one counts.
        seeds: of the core methods and the fractions; ablations have the first.
        more_seeds: further ones of SSA, FullAttn, MoBA and the first fraction, done later.
        fields: receptive fields of the perplexity runs, in tokens.
        rows: held-out rows for perplexity.
        statistics_rows: rows for the attention statistics.
        lengths: context lengths of the suite, which runs on the core methods.
        document_tokens: of each held-out document, for sliding windows.
        forms, samples, candidates: of the needle tasks.
        stride: of the sliding windows.
        rows_per_batch: of the perplexity runs.
    """

    name: str
    seconds: float
    seeds: tuple[int, ...]
    fields: tuple[int, ...]
    rows: int
    statistics_rows: int
    lengths: tuple[int, ...]
    document_tokens: int
    forms: tuple[Form, ...] = ("single", "multi_key")
    samples: int = 1
    candidates: int = 4
    stride: int = 256
    rows_per_batch: int = 8
    more_seeds: tuple[int, ...] = ()


_LENGTHS = (1024, 2048, 4096, 8192)
SCALES = {
    "tiny": Scale(
        "tiny", 6, (0, 1, 2), (16, 32, 64), 8, 2, (256, 512), 600, forms=("single",), stride=64, rows_per_batch=4
    ),
    "small": Scale("small", 40, (0, 1, 2), (64, 128, 256, 512, 1024, 2048), 96, 4, _LENGTHS, 10240, more_seeds=(3, 4)),
    "64m": Scale("64m", 170, (0, 1, 2), (64, 128, 256, 512, 1024, 2048), 192, 4, _LENGTHS, 16384, samples=2),
}


@dataclass(frozen=True)
class Piece:
    """One variant with one seed.

    Attributes:
        variant: what is varied, such as ``ssa`` or ``alpha-160``.
        seed: of weights, order of the rows and streams.
        role: what it is for.
        recipe: shipped recipe that it starts from.
        overrides: recipe keys that differ.
        changes: recipe keys that differ in all pieces of the study.
        brief: evaluate perplexity and statistics at the trained budget alone.
    """

    variant: str
    seed: int
    role: Role
    recipe: str
    overrides: dict[str, Any] = field(default_factory=dict, hash=False)
    changes: dict[str, Any] = field(default_factory=dict, hash=False)
    brief: bool = False

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.variant}-seed{self.seed}"

    def command(self, scale: Scale) -> str:
        """What trains and evaluates this variant, without seeds and places."""
        values = "".join(f" {key}={value}" for key, value in self.changes.items())
        brief, changed = " --brief" * self.brief, values and f" --set{values}"
        return f"ssa reproduce --scale {scale.name} --only {self.variant}{brief}{changed}"

    def load(self, data: str, device: str) -> Recipe:
        """The recipe that is trained."""
        run = {"name": self.name, "seed": self.seed, "data.path": data, "training.device": device}
        return load_recipe(self.recipe, {**self.changes, **self.overrides, **run})

    def plan(self, scale: Scale) -> Plan:
        """How it is evaluated: the whole suite for the core methods, statistics at one length for the others."""
        model = load_recipe(self.recipe, {**self.changes, **self.overrides}).model
        if self.brief:
            return Plan((model.num_blocks,), None, scale.rows, scale.statistics_rows, scale.rows_per_batch, "exact")
        budgets = sorted({max(1, tokens // model.block_size) for tokens in scale.fields} | {model.num_blocks})
        suite = SuitePlan(
            scale.lengths,
            stride=scale.stride,
            document_tokens=scale.document_tokens,
            needle_forms=scale.forms,
            needle_samples=scale.samples,
            needle_candidates=scale.candidates,
            statistics_rows=2,
        )
        if self.role != "core":
            trained = max(length for length in scale.lengths[:-1])
            suite = dataclasses.replace(suite, lengths=(trained,), sliding=False, needle_forms=(), word_documents=False)
        rows, batch, statistics = scale.rows, scale.rows_per_batch, scale.statistics_rows
        return Plan(budgets, None, rows, statistics, batch, "exact", suite, suite_budgets=(model.num_blocks,))


def pieces(
    scale: Scale,
    seeds: Sequence[int] | None = None,
    only: Sequence[str] = (),
    changes: dict[str, Any] | None = None,
    brief: bool = False,
) -> list[Piece]:
    """All pieces in order of importance: SSA, FullAttn and MoBA seed by seed; alignment on 1/8 of the queries; the
    ablations that a claim is about; NSA; further seeds; the other fractions; the other ablations.

    Args:
        seeds: instead of the scale's.
        only: variants to keep; none keeps all.
        changes, brief: see :class:`Piece`.

    Raises:
        ConfigError: an unknown variant, or changes that no recipe takes.
    """
    first, more = (tuple(seeds), ()) if seeds else (scale.seeds, scale.more_seeds)
    found = [dataclasses.replace(p, changes=changes or {}, brief=brief) for p in _pieces(scale, first, more)]
    known = list(dict.fromkeys(piece.variant for piece in found))
    if unknown := [name for name in only if name not in known]:
        raise ConfigError("only", unknown[0], f"one of {', '.join(known)}")
    chosen = [piece for piece in found if not only or piece.variant in only]
    for method in {piece.recipe: piece for piece in chosen}.values() if changes else ():
        method.load("checked", "cpu")
    return chosen


def _pieces(scale: Scale, seeds: tuple[int, ...], more: tuple[int, ...]) -> Iterator[Piece]:
    first, *others = FRACTIONS
    for seed in seeds:
        yield from (_core(scale, method, seed) for method in METHODS)
    yield from (_variant(scale, first, seed, "fraction") for seed in seeds)
    yield from (_variant(scale, name, seeds[0], "ablation") for name in CLAIMED)
    yield from (_core(scale, "nsa", seed) for seed in seeds)
    for seed in more:
        yield from (_core(scale, method, seed) for method in METHODS)
        yield _variant(scale, first, seed, "fraction")
    for name in others:
        yield from (_variant(scale, name, seed, "fraction") for seed in seeds)
    yield from (_variant(scale, name, seeds[0], "ablation") for name in ABLATIONS)


def _core(scale: Scale, method: str, seed: int) -> Piece:
    return Piece(method, seed, "core", f"{scale.name}/{method}")


def _variant(scale: Scale, name: str, seed: int, role: Role) -> Piece:
    return Piece(name, seed, role, f"{scale.name}/ssa", _overrides(name, scale))


def _overrides(ablation: str, scale: Scale) -> dict[str, Any]:
    """What an ablation's recipe changes in 64m/ssa, which the ablations extend."""
    base, changed = load_recipe("64m/ssa").model, load_recipe(f"ablations/{ablation}").model
    found = {
        f"model.{item.name}": getattr(changed, item.name)
        for item in dataclasses.fields(ModelSection)
        if getattr(changed, item.name) != getattr(base, item.name)
    }
    return found if scale.name != "tiny" else {k: v for k, v in found.items() if k != "model.num_blocks"}
