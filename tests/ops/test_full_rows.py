"""Full attention of some query rows equals those rows of full attention, gradients too, on every backend of a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from oracles import leaves, qkv
from ssa.documents import DocumentLayout
from ssa.errors import BackendError, InputError
from ssa.ops import full_attention, full_attention_rows
from ssa.ops.full import row_kernels
from ssa.ops.full.query_rows import QueryRows, Window

pytestmark = pytest.mark.usefixtures("poisoned_memory")
LAYOUT = DocumentLayout.from_lengths([[12, 12, 1], [9, 16]])
ROWS = QueryRows(
    (
        Window(0, 2, 12, 3, 7),
        Window(0, 2, 12, 8, 12),  # squares of one size share a call
        Window(0, 2, 12, 0, 2),
        Window(24, 1, 1, 0, 1),
        Window(34, 1, 16, 5, 6),
    )
)


def emulated_flash(*x: Any, scale: float) -> tuple[Tensor, Tensor, None]:
    """``aten._flash_attention_forward`` of packed queries and keys: causal masks aligned with the last key."""
    q, k, v, queries, keys, longest_q, longest_k, _, causal, _ = x
    assert causal
    assert (longest_q, longest_k) == (int(queries.diff().max()), int(keys.diff().max()))
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=q.dtype)
    for a, b, c, d in zip(queries[:-1], queries[1:], keys[:-1], keys[1:], strict=True):
        group = q.shape[1] // k.shape[1]
        logits = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d].repeat_interleave(group, 1)) * scale
        future = torch.ones(logits.shape[1:], dtype=torch.bool).triu(int(d - c - (b - a)) + 1)
        logits = logits.masked_fill(future, float("-inf"))
        out[a:b] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v[c:d].repeat_interleave(group, 1))
        lse[a:b] = logits.logsumexp(-1).t()
    return out, lse.t(), None


def emulated_flash_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any, scale: float
) -> Any:
    queries, keys, longest_q, longest_k, *_ = rest
    assert lse.shape == (q.shape[1], q.shape[0])
    x = leaves(q, k, v)
    with torch.enable_grad():
        again = emulated_flash(*x, queries, keys, longest_q, longest_k, 0.0, True, False, scale=scale)[0]
        return torch.autograd.grad(again, x, d_out)


def gradients(kernel: row_kernels.RowKernel, d_out: Tensor, inputs: list[Tensor], results: Any) -> tuple[Tensor, ...]:
    others = [torch.ones_like(x) for x in inputs]  # gradients are added to what is there
    return kernel.backward(d_out, *inputs, *results, ROWS, 0.4)(others)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> row_kernels.RowKernel:
    class Aten:
        _flash_attention_forward = staticmethod(emulated_flash)
        _flash_attention_backward = staticmethod(emulated_flash_backward)

    monkeypatch.setattr(row_kernels, "aten", Aten)
    return row_kernels.FLASH


@pytest.mark.parametrize("backend", ["reference", "cpu_flash"])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("programs", [512, 4, 1])  # no head folded, some, all
def test_rows_of_full_attention(backend: str, kv_heads: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_kernels, "PROGRAMS", programs)
    inputs = leaves(*qkv(LAYOUT, 4, kv_heads, 5))
    out, lse = full_attention_rows(*inputs, ROWS, LAYOUT, backend=backend)
    full, full_lse = full_attention(*inputs, LAYOUT, return_lse=True, backend="reference")
    index = ROWS.index(torch.device("cpu"))
    expected = full.flatten(0, 1)[index]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse, full_lse.flatten(0, 1)[index], rtol=1e-12, atol=1e-13)
    weight = torch.randn_like(out)
    grads = (torch.autograd.grad(y, inputs, weight) for y in (out, expected))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_heads_are_folded_while_the_gpu_stays_busy() -> None:
    assert row_kernels.foldable(4, 2, 16, 4096) == 16  # 8 heads of keys times 64 programs
    assert row_kernels.foldable(4, 2, 16, 1024) == 4
    assert row_kernels.foldable(1, 2, 16, 32) == 1
    assert row_kernels.foldable(8, 8, 6, 256) == 3  # a divisor of the group
    x = torch.arange(2 * 3 * 4 * 5).view(6, 4, 5)
    (folded,) = row_kernels.fold([x], 2, 2)
    assert folded.shape == (2, 6, 2, 5)
    assert torch.equal(folded[1, 3], x[4, [1, 3]])  # second row, second of the heads that share keys
    assert torch.equal(row_kernels.unfold(folded, 6), x)


def test_flash_gets_queries_with_their_prefix_of_keys(flash: row_kernels.RowKernel) -> None:
    """The real kernel runs on a GPU alone; an emulation of its contract checks offsets, gathering and scattering."""
    inputs = [x.flatten(0, 1) for x in qkv(LAYOUT, 4, 2, 5, torch.float32)]
    exact = row_kernels.REFERENCE
    results = flash.forward(*inputs, ROWS, 0.4), exact.forward(*inputs, ROWS, 0.4)
    weight = torch.randn_like(results[0][0])
    mine, theirs = (
        (*result, *gradients(kernel, weight, inputs, result))
        for result, kernel in zip(results, (flash, exact), strict=True)
    )
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu_flash"])
def test_other_documents_and_the_future_do_not_matter(backend: str) -> None:
    rows = QueryRows((Window(0, 2, 12, 3, 7),))
    inputs = qkv(LAYOUT, 4, 2, 5)
    out, _ = full_attention_rows(*inputs, rows, LAYOUT, backend=backend)
    for x in inputs:
        x[0, 7:12] = float("nan")
        x[0, 19:] = float("nan")
        x[1] = float("nan")
    assert torch.equal(full_attention_rows(*inputs, rows, LAYOUT, backend=backend)[0], out)


def test_low_precision_is_rounded_once() -> None:
    inputs = qkv(LAYOUT, 4, 2, 8, torch.bfloat16)
    out, lse = full_attention_rows(*inputs, ROWS, LAYOUT, backend="reference")
    exact, _ = full_attention_rows(*(x.double() for x in inputs), ROWS, LAYOUT, backend="reference")
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-3)


def test_gradients_of_keys_and_values_are_rounded_once() -> None:
    """Several windows and another stream add to them."""
    inputs = [x.flatten(0, 1) for x in qkv(LAYOUT, 4, 2, 8, torch.bfloat16)]
    kernel = row_kernels.REFERENCE
    results = kernel.forward(*inputs, ROWS, 0.4)
    weight = torch.randn_like(results[0])
    wide = [x.double() for x in (weight, *inputs, *results)]
    exact = gradients(kernel, wide[0], wide[1:4], wide[4:])
    for x, y in zip(gradients(kernel, weight, inputs, results)[1:], exact[1:], strict=True):
        assert x.dtype == torch.bfloat16
        torch.testing.assert_close(x.double(), y, rtol=2**-8, atol=1e-5)


def test_place_is_the_inverse_of_index() -> None:
    index, place = ROWS.index(torch.device("cpu")), ROWS.place(50, torch.device("cpu"))
    assert place[index].tolist() == list(range(ROWS.count))
    assert int((place >= 0).sum()) == ROWS.count
    longer = ROWS.place(60, torch.device("cpu"))  # a batch with the same windows and another end
    assert len(longer) == 60
    assert torch.equal(longer[:50], place)


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ((Window(0, 1, 13, 0, 2),), "a window inside documents"),
        ((Window(1, 1, 12, 0, 2),), "a window inside documents"),
        ((Window(0, 3, 12, 0, 2),), "a window inside documents"),
        ((Window(0, 1, 12, 4, 13),), "a window inside documents"),
        ((Window(0, 1, 12, 4, 4),), "a window inside documents"),
        ((Window(0, 2, 12, 0, 5), Window(12, 1, 12, 4, 6)), "every row once"),
        ((), "at least one"),
    ],
)
def test_refused_rows(windows: tuple[Window, ...], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        full_attention_rows(*qkv(LAYOUT), QueryRows(windows), LAYOUT)


def test_cuda_backends_are_refused_on_a_cpu() -> None:
    for backend in ("cudnn", "flash"):
        with pytest.raises(BackendError, match="needs an NVIDIA GPU"):
            full_attention_rows(*qkv(LAYOUT), ROWS, LAYOUT, backend=backend)


def test_the_gpu_joins_as_the_reference_does(interpret: Callable[..., None]) -> None:
    interpret("rows_triton_cases.py")
