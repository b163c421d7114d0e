"""The fused head and cross-entropy against PyTorch's own, and that no full logits exist."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssa.errors import InputError
from ssa.ops import linear_cross_entropy

N, C, V = 23, 16, 61


def inputs(dtype: torch.dtype = torch.float64, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, C, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < ignored] = -100
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("chunk_rows", [None, 1, 7, N, 1000])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_value_and_gradients_are_those_of_the_two_operations(
    dtype: torch.dtype, limit: float, chunk_rows: int | None
) -> None:
    hidden, weight, targets = inputs(dtype)
    ours = linear_cross_entropy(hidden, weight, targets, chunk_rows=chunk_rows) / 7
    theirs = plain(hidden, weight, targets) / 7
    torch.testing.assert_close(ours, theirs, rtol=limit, atol=0)
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (ours, theirs)), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=limit, atol=limit)


def test_autocast_rounds_no_more_than_the_two_operations() -> None:
    hidden, weight, targets = inputs(torch.float32)
    exact = torch.autograd.grad(plain(hidden.double(), weight.double(), targets), (hidden, weight))
    errors = []
    for function in (linear_cross_entropy, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = function(hidden, weight, targets)
        found = torch.autograd.grad(loss, (hidden, weight))
        assert [x.dtype for x in (loss, *found)] == [torch.float32] * 3
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)])
    for ours, theirs in zip(*errors, strict=True):
        assert ours <= 1.1 * theirs


def test_tied_weights_get_both_gradients() -> None:
    _, weight, targets = inputs()
    ids = torch.arange(N)
    found = []
    for function in (linear_cross_entropy, plain):
        loss = function(F.embedding(ids, weight).tanh(), weight, targets)
        found.append(torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(*found)


def test_nothing_to_predict_is_zero_with_zero_gradients() -> None:
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    assert float(loss.detach()) == 0.0
    assert not any(g.any() for g in torch.autograd.grad(loss, (hidden, weight)))


def test_huge_logits_stay_finite() -> None:
    hidden, weight, targets = inputs()
    scaled = (1e4 * hidden).detach().requires_grad_()
    loss = linear_cross_entropy(scaled, weight, targets)
    torch.testing.assert_close(loss, plain(scaled, weight, targets))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (scaled, weight)))


class LargestVocabularyTensor(TorchDispatchMode):
    """Most rows of any ``[tokens, V]`` tensor; the transposed weight has C rows and does not count."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] == V and x.shape[0] != C:
                self.rows = max(self.rows, x.shape[0])
        return out


def test_logits_exist_for_a_chunk_only_and_nothing_is_kept_without_gradients() -> None:
    hidden, weight, targets = inputs()
    with LargestVocabularyTensor() as seen:
        linear_cross_entropy(hidden, weight, targets, chunk_rows=5).backward()
    assert seen.rows == 5
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad


def test_shapes_that_do_not_fit_are_named() -> None:
    hidden, weight, targets = inputs()
    with pytest.raises(InputError, match=r"shapes .*\(22,\)"):
        linear_cross_entropy(hidden, weight, targets[1:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_in_bf16_it_rounds_no_more_than_the_two_operations(compiled: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(600, 256, generator=generator, device="cuda", requires_grad=True)
    weight = (torch.randn(5000, 256, generator=generator, device="cuda") / 16).requires_grad_()
    targets = torch.randint(0, 5000, (600,), generator=generator, device="cuda")
    targets[::7] = -100
    exact = torch.autograd.grad(plain(hidden.double(), weight.double(), targets), (hidden, weight))
    errors = []
    for function in (lambda *x: linear_cross_entropy(*x, chunk_rows=256, compiled=compiled), plain):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = function(hidden, weight, targets)
        found = torch.autograd.grad(loss, (hidden, weight))
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)])
    for ours, theirs in zip(*errors, strict=True):
        assert ours <= 1.1 * theirs
