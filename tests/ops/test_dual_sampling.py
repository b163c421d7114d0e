"""The alignment estimated on sampled query rows: every row with one probability, no bias, at its share of the cost."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from oracles import leaves, qkv, random_indices
from ssa.documents import DocumentLayout
from ssa.errors import InputError
from ssa.ops import AlignmentSpec, SparseSpec, ssa_attention
from ssa.ops.dual import api, sampling
from ssa.ops.dual.sampling import choose_rows, draw_tile, sample_rows, tiles_per_stratum

pytestmark = pytest.mark.usefixtures("poisoned_memory")
FRACTIONS = [1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16]
CPU = torch.device("cpu")
LAYOUTS = {
    "two rows": DocumentLayout.single(2, 32),
    "a few runs": DocumentLayout.from_lengths([[21, 5, 5, 33], [32, 32]]),
    "many documents": DocumentLayout.from_lengths([[9, 1, 16, 2, 20], [26, 7, 3, 12]]),
    "fewer tokens than tiles": DocumentLayout.from_lengths([3]),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_every_row_has_probability_f(layout: DocumentLayout, fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles of a stratum are equally likely, so taking tile 0, 1, ... of every stratum must give each row once."""
    monkeypatch.setattr(sampling, "TILE", 4)
    tiles = tiles_per_stratum(fraction)
    choices = [choose_rows(layout, tiles, lambda _, i=i: i) for i in range(tiles)]
    for rows in choices:
        if rows.count:
            rows.check("test", layout)
    counted = Counter(row for rows in choices for row in rows.index(CPU).tolist())
    assert counted == dict.fromkeys(range(layout.total), 1)


def test_a_tile_is_drawn_uniformly_and_from_its_arguments_alone() -> None:
    drawn = Counter(draw_tile(seed, stratum, 8) for seed in range(200) for stratum in range(20))
    assert all(abs(n - 500) < 5 * (500 * 7 / 8) ** 0.5 for n in drawn.values()), drawn
    assert draw_tile(2**64 + 3, 1, 8) == draw_tile(3, 1, 8)
    pairs = Counter((draw_tile(seed, 0, 4), draw_tile(seed, 1, 4)) for seed in range(1600))
    assert all(abs(n - 100) < 50 for n in pairs.values()), "strata are drawn independently"


def test_the_sample_is_a_function_of_layout_fraction_and_seed() -> None:
    layout = DocumentLayout.single(4, 8192)
    rows = sample_rows(layout, 1 / 8, 5)
    assert rows == sample_rows(DocumentLayout.single(4, 8192), 1 / 8, 5)
    assert len({sample_rows(layout, 1 / 8, seed) for seed in range(100)}) == 8
    assert [(w.documents, w.size, w.begin // 4096) for w in rows.windows] == [(4, 512, i) for i in range(2)]


@pytest.mark.parametrize("tokens", [1024, 8192, 32768])
def test_the_cost_is_the_fraction_of_full_attention(tokens: int) -> None:
    """Pairs of query and key: on average f, and in every draw where a document has two strata."""
    layout = DocumentLayout.single(1, tokens)
    shares = []
    for seed in range(300):
        rows = sample_rows(layout, 1 / 8, seed)
        pairs = sum((w.begin + 1 + w.end) * w.size / 2 for w in rows.windows)
        shares.append(pairs / (tokens * (tokens + 1) / 2))
    assert abs(sum(shares) / len(shares) - 1 / 8) < 0.01
    if tokens >= 2048:
        assert max(shares) - min(shares) < 1e-9


# ---------------------------------------------------------------------- the whole operation
def case(layout: DocumentLayout, dtype: Any = torch.float64) -> tuple[list[Tensor], Tensor]:
    q, k, v = qkv(layout, 4, 2, 5, dtype)
    gate = torch.rand(q.shape[:3], dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    return leaves(q, k, 3 * v, gate), random_indices(layout, 2, 2, 4, 0)


def run(layout: DocumentLayout, inputs: list[Tensor], indices: Tensor, fraction: float, **keywords: Any) -> Any:
    alignment = AlignmentSpec(query_fraction=fraction, **keywords.pop("alignment", {}))
    spec = SparseSpec(4, 2)
    main, seed = keywords.pop("main", "sparse"), keywords.pop("seed", 0)
    return ssa_attention(
        *inputs, main, spec=spec, alignment=alignment, layout=layout, block_indices=indices, seed=seed, **keywords
    )


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_value_and_gradients_are_unbiased(
    layout: DocumentLayout, fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate is a sum over strata, so the mean over their tiles, taken together, is the mean over all samples."""
    monkeypatch.setattr(sampling, "TILE", 4)
    inputs, indices = case(layout)
    tiles = tiles_per_stratum(fraction)
    out, exact = run(layout, inputs, indices, 1.0)
    expected = [exact.loss, exact.sparsity, *torch.autograd.grad(exact.loss, inputs)]
    means = [torch.zeros_like(x) for x in expected]
    for i in range(tiles):
        monkeypatch.setattr(api, "sample_rows", lambda layout, f, seed, i=i: choose_rows(layout, tiles, lambda _: i))
        sampled, found = run(layout, inputs, indices, fraction)
        assert torch.equal(sampled, out), "the main stream is exact"
        assert 0 <= found.attention_sparsity <= 1
        for mean, x in zip(means, [found.loss, found.sparsity, *torch.autograd.grad(found.loss, inputs)], strict=True):
            mean += x.detach() / tiles
    for x, y in zip(means, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("align_on", ["gated", "raw"])
@pytest.mark.parametrize("distance", ["smooth_l1", "l2"])
@pytest.mark.parametrize("directions", ["both", "sparsity", "commitment"])
@pytest.mark.parametrize("gated", [True, False])
def test_equals_the_loss_on_the_drawn_rows(align_on: str, distance: str, directions: str, gated: bool) -> None:
    """Output and alignment at once, against autograd through both dense streams with the other rows masked out."""
    from ssa.ops import full_attention, sparse_attention
    from ssa.ops.dual.alignment import align

    layout = LAYOUTS["a few runs"]
    inputs, indices = case(layout)
    q, k, v, gate = inputs
    names = {"align_on": align_on, "distance": distance, "directions": directions}
    given = [q, k, v, gate if gated else None]
    out, alignment = run(layout, given, indices, 1 / 4, alignment=names, seed=3)  # type: ignore[arg-type]
    rows = sample_rows(layout, 1 / 4, 3).index(CPU)
    full, sparse = full_attention(q, k, v, layout), sparse_attention(q, k, v, indices, 4, layout)
    compared = [full, sparse]
    if gated:
        full, sparse = full * gate[..., None], sparse * gate[..., None]
        compared = [full, sparse] if align_on == "gated" else compared
    drawn = (x.flatten(0, 1)[rows] for x in compared)
    loss = align(*drawn, AlignmentSpec(**names))[0] * (len(rows) * 4 / layout.total)  # type: ignore[arg-type]
    torch.testing.assert_close(out, sparse, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(alignment.loss, loss, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(out)
    wanted = inputs if gated else inputs[:3]
    mine, theirs = ((x * weight).sum() + 5 * y for x, y in ((out, alignment.loss), (sparse, loss)))
    for x, y in zip(torch.autograd.grad(mine, wanted), torch.autograd.grad(theirs, wanted), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_attention_sparsity_is_the_mean_over_the_drawn_rows() -> None:
    from ssa.ops import full_attention, sparse_attention

    layout = LAYOUTS["a few runs"]
    (q, k, v, gate), indices = case(layout)
    _, found = run(layout, [q, k, v, gate], indices, 1 / 4, seed=3)
    _, lse = full_attention(q, k, v, layout, return_lse=True)
    _, sparse_lse = sparse_attention(q, k, v, indices, 4, layout, return_lse=True)
    drawn = (sparse_lse - lse).exp().flatten(0, 1)[sample_rows(layout, 1 / 4, 3).index(CPU)]
    torch.testing.assert_close(found.attention_sparsity, drawn.mean().detach())


def test_full_steps_are_exact_and_need_no_seed() -> None:
    layout = LAYOUTS["two rows"]
    inputs, indices = case(layout)
    exact, sampled = (run(layout, inputs, indices, f, main="full", seed=None) for f in (1.0, 1 / 8))
    assert torch.equal(exact[0], sampled[0])
    assert torch.equal(exact[1].loss, sampled[1].loss)


def test_sparse_steps_need_a_seed() -> None:
    layout = LAYOUTS["two rows"]
    with pytest.raises(InputError, match=r"ssa_attention\.seed: got None; expected an integer"):
        run(layout, *case(layout), 1 / 8, seed=None)


def test_both_streams_of_the_drawn_rows_get_gradient_and_nothing_else_of_full_is_computed() -> None:
    """A NaN in the queries of a row that is not drawn reaches neither the loss nor, through it, the keys."""
    layout = DocumentLayout.single(1, 64)
    inputs, indices = case(layout)
    rows = sample_rows(layout, 1 / 4, 0)
    drawn = set(rows.index(CPU).tolist())
    outside = [row for row in range(layout.total) if row not in drawn]
    with torch.no_grad():
        inputs[0][0, outside] = float("nan")
    _, alignment = run(layout, inputs, indices, 1 / 4, seed=0)
    assert alignment.loss.isfinite()
    q_grad, *_ = torch.autograd.grad(alignment.loss, inputs)
    assert (q_grad[0, sorted(drawn)] != 0).any()


def test_early_tiles_come_with_late_ones() -> None:
    early, late = sample_rows(DocumentLayout.single(1, 32768), 1 / 16, 1).windows
    assert early.begin == 32768 - late.end
    assert early.end <= 16384 <= late.begin
