"""Decoding of one token on a CPU equals the reference: the same blocks, the same output."""

from __future__ import annotations

import pytest
import torch

from ssa.ops import SparseSpec
from ssa.ops.decode import decode_attention, select_blocks_cached, update_pooled
from ssa.ops.decode.cpu import choose

SPECS = [
    SparseSpec(16, 4),
    SparseSpec(16, 5, 1, 2),
    SparseSpec(16, 3, 1, 2),
    SparseSpec(32, 1),
    SparseSpec(16, 64),
    SparseSpec(16, 8, rule="official"),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_reference(spec: SparseSpec, dtype: torch.dtype, padded: bool) -> None:
    lengths = torch.tensor([700, 16, 1, 641, 0, 705], dtype=torch.int32)
    starts = torch.tensor([0, 3, 1, 600, 0, 1], dtype=torch.int32) if padded else None
    k, v = (torch.randn(6, 720, 2, 16).to(dtype) for _ in "kv")
    q, pooled = torch.randn(6, 1, 6, 16).to(dtype), torch.full((6, 45, 2, 16), float("nan")).to(dtype)
    update_pooled(pooled, k, lengths, 720, starts, spec.block_size)
    mine, wanted = (
        decode_attention(q, k, v, pooled, lengths, spec, starts=starts, return_lse=True, backend=name)
        for name in ("cpu", "reference")
    )
    for a, b in zip(mine, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=1e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-5)


def test_ties_go_to_the_lower_block() -> None:
    pooled = torch.randint(3, (40, 2, 4)).float()  # few values: many equal scores
    query, spec = torch.ones(2, 3, 4), SparseSpec(16, 7, 1, 2)
    mine = choose(query, pooled, 40, spec, 0.5)
    means, lengths = torch.cat([pooled, pooled[:1]])[None], torch.tensor([40 * 16 + 3], dtype=torch.int32)
    wanted = select_blocks_cached(query.view(1, 1, 6, 4), means, lengths, spec, scale=0.5)
    assert torch.equal(mine, wanted[0, 0].long())
