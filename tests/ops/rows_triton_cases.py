"""Run by test_full_rows.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""

import torch

from ssa.ops.full import row_kernels, triton_rows
from ssa.ops.full.query_rows import QueryRows, Window

W, H, D, N = 11, 6, 24, 50
ROWS = QueryRows((Window(3, 2, 15, 7, 12), Window(3, 2, 15, 13, 14), Window(40, 1, 9, 2, 5), Window(49, 1, 1, 0, 1)))


def compare(documents: int, heads: int) -> None:
    """Rows that fill no tile, a head dimension that is no power of two, a log-sum-exp far from the other's, and results
    whose heads come first in memory, as cuDNN's may."""
    torch.manual_seed(0)
    rows = documents * W
    d_out, q, out = torch.randn(3, rows, H, D)
    lse = 30 * torch.randn(rows, H)
    for parts in ([q], [d_out, q, out, lse]):
        mine, theirs = triton_rows.fold(parts, documents, heads), row_kernels.fold(parts, documents, heads)
        assert all(map(torch.equal, mine, theirs))
        assert all(torch.equal(row_kernels.unfold(x, rows), part) for x, part in zip(mine, parts, strict=True))
    past, past_lse = (torch.randn(documents, heads, W * H // heads, size) for size in (D, 1))
    past, past_lse = past.transpose(1, 2), 30 * past_lse[..., 0].transpose(1, 2)
    past_lse[0, 0] = float("-inf")
    for before in (past, past.contiguous(), past.mT.contiguous().mT):
        mine, theirs = [out.clone(), lse.clone()], [out.clone(), lse.clone()]
        triton_rows.merge(*mine, before, past_lse)
        row_kernels.merge(*theirs, before, past_lse)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    target, index = torch.randn(N, H, D), torch.randperm(N)[:rows]
    for other in (None, past, past.contiguous(), past.mT.contiguous().mT):
        mine[0], theirs[0] = target.clone(), target.clone()
        triton_rows.add(mine[0], index, out, other)
        row_kernels.add(theirs[0], index, out, other)
        torch.testing.assert_close(mine[0], theirs[0])


def compare_keys(dtype: torch.dtype, base: bool) -> None:
    """Windows of the same documents one after another, with gradients that lie in memory in every possible way."""
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(shape).to(dtype)  # noqa: E731
    bases = (draw(N, H, D), draw(N, H, D)) if base else ()
    own, place = (draw(ROWS.count, H, D), draw(H, ROWS.count, D).transpose(0, 1)), ROWS.place(N, torch.device("cpu"))
    mine, theirs = triton_rows.widen(bases, own, place), row_kernels.widen(bases, own, place)
    assert mine[0].dtype == torch.float32
    assert all(map(torch.equal, mine, theirs))
    for w in ROWS.windows[:3]:
        n, begin = w.documents, w.begin
        dense, wider = draw(n, begin, H, D), draw(n, begin + 2, H, D + 8)[:, 1:-1, :, 8:]
        heads_first = [draw(n, H, begin, D).transpose(1, 2) for _ in range(2)]
        backwards = [draw(n, begin, D, H).transpose(2, 3) for _ in range(2)]
        for parts in ((dense, wider), (wider, wider), heads_first, backwards):
            triton_rows.add_keys(mine, w, parts)
            row_kernels.add_keys(theirs, w, parts)
            assert all(map(torch.equal, mine, theirs))


if __name__ == "__main__":
    for documents in (1, 3):
        for heads in (1, 2, 6):
            compare(documents, heads)
    for dtype in (torch.float32, torch.bfloat16):
        for base in (False, True):
            compare_keys(dtype, base)
