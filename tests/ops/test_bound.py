"""Theorem 1 and the quantities behind it, against dense probabilities."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from oracles import (
    LargestTensor,
    all_blocks,
    causal_mask,
    dense_attention,
    fuzz,
    layouts,
    qkv,
    random_indices,
    selected_mask,
)
from ssa.documents import DocumentLayout
from ssa.ops import (
    attention_entropy,
    attention_sparsity,
    bound,
    dropped_mass,
    error_bound,
    full_attention,
    sparse_attention,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EXACT = {"rtol": 1e-9, "atol": 1e-11}


@st.composite
def cases(draw: st.DrawFn) -> tuple:
    """q, k, v, indices, block size, layout; values may hold outliers of any size and sign."""
    S = draw(st.sampled_from([1, 2, 4]))
    layout = draw(layouts(S))
    group, kv_heads, seed = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 10**6))
    q, k, v = qkv(layout, group * kv_heads, kv_heads, draw(st.sampled_from([1, 2, 5])), seed=seed)
    sharpness = draw(st.sampled_from([0.0, 0.3, 3.0, 30.0]))  # from uniform attention to one key
    if draw(st.booleans()):
        outlier = draw(st.integers(0, layout.tokens - 1))
        v[:, outlier] *= draw(st.sampled_from([-1e3, 0.0, 1e3]))
    return sharpness * q, k, v, random_indices(layout, kv_heads, draw(st.integers(1, 3)), S, seed), S, layout


def dense_pair(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, S: int, layout: DocumentLayout) -> tuple:
    """Full and sparse attention, dropped tokens ``[B, T, H, T]`` and values per query head ``[B, T, H, D]``."""
    group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    selected = selected_mask(indices, S, layout)
    full = dense_attention(q, k, v, causal_mask(layout), scale)
    sparse = dense_attention(q, k, v, selected, scale)
    dropped = (causal_mask(layout) & ~selected).repeat_interleave(group, 2)
    return full, sparse, dropped, v.repeat_interleave(group, 2)


@fuzz(200)
@given(cases())
def test_theorem_1_holds(case: tuple) -> None:
    result = error_bound(*case)
    slack = 1e-13 * case[2].norm(dim=-1).max()  # float64 rounding of outputs as large as the largest value
    assert (result.error <= result.bound + slack).all()
    assert ((result.dropped_mass >= 0) & (result.dropped_mass <= 1)).all()


@fuzz(200)
@given(cases())
def test_both_sides_are_the_dense_ones(case: tuple) -> None:
    result = error_bound(*case)
    full, sparse, dropped, values = dense_pair(*case)
    delta = (full.probability * dropped).sum(-1)
    largest = (values.norm(dim=-1).transpose(1, 2)[:, None] * dropped).amax(-1)
    scale = {"rtol": 1e-9, "atol": 1e-12 * float(values.norm(dim=-1).max()) + 1e-14}
    torch.testing.assert_close(result.dropped_mass, delta, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(result.error, (full.out - sparse.out).norm(dim=-1), **scale)
    torch.testing.assert_close(result.bound, delta * (largest + sparse.out.norm(dim=-1)), **scale)


@fuzz(100)
@given(cases())
def test_the_identity_behind_the_theorem(case: tuple) -> None:
    """On the operations' own outputs: h_full - h_sparse = sum of dropped a_full v - delta h_sparse."""
    q, k, v, indices, S, layout = case
    h_full, lse_full = full_attention(q, k, v, layout, return_lse=True)
    h_sparse, lse_sparse = sparse_attention(q, k, v, indices, S, layout, return_lse=True)
    full, sparse, dropped, values = dense_pair(*case)
    lost = torch.einsum("bths,bshd->bthd", full.probability * dropped, values)
    delta = dropped_mass(lse_sparse, lse_full)[..., None]
    size = float(v.abs().max()) + 1e-9
    torch.testing.assert_close(h_full - h_sparse, lost - delta * h_sparse, rtol=0, atol=1e-12 * size)
    # and the step before it: on a selected token, full attention is (1 - delta) times sparse attention
    torch.testing.assert_close(full.probability * ~dropped, (1 - delta) * sparse.probability, rtol=0, atol=1e-12)


@fuzz(100)
@given(cases())
def test_mass_from_log_sum_exps(case: tuple) -> None:
    q, k, v, indices, S, layout = case
    _, lse_full = full_attention(q, k, v, layout, return_lse=True)
    _, lse_sparse = sparse_attention(q, k, v, indices, S, layout, return_lse=True)
    full, _, dropped, _ = dense_pair(*case)
    kept = attention_sparsity(lse_sparse, lse_full)
    torch.testing.assert_close(kept, (full.probability * ~dropped).sum(-1), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(kept + dropped_mass(lse_sparse, lse_full), torch.ones_like(kept), rtol=1e-12, atol=0)
    assert ((kept >= 0) & (kept <= 1)).all()
    assert (lse_sparse <= lse_full + 1e-12).all()


def test_the_bound_is_reached() -> None:
    """One dropped token whose value points against the sparse output: error and bound are equal."""
    q, k = torch.zeros(1, 4, 1, 2).double(), torch.zeros(1, 4, 1, 2).double()
    v = torch.tensor([[-6.0, 0], [2, 0], [2, 0], [2, 0]]).double().view(1, 4, 1, 2)
    indices = torch.tensor([0, 1, 1, 1]).view(1, 4, 1, 1)
    indices = torch.cat([indices, torch.tensor([-1, -1, 2, 2]).view(1, 4, 1, 1)], -1)
    result = error_bound(q, k, v, indices, 1)
    # token 2 reads tokens 1 and 2: h_sparse = 2, h_full = -2/3, delta = 1/3, bound (6 + 2) / 3
    assert float(result.dropped_mass[0, 2, 0]) == pytest.approx(1 / 3, rel=1e-14)
    assert float(result.error[0, 2, 0]) == pytest.approx(8 / 3, rel=1e-14)
    assert float(result.bound[0, 2, 0]) == pytest.approx(8 / 3, rel=1e-14)


def test_nothing_dropped_nothing_lost() -> None:
    layout = DocumentLayout.from_lengths([9, 1, 16])
    result = error_bound(*qkv(layout, 4, 2), all_blocks(layout, 2, 4), 4, layout)
    assert result.error.max() < 1e-14
    assert result.dropped_mass.max() < 1e-14
    assert result.bound.max() < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_is_measured_in_float32(dtype: torch.dtype) -> None:
    layout = DocumentLayout.from_lengths([30, 11])
    q, k, v = qkv(layout, 4, 2, 8, dtype)
    indices = random_indices(layout, 2, 2, 4, seed=1)
    low = error_bound(q, k, v, indices, 4, layout)
    exact = error_bound(q.double(), k.double(), v.double(), indices, 4, layout)
    for x, y in zip(low, exact, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


def test_a_tiny_dropped_mass_does_not_cancel() -> None:
    assert float(dropped_mass(torch.tensor(-1e-12), torch.tensor(0.0))) == pytest.approx(1e-12, rel=1e-6, abs=0)


def test_rounding_above_one_is_clamped() -> None:
    above, below = torch.tensor([1e-6]), torch.tensor([0.0])
    assert float(attention_sparsity(above, below)) == 1
    assert float(dropped_mass(above, below)) == 0


@pytest.mark.parametrize("function", [attention_sparsity, dropped_mass])
def test_log_sum_exps_must_match(function: object) -> None:
    lse = torch.zeros(1, 4, 2)
    for other, what in (
        (torch.zeros(1, 4, 1), "shape"),
        (torch.zeros(1, 4, 2).double(), "dtype"),
        (torch.zeros(1, 4, 2, device="meta"), "device"),
    ):
        with pytest.raises(ValueError, match=rf"{function.__name__}: got lse_sparse of {what} .+; expected the same"):
            function(lse, other)


def test_carries_no_gradient() -> None:
    layout = DocumentLayout.single(1, 6)
    inputs = [x.requires_grad_() for x in qkv(layout)]
    assert not any(x.requires_grad for x in error_bound(*inputs, all_blocks(layout, 1, 2), 2))
    assert not attention_entropy(*inputs[:2]).requires_grad


# ---------------------------------------------------------------------- entropy
@fuzz(200)
@given(cases())
def test_entropy_in_bits(case: tuple) -> None:
    q, k, v, _, _, layout = case
    p = dense_attention(q, k, v, causal_mask(layout), q.shape[3] ** -0.5).probability
    expected = -torch.where(p > 0, p * p.clamp(min=1e-300).log2(), 0.0).sum(-1)
    torch.testing.assert_close(attention_entropy(q, k, layout), expected, **EXACT)


def test_entropy_by_hand() -> None:
    layout = DocumentLayout.from_lengths([4, 2])
    zero = torch.zeros(1, 6, 2, 3)
    entropy = attention_entropy(zero, zero[:, :, :1], layout)
    assert torch.allclose(entropy[0, :, 0], torch.tensor([0, 1, math.log2(3), 2, 0, 1]))
    assert torch.equal(entropy[..., 0], entropy[..., 1])


def test_entropy_survives_probabilities_that_underflow() -> None:
    q, k = torch.full((1, 3, 1, 1), 1e4), torch.tensor([0.0, 1, 0]).view(1, 3, 1, 1)
    assert torch.equal(attention_entropy(q, k).flatten(), torch.zeros(3))


# ---------------------------------------------------------------------- chunks
@pytest.mark.parametrize("elements", [1, 200])
def test_chunks_do_not_change_results(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = DocumentLayout.from_lengths([[9, 1, 16], [26]])
    q, k, v = qkv(layout, 4, 2)
    indices = random_indices(layout, 2, 2, 4, seed=2)
    whole = [*error_bound(q, k, v, indices, 4, layout), attention_entropy(q, k, layout)]
    monkeypatch.setattr(bound, "CHUNK_ELEMENTS", elements)
    chunked = [*error_bound(q, k, v, indices, 4, layout), attention_entropy(q, k, layout)]
    for x, y in zip(chunked, whole, strict=True):
        torch.testing.assert_close(x, y, **EXACT)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound, "CHUNK_ELEMENTS", 1 << 18)
    layout = DocumentLayout.single(1, 2048)
    q, k, v = qkv(layout, 1, 1, 4, torch.float32)
    own = (torch.arange(2048) // 16).view(1, 2048, 1, 1)
    with LargestTensor() as largest:
        attention_entropy(q, k, layout)
        bound.largest_dropped_value(v, own, 16, layout)
    assert largest.nbytes <= 8 << 18, "a dense mask of float32 logits would be 16 MiB"
