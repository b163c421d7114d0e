"""Tables of a study beyond the paper's claims: what exact top-k changes, what subsampling costs, ablations, time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ssa.report import formats, measures
from ssa.report.claims import label, relative_percent, shown, signed
from ssa.report.intervals import interval, paired
from ssa.report.own_claims import FRACTIONS
from ssa.report.study import Measure, Study


@dataclass(frozen=True)
class Table:
    """A titled table of texts."""

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Column(NamedTuple):
    """A measure as a column."""

    title: str
    measure: Measure
    show: formats.Format


COLUMNS = (
    Column("PPL, full", measures.full_perplexity, formats.perplexity),
    Column("PPL, sparse", measures.native_perplexity, formats.perplexity),
    Column("gap", measures.gap_percent, formats.signed_percent),
    Column("AttnSparsity", measures.attention_sparsity, formats.share),
    Column("entropy", measures.entropy_bits, formats.bits),
    Column("KL", measures.kl_nats, formats.nats),
)


def all_tables(study: Study) -> list[Table]:
    """Every table for which there is something to show."""
    found = [fraction_table(study), rule_table(study), ablation_table(study)]
    return [table for table in found if table is not None]


def core_table(study: Study) -> Table | None:
    """The methods with intervals, and what a piece took."""
    rows = []
    for name in study.variants("core"):
        cells = [shown(interval([*study.values(name, c.measure).values()]), c.show) for c in COLUMNS]
        rows.append((label(name), *cells, _seconds(study, name)))
    caption = "Means with 95 % t intervals over seeds. Time is the wall time of training one model."
    return _table("The four methods", caption, (*(c.title for c in COLUMNS), "training"), rows, "method")


def fraction_table(study: Study) -> Table | None:
    """SSA aligned on a fraction of the queries, against exact SSA, paired by seed."""
    present = [name for name in FRACTIONS if study.of(name)]
    if len(present) < 2:
        return None
    rows = []
    for name in present:
        cells = [shown(interval([*study.values(name, c.measure).values()]), c.show) for c in COLUMNS[:2]]
        for column in COLUMNS[:2]:
            difference = relative_percent(study, name, "ssa", column.measure)
            cells.append("" if name == "ssa" else shown(difference, formats.signed_percent))
        sparsity = COLUMNS[3]
        difference = paired(study.values(name, sparsity.measure), study.values("ssa", sparsity.measure))
        cells.append(shown(interval([*study.values(name, sparsity.measure).values()]), sparsity.show))
        cells.append("" if name == "ssa" else shown(difference, signed(sparsity.show)))
        rows.append((FRACTIONS[name], *cells, _seconds(study, name)))
    caption = (
        "In sparse steps the full counterpart is computed for a random fraction of the queries. Differences are to "
        "exact SSA of the same seed, with 95 % t intervals: subsampling costs something if an interval lies above zero."
    )
    perplexities = ("PPL, full", "PPL, sparse", "full: difference", "sparse: difference")
    columns = (*perplexities, "AttnSparsity", "its difference", "training")
    return _table("What aligning on a fraction of the queries costs", caption, columns, rows, "fraction")


def rule_table(study: Study) -> Table | None:
    """The same weights selecting by the published merge instead of the exact top-k."""
    rows = []
    names = [*study.variants("core"), *(n for n in ("official-top-k",) if study.of(n))]
    for name in names:
        change = interval([*study.values(name, measures.rule_percent).values()])
        if change.count:
            rows.append((_trained(name), shown(change, formats.signed_percent)))
    caption = (
        "Perplexity of sparse inference at the training budget when the same weights select by the published code's "
        "streaming merge, relative to the exact top-k. Above zero, the exact top-k is better."
    )
    return _table("What the exact top-k changes", caption, ("official top-k against exact",), rows, "model")


def _trained(name: str) -> str:
    return "SSA trained with the official top-k" if name == "official-top-k" else label(name)


def ablation_table(study: Study) -> Table | None:
    """Ablations beside SSA of the same seed."""
    names = study.variants("ablation")
    if not names:
        return None
    seeds = sorted({piece.seed for name in names for piece in study.of(name)})
    rows = []
    for name in ("ssa", *names):
        pieces = [piece for piece in study.of(name) if piece.seed in seeds]
        changed = ", ".join(
            f"{key.removeprefix('model.')} {value}" for key, value in (pieces[0].overrides if pieces else ())
        )
        if pieces and all(piece.status == "diverged" for piece in pieces):
            rows.append((label(name), changed, "diverged", *[""] * (len(COLUMNS) - 1)))
            continue
        values = [[v for s, v in study.values(name, c.measure).items() if s in seeds] for c in COLUMNS]
        cells = [c.show(math.fsum(v) / len(v)) if v else formats.MISSING for c, v in zip(COLUMNS, values, strict=True)]
        rows.append((label(name), changed, *cells))
    which = f"Seed{'s' if len(seeds) > 1 else ''} {formats.listed(map(str, seeds))}"
    caption = (
        f"{which} alone, so without intervals: compare a difference with how far the seeds of SSA lie apart in the "
        "first table. The first line is SSA itself."
    )
    return _table("Ablations", caption, ("changed", *(c.title for c in COLUMNS)), rows, "variant")


def _seconds(study: Study, name: str) -> str:
    """Median training time: the first piece of a process also compiles its kernels."""
    found = sorted(piece.train_seconds for piece in study.of(name) if piece.run)
    return f"{found[len(found) // 2]:.1f} s" if found else formats.MISSING


def _table(
    title: str, caption: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]], first: str
) -> Table | None:
    return Table(title, caption, (first, *columns), tuple(rows)) if rows else None
