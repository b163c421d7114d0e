"""A study in words: the claims for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from ssa.report import formats
from ssa.report.claims import EQUAL_PERCENT, Claim, Verdict, all_claims
from ssa.report.findings import Table, all_tables, core_table
from ssa.report.study import Study
from ssa.report.wording import data_line, distinct, machine_line, statement

RULE = (
    "A claim that a difference has a sign is *reproduced* if the 95 % t interval of the difference, paired by seed, "
    "lies wholly on the claimed side of zero (in a chain of methods for every neighbouring pair), *refuted* if one "
    "lies wholly on the other side, else *not resolved at this scale*. Equality means within "
    f"{EQUAL_PERCENT:g} %. A short run that stays finite neither proves nor refutes a claim of instability."
)
STYLES = {Verdict.REPRODUCED: "green", Verdict.REFUTED: "red", Verdict.UNRESOLVED: "yellow", Verdict.MISSING: "dim"}


def outcome(claims: Sequence[Claim]) -> str:
    """How many claims came out how, in one sentence."""
    counts = {verdict: sum(claim.verdict is verdict for claim in claims) for verdict in Verdict}
    parts = [f"{count} {verdict.value}" for verdict, count in counts.items() if count]
    return f"Of {len(claims)} claims of the paper: {formats.listed(parts)}."


def effort(study: Study) -> str:
    """How many models, and how long they took."""
    done = [piece for piece in study.pieces if piece.status != "failed"]
    variants = len({piece.variant for piece in done})
    text = f"{len(done)} models in {variants} variants, {study.seconds / 60:.1f} minutes of training and evaluation"
    failed = len(study.pieces) - len(done)
    return f"{text} ({failed} pieces failed and are left out)." if failed else f"{text}."


def render_claims(study: Study) -> RichTable:
    """The claims table for the terminal."""
    table = RichTable(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, title=outcome(all_claims(study)))
    for name in ("claim", "here", "difference [95 % interval]", "verdict"):
        table.add_column(name, overflow="fold")
    for claim in all_claims(study):
        subject = Text(f"{claim.subject}: ").append(claim.claim, "bold")
        verdict = Text(claim.verdict.value, STYLES[claim.verdict])
        table.add_row(subject, Text(", ".join(claim.measured)), Text("\n".join(claim.differences)), verdict)
    return table


def claims_markdown(study: Study) -> str:
    """The claims and tables as a Markdown page."""
    claims = all_claims(study)
    lines = ["# Claims of the paper, measured", ""]
    lines += [f"{_escape(statement(study.core))} {outcome(claims)} {effort(study)}", "", RULE, ""]
    head = ("claim", "paper (1B, 100B tokens)", "here", "difference [95 % interval]", "verdict")
    rows = [
        (
            f"{c.subject}: {c.claim}",
            c.paper,
            ", ".join(c.measured),
            "<br>".join(c.differences),
            f"**{c.verdict.value}**",
        )
        for c in claims
    ]
    lines += _markdown(head, rows)
    methods = core_table(study)
    for table in [*([methods] if methods else []), *all_tables(study)]:
        lines += ["", f"## {table.title}", "", table.caption, "", *_table(table)]
    evaluations = [item for group in study.core for item in group.evaluations]
    commits = distinct(evaluations, lambda item: item.commit or "")
    lines += ["", "## Where the figures come from", ""]
    lines += [
        "Written by `ssa reproduce` (or `ssa reproduce --report`) from the result files of its pieces; not edited."
    ]
    facts = [*distinct(evaluations, data_line), *distinct(evaluations, machine_line)]
    lines += ["", *(f"- {_escape(line)}" for line in facts), f"- commit {_escape(', '.join(commits) or 'unknown')}"]
    return "\n".join(lines) + "\n"


def _table(table: Table) -> list[str]:
    return _markdown(table.columns, table.rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[_escape(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]


def _escape(cell: str) -> str:
    """Nothing of a result file may end a cell or become markup; our own line breaks and stars stay."""
    return cell.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;").replace("&lt;br>", "<br>").replace("`", "'")
