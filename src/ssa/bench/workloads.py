"""What is timed: shapes, documents and inputs."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.ops.spec import SparseSpec

Kind = Literal["correlated", "random"]
RHO = 0.99  # neighbouring queries and keys of trained models select nearly the same blocks; so do these


@dataclass(frozen=True)
class Workload:
    """Shapes and inputs of a case.

    Attributes:
        name: short, unique with ``inputs``.
        rows: document lengths of each row.
        heads, kv_heads, head_dim: H, K, D.
        block_size, num_blocks: of the sparse stream.
        inputs: ``"correlated"``: q and k are AR(1) along time with rho 0.99; ``"random"``: independent.
        dtype: of q, k, v.
    """

    name: str
    rows: tuple[tuple[int, ...], ...]
    heads: int = 32
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    num_blocks: int = 16
    inputs: Kind = "correlated"
    dtype: torch.dtype = torch.bfloat16

    @property
    def layout(self) -> DocumentLayout:
        """Documents."""
        return DocumentLayout.from_lengths(self.rows)

    @property
    def spec(self) -> SparseSpec:
        """Selection."""
        return SparseSpec(self.block_size, self.num_blocks)

    @property
    def packed(self) -> bool:
        """Whether some row holds several documents."""
        return any(len(row) > 1 for row in self.rows)

    def describe(self) -> dict[str, Any]:
        """For the result file."""
        lengths = [n for row in self.rows for n in row]
        return {
            "name": self.name, "batch": len(self.rows), "tokens": sum(self.rows[0]), "documents": len(lengths),
            "longest": max(lengths), "heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim,
            "block_size": self.block_size, "num_blocks": self.num_blocks, "inputs": self.inputs,
            "dtype": str(self.dtype).removeprefix("torch."),
        }  # fmt: skip

    def small(self) -> Workload:
        """The same heads, blocks and inputs at a size that the float64 reference checks in a moment."""
        budget, equal = min(1024, sum(self.rows[0])), len({n for row in self.rows for n in row}) == 1
        row = [budget // 2, budget // 4 - 1, budget - budget // 2 - budget // 4 + 1]
        if not self.packed:
            row = [budget]
        elif equal:
            row = [budget // 4] * 4
        return replace(self, name=f"{self.name}, checked", rows=(tuple(row),))


@dataclass(frozen=True)
class Tensors:
    """``q``, ``d_out`` ``[B, T, H, D]``, ``k``, ``v`` ``[B, T, K, D]``; q, k, v require gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """What gradients are taken of."""
        return self.q, self.k, self.v


def draw(workload: Workload, device: torch.device, seed: int = 0) -> Tensors:
    """Inputs of a workload, the same for a seed on a device."""
    generator = torch.Generator(device).manual_seed(seed)
    layout = workload.layout

    def normal(heads: int) -> Tensor:
        shape = (layout.batch, layout.tokens, heads, workload.head_dim)
        return torch.randn(shape, generator=generator, device=device)

    def correlated(x: Tensor) -> Tensor:
        return autoregressive(x, RHO) if workload.inputs == "correlated" else x

    ready = lambda x: x.to(workload.dtype)  # noqa: E731
    q, k = ready(correlated(normal(workload.heads))), ready(correlated(normal(workload.kv_heads)))
    v, d_out = ready(normal(workload.kv_heads)), ready(normal(workload.heads))
    return Tensors(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), d_out)


def autoregressive(noise: Tensor, rho: float) -> Tensor:
    """Unit-variance AR(1) series along dimension 1 from independent ``noise``, in log2(T) steps.

    ``x_t = sum over i of rho**i e_(t-i)`` doubles its number of terms in every step.
    """
    x = noise * (1 - rho * rho) ** 0.5
    step = 1
    while step < x.shape[1] and rho**step > 1e-4:
        shifted = x.clone()
        shifted[:, step:] += rho**step * x[:, :-step]
        x, step = shifted, 2 * step
    return x


def realistic_rows(rows: int, tokens: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """Log-normal document lengths (median 500 tokens, sigma 1.2: many short texts, few long) that fill rows."""
    generator = random.Random(seed)
    found = []
    for _ in range(rows):
        row: list[int] = []
        while sum(row) < tokens:
            row.append(min(tokens - sum(row), max(16, int(generator.lognormvariate(6.2, 1.2)))))
        found.append(tuple(row))
    return tuple(found)
