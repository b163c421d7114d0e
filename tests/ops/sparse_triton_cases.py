"""Run by test_sparse_triton.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""

import itertools

import torch
from torch import Tensor

from ssa import DocumentLayout
from ssa.ops import SparseSpec, select_blocks, sparse_attention
from ssa.ops.sparse import triton, triton_index
from ssa.ops.sparse.triton_index import reader_index

LAYOUT = DocumentLayout.from_lengths([[35, 12]])
S = 16


def case(H: int, K: int, D: int = 16) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 47, h, D, requires_grad=True) for h in (H, K, K)]
    return inputs, select_blocks(*inputs[:2], SparseSpec(S, 2), LAYOUT, backend="reference")


def compare_shares() -> None:
    """The work items of any number of programs: every list once, in order, none beyond a program's share; and who
    starts where."""
    _, indices = case(4, 2)
    grid = LAYOUT.block_grid(4 * S)
    offsets, words = triton._bitmap_rows(LAYOUT, S, "cpu")
    for programs, cost, fits in itertools.product(((4, 4, 4), (64, 8, 4)), ((16, 26, 40), (99, 1, 99)), (True, False)):
        triton_index.GROUP_COST, triton_index.BITMAP_BYTES, triton_index.SEGMENT = cost, (1 << 30) * fits, 9
        index = reader_index(indices[0], grid.first_block, grid.block_start, offsets, words, True, programs)
        entry_offset, work_offset, work = index.entry_offset.tolist(), index.work_offset.tolist(), index.work.tolist()
        Z = 2 * grid.num_blocks
        begins = {0: 0, 4 * Z: 1, 6 * Z: 2}
        for level, (region, end) in enumerate(itertools.pairwise((*begins, 7 * Z))):
            first, entries = entry_offset[region], entry_offset[end] - entry_offset[region]
            share = max(triton_index.SEGMENT, -(-entries // programs[level]))
            at = first
            for group in range(region, end):
                for item in work[work_offset[group] : work_offset[group + 1]]:
                    assert item[0] == group
                    assert item[1] == at, "lists without gaps"
                    at = item[2]
                    assert (item[1] - first) // share == (item[2] - 1 - first) // share, "inside one share"
                assert at == entry_offset[group + 1]
            starts = index.first_work[sum(programs[:level]) :].tolist()
            for program in range(-(-entries // share)):
                assert work[starts[program]][1] == first + program * share
    triton_index.GROUP_COST, triton_index.BITMAP_BYTES, triton_index.SEGMENT = (16, 26, 40), 1 << 30, 64


def compare_gradients() -> None:
    """Groups of every size, shares that cut lists, both ways to the log-sum-exp's masks; against the reference."""
    (q, k, v), indices = case(4, 2)
    weight = torch.randn(q.shape)
    expected = None
    shipped, segment = triton.strategy, triton_index.SEGMENT
    for cost in ((1, 99, 99), (99, 1, 99), (99, 99, 1)):
        triton_index.GROUP_COST, triton_index.SEGMENT = cost, 15
        triton.strategy = lambda *a, **b: shipped(*a, **b)._replace(limit=1 << 20)
        out, lse = sparse_attention(q, k, v, indices, S, LAYOUT, return_lse=True, backend="triton")
        mine = (out, lse, *torch.autograd.grad((out * weight).sum(), (q, k, v)))
        if expected is None:
            out, lse = sparse_attention(q, k, v, indices, S, LAYOUT, return_lse=True, backend="reference")
            expected = (out, lse, *torch.autograd.grad((out * weight).sum(), (q, k, v)))
        for a, b in zip(mine, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    triton.strategy, triton_index.GROUP_COST, triton_index.SEGMENT = shipped, (16, 26, 40), segment


def compare_addends() -> None:
    """What is added to the gradients inside the kernels is added once, to every element."""
    (q, k, v), indices = case(2, 1)
    leaves, d_out = [x.detach() for x in (q, k, v)], torch.randn(q.shape)
    rest = (LAYOUT.lengths, S, 0.25)
    for limit in (-1, 1 << 20):  # token by token, union tiles
        shipped = triton.strategy
        triton.strategy = lambda *a, s=shipped, n=limit, **b: s(*a, **b)._replace(limit=n)
        results = torch.ops.ssa.sparse_forward(*leaves, indices, *rest)
        plain = torch.ops.ssa.sparse_backward(d_out, *leaves, indices, *results, *rest)
        plus = [torch.randn_like(x) for x in leaves]
        views = [torch.stack([x, x], -1)[..., 0] for x in plus]  # not contiguous
        summed = torch.ops.ssa.sparse_backward(d_out, *leaves, indices, *results, *rest, *views)
        triton.strategy = shipped
        for a, b, c in zip(summed, plain, plus, strict=True):
            torch.testing.assert_close(a, b + c, rtol=1e-6, atol=1e-6)


if __name__ == "__main__":
    compare_shares()
    compare_gradients()
    compare_addends()
