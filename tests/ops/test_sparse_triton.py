"""The parts of the sparse backward on the CPU, through Triton's interpreter: shares of readers, groups, addends."""

from collections.abc import Callable


def test_parts_of_the_backward_pass(interpret: Callable[..., None]) -> None:
    interpret("sparse_triton_cases.py")
