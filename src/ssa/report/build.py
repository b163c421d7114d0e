"""From run folders to a page on disk."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path

from ssa.errors import ConfigError, DiskError, MissingDependencyError
from ssa.report.runs import Run, discover, group_runs

EXTRA = "pip install 'sparse-sparse-attention[eval]'"


def build_report(paths: Sequence[Path], out: Path, figures: Path | None = None) -> Path:
    """Write the report of the runs in ``paths`` to the file ``out``, and return it.

    ``paths`` are run folders or folders of run folders, see :func:`ssa.report.discover`. ``figures`` names a folder
    that receives the figures as PNG files, too.
    """
    return write_report(discover(paths), out, figures)


def write_report(runs: Sequence[Run], out: Path, figures: Path | None = None) -> Path:
    """As :func:`build_report`, for runs that are already read."""
    require("matplotlib", "jinja2")
    from ssa.report.page import render_page
    from ssa.report.plots import all_figures

    if out.is_dir():
        raise ConfigError("--out", f"the folder {out}", "a file name", str(out / "report.html"))
    groups = group_runs(runs)
    drawn = all_figures(groups)
    page = render_page(groups, drawn)
    if figures:
        for figure in drawn:
            write_file(figures / f"{figure.name}.png", figure.png)
    write_file(out, page.encode("utf-8"))
    return out


def require(*modules: str) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            raise MissingDependencyError("report", f"no module {module!r}", " and ".join(modules), EXTRA) from error


def write_file(path: Path, content: bytes) -> None:
    """Replace ``path`` at once: a reader sees the old file or the new one, never a part."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DiskError(str(path), error.strerror or "a write error", "a writable place", "another --out") from error
