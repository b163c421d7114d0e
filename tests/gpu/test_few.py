"""Products of few tokens on a GPU: ``python -m pytest tests/gpu/test_few.py`` takes seconds after compilation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssa.ops.few import Product, Projections, few_linear, few_project
from ssa.ops.few.reference import few_linear as linear_reference
from ssa.ops.few.reference import few_project as project_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned_memory"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(*shape, device="cuda") * 0.1).to(dtype)


def close(mine: Tensor, wanted: Tensor) -> None:
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}[mine.dtype]
    error = float((mine.double() - wanted.double()).norm() / wanted.double().norm())
    assert error < 3 * unit, error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(1, 1), (16, 1), (3, 7), (32, 1)], ids=str)
def test_linear(rows: tuple[int, int], dtype: torch.dtype) -> None:
    for inputs, outputs in ((2048, 8192), (8192, 2048), (2048, 2048), (768, 1000)):
        x, weight = normal(*rows, inputs, dtype=dtype), normal(outputs, inputs, dtype=dtype)
        norm, up = 1 + normal(inputs, dtype=dtype), normal(outputs, inputs, dtype=dtype)
        gate, add = torch.rand(*rows, inputs // 64, device="cuda").to(dtype), normal(*rows, outputs, dtype=dtype)
        for product in (Product(norm=norm, eps=1e-5, up=up), Product(gate=gate, add=add), Product(add=add)):
            close(few_linear(x, weight, product), linear_reference(x, weight, product))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(1, 1), (16, 1), (3, 7)], ids=str)
@pytest.mark.parametrize("shape", [(2048, 32, 2, 64), (4096, 32, 8, 128), (768, 6, 3, 96)], ids=str)
def test_project(shape: tuple[int, int, int, int], rows: tuple[int, int], dtype: torch.dtype) -> None:
    (C, H, K, D), (B, N) = shape, rows
    weights = [normal(n, C, dtype=dtype) for n in (H * D, K * D, K * D, H)]
    layer = Projections(1 + normal(C, dtype=dtype), 1e-5, *weights)
    angle = torch.randn(B, N, D // 2, device="cuda") * 9
    rope = tuple(torch.cat([part, part], -1).to(dtype) for part in (angle.cos(), angle.sin()))
    lengths = torch.arange(B, device="cuda", dtype=torch.int32) + N
    caches = [tuple(torch.zeros(B, 64, K, D, device="cuda", dtype=dtype) for _ in "kv") for _ in "ab"]
    x = normal(B, N, C, dtype=dtype)
    mine = few_project(x, layer, rope, caches[0], lengths)
    wanted = project_reference(x, layer, rope, caches[1], lengths)
    for a, b in zip((*mine, *caches[0]), (*wanted, *caches[1]), strict=True):
        close(a, b)
        assert torch.equal(a == 0, b == 0) or a.dim() != 4  # nothing is written elsewhere
