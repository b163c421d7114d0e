"""The compression and window branches of the NSA baseline, against dense formulas and autograd."""

from __future__ import annotations

from typing import Any

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
    tokens,
)
from ssa.documents import DocumentLayout
from ssa.errors import InputError
from ssa.ops import compressed_attention, full_attention, nsa, window_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EXACT = {"rtol": 1e-10, "atol": 1e-11}


def dense_window(q: Tensor, k: Tensor, v: Tensor, window: int, layout: DocumentLayout) -> Tensor:
    _, position = tokens(layout)
    near = position[:, :, None] - position[:, None] < window
    return dense_attention(q, k, v, causal_mask(layout) & near[:, :, None], q.shape[3] ** -0.5).out


def dense_compressed(q: Tensor, k: Tensor, v: Tensor, S: int, layout: DocumentLayout) -> Tensor:
    out = torch.zeros_like(q)
    for row, document in document_slices(layout):
        length = document.stop - document.start
        blocks = length // S
        if not blocks:
            continue
        pooled = [torch.stack([x[row, document][n * S : (n + 1) * S].mean(0) for n in range(blocks)]) for x in (k, v)]
        complete = (torch.arange(blocks) + 1) * S <= torch.arange(length)[:, None] + 1
        inputs = (x[None] for x in (q[row, document], *pooled))
        part = dense_attention(*inputs, complete[None, :, None], q.shape[3] ** -0.5)
        out = out.index_put((torch.tensor(row), torch.arange(document.start, document.stop)), part.out[0])
    return out


BRANCHES = {"window": (window_attention, dense_window), "compressed": (compressed_attention, dense_compressed)}


def forward_backward(function: Any, inputs: tuple, size: int, layout: DocumentLayout, d_out: Tensor) -> list[Tensor]:
    mine = leaves(*inputs)
    out = function(*mine, size, layout)
    if out.requires_grad:  # no complete block anywhere: the output is a constant 0
        out.backward(d_out)
    return [out.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in mine)]


@pytest.mark.parametrize("branch", BRANCHES)
@fuzz(100)
@given(st.data())
def test_equals_the_dense_formula(branch: str, data: st.DataObject) -> None:
    S = data.draw(st.sampled_from([1, 2, 4, 8]))
    layout, group, kv_heads = data.draw(layouts(S)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2))
    size = S if branch == "compressed" else data.draw(st.integers(1, 20))
    dim, seed = data.draw(st.sampled_from([1, 3, 4])), data.draw(st.integers(0, 10**6))
    inputs = qkv(layout, group * kv_heads, kv_heads, dim, seed=seed)
    d_out = torch.randn_like(inputs[0])
    mine, theirs = (forward_backward(f, inputs, size, layout, d_out) for f in BRANCHES[branch])
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("elements", [1, 100])
def test_chunks_do_not_change_results(branch: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = DocumentLayout.from_lengths([[9, 1, 16], [26]])
    inputs = qkv(layout, 4, 2)
    d_out = torch.randn_like(inputs[0])
    function = BRANCHES[branch][0]
    whole = forward_backward(function, inputs, 4, layout, d_out)
    monkeypatch.setattr(nsa, "CHUNK_ELEMENTS", elements)
    for x, y in zip(forward_backward(function, inputs, 4, layout, d_out), whole, strict=True):
        torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.parametrize("branch", BRANCHES)
def test_memory_is_bounded(branch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nsa, "CHUNK_ELEMENTS", 1 << 18)
    inputs = leaves(*qkv(DocumentLayout.single(1, 2048), 1, 1, 4, torch.float32))
    with LargestTensor() as largest:
        BRANCHES[branch][0](*inputs, 2).sum().backward()
    assert largest.nbytes <= 8 << 18, "int64 distances of a chunk; all of them would be 32 MiB"


@pytest.mark.parametrize("branch", BRANCHES)
def test_float32_and_bfloat16(branch: str) -> None:
    layout = DocumentLayout.from_lengths([50, 3])
    function, dense = BRANCHES[branch]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 6e-3)):  # bf16: pooled keys and output rounded
        inputs = qkv(layout, 4, 2, 8, dtype)
        out = function(*inputs, 8, layout)
        assert out.dtype == dtype
        assert rms_error(out, dense(*(x.double() for x in inputs), 8, layout)) < tolerance


def test_compression_gives_zero_until_a_block_is_complete() -> None:
    layout = DocumentLayout.from_lengths([3, 6])
    inputs = leaves(*qkv(layout))
    out = compressed_attention(*inputs, 4, layout)
    out.sum().backward()
    assert (out[0, :6] == 0).all()
    assert (out[0, 6:] != 0).all()
    assert all(x.grad.isfinite().all() for x in inputs)
    assert (inputs[2].grad[0, :3] == 0).all(), "the short document has no complete block"
    assert (inputs[2].grad[0, 7:] == 0).all(), "nor has the tail of the other"


def test_compression_sees_the_own_block_from_its_last_token() -> None:
    v = torch.tensor([1.0, 3, 10, 20]).view(1, 4, 1, 1)
    zero = torch.zeros_like(v)
    assert compressed_attention(zero, zero, v, 2).flatten().tolist() == [0, 2, 2, 8.5]


def test_compression_without_any_complete_block() -> None:
    inputs = leaves(*qkv(DocumentLayout.single(2, 3)))
    assert (compressed_attention(*inputs, 4) == 0).all()


def test_a_window_of_one_is_the_value_itself() -> None:
    layout = DocumentLayout.from_lengths([5, 2])
    q, k, v = qkv(layout, 4, 2)
    torch.testing.assert_close(window_attention(q, k, v, 1, layout), v.repeat_interleave(2, 2), **EXACT)


def test_a_window_of_everything_is_full_attention() -> None:
    layout = DocumentLayout.from_lengths([5, 12])
    q, k, v = qkv(layout, 4, 2)
    torch.testing.assert_close(window_attention(q, k, v, 12, layout), full_attention(q, k, v, layout), **EXACT)


@pytest.mark.parametrize("branch", BRANCHES)
def test_gradcheck(branch: str) -> None:
    layout = DocumentLayout.from_lengths([5, 1, 7])
    function = lambda q, k, v: BRANCHES[branch][0](q, k, v, 2, layout)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves(*qkv(layout, 2, 1, 2)), atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("size", [0, -1, 2.5, True, "4"])
def test_refuses_a_bad_size(branch: str, size: Any) -> None:
    name = "window" if branch == "window" else "block_size"
    with pytest.raises(InputError, match=f"{branch}_attention.{name}: got {size!r}; expected an integer of at least 1"):
        BRANCHES[branch][0](*qkv(DocumentLayout.single(1, 4)), size)


def _fused(q: Tensor, k: Tensor, v: Tensor, visible: Any, scale: float) -> Tensor:
    return nsa._fused_attention(q, k, v, visible(slice(0, q.shape[1])), scale)


@pytest.mark.parametrize("branch", ["compression", "window"])
def test_the_fused_form_is_the_same_operation(branch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run where the readable form would run, in float64: the outputs and gradients are the same."""
    layout = DocumentLayout.from_lengths([[7, 33, 40], [80]])
    results = []
    for fused in (False, True):
        q, k, v = leaves(*qkv(layout, heads=4, kv_heads=2, dim=8))
        if fused:
            monkeypatch.setattr(nsa, "_masked_attention", _fused)
        if branch == "compression":
            out = compressed_attention(q, k, v, 8, layout)
        else:
            out = window_attention(q, k, v, 12, layout)
        results.append((out, *torch.autograd.grad((out * out).sum(), (q, k, v))))
    for readable, fused_result in zip(*results, strict=True):
        torch.testing.assert_close(fused_result, readable, **EXACT)
