"""The parts of the sparse backward on the CPU, through Triton's interpreter: shares of readers, groups, addends."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_parts_of_the_backward_pass() -> None:
    command = [sys.executable, str(Path(__file__).with_name("sparse_triton_cases.py"))]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
