"""Run by test_full_rows.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""

import torch

from ssa.ops.full import row_kernels, triton_rows

W, H, D, N = 21, 3, 24, 50


def compare() -> None:
    """Rows that fill no tile, a head dimension that is no power of two, and a log-sum-exp far from the other's."""
    torch.manual_seed(0)
    out, past = torch.randn(W, H, D), torch.randn(W, H, D)
    lse, past_lse = 30 * torch.randn(W, H), 30 * torch.randn(W, H)
    past_lse[0] = float("-inf")
    mine, theirs = [out.clone(), lse.clone()], [out.clone(), lse.clone()]
    triton_rows.merge(*mine, past, past_lse)
    row_kernels.merge(*theirs, past, past_lse)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    target, index = torch.randn(N, H, D), torch.randperm(N)[:W]
    for other in (None, past):
        mine[0], theirs[0] = target.clone(), target.clone()
        triton_rows.add(mine[0], index, out, other)
        row_kernels.add(theirs[0], index, out, other)
        torch.testing.assert_close(mine[0], theirs[0])


if __name__ == "__main__":
    compare()
