"""Products of few tokens, in Triton's interpreter and on a CPU, against their reference and in a model's layers."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ssa.errors import InputError
from ssa.ops.few import few_linear, is_few, serves


@pytest.mark.parametrize("interpreted", ["1", "0"])
def test_backends_agree_with_the_reference_and_layers_with_their_modules(interpreted: str) -> None:
    """The kernels in the interpreter, and what a CPU runs."""
    if interpreted == "1" and find_spec("triton") is None:
        pytest.skip("needs triton")
    if interpreted == "0" and not torch.backends.mkldnn.is_available():
        pytest.skip("needs a torch with oneDNN")
    command = [sys.executable, str(Path(__file__).with_name("few_cases.py"))]
    environment = {**os.environ, "TRITON_INTERPRET": interpreted, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]


def test_what_is_not_served() -> None:
    x = torch.randn(2, 1, 128)
    assert not is_few(x)  # gradients
    with torch.no_grad():
        assert is_few(x) == torch.backends.mkldnn.is_available()
        assert not is_few(x.bfloat16())
        assert not is_few(torch.randn(2, 17, 128))
    assert serves(x, [torch.empty(3, 128), torch.empty(128)])
    wrong = torch.empty(3, 128).bfloat16(), torch.empty(3, 96), torch.empty(128, 3).T, torch.empty(128, device="meta")
    for weight in wrong:
        assert not serves(x, [weight])
    with pytest.raises(InputError, match="C a multiple of 128"):
        few_linear(torch.randn(2, 1, 96), torch.randn(4, 96))
