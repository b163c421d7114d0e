"""Proof of the Triton kernels on a GPU: ``python -m pytest tests/gpu/test_kernels.py -n 8`` takes minutes.

Errors are compared with those of eager PyTorch in the same low precision, both against float64 with the same blocks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssa.documents import DocumentLayout
from ssa.ops import SparseSpec, select_blocks, sparse_attention, ssa_attention
from ssa.ops.selection.reference import pool_keys

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned_memory"),
]
PACKED = DocumentLayout.from_lengths([994, 37, 500, 23, 5, 1, 70, 33, 17, 99, 15, 16, 65, 47, 81, 45])
NAMES = ("out", "dq", "dk", "dv")


class Shape(NamedTuple):
    """Heads, KV heads, head dim, block size, blocks, dtype."""

    H: int
    K: int
    D: int
    S: int
    k: int
    dtype: torch.dtype = torch.bfloat16


SHAPES = [
    Shape(32, 2, 64, 16, 16),  # 1B
    Shape(32, 8, 128, 16, 16),  # 8B
    Shape(16, 1, 64, 32, 32),
    Shape(8, 8, 64, 64, 4),
    Shape(4, 4, 128, 128, 3),
    Shape(2, 2, 256, 64, 4),
    Shape(10, 2, 192, 32, 4),
    Shape(6, 2, 80, 16, 8, torch.float16),
    Shape(12, 4, 96, 16, 5, torch.float16),
    Shape(64, 1, 32, 16, 16),
    Shape(8, 2, 64, 16, 8, torch.float32),
]


# ---------------------------------------------------------------------- inputs and oracles
def inputs(shape: Shape, layout: DocumentLayout, correlation: float = 0.95, seed: int = 0) -> list[Tensor]:
    """q, k, v and the output's gradient; q and k drift along time, as those of trained models do."""
    generator = torch.Generator("cuda").manual_seed(seed)
    B, T = layout.batch, layout.tokens

    def draw(heads: int, drift: float = 0.0) -> Tensor:
        x = torch.randn(B, T, heads, shape.D, device="cuda", generator=generator)
        if drift:
            x *= (1 - drift**2) ** 0.5
            for i in range(7):
                if (1 << i) < T:
                    x[:, 1 << i :] += drift ** (1 << i) * x[:, : -(1 << i)].clone()
        return x.to(shape.dtype)

    return [draw(shape.H, correlation), draw(shape.K, correlation), draw(shape.K), draw(shape.H)]


def run(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, indices: Tensor, S: int, layout: DocumentLayout | None = None
) -> list[Tensor]:
    """out, lse, dq, dk, dv of the kernels."""
    mine = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse = sparse_attention(*mine, indices, S, layout, return_lse=True, backend="triton")
    out.backward(d_out)
    return [out.detach(), lse, *(x.grad for x in mine)]  # type: ignore[list-item]


def read_mask(indices: Tensor, S: int, layout: DocumentLayout) -> Tensor:
    """``[N, K, N]``: which keys each query reads."""
    document, position = layout.document_ids("cuda").view(-1), layout.positions("cuda").view(-1)
    N, K = len(document), indices.shape[2]
    blocks = layout.max_length // S + 2
    chosen = torch.zeros(N, K, blocks, dtype=torch.bool, device="cuda")
    chosen.scatter_(2, torch.where(indices >= 0, indices, blocks - 1).view(N, K, -1).long(), True)
    same = (document[:, None] == document) & (position <= position[:, None])
    return chosen[:, :, position // S] & same[:, None]


def eager(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, mask: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """out, lse, dq, dk, dv of masked attention computed step by step in ``dtype``."""
    mine = [x.detach().flatten(0, 1).to(dtype).requires_grad_() for x in (q, k, v)]
    query = mine[0].unflatten(1, (k.shape[2], -1))
    logits = torch.einsum("tkgd,skd->tkgs", query, mine[1]) * q.shape[3] ** -0.5
    logits = logits.masked_fill(~mask[:, :, None], float("-inf"))
    out = torch.einsum("tkgs,skd->tkgd", logits.softmax(-1), mine[2]).flatten(1, 2)
    out.backward(d_out.flatten(0, 1).to(dtype))
    lse = logits.detach().logsumexp(-1).flatten(1)
    return [x.detach().view(*q.shape[:2], *x.shape[1:]) for x in (out, lse, *(x.grad for x in mine))]  # type: ignore[union-attr]


def error(x: Tensor, exact: Tensor) -> float:
    """Relative RMS error; infinite for NaN."""
    value = float((x.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))
    return value if value == value else float("inf")


def deviation(x: Tensor, exact: Tensor, d_out: Tensor, layout: DocumentLayout) -> float:
    """As :func:`error`; relative to d_out if all documents have one token: their dq and dk are 0 but for rounding."""
    return error(x, exact) if layout.max_length > 1 else float((x.double() - exact).norm() / d_out.double().norm())


def select(q: Tensor, k: Tensor, shape: Shape, layout: DocumentLayout | None = None, **options: Any) -> Tensor:
    return select_blocks(q, k, SparseSpec(shape.S, shape.k, **options), layout, backend="triton")


@pytest.fixture(params=[0, 1 << 30], ids=["one pass", "two passes"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Selection both ways, whatever the lengths."""
    monkeypatch.setattr("ssa.ops.selection.triton.ONE_PASS_TOKENS", request.param)


@pytest.fixture(autouse=True)
def _release() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


# ---------------------------------------------------------------------- accuracy
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_against_float64(shape: Shape) -> None:
    q, k, v, d_out = inputs(shape, PACKED)
    indices = select(q, k, shape, PACKED)
    mask = read_mask(indices, shape.S, PACKED)
    exact = eager(q, k, v, d_out, mask, torch.float64)
    plain = eager(q, k, v, d_out, mask, shape.dtype)
    mine = run(q, k, v, d_out, indices, shape.S, PACKED)
    assert (mine[1].double() - exact[1]).abs().max() < 2e-5  # lse, natural log
    for i, name in ((0, "out"), (2, "dq"), (3, "dk"), (4, "dv")):
        allowed = (2 if i == 0 else 3) * error(plain[i], exact[i])
        assert error(mine[i], exact[i]) <= max(allowed, 5e-6 if shape.dtype == torch.float32 else 0), name
    for i in (3, 4):  # the keys that most and fewest queries read
        readers = mask.sum(0).float().mean(0)
        for row in (int(readers.argmax()), int(readers.argmin())):
            x, y, z = (t[i].flatten(0, 1)[row].double() for t in (mine, exact, plain))
            scale = exact[i].double().square().mean().sqrt()
            assert (x - y).abs().max() <= 3 * (z - y).abs().max() + 0.02 * scale


def assert_selection(q: Tensor, k: Tensor, shape: Shape, layout: DocumentLayout, indices: Tensor) -> None:
    """Sets equal the true top-k; a different block is allowed where float64 scores agree to 1e-5, or to what rounding
    the largest logits to float32 changes, or to the weights that float32 has no normal number for, one of each head."""
    N, K, S = layout.total, shape.K, shape.S
    grid = layout.block_grid(S, "cuda")
    pooled = pool_keys(k, S, layout).double()
    position = layout.positions("cuda").view(-1)
    block = torch.arange(grid.num_blocks, device="cuda") - grid.first_block[:, None].long()
    own = (position // S)[:, None]
    complete = (block >= 0) & (block < (position[:, None] + 1) // S)
    query = q.flatten(0, 1).double().unflatten(1, (K, -1))
    logits = torch.einsum("tkgd,nkd->tkgn", query, pooled) * shape.D**-0.5
    score = logits.masked_fill(~complete[:, None, None], float("-inf")).softmax(-1).nan_to_num().sum(2)
    least = shape.H // K * torch.finfo(torch.float32).tiny
    tolerance = 1e-5 + 5e-6 * max(0.0, float(logits.abs().max()) - 10)
    score = score.masked_fill(~((block >= 0) & (block < own))[:, None], -1.0)
    need = torch.minimum(own[:, 0], torch.tensor(shape.k - 1, device="cuda"))
    mine = indices.view(N, K, -1).long()
    assert (mine.eq(own[..., None]).sum(-1) == 1).all(), "own block"
    counts = (mine >= 0).sum(-1)
    assert (counts == (need + 1)[:, None]).all()
    assert (mine.diff(dim=-1).gt(0) | mine[..., 1:].eq(-1)).all(), "ascending, padded at the end"
    other = (mine >= 0) & (mine != own[..., None])
    spare = grid.num_blocks  # a column of its own for empty slots and own blocks, so that they overwrite nothing
    place = torch.where(other, mine + grid.first_block[:, None, None], spare)
    worst = torch.where(other, score.gather(2, place.clamp(max=spare - 1)), float("inf")).min(-1).values
    taken = torch.zeros(N, K, spare + 1, dtype=torch.bool, device="cuda").scatter_(2, place, True)[..., :spare]
    best_left = score.masked_fill(taken, -1.0).max(-1).values
    wrong = (best_left > worst * (1 + tolerance) + least) & (need > 0)[:, None]
    assert not wrong.any(), f"{int(wrong.sum())} rows"


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_selection_is_the_true_top_k(shape: Shape) -> None:
    q, k, _, _ = inputs(shape, PACKED)
    assert_selection(q, k, shape, PACKED, select(q, k, shape, PACKED))


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("spike", [None, 0.0, 5.0, 100.0, 1e4])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[2], SHAPES[9]], ids=str)
def test_selection_of_long_documents(shape: Shape, spike: float | None) -> None:
    """Also with keys that the mean key of their neighbours hides, up to logits that overflow any guess; and with equal
    keys (0), where all scores tie."""
    layout = DocumentLayout.from_lengths([6000, 2192])
    q, k, _, _ = inputs(shape, layout)
    if spike is not None:
        place = torch.randint(0, 8192 // shape.S, (12,), device="cuda") * shape.S
        for i in range(shape.S):
            k[:, place + i] = (spike * q[:, place // 2 + 4000, :: shape.H // shape.K]).to(k.dtype)
    if spike == 0.0:
        k.fill_(0.5)
    if spike != 1e4 or shape.dtype != torch.float16:  # float16 keys would overflow
        assert_selection(q, k, shape, layout, select(q, k, shape, layout))


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("options", [{"first_blocks": 1, "local_blocks": 2}, {"rule": "official"}], ids=str)
def test_other_rules_agree_with_the_reference(options: dict[str, Any]) -> None:
    shape = Shape(8, 2, 64, 16, 12, torch.float32)
    q, k, _, _ = inputs(shape, PACKED)
    mine = select(q, k, shape, PACKED, **options)
    reference = select_blocks(q, k, SparseSpec(shape.S, shape.k, **options), PACKED, backend="reference")
    assert (mine != reference).any(-1).float().mean() < 1e-3  # float32 ties


@pytest.mark.parametrize("part", range(10))
def test_random_shapes(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 random batches each: lengths, documents, budgets, strides; every second one selects in one pass."""
    chance = random.Random(part)
    H, K, D, S = [
        (16, 1, 64, 16), (8, 2, 128, 16), (4, 4, 32, 32), (32, 2, 64, 16), (3, 1, 80, 16),
        (8, 8, 64, 64), (64, 1, 64, 16), (4, 2, 96, 128), (12, 2, 64, 32), (16, 4, 128, 64),
    ][part]  # fmt: skip
    dtype = torch.float16 if part % 3 == 2 else torch.bfloat16
    for seed in range(200):
        monkeypatch.setattr("ssa.ops.selection.triton.ONE_PASS_TOKENS", 0 if seed % 2 else 1 << 30)
        rows = chance.randint(1, 2)
        lengths = [max(1, chance.choice([chance.randint(1, 5 * S), S, S - 1, S + 1, 2 * S, 1])) for _ in range(3)]
        layout = DocumentLayout.from_lengths([lengths, lengths[::-1]][:rows])
        shape = Shape(H, K, D, S, chance.choice([1, 2, 3, 4]), dtype)
        q, k, v, d_out = inputs(shape, layout, chance.choice([0.0, 0.9]), seed)
        indices = select(q, k, shape, layout)
        assert_selection(q, k, shape, layout, indices)
        mask = read_mask(indices, S, layout)
        exact = eager(q, k, v, d_out, mask, torch.float64)
        fused = torch.cat([q, k, v], 2).detach()  # views of a fused projection
        views = fused.split([H, K, K], 2)
        mine = run(*views, d_out, indices, S, layout)  # type: ignore[arg-type]
        assert (mine[1].double() - exact[1]).abs().max() < 2e-5, (seed, layout.lengths)
        for i in (0, 2, 3, 4):
            assert deviation(mine[i], exact[i], d_out, layout) < 0.01, (seed, i, layout.lengths, shape)


# ---------------------------------------------------------------------- bits
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_fifty_reruns_are_bit_equal(shape: Shape) -> None:
    layout = DocumentLayout.from_lengths([5000, 3000, 192])
    q, k, v, d_out = inputs(shape, layout, 0.9)
    first: list[Tensor] = []
    for _ in range(50):
        indices = select(q, k, shape, layout)
        results = [indices, *run(q, k, v, d_out, indices, shape.S, layout)]
        first = first or results
        assert all(torch.equal(x, y) for x, y in zip(first, results, strict=True))


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_packed_equals_separate(shape: Shape) -> None:
    q, k, v, d_out = inputs(shape, PACKED)
    indices = select(q, k, shape, PACKED)
    together = [indices, *run(q, k, v, d_out, indices, shape.S, PACKED)]
    start = 0
    for length in PACKED.lengths:
        alone = [x[:, start : start + length].contiguous() for x in (q, k, v, d_out)]
        own = select(*alone[:2], shape)
        for x, y in zip(together, [own, *run(*alone, own, shape.S)], strict=True):  # type: ignore[arg-type]
            assert torch.equal(x[:, start : start + length], y)
        start += length


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("correlation", [0.0, 0.95])
def test_the_future_and_other_documents_change_no_bit(shape: Shape, correlation: float) -> None:
    layout = DocumentLayout.from_lengths([700, 333, 515])
    q, k, v, _ = inputs(shape, layout, correlation)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        indices = select(q, k, shape, layout)
        return [indices, *sparse_attention(q, k, v, indices, shape.S, layout, return_lse=True, backend="triton")]

    before = attend(q, k, v)
    for token in (0, 1, 300, 301, 303, 511, 640, 699, 700, 900, 1032, 1033, 1300):
        end = next(e for e in (700, 1033, 1548) if token < e)
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, token] = (20 * torch.randn(x.shape[2:], device="cuda")).to(x.dtype)
        for x, y in zip(before, attend(*changed), strict=True):
            assert torch.equal(x[:, :token], y[:, :token])
            assert torch.equal(x[:, end:], y[:, end:])


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_union_and_token_kernels_agree(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssa.ops.sparse import triton

    q, k, v, d_out = inputs(shape, PACKED)
    indices = select(q, k, shape, PACKED)
    plan, results = triton.strategy, []
    for limit in (-1, 1 << 30):
        monkeypatch.setattr(triton, "strategy", lambda *a, plan=plan, limit=limit: plan(*a)._replace(limit=limit))
        results.append(run(q, k, v, d_out, indices, shape.S, PACKED))
    for x, y in zip(*results, strict=True):
        assert error(x, y) < 5e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_documents_nan_stays_inside(bad: float) -> None:
    shape, layout = SHAPES[0], DocumentLayout.from_lengths([101, 57, 200])
    q, k, v, d_out = inputs(shape, layout)
    indices = select(q, k, shape, layout)
    before = [indices, *run(q, k, v, d_out, indices, shape.S, layout)]
    broken = [x.clone() for x in (q, k, v, d_out)]
    for x in broken:
        x[:, 101:158] = bad
    indices = select(*broken[:2], shape, layout)
    for x, y in zip(before, [indices, *run(*broken, indices, shape.S, layout)], strict=True):  # type: ignore[arg-type]
        assert torch.equal(x[:, :101], y[:, :101])
        assert torch.equal(x[:, 158:], y[:, 158:])


# ---------------------------------------------------------------------- PyTorch
class Calls(TorchDispatchMode):
    """Records the calls of our operations."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ssa":
            self.made.append((func, args))
        return func(*args, **(kwargs or {}))


def test_the_operations_pass_opcheck() -> None:
    shape, layout = SHAPES[0], DocumentLayout.from_lengths([37, 20])
    q, k, v, d_out = inputs(shape, layout)
    with Calls() as calls:
        run(q, k, v, d_out, select(q, k, shape, layout), shape.S, layout)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        ssa_attention(*leaves, spec=SparseSpec(shape.S, 2), layout=layout)[0].backward(d_out)
    made = {func.name().removeprefix("ssa::"): (func, args) for func, args in calls.made}
    for name in ("select_blocks", "sparse_forward", "sparse_backward", "sparse_begin", "sparse_finish"):
        func, args = made[name]
        fresh = [x.detach().clone() if isinstance(x, Tensor) else x for x in args]
        if name == "sparse_forward":
            fresh[:3] = [x.requires_grad_() for x in fresh[:3]]
        unwritten = name == "sparse_begin"  # parts of no block: two calls need not agree there
        utils = {"test_utils": ("test_schema", "test_faketensor")} if unwritten else {}
        torch.library.opcheck(func, fresh, **utils)


def test_compiles_without_a_graph_break() -> None:
    shape, layout = SHAPES[0], PACKED
    q, k, v, d_out = inputs(shape, layout)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        indices = select_blocks(q, k, SparseSpec(shape.S, shape.k), layout)
        return sparse_attention(q, k, v, indices, shape.S, layout) * 2

    results = []
    for function in (torch.compile(attend, fullgraph=True), attend):
        mine = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = function(*mine)
        results.append([out, *torch.autograd.grad(out, mine, d_out)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_a_new_layout_is_only_a_new_layout() -> None:
    """Launches are remembered by shape and strides; other documents, lengths and views must not reuse a wrong one."""
    shape = SHAPES[0]
    for lengths in ([1024], [17, 1007], [1] * 40, [3000], [16] * 65):
        layout = DocumentLayout.from_lengths(lengths)
        q, k, v, d_out = inputs(shape, layout)
        fused = torch.cat([q, k, v], 2).split([shape.H, shape.K, shape.K], 2)
        for views in ((q, k, v), fused):
            indices = select(*views[:2], shape, layout)
            assert_selection(q, k, shape, layout, indices)
            exact = eager(q, k, v, d_out, read_mask(indices, shape.S, layout), torch.float64)
            mine = run(*views, d_out, indices, shape.S, layout)
            for i in (0, 2, 3, 4):
                assert deviation(mine[i], exact[i], d_out, layout) < 0.01


# ---------------------------------------------------------------------- extremes
def test_offsets_beyond_32_bits() -> None:
    """More than 2^31 elements of q: the last document has the bits of a run of its own."""
    shape = Shape(32, 2, 128, 16, 8)
    layout = DocumentLayout.from_lengths([32768] * 16 + [20001])
    assert layout.total * shape.H * shape.D > 1 << 31
    torch.use_deterministic_algorithms(False)  # poisoning tens of gigabytes takes long
    q, k, v, d_out = (torch.randn(1, layout.total, h, 128, device="cuda", dtype=torch.bfloat16) for h in (32, 2, 2, 32))
    indices = select(q, k, shape, layout)
    together = [indices, *run(q, k, v, d_out, indices, 16, layout)]
    alone = [x[:, -20001:].contiguous() for x in (q, k, v, d_out)]
    own = select(*alone[:2], shape)
    for x, y in zip(together, [own, *run(*alone, own, 16)], strict=True):  # type: ignore[arg-type]
        assert torch.equal(x[:, -20001:], y)


def test_the_sorted_index_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssa.ops.sparse import triton, triton_index

    shape = SHAPES[0]
    q, k, v, d_out = inputs(shape, PACKED, 0.0)
    indices = select(q, k, shape, PACKED)
    plan = triton.strategy
    monkeypatch.setattr(triton, "strategy", lambda *a: plan(*a)._replace(cost=(1, 99, 99)))
    usual = run(q, k, v, d_out, indices, shape.S, PACKED)
    monkeypatch.setattr(triton_index, "BITMAP_BYTES", 0)
    assert all(torch.equal(x, y) for x, y in zip(usual, run(q, k, v, d_out, indices, shape.S, PACKED), strict=True))


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_a_block_that_everybody_reads(shape: Shape) -> None:
    layout = DocumentLayout.single(1, 4096)
    q, k, v, d_out = inputs(shape, layout, 0.0)
    own = layout.positions("cuda")[:, :, None, None] // shape.S
    indices = torch.cat([torch.zeros_like(own), torch.where(own > 0, own, -1)], -1).expand(-1, -1, shape.K, -1).int()
    exact = eager(q, k, v, d_out, read_mask(indices, shape.S, layout), torch.float64)
    mine = run(q, k, v, d_out, indices, shape.S, layout)
    for i in (0, 2, 3, 4):
        assert error(mine[i], exact[i]) < 5e-3


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_a_budget_that_covers_everything_is_full_attention(shape: Shape) -> None:
    layout = DocumentLayout.from_lengths([700, 324])
    wide = shape._replace(k=64)
    q, k, v, d_out = inputs(shape, layout, 0.0)
    indices = select(q, k, wide, layout)
    position, document = layout.positions("cuda").view(-1), layout.document_ids("cuda").view(-1)
    causal = (document[:, None] == document) & (position <= position[:, None])
    mask = causal[:, None].expand(-1, shape.K, -1)
    exact = eager(q, k, v, d_out, mask, torch.float64)
    mine = run(q, k, v, d_out, indices, shape.S, layout)
    assert (mine[1].double() - exact[1]).abs().max() < 2e-5
    for i in (0, 2, 3, 4):
        assert error(mine[i], exact[i]) < 5e-3


def test_million_tokens() -> None:
    """Runs through at 2^20 tokens (one document of 2^19): finite everywhere."""
    shape = Shape(4, 1, 64, 32, 8)
    layout = DocumentLayout.from_lengths([1 << 19, *[1 << 16] * 8])
    torch.use_deterministic_algorithms(False)
    q, k, v, d_out = (torch.randn(1, layout.total, h, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 1, 1, 4))
    for x in run(q, k, v, d_out, select(q, k, shape, layout), shape.S, layout):
        assert torch.isfinite(x).all()
