"""Selection in one pass and in two against the reference, on the CPU through Triton's interpreter."""

from collections.abc import Callable

import pytest

CASES = (
    "documents around chunks",
    "forced blocks, two groups",
    "hidden keys",
    "overflow",
    "repeated keys in slabs",
    "many heads",
)


@pytest.mark.parametrize("name", CASES)
def test_all_ways_choose_what_the_reference_chooses(name: str, interpret: Callable[..., None]) -> None:
    interpret("selection_cases.py", name)
