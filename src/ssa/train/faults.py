"""Named points at which a test can kill the process: ``SSA_FAULT=POINT`` or ``SSA_FAULT=POINT@STEP``."""

from __future__ import annotations

import os
import signal

VARIABLE = "SSA_FAULT"


def fault_point(name: str, step: int | None = None) -> None:
    """SIGKILL this process if the environment names this point (and step). Only called where a step or save begins."""
    wanted = os.environ.get(VARIABLE)
    if wanted is not None and wanted in (name, f"{name}@{step}"):
        os.kill(os.getpid(), signal.SIGKILL)
