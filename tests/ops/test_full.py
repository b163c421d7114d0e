"""Full causal attention over documents on every CPU backend, against a dense mask and autograd."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from oracles import (
    LargestTensor,
    causal_mask,
    dense_attention,
    document_slices,
    fuzz,
    layouts,
    leaves,
    qkv,
    rms_error,
    rounding_bounds,
)
from ssa.documents import DocumentLayout
from ssa.ops import full_attention
from ssa.ops.full import reference

BACKENDS = ["reference", "cpu_flash"]
pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.parametrize("backend", BACKENDS)]
EXACT = {"rtol": 1e-10, "atol": 1e-11}
ODD_ROWS = [[1], [2], [15], [16], [17], [33], [1, 3, 4, 5, 7, 8, 9, 16], [1] * 40, [7] * 6, [37, 2, 1]]


def attend(backend: str, q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout, **kw: float) -> tuple:
    return full_attention(q, k, v, layout, return_lse=True, backend=backend, **kw)


def forward_backward(backend: str, inputs: tuple, layout: DocumentLayout, d_out: Tensor, **kw: float) -> list[Tensor]:
    """Output, log-sum-exp, dq, dk, dv."""
    mine = leaves(*inputs)
    out, lse = attend(backend, *mine, layout, **kw)
    out.backward(d_out)
    return [out.detach(), lse, *(x.grad for x in mine)]


def exact_forward_backward(inputs: tuple, layout: DocumentLayout, d_out: Tensor, scale: float) -> list[Tensor]:
    """The same through a dense mask in float64 and autograd."""
    mine = leaves(*(x.double() for x in inputs))
    dense = dense_attention(*mine, causal_mask(layout), scale)
    dense.out.backward(d_out.double())
    return [dense.out.detach(), dense.lse.detach(), *(x.grad for x in mine)]


def test_by_hand(backend: str) -> None:
    zero = torch.zeros(1, 5, 1, 1)
    v = torch.tensor([1.0, 3, 8, 4, 6]).view(1, 5, 1, 1)
    out, lse = attend(backend, zero, zero, v, DocumentLayout.from_lengths([3, 2]))
    assert torch.allclose(out.flatten(), torch.tensor([1.0, 2, 4, 4, 5]))
    assert torch.allclose(lse.flatten().exp(), torch.tensor([1.0, 2, 3, 1, 2]))


@fuzz(200)
@given(st.data())
def test_equals_a_dense_mask(backend: str, data: st.DataObject) -> None:
    layout = data.draw(layouts(data.draw(st.sampled_from([1, 4, 8]))))
    group, kv_heads, dim = (data.draw(s) for s in (st.integers(1, 6), st.integers(1, 3), st.sampled_from([1, 3, 5, 8])))
    inputs = qkv(layout, group * kv_heads, kv_heads, dim, seed=data.draw(st.integers(0, 10**6)))
    scale, d_out = data.draw(st.floats(0.1, 3)), torch.randn_like(inputs[0])
    mine = forward_backward(backend, inputs, layout, d_out, scale=scale)
    for x, y in zip(mine, exact_forward_backward(inputs, layout, d_out, scale), strict=True):
        torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.parametrize("lengths", ODD_ROWS, ids=str)
def test_equals_a_dense_mask_at_odd_lengths(backend: str, lengths: list[int]) -> None:
    layout = DocumentLayout.from_lengths(lengths)
    inputs = qkv(layout, 6, 2, 5)
    d_out = torch.randn_like(inputs[0])
    mine = forward_backward(backend, inputs, layout, d_out)
    for x, y in zip(mine, exact_forward_backward(inputs, layout, d_out, 5**-0.5), strict=True):
        torch.testing.assert_close(x, y, **EXACT)


def test_gradcheck(backend: str) -> None:
    layout = DocumentLayout.from_lengths([5, 1, 3])
    function = lambda q, k, v: full_attention(q, k, v, layout, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves(*qkv(layout, 4, 2, 3)), atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("lengths", [[300], [130, 1, 69], [64, 64, 64]], ids=str)
def test_float32_is_within_one_millionth(backend: str, lengths: list[int]) -> None:
    layout = DocumentLayout.from_lengths(lengths)
    inputs = qkv(layout, 4, 2, 16, torch.float32)
    d_out = torch.randn_like(inputs[0])
    mine, exact = forward_backward(backend, inputs, layout, d_out), exact_forward_backward(inputs, layout, d_out, 0.25)
    assert mine[1].dtype == torch.float32
    assert [rms_error(x, y) < 1e-6 for x, y in zip(mine, exact, strict=True)] == [True] * 5


@pytest.mark.parametrize("group", [1, 4])
def test_bfloat16_rounds_only_where_it_must(backend: str, group: int) -> None:
    layout = DocumentLayout.from_lengths([61, 1, 34])
    inputs = qkv(layout, 2 * group, 2, 16, torch.bfloat16)
    d_out = torch.randn_like(inputs[0])
    mine, exact = forward_backward(backend, inputs, layout, d_out), exact_forward_backward(inputs, layout, d_out, 0.25)
    assert [x.dtype for x in mine] == [torch.bfloat16, torch.float32] + [torch.bfloat16] * 3
    # PyTorch's kernel sums a coarse exponential for low precision: exp(0) is already 5.4e-5 below 1
    assert (mine.pop(1) - exact.pop(1)).abs().max() < (1e-4 if backend == "cpu_flash" else 2e-6)
    bounds = rounding_bounds(inputs, d_out, causal_mask(layout), 0.25, flash=backend == "cpu_flash")
    for x, y, bound in zip(mine, exact, bounds, strict=True):
        assert ((x.double() - y).abs() <= 1.01 * bound + 1e-5).all()  # 1e-5: float32 sums of magnitude one


def test_large_logits_do_not_overflow(backend: str) -> None:
    layout = DocumentLayout.from_lengths([12, 5])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        inputs = tuple(30 * x for x in qkv(layout, dtype=dtype))
        results = forward_backward(backend, inputs, layout, torch.ones_like(inputs[0]), scale=50.0)
        assert all(x.isfinite().all() for x in results)


def test_masked_keys_lose_against_any_visible_logit(backend: str) -> None:
    """Every visible logit is -90000: a mask that writes a large negative number instead of -inf would win."""
    q, k = torch.full((1, 4, 1, 1), 300.0), torch.full((1, 4, 1, 1), -300.0)
    v = torch.tensor([1.0, 3, 5, 7]).view(1, 4, 1, 1)
    out, lse = attend(backend, q, k, v, DocumentLayout.from_lengths([2, 2]), scale=1.0)
    assert out.flatten().tolist() == [1, 2, 5, 6]
    assert (lse < -8e4).all()


@pytest.mark.parametrize("elements", [1, 100, 1000])
def test_chunks_do_not_change_results(backend: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = DocumentLayout.from_lengths([[9, 1, 16], [26]])
    inputs = qkv(layout, 4, 2)
    d_out = torch.randn_like(inputs[0])
    whole = forward_backward(backend, inputs, layout, d_out)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", elements)
    for x, y in zip(forward_backward(backend, inputs, layout, d_out), whole, strict=True):
        torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_packed_equals_separate(backend: str, dtype: torch.dtype) -> None:
    layout = DocumentLayout.from_lengths([[1, 7, 7, 12], [12, 15]])
    q, k, v = qkv(layout, 4, 2, 5, dtype)
    out, lse = attend(backend, q, k, v, layout)
    for row, document in document_slices(layout):
        alone = DocumentLayout.single(1, document.stop - document.start)
        part, part_lse = attend(backend, *(x[row : row + 1, document] for x in (q, k, v)), alone)
        one_rounding = 2**-7 if dtype == torch.bfloat16 else 1e-12
        torch.testing.assert_close(part[0], out[row, document], rtol=one_rounding, atol=0)
        torch.testing.assert_close(part_lse[0], lse[row, document], rtol=1e-6, atol=1e-6)


def test_default_layout_is_one_document_per_row(backend: str) -> None:
    q, k, v = qkv(DocumentLayout.single(2, 9), dtype=torch.float32)
    out, _ = attend(backend, q, k, v, DocumentLayout.from_lengths([[9], [9]]))
    assert torch.equal(full_attention(q, k, v, backend=backend), out)


def test_noncontiguous_inputs_and_gradients(backend: str) -> None:
    layout = DocumentLayout.from_lengths([[5, 8], [13]])
    q, k, v = qkv(layout, 4, 2)
    plain = leaves(q, k, v)
    attend(backend, *plain, layout)[0].sum().backward()

    odd = leaves(*(x.transpose(1, 2).contiguous() for x in (q, k)), torch.stack([v, v], -1))
    views = [odd[0].transpose(1, 2), odd[1].transpose(1, 2), odd[2][..., 0]]
    assert not any(x.is_contiguous() for x in views)
    attend(backend, *views, layout)[0].sum().backward()  # the gradient of a sum is a stride-0 view
    torch.testing.assert_close(odd[0].grad.transpose(1, 2), plain[0].grad, **EXACT)
    torch.testing.assert_close(odd[1].grad.transpose(1, 2), plain[1].grad, **EXACT)
    torch.testing.assert_close(odd[2].grad[..., 0], plain[2].grad, **EXACT)


def test_log_sum_exp_carries_no_gradient(backend: str) -> None:
    layout = DocumentLayout.single(1, 5)
    out, lse = attend(backend, *leaves(*qkv(layout)), layout)
    assert out.requires_grad
    assert not lse.requires_grad


def test_long_sequences_stay_within_a_chunk(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """T = 8192, one head: all logits would be 256 MiB."""
    layout = DocumentLayout.single(1, 8192)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1 << 22)
    inputs = leaves(*qkv(layout, 1, 1, 4, torch.float32))
    with LargestTensor() as largest:
        attend(backend, *inputs, layout)[0].sum().backward()
    assert largest.nbytes <= 4 << 22
    assert all(x.grad.isfinite().all() for x in inputs)
