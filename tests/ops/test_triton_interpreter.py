"""The Triton kernels against the references, on the CPU through Triton's interpreter: forward, backward, selection."""

from collections.abc import Callable

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


@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_the_references(name: str, interpret: Callable[..., None]) -> None:
    interpret("triton_cases.py", name)
