"""Run by test_sparse_triton.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from ssa import DocumentLayout
from ssa.ops import SparseSpec, select_blocks, sparse_attention
from ssa.ops.sparse import triton, triton_index

LAYOUT = DocumentLayout.from_lengths([[35, 12]])
S = 16


def case(H: int, K: int, D: int = 16) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 47, h, D, requires_grad=True) for h in (H, K, K)]
    return inputs, select_blocks(*inputs[:2], SparseSpec(S, 2), LAYOUT, backend="reference")


def compare_gradients() -> None:
    """Groups of every size, in segments, both ways round; all tiles by the union kernels, both ways to mask."""
    (q, k, v), indices = case(4, 2)
    weight = torch.randn(q.shape)
    expected = None
    shipped, segment = triton.strategy, triton_index.SEGMENT
    for keys_first, cost in ((False, (1, 99, 99)), (False, (99, 1, 99)), (True, (99, 99, 1)), (True, (16, 20, 29))):
        triton_index.SEGMENT = 15
        plan = shipped(4, 2, 16, S, 2)
        dkv = tuple(x._replace(keys_first=keys_first) for x in plan.dkv)
        plan = plan._replace(limit=1 << 20, dkv=dkv, cost=cost, select=(keys_first, keys_first))
        triton.strategy = lambda *_, plan=plan: plan
        out, lse = sparse_attention(q, k, v, indices, S, LAYOUT, return_lse=True, backend="triton")
        mine = (out, lse, *torch.autograd.grad((out * weight).sum(), (q, k, v)))
        if expected is None:
            out, lse = sparse_attention(q, k, v, indices, S, LAYOUT, return_lse=True, backend="reference")
            expected = (out, lse, *torch.autograd.grad((out * weight).sum(), (q, k, v)))
        for a, b in zip(mine, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    triton.strategy, triton_index.SEGMENT = shipped, segment


def compare_halves() -> None:
    """In two halves, what is added to the gradients inside the kernels is added once, to every element."""
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
        given = (d_out, (d_out * results[0]).sum(-1), *leaves, indices)
        begun = torch.ops.ssa.sparse_begin(*given, results[1], *rest)
        with FakeTensorMode(shape_env=ShapeEnv()) as mode:
            said = torch.ops.ssa.sparse_begin(*(mode.from_tensor(x) for x in (*given, results[1])), *rest)
        assert [(x.shape, x.dtype) for x in said] == [(x.shape, x.dtype) for x in begun]
        summed = torch.ops.ssa.sparse_finish(*given, *results, *begun, *rest, *views)
        triton.strategy = shipped
        for a, b, c in zip(summed, plain, plus, strict=True):
            torch.testing.assert_close(a, b + c, rtol=1e-6, atol=1e-6)


if __name__ == "__main__":
    compare_gradients()
    compare_halves()
