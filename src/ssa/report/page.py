"""The report as one HTML file: styles and figures are inside, and nothing is loaded or run by the browser."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ssa.report import formats
from ssa.report.checks import Verdict, run_checks
from ssa.report.results import EVALUATION_SCHEMA, MAJOR, METRICS_SCHEMA
from ssa.report.runs import METHODS, Group
from ssa.report.style import COLOURS, OTHER_COLOUR, Figure
from ssa.report.table import headline
from ssa.report.wording import data_line, distinct, machine_line, notes, outcome, statement

HERE = Path(__file__).parent
VERDICTS = {Verdict.HOLDS: ("yes", "✓"), Verdict.FAILS: ("no", "✗"), Verdict.MISSING: ("open", "–")}


def render_page(groups: Sequence[Group], figures: Sequence[Figure]) -> str:
    """The page. Every text from a result file is escaped; the page's policy forbids scripts and remote loads."""
    css = (HERE / "page.css").read_text(encoding="utf-8") + _swatches()
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    table, checks = headline(groups), run_checks(groups)
    evaluations = [evaluation for group in groups for evaluation in group.evaluations]
    return environment.get_template("page.html").render(
        policy=_policy(css),
        css=Markup(css),
        title=f"{formats.listed(group.label for group in groups)}: full and sparse inference",
        statement=statement(groups),
        outcome=outcome(checks) if evaluations else "",
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
        commands=distinct(evaluations, lambda evaluation: evaluation.command or ""),
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
