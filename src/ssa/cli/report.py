"""``ssa report``: the headline table in the terminal, and one page to send."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

HELP = "Turn evaluated runs into a table and one self-contained HTML page."


def run(argv: list[str]) -> int:
    """Parse flags, print the table, write the page; exit code 0."""

    def command(
        runs: Annotated[
            tuple[Path, ...],
            tyro.conf.Positional,
            tyro.conf.arg(help="run folders, or folders of run folders; seeds of one configuration are put together"),
        ],
        out: Annotated[Path, tyro.conf.arg(help="the page to write")] = Path("report.html"),
        figures: Annotated[Path | None, tyro.conf.arg(help="a folder for the figures as PNG files, too")] = None,
    ) -> int:
        from rich.console import Console

        from ssa.errors import ConfigError
        from ssa.report import discover, render_table, write_report

        if not runs:
            raise ConfigError("ssa report", "no run folder", "one or more", "ssa report RUN --out report.html")
        found = discover(runs)
        console = Console()
        if evaluations := [item.evaluation for item in found if item.evaluation]:
            console.print(render_table(evaluations))
        page = write_report(found, out, figures)
        console.print(f"written to {page}", markup=False, highlight=False, soft_wrap=True)
        return 0

    return tyro.cli(command, args=argv, prog="ssa report", description=HELP)
