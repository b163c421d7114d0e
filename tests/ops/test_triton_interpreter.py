"""The Triton kernels against the references, on the CPU through Triton's interpreter: forward, backward, selection."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CASES = (
    "mqa, lengths around a block",
    "mha, two rows",
    "group of 16",
    "forced blocks",
    "official rule",
    "blocks longer than a tile",
    "budget over all blocks",
)
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_the_references(name: str) -> None:
    command = [sys.executable, str(Path(__file__).with_name("triton_cases.py")), name]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
