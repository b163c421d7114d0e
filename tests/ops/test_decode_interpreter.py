"""The decoding kernels against the references, on the CPU through Triton's interpreter."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

CASES = (
    "one token, ragged",
    "left padding, three tokens",
    "forced blocks, group of 16",
    "official rule",
    "own block only",
    "a budget over all blocks",
    "more keys than one program attends",
    "small tiles",
    "slabs",
)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_kernels_agree_with_the_references() -> None:
    command = [sys.executable, str(Path(__file__).with_name("decode_cases.py")), *CASES]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
