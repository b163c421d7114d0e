"""Selection in one pass and in two against the reference, on the CPU through Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CASES = (
    "documents around chunks",
    "forced blocks, two groups",
    "hidden keys",
    "overflow",
    "repeated keys in slabs",
)
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


@pytest.mark.parametrize("name", CASES)
def test_both_ways_choose_what_the_reference_chooses(name: str) -> None:
    command = [sys.executable, str(Path(__file__).with_name("selection_cases.py")), name]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
