"""The Triton kernels of the elementwise passes against plain PyTorch, on the CPU through Triton's interpreter."""

from collections.abc import Callable


def test_kernels_agree_with_the_reference(interpret: Callable[..., None]) -> None:
    interpret("dual_triton_cases.py")
