"""The headline table: as plain data, and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich import box
from rich.table import Table
from rich.text import Text

from ssa.report import formats, measures
from ssa.report.measures import Measure, perplexity_at
from ssa.report.results import Budget, Evaluation
from ssa.report.runs import Group, Run, group_runs


@dataclass(frozen=True)
class Line:
    """One measure, a line of the table. ``section`` groups neighbours; ``detail`` says more where there is room."""

    section: str
    label: str
    detail: str
    measure: Measure
    show: formats.Format
    lower_is_better: bool = False


@dataclass(frozen=True)
class Cell:
    """A mean over the seeds as text, what to know about the seeds, and whether it is the best of its line."""

    text: str
    detail: str
    best: bool


@dataclass(frozen=True)
class Headline:
    """The table: one column per group that was evaluated, lines by section."""

    groups: tuple[Group, ...]
    sections: tuple[tuple[tuple[Line, tuple[Cell, ...]], ...], ...]


def headline(groups: Iterable[Group]) -> Headline:
    """The headline table. A line that nobody measured is left out."""
    evaluated = tuple(group for group in groups if group.evaluations)
    lines = [(line, cells) for line in _lines(evaluated) if (cells := _cells(evaluated, line))]
    sections = groupby(lines, key=lambda item: item[0].section)
    return Headline(evaluated, tuple(tuple(items) for _, items in sections))


def _cells(groups: Sequence[Group], line: Line) -> tuple[Cell, ...]:
    spreads = [group.spread(line.measure) for group in groups]
    if all(math.isnan(value) for spread in spreads for value in spread.values):
        return ()
    means = [spread.mean for spread in spreads if spread.finite]
    lowest = min(means) if line.lower_is_better and len(means) > 1 else None
    return tuple(Cell(*formats.spread_text(spread, line.show), best=spread.mean == lowest) for spread in spreads)


def budgets(groups: Iterable[Group]) -> list[Budget]:
    """Every sparse budget that any evaluation ran at, smallest first."""
    evaluations = (evaluation for group in groups for evaluation in group.evaluations)
    return sorted({run.budget for evaluation in evaluations for run in evaluation.runs if run.budget})


def _lines(groups: Sequence[Group]) -> list[Line]:
    both, attention = "full against sparse", "attention"
    inner, percent = measures.attention_sparsity, formats.signed_percent
    return [
        *_perplexity_lines(groups),
        Line(both, "Attention gap", "perplexity, sparse over full", measures.gap_percent, percent),
        Line(both, "KL(full ‖ sparse)", "nats a token", measures.kl_nats, formats.nats, True),
        Line(attention, "AttnSparsity, full inference", "", inner, formats.share),
        Line(attention, "AttnSparsity, sparse inference", "", measures.sparse_attention_sparsity, formats.share),
        Line(attention, "Entropy in bits", "full inference", measures.entropy_bits, formats.bits),
        Line("theorem", "Theorem 1 met", "share of queries", measures.bound_share, formats.percent_met),
    ]


def _perplexity_lines(groups: Sequence[Group]) -> list[Line]:
    """Full attention, then every budget. The budget of training is marked where all groups have the same."""
    trained = {group.training_budget for group in groups}
    found: list[tuple[Budget | None, str, str]] = [(None, "full attention", "")]
    for budget in budgets(groups):
        detail = f"{budget.num_blocks} block{'s' if budget.num_blocks > 1 else ''} of {budget.block_size}"
        mark = " (trained)" if trained == {budget} else ""
        found.append((budget, f"{budget.receptive_field:,} tokens{mark}", detail))
    return [
        Line("perplexity", f"Perplexity, {label}", detail, perplexity_at(budget), formats.perplexity, True)
        for budget, label, detail in found
    ]


def render_table(evaluations: Iterable[Evaluation]) -> Table:
    """The headline table for the terminal: one column per method, one line per measure.

    Seeds of one configuration are averaged, with their range below. Every text is printed literally.
    """
    data = headline(group_runs(Run(evaluation) for evaluation in evaluations))
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    for group in data.groups:
        header = Text(group.label)
        seeds = len(group.evaluations)
        table.add_column(
            header.append(f"\n{seeds} seeds", "dim") if seeds > 1 else header, justify="right", overflow="fold"
        )
    for section in data.sections:
        for line, cells in section:
            table.add_row(Text(line.label), *map(_terminal_cell, cells))
        table.add_section()
    return table


def _terminal_cell(cell: Cell) -> Text:
    text = Text(cell.text, style="bold" if cell.best else "")
    return text.append(f"\n{cell.detail}", style="dim not bold") if cell.detail else text
