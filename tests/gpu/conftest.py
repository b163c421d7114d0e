"""What failed is written down at once: a run may be cut before pytest's own summary."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append each failure to the file that SSA_FAILURES names."""
    path = os.environ.get("SSA_FAILURES")
    if path and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(path).open("a") as file:
            file.write(f"==== {report.nodeid} ({report.when})\n{report.longreprtext[-4000:]}\n")
