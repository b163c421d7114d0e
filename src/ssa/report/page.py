"""The report as one HTML file: styles and figures are inside, and nothing is loaded or run by the browser."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ssa.report import claims as claim_rules
from ssa.report import formats
from ssa.report.checks import Verdict, run_checks
from ssa.report.claims import all_claims
from ssa.report.findings import all_tables
from ssa.report.own_claims import own_claims, verdict_text
from ssa.report.results import EVALUATION_SCHEMA, MAJOR, METRICS_SCHEMA
from ssa.report.runs import METHODS, Group
from ssa.report.study import Study
from ssa.report.study_text import RULE, call_lines, effort, study_commands
from ssa.report.study_text import outcome as study_outcome
from ssa.report.style import COLOURS, OTHER_COLOUR, Figure
from ssa.report.table import headline
from ssa.report.wording import data_line, distinct, machine_line, notes, outcome, statement

HERE = Path(__file__).parent
VERDICTS = {Verdict.HOLDS: ("yes", "✓"), Verdict.FAILS: ("no", "✗"), Verdict.MISSING: ("open", "–")}

CLAIM_VERDICTS = {
    claim_rules.Verdict.REPRODUCED: ("yes", "✓"),
    claim_rules.Verdict.REFUTED: ("no", "✗"),
    claim_rules.Verdict.UNRESOLVED: ("open", "?"),
    claim_rules.Verdict.MISSING: ("open", "–"),
}


def render_page(groups: Sequence[Group], figures: Sequence[Figure], study: Study | None = None) -> str:
    """The page. Every text from a result file is escaped; the page's policy forbids scripts and remote loads.

    With a ``study``, whose core methods are ``groups``, the claims with their intervals take the place of the checks.
    """
    css = (HERE / "page.css").read_text(encoding="utf-8") + _swatches()
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    table, checks = headline(groups), [] if study else run_checks(groups)
    claims = all_claims(study) if study else []
    evaluations = [evaluation for group in groups for evaluation in group.evaluations]
    return environment.get_template("page.html").render(
        policy=_policy(css),
        css=Markup(css),
        title="Sparse Sparse Attention: the paper’s claims, measured"
        if study
        else f"{formats.listed(group.label for group in groups)}: full and sparse inference",
        statement=statement(groups),
        outcome=study_outcome(claims) if study else outcome(checks) if evaluations else "",
        effort=effort(study) if study else "",
        claims=claims,
        own=own_claims(study) if study else [],
        own_verdict=verdict_text,
        claim_verdicts=CLAIM_VERDICTS,
        rule=RULE.replace("*", "") if study else "",
        tables=all_tables(study) if study else [],
        notes=notes(groups),
        table=table,
        several_seeds=any(len(group.evaluations) > 1 for group in groups),
        swatch=lambda group: f"m-{group.method}" if group.method in METHODS else "m-other",
        checks=checks if evaluations else [],
        verdicts=VERDICTS,
        figures=[(figure, base64.b64encode(figure.png).decode("ascii")) for figure in figures],
        groups=groups,
        large=formats.large,
        data=distinct(evaluations, data_line),
        machines=distinct(evaluations, machine_line),
        commands=study_commands(study) if study else distinct(evaluations, lambda item: item.command or ""),
        calls=call_lines(study) if study else [],
        schemas=f"{EVALUATION_SCHEMA}/{MAJOR}, {METRICS_SCHEMA}/{MAJOR}",
    )


def _policy(css: str) -> str:
    """Content-Security-Policy: the one style sheet of this page by its hash, and images that lie inside it."""
    digest = base64.b64encode(hashlib.sha256(css.encode("utf-8")).digest()).decode("ascii")
    return f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _swatches() -> str:
    """The methods' colours, from the figures' palette."""
    rules = [f".m-{method}::before {{ background: {value}; }}" for method, value in COLOURS.items()]
    return "\n".join([*rules, f".m-other::before {{ background: {OTHER_COLOUR}; }}", ""])
