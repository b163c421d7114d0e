"""Both streams as one operation on a GPU: sampled rows through every kernel, elementwise passes, no waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.errors import BackendError
from ssa.ops import AlignmentSpec, SparseSpec, full_attention_rows, ssa_attention
from ssa.ops.dual import passes
from ssa.ops.dual.passes import Streams
from ssa.ops.dual.sampling import sample_rows
from ssa.ops.full.query_rows import QueryRows, Window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(32, 2, 64), (32, 8, 128), (8, 8, 96)]  # H, K, D
LAYOUTS = {
    "two rows": DocumentLayout.single(2, 2048),
    "two runs": DocumentLayout.from_lengths([[512, 512, 1024], [1024, 1024]]),
    "mixed": DocumentLayout.from_lengths([[994, 37, 500, 23, 5, 1, 70, 33, 17, 99, 269]]),
}


def inputs(layout: DocumentLayout, shape: tuple[int, int, int]) -> list[Tensor]:
    H, K, D = shape
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = [(layout.batch, layout.tokens, h, D) for h in (H, K, K, H)]
    return [torch.randn(s, device="cuda", generator=generator, dtype=torch.bfloat16).requires_grad_() for s in sizes]


def worst(mine: Any, exact: Any) -> float:
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(mine, exact, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["cudnn", "flash"])
def test_sampled_rows_of_full_attention(layout: DocumentLayout, shape: tuple[int, int, int], backend: str) -> None:
    """Relative errors of a bfloat16 flash kernel lie around 3e-3; a merge or an offset gone wrong is off by tenths."""
    q, k, v, d_out = inputs(layout, shape)
    rows = sample_rows(layout, 1 / 8, 3)
    if backend == "cudnn" and layout is not LAYOUTS["two rows"]:
        with pytest.raises(BackendError, match="several lengths"):
            full_attention_rows(q, k, v, rows, layout, backend=backend)
        return
    upstream = d_out.detach().flatten(0, 1)[: rows.count]
    exact_inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    results = []
    for leaves, name in (([q, k, v], backend), (exact_inputs, "reference")):
        out, lse = full_attention_rows(*leaves, rows, layout, backend=name)
        results.append((out, lse, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))))
    assert worst(*results) < 1e-2
    assert worst(results[0][1:2], results[1][1:2]) < 1e-4


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("main", ["full", "sparse"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("align_on", ["gated", "raw"])
def test_passes_agree_with_the_reference(sampled: bool, main: str, gated: bool, align_on: str) -> None:
    from ssa.ops.dual import triton_passes

    if sampled and main == "full":
        pytest.skip("full steps are exact")
    N, H, D = 1000, 6, 80
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(shape, device="cuda", generator=generator)  # noqa: E731
    rows = QueryRows((Window(0, 1, N, 17, 401),)) if sampled else None
    spec = AlignmentSpec(align_on=align_on, query_fraction=0.5 if sampled else 1.0)  # type: ignore[arg-type]
    gate = draw(N, H).sigmoid().bfloat16() if gated else None
    R = rows.count if rows else N
    x = Streams(draw(R, H, D).bfloat16(), draw(N, H, D).bfloat16(), gate, rows, main, spec)
    lse_full, lse_sparse, up = draw(R, H), draw(N, H), draw(N, H, D).bfloat16()
    d_loss = torch.tensor(1e4, device="cuda")
    pairs = [
        (triton_passes.forward(x, lse_full, lse_sparse), passes.forward(x, lse_full, lse_sparse)),
        (triton_passes.backward(x, up, d_loss), passes.backward(x, up, d_loss)),
    ]
    for mine, theirs in pairs:
        for a, b in zip(mine, theirs, strict=True):
            if b is not None:
                torch.testing.assert_close(a.float(), b.float(), rtol=1e-2, atol=1e-2)
    again = triton_passes.forward(x, lse_full, lse_sparse)
    assert all(torch.equal(a, b) for a, b in zip(again, pairs[0][0], strict=True)), "sums have a fixed order"


@pytest.mark.parametrize("D", [80, 128])
def test_keys_of_sampled_rows_are_added_up_as_the_reference_does(D: int) -> None:
    """Windows of the same documents, whose gradients are views or dense."""
    from ssa.ops.full import row_kernels, triton_rows

    N, K = 4 * 1001, 3
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(shape, device="cuda", generator=generator).bfloat16()  # noqa: E731
    rows = QueryRows((Window(1001, 3, 1001, 17, 401), Window(1001, 3, 1001, 960, 990)))
    own, place = (draw(rows.count, K, D), draw(rows.count, K, D)), rows.place(N, torch.device("cuda"))
    for base in ((), (draw(N, K, D), draw(N, K, D))):
        mine, theirs = (x.widen(base, own, place) for x in (triton_rows, row_kernels))
        for w in rows.windows:
            dense, view = draw(3, w.begin, K, D), draw(3, 1001, K, D)[:, : w.begin]
            heads_first = draw(3, K, w.begin, D).transpose(1, 2)
            for parts in ((dense, dense), (dense, view), (view, view), (heads_first, heads_first)):
                triton_rows.add_keys(mine, w, parts)
                row_kernels.add_keys(theirs, w, parts)
        assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("main", "fraction"), [("full", 1.0), ("sparse", 1.0), ("sparse", 1 / 8)])
def test_the_operation(layout: DocumentLayout, main: str, fraction: float) -> None:
    """Against the plain backends in float32, with the alignment weighted as much as the upstream gradient."""
    q, k, v, d_out = inputs(layout, SHAPES[0])
    gate = torch.rand(q.shape[:3], device="cuda").bfloat16().requires_grad_()
    spec = AlignmentSpec(weight=float(q.numel()), query_fraction=fraction)
    results, indices = [], None
    for backend, dtype in (("reference", torch.float32), ("auto", torch.bfloat16)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v, gate)]
        if indices is None:
            from ssa.ops import select_blocks

            indices = select_blocks(q.detach(), k.detach(), SparseSpec(), layout)
        out, alignment = ssa_attention(
            *leaves[:3], leaves[3], main, alignment=spec, layout=layout, block_indices=indices, seed=1,  # type: ignore[arg-type]
            backend=backend, full_backend="reference" if backend == "reference" else "auto",
        )  # fmt: skip
        upstream = [d_out.detach().to(dtype), torch.ones_like(alignment.loss)]
        grads = torch.autograd.grad([out, alignment.loss], leaves, upstream)
        results.append((out, alignment.loss, alignment.attention_sparsity, *grads))
    assert worst(results[1], results[0]) < 2e-2


@pytest.mark.parametrize(("main", "fraction"), [("full", 1.0), ("sparse", 1.0), ("sparse", 1 / 8)])
def test_never_waits_for_the_device(main: str, fraction: float) -> None:
    layout = LAYOUTS["two rows"]
    q, k, v, d_out = inputs(layout, SHAPES[0])
    spec = AlignmentSpec(query_fraction=fraction)

    def step(seed: int) -> None:
        out, alignment = ssa_attention(q, k, v, None, main, alignment=spec, layout=layout, seed=seed)  # type: ignore[arg-type]
        torch.autograd.grad([out, alignment.loss], [q, k, v], [d_out.detach(), torch.ones_like(alignment.loss)])

    for seed in range(3):
        step(seed)  # compilation, plans
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(0)
        step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", [LAYOUTS["mixed"], LAYOUTS["two rows"]], ids=["mixed", "two rows"])
def test_gradients_of_both_streams_are_rounded_once(layout: DocumentLayout) -> None:
    """The sparse backward adds the full stream's gradients before it rounds: no further off than adding afterwards."""
    from ssa.ops import select_blocks
    from ssa.ops.sparse import triton  # noqa: F401 - declares the operations

    q, k, v, _ = (x.detach() for x in inputs(layout, (32, 2, 64)))
    spec = SparseSpec(16, 16)
    indices = select_blocks(q, k, spec, layout)
    d_out, rest = torch.randn_like(q), (layout.lengths, 16, 0.125)
    plus = [torch.randn_like(x) for x in (q, k, v)]

    def backward(tensors: list[Tensor], d: Tensor, *others: Tensor) -> Any:
        results = torch.ops.ssa.sparse_forward(*tensors, indices, *rest)
        given = (d, (d.float() * results[0].float()).sum(-1), *tensors, indices)
        begun = torch.ops.ssa.sparse_begin(*given, results[1], *rest)
        return torch.ops.ssa.sparse_finish(*given, *results, *begun, *rest, *others)

    together = backward([q, k, v], d_out, *plus)
    assert all(map(torch.equal, together, backward([q, k, v], d_out, *plus)))
    apart = [a + b for a, b in zip(backward([q, k, v], d_out), plus, strict=True)]
    exact = [a + b for a, b in zip(backward([q.float(), k.float(), v.float()], d_out.float()), plus, strict=True)]
    for mine, separate, right in zip(together, apart, exact, strict=True):
        assert (mine - right).norm() <= 1.001 * (separate - right).norm()


@pytest.mark.parametrize("main", ["full", "sparse"])
def test_streams_side_by_side_give_what_they_give_in_turn(main: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full backward pass adds in no fixed order; all else has the same bits, run after run."""
    layout = DocumentLayout.single(4, 2048)
    results: dict[int, list[Any]] = {0: [], 1 << 62: []}
    for _ in range(5):
        for worth, found in results.items():
            monkeypatch.setattr("ssa.ops.triton_support.WORTH_A_STREAM", worth)
            *leaves, d_out = inputs(layout, (32, 2, 64))
            out, alignment = ssa_attention(*leaves, main=main, layout=layout)  # type: ignore[arg-type]
            gradients = torch.autograd.grad([out, alignment.loss], leaves, [d_out, torch.ones((), device="cuda")])
            found.append((out.detach(), alignment.loss.detach(), *gradients))
    beside, in_turn = results[0], results[1 << 62][0]
    for out, loss, *gradients in beside:
        assert torch.equal(out, in_turn[0])
        assert torch.equal(loss, in_turn[1])
        assert worst(gradients, in_turn[2:]) < 3e-3
