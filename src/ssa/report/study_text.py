"""A study in words: the claims for the terminal and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from ssa.errors import ConfigError
from ssa.report import formats
from ssa.report.claims import Claim, Verdict, all_claims
from ssa.report.findings import Table, all_tables, core_table
from ssa.report.own_claims import own_claims, verdict_text
from ssa.report.study import Study
from ssa.report.wording import data_line, distinct, machine_line, model_sizes, statement

RULE = (
    "A claim that a difference has a sign is *reproduced* if the 95 % t interval of the difference, paired by seed, "
    "lies wholly on the claimed side of zero (in a chain of methods for every neighbouring pair), *refuted* if one "
    "lies wholly on the other side, else *not resolved at this scale*. For 'no worse' a margin, which the claim names, "
    "stands in place of zero. A short run that stays finite neither proves nor refutes a claim of instability."
)
STYLES = {Verdict.REPRODUCED: "green", Verdict.REFUTED: "red", Verdict.UNRESOLVED: "yellow", Verdict.MISSING: "dim"}


def outcome(claims: Sequence[Claim]) -> str:
    """How many claims came out how, in one sentence."""
    counts = {verdict: sum(claim.verdict is verdict for claim in claims) for verdict in Verdict}
    parts = [f"{count} {verdict.value}" for verdict, count in counts.items() if count]
    return f"Of {len(claims)} claims of the paper: {formats.listed(parts)}."


def effort(study: Study) -> str:
    """How many models, and what they took."""
    done = [piece for piece in study.pieces if piece.status != "failed"]
    variants = len({piece.variant for piece in done})
    text = f"{len(done)} models in {variants} variants, {study.seconds / 60:.0f} minutes of training and evaluation"
    if calls := [call for call in study.calls if call.pieces]:
        gpus, processes = max(call.gpus for call in calls), max(call.workers for call in calls)
        text += f" in {'up to ' * (len({call.workers for call in calls}) > 1)}{processes} processes"
        text += f" on {gpus} GPU{'s' * (gpus > 1)}: {study.gpu_seconds / 60:.1f} GPU minutes" if gpus else " on a CPU"
    failed = len(study.pieces) - len(done)
    return f"{text} ({failed} pieces failed and are left out)." if failed else f"{text}."


def study_commands(study: Study) -> list[str]:
    """The commands that give these pieces, without the choice of a variant."""
    evaluations = [piece.run.evaluation for piece in study.pieces if piece.run and piece.run.evaluation]
    return distinct(evaluations, lambda item: re.sub(r" --only \S+", "", item.command or ""))


def call_lines(study: Study) -> list[str]:
    """When the study was at work, on what, for how long."""
    return [
        f"{call.began}: {call.seconds:.0f} s on {call.gpus} GPU{'s' * (call.gpus != 1)}, {call.workers} "
        f"process{'es' * (call.workers != 1)}, {call.pieces} pieces"
        for call in study.calls
    ]


def render_claims(study: Study) -> RichTable:
    """The claims table for the terminal, ours after the paper's."""
    table = RichTable(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, title=outcome(all_claims(study)))
    for name in ("claim", "here", "difference [95 % interval]", "verdict"):
        table.add_column(name, overflow="fold")
    for claims, word in ((all_claims(study), value_of), (own_claims(study), verdict_text)):
        for claim in claims:
            subject = Text(f"{claim.subject}: ").append(claim.claim, "bold")
            verdict = Text(word(claim.verdict), STYLES[claim.verdict])
            table.add_row(subject, Text(", ".join(claim.measured)), Text("\n".join(claim.differences)), verdict)
        table.add_section()
    return table


def value_of(verdict: Verdict) -> str:
    """Of a claim of the paper."""
    return verdict.value


def claims_summary(study: Study) -> str:
    """The claims as a short Markdown table: claim, difference, verdict. For a README."""
    rows = [(f"{c.subject}: {c.claim}", "<br>".join(c.differences), c.verdict.value) for c in all_claims(study)]
    rows += [
        (f"{c.subject}: {c.claim}", "<br>".join(c.differences), verdict_text(c.verdict)) for c in own_claims(study)
    ]
    head = ("claim", "difference here [95 % interval over seeds]", "verdict")
    return "\n".join([f"{_escape(statement(study.core))} {effort(study)}", "", *_markdown(head, rows)])


def put_summary(text: str, study: Study, where: str) -> str:
    """``text`` with the summary between the lines ``<!-- claims -->`` and ``<!-- /claims -->``.

    Raises:
        ConfigError: the two lines are not there once each, in this order.
    """
    begin, end = "<!-- claims -->\n", "<!-- /claims -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ConfigError(where, "no place for the claims", f"the lines {begin.strip()} and {end}, in this order")
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    return f"{before}{claims_summary(study)}\n{after}"


def claims_markdown(study: Study) -> str:
    """The claims and tables as a Markdown page."""
    claims = all_claims(study)
    evaluations = [item for group in study.core for item in group.evaluations]
    lines = [f"# Claims of the paper, measured{f' at {model_sizes(study.core)}' if evaluations else ''}", ""]
    lines += [f"{_escape(statement(study.core))} {outcome(claims)} {effort(study)}", "", RULE, ""]
    head = ("claim", "paper (1B, 100B tokens)", "here", "difference [95 % interval]", "verdict")
    lines += _markdown(head, [_row(c, c.verdict.value) for c in claims])
    if own := own_claims(study):
        lines += ["", "## What is ours alone", ""]
        lines += _markdown((head[0], *head[2:]), [_cut(_row(c, verdict_text(c.verdict))) for c in own])
    methods = core_table(study)
    for table in [*([methods] if methods else []), *all_tables(study)]:
        lines += ["", f"## {table.title}", "", table.caption, "", *_table(table)]
    commits = distinct(evaluations, lambda item: item.commit or "")
    lines += ["", "## Where the figures come from", ""]
    lines += [
        "Written by `ssa reproduce` (or `ssa reproduce --report`) from the result files of its pieces; not edited."
    ]
    commands = [f"command: {line} --data DATA --out STUDY" for line in study_commands(study)]
    facts = [*commands, *distinct(evaluations, data_line), *distinct(evaluations, machine_line), *call_lines(study)]
    lines += ["", *(f"- {_escape(line)}" for line in facts), f"- commit {_escape(', '.join(commits) or 'unknown')}"]
    return "\n".join(lines) + "\n"


def _row(claim: Claim, verdict: str) -> tuple[str, ...]:
    differences = "<br>".join(claim.differences)
    return (f"{claim.subject}: {claim.claim}", claim.paper, ", ".join(claim.measured), differences, f"**{verdict}**")


def _cut(row: tuple[str, ...]) -> tuple[str, ...]:
    """Without the paper's column."""
    return (row[0], *row[2:])


def _table(table: Table) -> list[str]:
    return _markdown(table.columns, table.rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[_escape(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]


def _escape(cell: str) -> str:
    """Nothing of a result file may end a cell or become markup; our own line breaks and stars stay."""
    text = re.sub(r"<(?!br>)(?=\S)", "&lt;", cell)  # before a space it is no markup, and reads better
    return text.replace("|", "\\|").replace("\n", " ").replace("`", "'")
