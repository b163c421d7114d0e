"""A study on disk: the page and the claims file."""

from __future__ import annotations

from pathlib import Path

from ssa.report.build import require, write_file
from ssa.report.study import Study
from ssa.report.study_text import claims_markdown


def write_study(study: Study, out: Path, claims: Path | None = None) -> list[Path]:
    """Write ``report.html`` and ``claims.md`` into ``out``, and the claims to a second file if named.

    Returns:
        The files written.
    """
    require("matplotlib", "jinja2")
    from ssa.report.page import render_page
    from ssa.report.plots import all_figures
    from ssa.report.study_plots import study_figures

    figures = [*all_figures(study.core), *study_figures(study)]
    page = out / "report.html"
    write_file(page, render_page(study.core, figures, study).encode("utf-8"))
    written = [page]
    text = claims_markdown(study).encode("utf-8")
    for path in (out / "claims.md", *([claims] if claims else [])):
        write_file(path, text)
        written.append(path)
    for figure in figures:
        write_file(out / "figures" / f"{figure.name}.png", figure.png)
    return written
