"""Sparse attention given block indices, against a dense mask and autograd."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from oracles import (
    LargestTensor,
    all_blocks,
    dense_attention,
    fuzz,
    layouts,
    leaves,
    qkv,
    random_indices,
    rms_error,
    rounding_bounds,
    selected_mask,
)
from ssa.documents import DocumentLayout
from ssa.ops import SparseSpec, full_attention, select_blocks, sparse_attention
from ssa.ops.sparse import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EXACT = {"rtol": 1e-10, "atol": 1e-11}  # float64 against float64 in another order of summation
ODD_ROWS = [[1], [3], [4], [5], [11], [12], [13], [1, 3, 4, 5, 7, 8, 9, 16], [1] * 40, [37, 2, 1]]


def attend(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, S: int, layout: DocumentLayout, **kw: float) -> tuple:
    return sparse_attention(q, k, v, indices, S, layout, return_lse=True, backend="reference", **kw)


# ---------------------------------------------------------------------- by hand
def test_one_selected_block_by_hand() -> None:
    # equal logits: the output is the mean value of the visible tokens of the selected blocks
    q, k = torch.zeros(1, 6, 1, 1), torch.zeros(1, 6, 1, 1)
    v = torch.tensor([1.0, 2, 4, 8, 16, 32]).view(1, 6, 1, 1)
    indices = torch.tensor([[0, -1], [0, -1], [0, 1], [1, -1], [0, 2], [2, 1]]).view(1, 6, 1, 2)
    out, lse = attend(q, k, v, indices, 2, DocumentLayout.single(1, 6))
    expected = torch.tensor([1, 1.5, 7 / 3, 6, 19 / 3, 15])
    assert torch.allclose(out.flatten(), expected)
    assert torch.allclose(lse.flatten().exp(), torch.tensor([1.0, 2, 3, 2, 3, 4]))


def test_blocks_count_from_the_queries_own_document() -> None:
    layout = DocumentLayout.from_lengths([3, 3])
    v = torch.tensor([1.0, 2, 4, 8, 16, 32]).view(1, 6, 1, 1)
    zero = torch.zeros_like(v)
    out, _ = attend(zero, zero, v, torch.zeros(1, 6, 1, 1, dtype=torch.int32), 2, layout)
    assert out.flatten().tolist() == [1, 1.5, 1.5, 8, 12, 12]


# ---------------------------------------------------------------------- dense mask and autograd
def assert_equals_dense_mask(
    inputs: tuple[Tensor, Tensor, Tensor], indices: Tensor, S: int, layout: DocumentLayout, scale: float
) -> None:
    d_out = torch.randn_like(inputs[0])
    mine, theirs = leaves(*inputs), leaves(*inputs)
    out, lse = attend(*mine, indices, S, layout, scale=scale)
    dense = dense_attention(*theirs, selected_mask(indices, S, layout), scale)
    torch.testing.assert_close(out, dense.out, **EXACT)
    torch.testing.assert_close(lse, dense.lse.detach(), **EXACT)
    out.backward(d_out)
    dense.out.backward(d_out)
    for name, x, y in zip("qkv", mine, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, **EXACT, msg=lambda m, name=name: f"d{name}: {m}")


@fuzz(200)
@given(st.data())
def test_equals_a_dense_mask(data: st.DataObject) -> None:
    S = data.draw(st.sampled_from([1, 2, 4, 8]))
    layout = data.draw(layouts(S))
    group, kv_heads = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    dim, slots, seed = (data.draw(s) for s in (st.sampled_from([1, 3, 5, 8]), st.integers(1, 5), st.integers(0, 10**6)))
    indices = random_indices(layout, kv_heads, slots, S, seed)
    if data.draw(st.booleans()):
        indices = indices.long()
    assert_equals_dense_mask(
        qkv(layout, group * kv_heads, kv_heads, dim, seed=seed), indices, S, layout, data.draw(st.floats(0.1, 3))
    )


@pytest.mark.parametrize("lengths", ODD_ROWS, ids=str)
@pytest.mark.parametrize(("S", "budget"), [(4, 2), (4, 3)])
def test_equals_a_dense_mask_at_odd_lengths(lengths: list[int], S: int, budget: int) -> None:
    layout = DocumentLayout.from_lengths(lengths)
    q, k, v = qkv(layout, 6, 2, 5)
    indices = select_blocks(q, k, SparseSpec(S, budget), layout, backend="reference")
    assert_equals_dense_mask((q, k, v), indices, S, layout, 5**-0.5)


@pytest.mark.parametrize("lengths", ODD_ROWS[-3:], ids=str)
def test_gradcheck(lengths: list[int]) -> None:
    layout = DocumentLayout.from_lengths(lengths)
    inputs = leaves(*qkv(layout, 2, 1, 2))
    indices = random_indices(layout, 1, 3, 4, seed=1)
    function = lambda q, k, v: sparse_attention(q, k, v, indices, 4, layout, backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, atol=1e-5, fast_mode=True)


# ---------------------------------------------------------------------- precision
@pytest.mark.parametrize("seed", range(3))
def test_float32_is_within_one_millionth(seed: int) -> None:
    layout = DocumentLayout.from_lengths([100, 27, 1])
    inputs = qkv(layout, 4, 2, 16, torch.float32, seed)
    indices = random_indices(layout, 2, 4, 8, seed)
    d_out = torch.randn_like(inputs[0])
    mine, theirs = leaves(*inputs), leaves(*(x.double() for x in inputs))
    out, lse = attend(*mine, indices, 8, layout)
    dense = dense_attention(*theirs, selected_mask(indices, 8, layout), 0.25)
    out.backward(d_out)
    dense.out.backward(d_out.double())
    assert lse.dtype == torch.float32
    pairs = [(out, dense.out), (lse, dense.lse), *((x.grad, y.grad) for x, y in zip(mine, theirs, strict=True))]
    assert [rms_error(x, y) < 1e-6 for x, y in pairs] == [True] * 5


@pytest.mark.parametrize("group", [1, 4])
def test_bfloat16_rounds_only_where_it_must(group: int) -> None:
    layout = DocumentLayout.from_lengths([61, 1, 34])
    inputs = qkv(layout, 2 * group, 2, 16, torch.bfloat16)
    indices = random_indices(layout, 2, 3, 8, seed=2)
    mask, d_out = selected_mask(indices, 8, layout), torch.randn_like(inputs[0])
    mine, theirs = leaves(*inputs), leaves(*(x.double() for x in inputs))
    out, lse = attend(*mine, indices, 8, layout, scale=0.25)
    dense = dense_attention(*theirs, mask, 0.25)
    out.backward(d_out)
    dense.out.backward(d_out.double())
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    exact = [dense.out, *(x.grad for x in theirs)]
    bounds = rounding_bounds(inputs, d_out, mask, 0.25)
    for x, y, bound in zip([out, *(x.grad for x in mine)], exact, bounds, strict=True):
        assert ((x.double() - y).abs() <= 1.01 * bound + 1e-5).all()  # 1e-5: float32 sums of magnitude one


def test_large_logits_do_not_overflow() -> None:
    layout = DocumentLayout.single(1, 12)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        inputs = leaves(*(30 * x for x in qkv(layout, dtype=dtype)))
        out, lse = attend(*inputs, all_blocks(layout, 1, 4), 4, layout, scale=50.0)
        out.sum().backward()
        assert all(x.isfinite().all() for x in (out, lse, *(x.grad for x in inputs)))


def test_masked_keys_lose_against_any_visible_logit() -> None:
    """Every visible logit is -90000: a mask that writes a large negative number instead of -inf would win."""
    layout = DocumentLayout.single(1, 6)
    q, k = torch.full((1, 6, 1, 1), 300.0), torch.full((1, 6, 1, 1), -300.0)
    v = torch.tensor([1.0, 3, 5, 7, 9, 11]).view(1, 6, 1, 1)
    out, lse = attend(q, k, v, (torch.arange(6) // 2).view(1, 6, 1, 1), 2, layout, scale=1.0)
    assert out.flatten().tolist() == [1, 2, 5, 6, 9, 10]
    assert (lse < -8e4).all()


# ---------------------------------------------------------------------- identities
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_budget_that_covers_all_blocks_is_full_attention(dtype: torch.dtype) -> None:
    layout = DocumentLayout.from_lengths([[9, 1, 16], [26]])
    q, k, v = qkv(layout, 4, 2, 5, dtype)
    indices = select_blocks(q, k, SparseSpec(4, 7), layout, backend="reference")
    out, lse = attend(q, k, v, indices, 4, layout)
    full, full_lse = full_attention(q, k, v, layout, return_lse=True, backend="reference")
    tolerance = 1e-14 if dtype == torch.float64 else 2e-6
    assert (out - full).abs().max() < tolerance
    assert (lse - full_lse).abs().max() < tolerance


def test_slots_may_come_in_any_order() -> None:
    layout = DocumentLayout.from_lengths([13, 20])
    q, k, v = qkv(layout, 4, 2)
    indices = random_indices(layout, 2, 4, 4, seed=3)
    out, lse = attend(q, k, v, indices, 4, layout)
    again, lse_again = attend(q, k, v, indices[..., torch.tensor([2, 0, 3, 1])], 4, layout)
    torch.testing.assert_close(again, out, **EXACT)
    torch.testing.assert_close(lse_again, lse, **EXACT)


def test_index_dtype_does_not_matter() -> None:
    layout = DocumentLayout.from_lengths([13, 20])
    q, k, v = qkv(layout, 4, 2, dtype=torch.float32)
    indices = random_indices(layout, 2, 4, 4, seed=3)
    for x, y in zip(attend(q, k, v, indices, 4, layout), attend(q, k, v, indices.long(), 4, layout), strict=True):
        assert torch.equal(x, y)


def test_permuting_documents_permutes_outputs() -> None:
    lengths = [5, 1, 12]
    layout, turned = DocumentLayout.from_lengths(lengths), DocumentLayout.from_lengths(lengths[::-1])
    q, k, v = qkv(layout, 2, 1)
    turn = torch.cat([torch.arange(6, 18), torch.arange(5, 6), torch.arange(5)])
    indices = random_indices(layout, 1, 2, 4, seed=0)
    out, _ = attend(q, k, v, indices, 4, layout)
    again, _ = attend(*(x[:, turn] for x in (q, k, v, indices)), 4, turned)
    torch.testing.assert_close(again, out[:, turn], **EXACT)


@pytest.mark.parametrize("elements", [1, 100, 1000])
def test_chunks_do_not_change_results(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = DocumentLayout.from_lengths([[9, 1, 16], [26]])
    inputs, indices = qkv(layout, 4, 2), random_indices(layout, 2, 3, 4, seed=5)
    results = []
    for size in (reference.CHUNK_ELEMENTS, elements):
        monkeypatch.setattr(reference, "CHUNK_ELEMENTS", size)
        mine = leaves(*inputs)
        out, lse = attend(*mine, indices, 4, layout)
        (out * torch.arange(out.numel()).view_as(out)).sum().backward()
        results.append([out, lse, *(x.grad for x in mine)])
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, **EXACT)


def test_noncontiguous_inputs_and_gradients() -> None:
    layout = DocumentLayout.from_lengths([[5, 8], [13]])
    q, k, v = qkv(layout, 4, 2)
    indices = random_indices(layout, 2, 3, 4, seed=6)
    plain = leaves(q, k, v)
    attend(*plain, indices, 4, layout)[0].sum().backward()

    stored = [x.transpose(1, 2).contiguous() for x in (q, k)] + [torch.stack([v, v], -1)]
    odd = leaves(*stored)
    views = [odd[0].transpose(1, 2), odd[1].transpose(1, 2), odd[2][..., 0]]
    odd_indices = indices.transpose(1, 3).contiguous().transpose(1, 3)
    assert not any(x.is_contiguous() for x in (*views, odd_indices))
    attend(*views, odd_indices, 4, layout)[0].sum().backward()  # the gradient of a sum is a stride-0 view
    torch.testing.assert_close(odd[0].grad.transpose(1, 2), plain[0].grad, **EXACT)
    torch.testing.assert_close(odd[1].grad.transpose(1, 2), plain[1].grad, **EXACT)
    torch.testing.assert_close(odd[2].grad[..., 0], plain[2].grad, **EXACT)


def test_keys_that_nobody_reads_get_exactly_no_gradient() -> None:
    layout = DocumentLayout.single(1, 12)
    _, k, v = inputs = leaves(*qkv(layout))
    own = (torch.arange(12, dtype=torch.int32) // 4).view(1, 12, 1, 1)
    out, _ = attend(*inputs, own, 4, layout)
    out[:, 8:].sum().backward()
    assert (k.grad[:, :8] == 0).all()
    assert (v.grad[:, :8] == 0).all()
    assert (v.grad[:, 8:] != 0).all()


def test_log_sum_exp_carries_no_gradient_and_is_optional() -> None:
    layout = DocumentLayout.single(1, 5)
    inputs = leaves(*qkv(layout))
    out, lse = attend(*inputs, all_blocks(layout, 1, 4), 4, layout)
    assert out.requires_grad
    assert not lse.requires_grad
    assert torch.equal(sparse_attention(*inputs, all_blocks(layout, 1, 4), 4), out)


def test_repeats_bit_for_bit() -> None:
    layout = DocumentLayout.from_lengths([30, 20])
    inputs, indices = qkv(layout, 4, 2, 8, torch.float32), random_indices(layout, 2, 3, 4, seed=7)

    def run() -> list[Tensor]:
        mine = leaves(*inputs)
        out, lse = attend(*mine, indices, 4, layout)
        out.square().sum().backward()
        return [out, lse, *(x.grad for x in mine)]

    first = run()
    for _ in range(10):
        assert all(torch.equal(x, y) for x, y in zip(first, run(), strict=True))


def test_long_sequences_stay_within_a_chunk() -> None:
    """T = 8192: a dense mask would be 64 MiB, gathered keys 64 MiB; chunks hold 16."""
    layout = DocumentLayout.single(1, 8192)
    inputs = leaves(*qkv(layout, 1, 1, 8, torch.float32))
    own, slot = torch.arange(8192)[:, None] // 16, torch.arange(16)
    spread = torch.where(slot < 15, (own - 1) * slot // 15, own)  # the own block and 15 before it
    indices = torch.where(own >= 16, spread, torch.where(slot <= own, slot, -1))
    with LargestTensor() as largest:
        sparse_attention(*inputs, indices.view(1, 8192, 1, 16), 16).sum().backward()
    assert largest.nbytes <= 4 * reference.CHUNK_ELEMENTS
    assert all(x.grad.isfinite().all() for x in inputs)
