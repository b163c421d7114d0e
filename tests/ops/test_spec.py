"""What a sparse specification accepts, and that it names what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ssa.errors import InputError
from ssa.ops import SparseSpec
from ssa.ops.spec import BLOCK_SIZES


def test_defaults_are_the_papers() -> None:
    spec = SparseSpec()
    assert (spec.block_size, spec.num_blocks, spec.receptive_field) == (16, 16, 256)
    assert (spec.first_blocks, spec.local_blocks, spec.rule) == (0, 1, "exact")


@pytest.mark.parametrize("size", BLOCK_SIZES)
def test_receptive_field(size: int) -> None:
    assert SparseSpec(size, 3).receptive_field == 3 * size


def test_forced_blocks_may_fill_the_budget() -> None:
    SparseSpec(16, 4, first_blocks=1, local_blocks=3)


def test_is_a_value() -> None:
    assert SparseSpec(16, 4) == SparseSpec(16, 4)
    assert hash(SparseSpec(16, 4)) == hash(SparseSpec(16, 4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        SparseSpec().num_blocks = 2  # type: ignore[misc]


REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    ({"block_size": 0}, "SparseSpec.block_size: got 0", "(1, 2, 4, 8, 16"),
    ({"block_size": -1}, "got -1", "16"),
    ({"block_size": 24}, "got 24", "16"),
    ({"block_size": 512}, "got 512", "256"),
    ({"block_size": 16.0}, "got 16.0", "integer"),
    ({"block_size": True}, "got True", "integer"),
    ({"block_size": "16"}, "got '16'", "integer"),
    ({"num_blocks": 0}, "SparseSpec.num_blocks: got 0", "at least 1"),
    ({"num_blocks": -3}, "got -3", "at least 1"),
    ({"num_blocks": 2.5}, "got 2.5", "integer"),
    ({"num_blocks": True}, "got True", "integer"),
    ({"first_blocks": -1}, "first_blocks -1", "first_blocks >= 0"),
    ({"first_blocks": 0.5}, "first_blocks 0.5", "integers"),
    ({"local_blocks": 0}, "local_blocks 0", "own block is always read"),
    ({"local_blocks": "1"}, "local_blocks '1'", "integers"),
    ({"num_blocks": 3, "first_blocks": 2, "local_blocks": 2}, "2 first + 2 local", "num_blocks = 3"),
    ({"rule": "topk"}, "SparseSpec.rule: got 'topk'", "'exact', 'official'"),
    ({"rule": "official", "block_size": 8, "num_blocks": 9}, "got 9", "block_size = 8"),
    ({"rule": "official", "first_blocks": 1}, "forced blocks", "rule='exact'"),
    ({"rule": "official", "local_blocks": 2}, "forced blocks", "rule='exact'"),
    # its merge would keep half a block
    ({"rule": "official", "block_size": 1, "num_blocks": 1}, "SparseSpec.block_size: got 1", "at least 2"),
]


@pytest.mark.parametrize(("arguments", "got", "expected"), REFUSALS)
def test_refusals(arguments: dict[str, Any], got: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        SparseSpec(**arguments)
    assert got in str(caught.value)
    assert expected in str(caught.value)
