"""What the operations are compared with: dense masks and plain loops that share no code with ``ssa.ops``.

Shapes: B batch, T tokens, H query heads, K key-value heads, G = H/K, D head dim, S block size, n blocks per query.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis.strategies as st
import torch
from hypothesis import settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssa.documents import DocumentLayout

Inputs = tuple[Tensor, Tensor, Tensor]


def fuzz(examples: int) -> Callable[..., Any]:
    """Hypothesis settings for tests whose examples are dear; ``FUZZ_FACTOR`` multiplies them at night."""
    return settings(max_examples=examples * int(os.environ.get("FUZZ_FACTOR", "1")))


# ---------------------------------------------------------------------- inputs
def qkv(
    layout: DocumentLayout, heads: int = 2, kv_heads: int = 1, dim: int = 4, dtype: Any = torch.float64, seed: int = 0
) -> Inputs:
    """Normal ``q [B, T, H, D]`` and ``k``, ``v`` ``[B, T, K, D]``."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.batch, layout.tokens)
    return tuple(  # type: ignore[return-value]
        torch.randn(*shape, n, dim, generator=generator, dtype=torch.float64).to(dtype)
        for n in (heads, kv_heads, kv_heads)
    )


def integer_qk(
    layout: DocumentLayout, heads: int, kv_heads: int, dim: int, block_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Queries and keys whose pooled logits are small integers: exact in any order of summation, with many ties."""
    generator = torch.Generator().manual_seed(seed)
    shape = (layout.batch, layout.tokens)
    q = torch.randint(-1, 2, (*shape, heads, dim), generator=generator)
    k = torch.randint(-2, 3, (*shape, kv_heads, dim), generator=generator)
    # a mean over up to S tokens is exact: equal keys inside a block, whatever its length
    first = _first_token_of_block(layout, block_size)
    return q.float(), k.flatten(0, 1)[first].view_as(k).float()


def random_indices(layout: DocumentLayout, kv_heads: int, slots: int, block_size: int, seed: int) -> Tensor:
    """Valid block indices of any kind: unordered, -1 in any slot, the own block not always there, none twice."""
    generator = torch.Generator().manual_seed(seed)
    _, position = tokens(layout)
    out = torch.full((layout.batch, layout.tokens, kv_heads, slots), -1, dtype=torch.int32)
    for b in range(layout.batch):
        for t in range(layout.tokens):
            available = int(position[b, t]) // block_size + 1
            for g in range(kv_heads):
                count = int(torch.randint(1, min(slots, available) + 1, (), generator=generator))
                blocks = torch.randperm(available, generator=generator)[:count].int()
                out[b, t, g, torch.randperm(slots, generator=generator)[:count]] = blocks
    return out


def all_blocks(layout: DocumentLayout, kv_heads: int, block_size: int) -> Tensor:
    """Every block up to the own one."""
    _, position = tokens(layout)
    block = torch.arange(-(-layout.max_length // block_size))
    indices = torch.where(block <= position[..., None] // block_size, block, -1)
    return indices[:, :, None].expand(-1, -1, kv_heads, -1).int()


def leaves(*tensors: Tensor) -> list[Tensor]:
    """Copies that collect gradient."""
    return [x.detach().clone().requires_grad_() for x in tensors]


@st.composite
def layouts(draw: st.DrawFn, block_size: int, most: int = 4) -> DocumentLayout:
    """One or two rows of documents whose lengths lie at and around multiples of the block size."""
    S = block_size
    near = [n for n in (1, S - 1, S, S + 1, 2 * S - 1, 2 * S, 2 * S + 1, 3 * S, 4 * S + 1) if n > 0]
    row = draw(st.lists(st.sampled_from(near), min_size=1, max_size=most))
    rows = [row] if draw(st.booleans()) else [row, draw(st.permutations(row))]
    return DocumentLayout.from_lengths(rows)


# ---------------------------------------------------------------------- documents
def tokens(layout: DocumentLayout) -> tuple[Tensor, Tensor]:
    """Document number and position of each token, ``[B, T]`` each, by counting."""
    document = [d for d, length in enumerate(layout.lengths) for _ in range(length)]
    position = [p for length in layout.lengths for p in range(length)]
    return tuple(torch.tensor(x).view(layout.batch, layout.tokens) for x in (document, position))  # type: ignore[return-value]


def document_slices(layout: DocumentLayout) -> list[tuple[int, slice]]:
    """Row and tokens of each document."""
    out, flat = [], 0
    for length in layout.lengths:
        row, first = divmod(flat, layout.tokens)
        out.append((row, slice(first, first + length)))
        flat += length
    return out


def _first_token_of_block(layout: DocumentLayout, block_size: int) -> Tensor:
    flat, out = 0, []
    for length in layout.lengths:
        out += [flat + p // block_size * block_size for p in range(length)]
        flat += length
    return torch.tensor(out)


# ---------------------------------------------------------------------- dense attention
def causal_mask(layout: DocumentLayout) -> Tensor:
    """``[B, T, 1, T]``: query, KV head, key."""
    document, position = tokens(layout)
    same = document[:, :, None] == document[:, None]
    return (same & (position[:, None] <= position[:, :, None]))[:, :, None]


def selected_mask(indices: Tensor, block_size: int, layout: DocumentLayout) -> Tensor:
    """``[B, T, K, T]``: the key's block is selected, its document is the query's, it is not in the future."""
    _, position = tokens(layout)
    block = (position // block_size)[:, None, None, :, None]
    return (block == indices[:, :, :, None]).any(-1) & causal_mask(layout)


class Dense(NamedTuple):
    """Output ``[B, T, H, D]``, log-sum-exp ``[B, T, H]`` and probabilities ``[B, T, H, T]`` in float64."""

    out: Tensor
    lse: Tensor
    probability: Tensor


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Dense:
    """Softmax attention under ``mask [B, T, K or 1, T]``, differentiable by autograd; rows that see nothing give 0."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.double(), k.double().repeat_interleave(group, 2), v.double().repeat_interleave(group, 2)
    mask = mask.expand(-1, -1, k.shape[2] // group, -1).repeat_interleave(group, 2)
    logits = (torch.einsum("bthd,bshd->bths", q, k) * scale).masked_fill(~mask, float("-inf"))
    sees = mask.any(-1, keepdim=True)
    probability = logits.masked_fill(~sees, 0.0).softmax(-1) * sees
    return Dense(torch.einsum("bths,bshd->bthd", probability, v), logits.logsumexp(-1), probability)


# ---------------------------------------------------------------------- selection
def pooled_means(keys: Tensor, S: int) -> Tensor:
    """Mean keys ``[N, K, D]`` of one document's ``keys [L, K, D]`` in float64."""
    return torch.stack([keys[a : a + S].double().mean(0) for a in range(0, len(keys), S)])


def document_scores(q: Tensor, pooled: Tensor, S: int, scale: float) -> Tensor:
    """``[L, K, N]`` float64: sum over each group's heads of the softmax over the complete blocks, one document.

    ``q [L, H, D]``, ``pooled [N, K, D]``.
    """
    L, H, _ = q.shape
    N, K, _ = pooled.shape
    score = torch.zeros(L, K, N, dtype=torch.float64)
    for t in range(L):
        complete = (t + 1) // S
        if complete == 0:
            continue
        for h in range(H):
            g = h // (H // K)
            logits = (pooled[:complete, g].double() @ q[t, h].double()) * scale
            score[t, g, :complete] += logits.softmax(0)
    return score


# ---------------------------------------------------------------------- rounding and memory
def rms_error(x: Tensor, exact: Tensor) -> float:
    """Root-mean-square error relative to the root mean square of ``exact``."""
    x, exact = x.detach().double(), exact.detach().double()
    return float((x - exact).norm() / exact.norm().clamp(min=1e-30))


BF16_UNIT = 2.0**-8  # largest relative error of one rounding to bfloat16 (8 significant bits)


def rounding_bounds(inputs: Inputs, d_out: Tensor, mask: Tensor, scale: float, flash: bool = False) -> list[Tensor]:
    """How far bfloat16 may move out, dq, dk and dv of an exact attention, elementwise (first order, float64).

    Everything is computed in float32 and rounded once at the end, except: the backward pass reads the *rounded*
    output in ``delta = sum(d_out * out)``; and a flash kernel (``flash=True``) rounds the probabilities and the
    gradients of the logits before their second matrix product, and each query head's dk and dv before the sum.
    """
    (q, k, v), u = inputs, BF16_UNIT
    group = q.shape[2] // k.shape[2]
    dense = dense_attention(q, k, v, mask, scale)
    p, d_out = dense.probability, d_out.double()
    key, value = (x.double().repeat_interleave(group, 2) for x in (k, v))

    def pull(weights: Tensor, x: Tensor) -> Tensor:  # weights [B, T, H, T] over keys
        return torch.einsum("bths,bshd->bthd", weights, x)

    def push(weights: Tensor, x: Tensor) -> Tensor:  # over queries, then over the heads of a group
        return torch.einsum("bths,bthd->bshd", weights, x).unflatten(2, (-1, group)).sum(3)

    delta = (d_out * dense.out).sum(-1, keepdim=True)
    d_logits = p * (torch.einsum("bthd,bshd->bths", d_out, value) - delta) * scale
    loose = u * p * (d_out * dense.out).abs().sum(-1, keepdim=True) * scale  # from the rounded output
    out = u * dense.out.abs()
    dq = pull(loose, key.abs()) + u * pull(d_logits, key).abs()
    dk = push(loose, q.double().abs()) + u * push(d_logits, q.double()).abs()
    dv = u * push(p, d_out).abs()
    if flash:
        out = out + u * pull(p, value.abs())
        dq = dq + u * pull(d_logits.abs() + loose, key.abs())
        dk = dk + 2 * u * push(d_logits.abs() + loose, q.double().abs())
        dv = dv + 2 * u * push(p, d_out.abs())
    return [out, dq, dk, dv]


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation returns."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return out
