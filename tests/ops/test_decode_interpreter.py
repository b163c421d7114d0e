"""The decoding kernels against the references, on the CPU through Triton's interpreter."""

from collections.abc import Callable

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


def test_kernels_agree_with_the_references(interpret: Callable[..., None]) -> None:
    interpret("decode_cases.py", *CASES)
