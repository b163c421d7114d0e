"""Run by test_decode_interpreter.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from ssa.ops import SparseSpec
from ssa.ops.decode import (
    attend_blocks_cached,
    decode_attention,
    full_decode_attention,
    select_blocks_cached,
    update_pooled,
)


class Case(NamedTuple):
    """Lengths, first rows and new tokens; heads, KV heads, head dim; capacity; selection."""

    lengths: list[int]
    starts: list[int] | None
    N: int
    H: int
    K: int
    D: int
    C: int
    spec: SparseSpec


CASES = {
    "one token, ragged": Case([5, 16, 700], None, 1, 4, 2, 16, 720, SparseSpec(16, 4)),
    "left padding, three tokens": Case([90, 90, 90], [0, 37, 88], 3, 3, 1, 24, 96, SparseSpec(16, 3)),
    "forced blocks, group of 16": Case([300, 0], None, 2, 16, 1, 16, 304, SparseSpec(16, 5, 1, 2)),
    "official rule": Case([600, 200], [3, 0], 1, 2, 1, 16, 608, SparseSpec(16, 6, rule="official")),
    "own block only": Case([64, 63], None, 1, 2, 2, 16, 64, SparseSpec(32, 1)),
    "a budget over all blocks": Case([200, 77], None, 2, 4, 2, 16, 208, SparseSpec(16, 13)),
    "more keys than one program attends": Case([900, 650], [0, 11], 1, 2, 1, 16, 912, SparseSpec(16, 40)),
}


def cache(x: Case) -> tuple[Tensor, ...]:
    """q, k, v, pooled, lengths, starts; NaN in every row that is not a real token, pooled by the reference."""
    torch.manual_seed(0)
    B, S = len(x.lengths), x.spec.block_size
    lengths = torch.tensor(x.lengths, dtype=torch.int32)
    starts = None if x.starts is None else torch.tensor(x.starts, dtype=torch.int32)
    first = torch.zeros_like(lengths) if starts is None else starts
    row = torch.arange(x.C)
    real = (row >= first[:, None]) & (row < lengths[:, None])
    k, v = (torch.randn(B, x.C, x.K, x.D).masked_fill(~real[..., None, None], float("nan")) for _ in range(2))
    q = torch.randn(B, x.N, x.H, x.D)
    q[(lengths - first)[:, None] - x.N + torch.arange(x.N) < 0] = float("nan")
    pooled = torch.full((B, -(-x.C // S), x.K, x.D), float("nan"))
    update_pooled(pooled, k, lengths, x.C, starts, S, backend="reference")
    return q, k, v, pooled, lengths, starts


def compare(name: str) -> None:
    """Pooled keys bit for bit, blocks exactly, outputs within float32 rounding of the reference."""
    x = CASES[name]
    q, k, v, pooled, lengths, starts = cache(x)
    both = ("triton", "reference")
    for new in (1, 17, x.C):
        empty = [torch.full_like(pooled, float("nan")) for _ in both]
        for to, backend in zip(empty, both, strict=True):
            update_pooled(to, k, lengths, new, starts, x.spec.block_size, backend=backend)
        assert torch.equal(empty[0].nan_to_num(-7.0), empty[1].nan_to_num(-7.0)), f"pooled, {new} new"
    updated(x, (q, k, v, pooled, lengths, starts))
    chosen = [select_blocks_cached(q, pooled, lengths, x.spec, starts=starts, backend=b) for b in both]
    assert torch.equal(*chosen), "blocks"
    for results in (
        [decode_attention(q, k, v, pooled, lengths, x.spec, starts=starts, return_lse=True, backend=b) for b in both],
        [attend_blocks_cached(q, k, v, chosen[1], x.spec.block_size, lengths, starts=starts, backend=b) for b in both],
        [full_decode_attention(q, k, v, lengths, starts=starts, return_lse=True, backend=b) for b in both],
    ):
        for mine, reference in zip(*results, strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5)


def updated(x: Case, given: tuple[Tensor, ...]) -> None:
    """With ``update`` the new tokens' blocks need no mean before: the same output, and the same means after."""
    q, k, v, pooled, lengths, starts = given
    lacking = pooled.clone()
    for row, length in enumerate((lengths - (0 if starts is None else starts)).tolist()):
        lacking[row, max(length - x.N, 0) // x.spec.block_size :] = float("nan")
    for backend in ("triton", "reference"):
        means = lacking.clone()
        mine = decode_attention(q, k, v, means, lengths, x.spec, starts=starts, update=True, backend=backend)
        assert torch.equal(means.nan_to_num(-7.0), pooled.nan_to_num(-7.0)), f"means, {backend}"
        wanted = decode_attention(q, k, v, pooled, lengths, x.spec, starts=starts, backend=backend)
        torch.testing.assert_close(mine, wanted, atol=1e-6, rtol=1e-6)


def slabs() -> None:
    """A workspace that holds one row at a time changes nothing."""
    import ssa.ops.decode.triton as launches

    launches.WORK_ELEMENTS = 1
    launches._selection.cache_clear()
    compare("left padding, three tokens")


def small_tiles() -> None:
    """Rows of several tiles, shared out over the programs of a small and of a large device."""
    import ssa.ops.decode.triton as launches

    launches.TILE_BYTES, launches.SELECT_BYTES, x = 1, 1 << 11, CASES["one token, ragged"]
    for processors in (4, 132):
        launches._processors = lambda index, n=processors: n
        launches._selection.cache_clear()
        launch = launches._selection(3, x.N, x.H, x.K, x.D, -(-x.C // 16), 4, x.spec, None)
        assert launch.splits > 1
        compare("one token, ragged")


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    for case in sys.argv[1:]:
        special = {"slabs": slabs, "small tiles": small_tiles}
        special.get(case, lambda name=case: compare(name))()
