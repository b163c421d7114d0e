"""Triton's kernels on a CPU."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.fixture
def interpret() -> Callable[..., None]:
    """Runs a script of this folder with its arguments through Triton's interpreter; the test fails if it does.

    In a process of its own: Triton reads TRITON_INTERPRET when it is imported.
    """
    if find_spec("triton") is None:
        pytest.skip("needs triton")

    def run(script: str, *arguments: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]

    return run
