"""Run by test_dual_triton.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""

import itertools

import torch

from ssa import DocumentLayout
from ssa.ops import AlignmentSpec, SparseSpec, ssa_attention
from ssa.ops.dual import passes, triton_passes
from ssa.ops.dual.passes import Streams
from ssa.ops.full.query_rows import QueryRows, Window

N, H, D = 37, 3, 24
ROWS = QueryRows((Window(0, 1, 37, 2, 9), Window(0, 1, 37, 30, 37)))


def compare_passes() -> None:
    """Every combination of settings, head dimension and rows that fill no tile, upstream gradients that are a view."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: 2 * torch.randn(*shape, generator=generator)  # noqa: E731
    settings = itertools.product(
        ("full", "sparse"), (None, ROWS), (True, False), ("gated", "raw"), ("smooth_l1", "l2"),
        ("both", "sparsity", "commitment"),
    )  # fmt: skip
    for main, rows, gated, align_on, distance, directions in list(settings)[::3]:  # of 3 directions, each in turn
        if main == "full" and rows is not None:
            continue
        spec = AlignmentSpec(10.0, distance, align_on, directions, 0.25 if rows else 1.0)  # type: ignore[arg-type]
        R = rows.count if rows else N
        gate = torch.rand(N, H, generator=generator) if gated else None
        x = Streams(draw(R, H, D), draw(N, H, D), gate, rows, main, spec)
        lse_full, lse_sparse = draw(R, H), draw(N, H)
        wide = draw(N, 2 * H, 2 * D)
        up = wide[:, H:, :D]
        for mine, theirs in (
            (triton_passes.forward(x, lse_full, lse_sparse), passes.forward(x, lse_full, lse_sparse)),
            (triton_passes.backward(x, up, torch.tensor(3.0)), passes.backward(x, up, torch.tensor(3.0))),
        ):
            for a, b in zip(mine, theirs, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def compare_operation() -> None:
    """The whole operation through all kernels, exact and on sampled rows."""
    layout = DocumentLayout.from_lengths([[33, 7]])
    torch.manual_seed(0)
    shapes = ((1, 40, 2, 16), (1, 40, 1, 16), (1, 40, 1, 16), (1, 40, 2))
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    weight = torch.randn(shapes[0])
    for main, fraction in (("full", 1.0), ("sparse", 0.5)):
        results = []
        for backend in ("triton", "reference"):
            out, alignment = ssa_attention(
                *inputs[:3], inputs[3].sigmoid(), main, spec=SparseSpec(16, 2), layout=layout, seed=1,  # type: ignore[arg-type]
                alignment=AlignmentSpec(query_fraction=fraction), backend=backend,
            )  # fmt: skip
            grads = torch.autograd.grad((out * weight).sum() + alignment.loss, inputs)
            results.append((out, *alignment, *grads))
        for mine, reference in zip(*results, strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    compare_passes()
    compare_operation()
