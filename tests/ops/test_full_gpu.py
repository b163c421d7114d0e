"""The CUDA kernels of the full stream on a GPU, against float64. Skipped without one."""

from __future__ import annotations

import pytest
import torch

from oracles import leaves, qkv
from ssa.documents import DocumentLayout
from ssa.ops import full_attention
from ssa.ops.dispatch import Request
from ssa.ops.full import backends

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA_BACKENDS = [pytest.param(name, marks=gpu) for name in ("cuda", "cudnn", "packed", "flash")]


def _on_gpu(name: str, lengths: list[int], heads: int, kv_heads: int, dim: int) -> tuple[tuple, DocumentLayout]:
    request = Request(torch.device("cuda"), torch.bfloat16, heads, kv_heads, dim)
    if name != "cuda" and (reason := backends.refuse(name, request)):
        pytest.skip(reason)
    layout = DocumentLayout.from_lengths(lengths)
    return leaves(*(x.cuda() for x in qkv(layout, heads, kv_heads, dim, torch.bfloat16))), layout


@pytest.mark.parametrize("name", CUDA_BACKENDS)
@pytest.mark.parametrize("lengths", [[1], [1] * 9, [63, 1, 64, 65, 127, 300], [256] * 4, [700, 24, 300, 1]], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (16, 1, 64), (8, 2, 128), (4, 2, 96)])
@pytest.mark.usefixtures("poisoned_memory")
def test_gpu_kernels_against_float64(
    name: str, lengths: list[int], heads: int, kv_heads: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three roundings to bfloat16 (2**-9 each); one token alone has an exactly zero dq and dk."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)  # poisoned memory turns it on
    inputs, layout = _on_gpu(name, lengths, heads, kv_heads, dim)
    wide = leaves(*(x.double() for x in inputs))
    d_out = torch.randn_like(inputs[0])
    out, lse = full_attention(*inputs, layout, return_lse=True, backend=name)
    exact, exact_lse = full_attention(*wide, layout, return_lse=True, backend="reference")
    mine = torch.autograd.grad(out, inputs, d_out)
    truth = torch.autograd.grad(exact, wide, d_out.double())
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    for x, y in zip((out, *mine), (exact, *truth), strict=True):
        assert (x.double() - y).norm() <= 3 * 2**-9 * y.norm() + 1e-2


@pytest.mark.parametrize("name", CUDA_BACKENDS)
def test_gpu_kernels_compile_as_one_graph(name: str) -> None:
    inputs, layout = _on_gpu(name, [700, 24, 300], 8, 2, 64)
    attend = lambda q, k, v: full_attention(q, k, v, layout, backend=name)  # noqa: E731
    torch.testing.assert_close(torch.compile(attend, fullgraph=True, backend="aot_eager")(*inputs), attend(*inputs))
