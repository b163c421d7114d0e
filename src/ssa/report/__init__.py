"""Reports from result files: ``evaluation.json`` and ``metrics.jsonl`` in, a table and one HTML page out.

Reading and the table need no more than ``rich``; the page needs matplotlib and jinja2, imported when it is built.
"""

from ssa.report.build import build_report, write_report
from ssa.report.record import restore_record, write_record
from ssa.report.results import Evaluation, Metrics, parse_evaluation, read_evaluation, read_metrics
from ssa.report.runs import Run, discover
from ssa.report.study import Study, read_study
from ssa.report.study_build import write_study
from ssa.report.study_text import claims_markdown, render_claims
from ssa.report.table import render_table

__all__ = [
    "Evaluation",
    "Metrics",
    "Run",
    "Study",
    "build_report",
    "claims_markdown",
    "discover",
    "parse_evaluation",
    "read_evaluation",
    "read_metrics",
    "read_study",
    "render_claims",
    "render_table",
    "restore_record",
    "write_record",
    "write_report",
    "write_study",
]
