"""Adaptive budgets: certified limits always hold, budgets are as small as they can be, caches agree with whole runs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.errors import BackendError, InputError
from ssa.ops import SparseSpec, adaptive_blocks, full_attention, select_blocks, sparse_attention
from ssa.ops.budget.api import empty_block_bounds, update_block_bounds
from ssa.ops.budget.reference import Masses, block_bounds, bounded_masses, choose
from ssa.ops.decode import attend_blocks_cached, decode_attention, select_blocks_cached, update_pooled

S = 8


def true_dropped(q: Tensor, k: Tensor, indices: Tensor) -> Tensor:
    """Dropped mass of the worst head ``[B, T, K]`` in float64, summed over the tokens that are left out."""
    return dropped_by_head(q, k, indices).amax(-1)


def mean_dropped(q: Tensor, k: Tensor, indices: Tensor) -> Tensor:
    """The same, mean over heads."""
    return dropped_by_head(q, k, indices).mean(-1)


def dropped_by_head(q: Tensor, k: Tensor, indices: Tensor, block_size: int = S) -> Tensor:
    """``[B, T, K, G]``."""
    B, T, _, D = q.shape
    K = k.shape[2]
    query = q.double().unflatten(2, (K, -1))
    logits = torch.einsum("btkgd,bskd->btkgs", query, k.double()) * D**-0.5
    place = torch.arange(T)
    logits = logits.masked_fill((place > place[:, None])[None, :, None, None], -torch.inf)
    picked = torch.zeros(B, T, K, T // block_size + 2, dtype=torch.bool)
    picked.scatter_(3, torch.where(indices >= 0, indices, T // block_size + 1).long(), True)
    kept = picked[..., place // block_size][:, :, :, None]
    return (logits.softmax(-1) * ~kept).sum(-1)


def random_case(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q = torch.randn(2, 64, 4, 16, generator=generator)
    k = torch.randn(2, 64, 2, 16, generator=generator)
    return (q * 2).to(dtype), (k + torch.randn(2, 1, 2, 16, generator=generator)).to(dtype)


def adversarial(kind: str, generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q, k = (x.float() for x in random_case(generator, dtype))
    if kind == "one hot key":
        k[:, 11] = 8 * q[:, 40, ::2]
    elif kind == "outlier behind a benign mean":  # the block's mean is small, one key in it is not
        k[:, 16] = 6 * q[:, 50, ::2]
        k[:, 17] = -k[:, 16]
    elif kind == "huge norms":
        k *= 3e3
    elif kind == "tiny norms":
        k *= 1e-6
    elif kind == "equal keys":
        k[:] = k[:, :1]
    elif kind == "a large common offset":
        k += 200
    elif kind == "drifting keys":
        k = k.cumsum(1)
    return q.to(dtype), k.to(dtype)


KINDS = (
    "one hot key",
    "outlier behind a benign mean",
    "huge norms",
    "tiny norms",
    "equal keys",
    "a large common offset",
    "drifting keys",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("limit", [0.0, 0.01, 0.2, 0.7])
def test_certified_is_never_exceeded(limit: float, dtype: torch.dtype) -> None:
    """8 kinds x 2 x 64 queries x 2 KV heads for every limit and dtype: 24,576 cases."""
    generator = torch.Generator().manual_seed(1)
    spec = SparseSpec(S, 64, max_dropped_mass=limit, flavour="certified")
    cases = [random_case(generator, dtype)] + [adversarial(kind, generator, dtype) for kind in KINDS]
    for q, k in cases:
        found = adaptive_blocks(q, k, spec)
        dropped = true_dropped(q, k, found.indices)
        assert (dropped <= limit + 1e-12).all()
        assert (dropped <= found.bound.double() + 1e-12).all()
        assert (found.bound <= limit * (1 + 1e-5)).all()
        own = (torch.arange(64) // S)[:, None]
        assert (found.indices.amax(-1) == own).all()  # the own block is always read
        if limit == 0:
            assert torch.equal(found.counts, (own + 1).expand(2, -1, 2).int())


def test_certified_drops_something() -> None:
    """A certificate that keeps everything would be right and useless: tight blocks far from the query are dropped."""
    q, k = torch.ones(1, 64, 2, 16) * 4, torch.randn(1, 64, 1, 16) * 0.05
    k[:, :32] -= 1
    found = adaptive_blocks(q, k, SparseSpec(S, 64, max_dropped_mass=0.01, flavour="certified"))
    assert (found.counts[0, 40:] <= torch.arange(40, 64)[:, None] // S - 2).all()


@pytest.mark.parametrize("flavour", ["estimated", "certified", "per_block"])
def test_budgets_shrink_with_the_limit(flavour: str) -> None:
    q, k = random_case(torch.Generator().manual_seed(0), torch.float32)
    limits = [0.0, 0.001, 0.01, 0.05, 0.2, 0.5, 0.9, 0.999]
    found = [adaptive_blocks(q, k, SparseSpec(S, 64, max_dropped_mass=x, flavour=flavour)) for x in limits]
    for smaller, larger in pairwise(found):
        assert (larger.counts <= smaller.counts).all()
    assert torch.equal(found[0].counts[0, :, 0], (torch.arange(64) // S + 1).int())
    assert (found[-1].counts.float().mean() < found[0].counts.float().mean() - 1).all()


def test_estimated_is_exact_where_blocks_are_uniform() -> None:
    """Equal keys in every block: mean-key masses are the masses, so the fewest blocks are found and hold."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 64, 2, 16, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 8, 1, 16, generator=generator, dtype=torch.float64).repeat_interleave(S, 1)
    found = adaptive_blocks(q, k, SparseSpec(S, 64, max_dropped_mass=0.1))
    dropped = true_dropped(q, k, found.indices)
    assert (dropped <= 0.1).all()
    torch.testing.assert_close(dropped, found.bound, atol=1e-12, rtol=1e-9)


def test_one_head_takes_the_fewest_blocks() -> None:
    """Against every subset, by brute force: with one head a falling order of mass is optimal."""
    masses = torch.randn(40, 1, 1, 6, dtype=torch.float64) * 2
    position = torch.full((40,), 6 * S - 1)
    spec = SparseSpec(S, 64, max_dropped_mass=0.15)
    found = choose(Masses(masses, masses), masses[..., -1], torch.zeros(40, dtype=torch.int64), position, spec)
    share = masses[:, 0, 0].softmax(-1)
    subsets = torch.tensor([[(i >> j) & 1 for j in range(6)] for i in range(32, 64)], dtype=torch.float64)
    enough = share @ subsets.T >= 0.85
    fewest = torch.where(enough, subsets.sum(1), 99.0).amin(1)
    assert torch.equal(found.counts[:, 0].double(), fewest)


def test_a_limit_per_block_drops_the_least_at_its_cost() -> None:
    """Uniform blocks, so that estimates are masses: no fixed budget with as many blocks in all drops less in all."""
    generator = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(2, 64, 4, 16, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 8, 2, 16, generator=generator, dtype=torch.float64).repeat_interleave(S, 1)
    share = lambda spec: (blocks := select_blocks(q, k, spec), mean_dropped(q, k, blocks))  # noqa: E731
    fixed = [share(SparseSpec(S, n)) for n in range(1, 9)]
    for limit in (0.001, 0.01, 0.05, 0.2):
        blocks, dropped = share(SparseSpec(S, 64, max_dropped_mass=limit, flavour="per_block"))
        cost = float((blocks >= 0).sum())
        for other, mass in fixed:
            if float((other >= 0).sum()) <= cost:
                assert dropped.sum() <= mass.sum() + 1e-9
    everything = select_blocks(q, k, SparseSpec(S, 64, max_dropped_mass=0.0, flavour="per_block"))
    assert torch.equal((everything >= 0).sum(-1)[0, :, 0], torch.arange(64) // S + 1)


def test_a_larger_safety_takes_more_blocks() -> None:
    q, k = random_case(torch.Generator().manual_seed(0), torch.float32)
    few, many = (adaptive_blocks(q, k, SparseSpec(S, 64, max_dropped_mass=0.2, safety=x)) for x in (1.0, 4.0))
    assert (few.counts <= many.counts).all()
    exceeded = [(true_dropped(q, k, x.indices) > 0.2).double().mean() for x in (few, many)]
    assert exceeded[1] < exceeded[0]


def test_bounds_hold_for_every_block() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for kind in KINDS:
            q, k = adversarial(kind, generator, dtype)
            blocks = k[0].unflatten(0, (-1, S))
            mean = blocks.float().mean(1).to(dtype)
            low, high = bounded_masses(q[0], mean, block_bounds(blocks, mean), 0.25, S)
            query = q[0].double().unflatten(1, (2, -1))
            exact = (torch.einsum("tkgd,nskd->tkgns", query, blocks.double()) * 0.25).logsumexp(-1)
            assert (low.double() <= exact).all(), kind
            assert (high.double() >= exact).all(), kind


def test_a_cap_is_kept_and_the_bound_says_so() -> None:
    q, k = random_case(torch.Generator().manual_seed(0), torch.float32)
    spec = SparseSpec(S, 2, max_dropped_mass=0.01, flavour="certified")
    found = adaptive_blocks(q, k, spec)
    assert int(found.counts.max()) == 2
    assert (found.bound[:, 40:] > 0.01).any()
    assert (true_dropped(q, k, found.indices) <= found.bound.double() + 1e-6).all()
    forced = adaptive_blocks(q, k, SparseSpec(S, 8, 1, 2, max_dropped_mass=0.99))
    assert (forced.indices[:, 40:, :, 0] == 0).all()
    assert int(forced.counts[:, 40:].min()) >= 3


@pytest.mark.parametrize("flavour", ["estimated", "certified"])
def test_documents_do_not_see_each_other(flavour: str) -> None:
    q, k = random_case(torch.Generator().manual_seed(0), torch.float32)
    layout = DocumentLayout.from_lengths([[37, 27], [64]])
    spec = SparseSpec(S, 64, max_dropped_mass=0.1, flavour=flavour)
    before = adaptive_blocks(q, k, spec, layout)
    k[0, :37] = float("nan")
    after = adaptive_blocks(q, k, spec, layout)
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x[0, 37:], y[0, 37:])
        assert torch.equal(x[1], y[1])
    alone = adaptive_blocks(q[:1, 37:], k[:1, 37:], spec)
    assert torch.equal(alone.counts, before.counts[:1, 37:])


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = random_case(torch.Generator().manual_seed(0), torch.float32)
    spec = SparseSpec(S, 64, max_dropped_mass=0.1, flavour="certified")
    whole = adaptive_blocks(q, k, spec)
    monkeypatch.setattr("ssa.ops.budget.reference.CHUNK_ELEMENTS", 500)
    assert torch.equal(adaptive_blocks(q, k, spec).indices, whole.indices)


@pytest.mark.parametrize("flavour", ["estimated", "certified", "per_block"])
@pytest.mark.parametrize("starts", [None, [0, 19]])
def test_decoding_chooses_what_the_whole_sequence_chooses(flavour: str, starts: list[int] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    N, C, ends = 3, 70, [66, 52]
    q, k = (torch.randn(2, 66, h, 16, generator=generator, dtype=torch.float64) for h in (4, 2))
    v = torch.randn(2, 66, 2, 16, generator=generator, dtype=torch.float64)
    first = starts or [0, 0]
    cached_k, cached_v = torch.full((2, 2, C, 2, 16), float("nan"), dtype=torch.float64)
    for b in range(2):
        cached_k[b, first[b] : ends[b]], cached_v[b, first[b] : ends[b]] = (x[b, : ends[b] - first[b]] for x in (k, v))
    begin = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    pooled = torch.full((2, 9, 2, 16), float("nan"), dtype=torch.float64)
    bounds = empty_block_bounds(pooled)
    for filled in range(5, 71, 5):  # five tokens at a time
        at = torch.tensor([min(filled, n) for n in ends], dtype=torch.int32)
        begun = None if begin is None else torch.minimum(begin, at)
        update_pooled(pooled, cached_k, at, 5, begun, S)
        update_block_bounds(bounds, pooled, cached_k, at, 5, begun, S)
    lengths = torch.tensor(ends, dtype=torch.int32)
    spec = SparseSpec(S, 9, max_dropped_mass=0.3, flavour=flavour)
    count = [e - f for e, f in zip(ends, first, strict=True)]
    newest = torch.stack([q[b, n - N : n] for b, n in enumerate(count)])
    given = {"starts": begin, "bounds": bounds if flavour == "certified" else None}
    indices = select_blocks_cached(newest, pooled, lengths, spec, k=cached_k, **given)
    out = decode_attention(newest, cached_k, cached_v, pooled, lengths, spec, **given)
    expected = attend_blocks_cached(newest, cached_k, cached_v, indices, S, lengths, starts=begin)[0]
    assert torch.equal(out, expected)
    for b, n in enumerate(count):
        whole = select_blocks(q[b : b + 1, :n], k[b : b + 1, :n], spec)[0, -N:]
        width = whole.shape[-1]
        assert torch.equal(indices[b, ..., :width], whole)
        assert (indices[b, ..., width:] == -1).all()
        y = sparse_attention(q[b : b + 1, :n], k[b : b + 1, :n], v[b : b + 1, :n],
                             select_blocks(q[b : b + 1, :n], k[b : b + 1, :n], spec), S)  # fmt: skip
        torch.testing.assert_close(out[b], y[0, -N:])


def test_a_limit_of_zero_is_full_attention() -> None:
    q, k = random_case(torch.Generator().manual_seed(0), torch.float32)
    indices = select_blocks(q, k, SparseSpec(S, 64, max_dropped_mass=0.0))
    torch.testing.assert_close(sparse_attention(q, k, k, indices, S), full_attention(q, k, k), atol=1e-5, rtol=1e-5)


def test_padding_takes_no_block() -> None:
    q, k = torch.randn(1, 4, 2, 16), torch.randn(1, 16, 1, 16)
    pooled = k.unflatten(1, (2, S)).mean(2)
    lengths, starts = (torch.tensor([x], dtype=torch.int32) for x in (10, 8))
    out = decode_attention(
        q, k, k, pooled, lengths, SparseSpec(S, 2, max_dropped_mass=0.1), starts=starts
    )  # the first two new tokens are padding
    assert not out[0, :2].any()
    assert out[0, 2:].isfinite().all()
    assert out[0, 2:].any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_dropped_mass": 1.0}, r"a number in \[0, 1\)"),
        ({"max_dropped_mass": -0.1}, r"a number in \[0, 1\)"),
        ({"flavour": "guessed"}, "flavour"),
        ({"safety": 0.0}, "safety"),
        ({"max_dropped_mass": 0.1, "rule": "official"}, "rule='exact'"),
    ],
)
def test_bad_limits_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SparseSpec(16, 16, **fields)


def test_missing_parts_are_asked_for() -> None:
    q, k = random_case(torch.Generator().manual_seed(0), torch.float32)
    lengths = torch.tensor([64, 64], dtype=torch.int32)
    pooled = k.unflatten(1, (-1, S)).mean(2)
    spec = SparseSpec(S, 8, max_dropped_mass=0.1, flavour="certified")
    with pytest.raises(InputError, match="update_block_bounds"):
        decode_attention(q[:, -1:], k, k, pooled, lengths, spec)
    spec = SparseSpec(S, 8, max_dropped_mass=0.1)
    with pytest.raises(InputError, match=r"select_blocks_cached\.k"):
        select_blocks_cached(q[:, -1:], pooled, lengths, spec)
    with pytest.raises(BackendError, match="max_dropped_mass"):
        select_blocks(q, k, spec, backend="triton")
    with pytest.raises(InputError, match="max_dropped_mass"):
        adaptive_blocks(q, k, SparseSpec(S, 8))
