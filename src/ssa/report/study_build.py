"""A study on disk: the page and the claims file."""

from __future__ import annotations

from pathlib import Path

from ssa.report.build import require, write_file
from ssa.report.fields import read_text
from ssa.report.record import write_record
from ssa.report.study import Study
from ssa.report.study_text import claims_markdown, put_summary


def write_study(
    study: Study, out: Path, claims: Path | None = None, summary: Path | None = None, record: Path | None = None
) -> list[Path]:
    """Write ``report.html`` and ``claims.md`` into ``out``.

    Args:
        claims: a second place for the claims.
        summary: a Markdown file that has a place for a short table of them, see :func:`put_summary`.
        record: receives the figures of all pieces of the study in ``out`` as one JSON file.

    Returns:
        The files written.
    """
    if summary is not None:
        put_summary(read_text(summary), study, str(summary))  # refused before anything is written
    require("matplotlib", "jinja2")
    from ssa.report.interval_plot import interval_figure
    from ssa.report.page import render_page
    from ssa.report.plots import all_figures
    from ssa.report.study_plots import study_figures

    resolved = interval_figure(study)
    figures = [*([resolved] if resolved else []), *all_figures(study.core), *study_figures(study)]
    page = out / "report.html"
    write_file(page, render_page(study.core, figures, study).encode("utf-8"))
    written = [page]
    text = claims_markdown(study).encode("utf-8")
    for path in (out / "claims.md", *([claims] if claims else [])):
        write_file(path, text)
        written.append(path)
    if summary is not None:
        write_file(summary, put_summary(read_text(summary), study, str(summary)).encode("utf-8"))
        written.append(summary)
    if record is not None:
        write_record(out, record)
        written.append(record)
    for figure in figures:
        write_file(out / "figures" / f"{figure.name}.png", figure.png)
    return written
