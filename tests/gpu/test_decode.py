"""Proof of the decoding kernels on a GPU: ``python -m pytest tests/gpu/test_decode.py`` takes about a minute.

Everything that is not a real row of the cache holds NaN, and so does fresh memory.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.ops import SparseSpec, select_blocks
from ssa.ops.decode import (
    attend_blocks_cached,
    decode_attention,
    full_decode_attention,
    select_blocks_cached,
    update_pooled,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned_memory"),
]
NAN = float("nan")


class Shape(NamedTuple):
    """Heads, KV heads, head dim, selection, dtype, new tokens."""

    H: int
    K: int
    D: int
    spec: SparseSpec
    dtype: torch.dtype = torch.bfloat16
    N: int = 1


SHAPES = [
    Shape(32, 2, 64, SparseSpec(16, 16)),  # 1B
    Shape(32, 8, 128, SparseSpec(16, 16)),  # 8B
    Shape(16, 1, 64, SparseSpec(16, 16, rule="official")),
    Shape(32, 2, 64, SparseSpec(16, 64)),  # more keys than one program attends
    Shape(8, 8, 64, SparseSpec(64, 4, 1, 2), N=5),
    Shape(2, 2, 256, SparseSpec(128, 3), N=2),
    Shape(64, 1, 32, SparseSpec(32, 8), N=3),
    Shape(10, 2, 192, SparseSpec(32, 4)),
    Shape(6, 2, 80, SparseSpec(16, 8), torch.float16, N=4),
    Shape(8, 2, 64, SparseSpec(16, 8), torch.float32, N=2),
    Shape(4, 2, 256, SparseSpec(16, 8), torch.float32),
]
LENGTHS, STARTS = [4096, 1, 16, 2047, 3001, 0], [0, 0, 3, 2000, 17, 0]
CAPACITY = 4100


class Cache(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    pooled: Tensor


def cache(shape: Shape, lengths: list[int], starts: list[int], capacity: int = CAPACITY, seed: int = 0) -> Cache:
    """NaN in every row that is not a real token."""
    generator = torch.Generator("cuda").manual_seed(seed)
    B, row = len(lengths), torch.arange(capacity, device="cuda")
    first, end = (torch.tensor(x, device="cuda")[:, None] for x in (starts, lengths))
    unreal = ((row < first) | (row >= end))[..., None, None]
    draw = lambda n, h: torch.randn(B, n, h, shape.D, device="cuda", generator=generator).to(shape.dtype)  # noqa: E731
    k, v = (draw(capacity, shape.K).masked_fill(unreal, NAN) for _ in range(2))
    S = shape.spec.block_size
    pooled = torch.full((B, -(-capacity // S), shape.K, shape.D), NAN, device="cuda", dtype=shape.dtype)
    update_pooled(pooled, k, integers(lengths), capacity, integers(starts), S, backend="triton")
    return Cache(draw(shape.N, shape.H), k, v, pooled)


def integers(x: list[int]) -> Tensor:
    return torch.tensor(x, dtype=torch.int32, device="cuda")


def exact(x: Cache, lengths: list[int], starts: list[int], allowed: Tensor | None, S: int) -> tuple[Tensor, Tensor]:
    """Output and lse in float64; ``allowed [B, N, K, n]`` blocks, or None for full attention."""
    B, N, H, D = x.q.shape
    K = x.k.shape[2]
    out = torch.zeros(B, N, H, D, dtype=torch.float64, device="cuda")
    lse = torch.full((B, N, H), -torch.inf, dtype=torch.float64, device="cuda")
    for b, (first, end) in enumerate(zip(starts, lengths, strict=True)):
        for i in range(N):
            place = end - first - N + i
            if place < 0:
                continue
            key, value = (y[b, first : first + place + 1].double() for y in (x.k, x.v))
            logits = torch.einsum("kgd,lkd->kgl", x.q[b, i].double().view(K, H // K, D), key) * D**-0.5
            if allowed is not None:
                block = torch.arange(place + 1, device="cuda") // S
                seen = (block[None, :, None] == allowed[b, i][:, None, :]).any(-1)  # [K, L]
                logits = logits.masked_fill(~seen[:, None], -torch.inf)
            out[b, i] = torch.einsum("kgl,lkd->kgd", logits.softmax(-1), value).reshape(H, D)
            lse[b, i] = logits.logsumexp(-1).reshape(H)
    return out, lse


def close(mine: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    """Twice the rounding of the dtype, relative to the output's size; zeros and -inf exactly."""
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}[dtype]
    out, lse = mine[0].double(), mine[1].double()
    assert torch.isfinite(out).all()
    nothing = wanted[1] == -torch.inf
    assert torch.equal(lse == -torch.inf, nothing)
    assert not out[nothing].any()
    error = float((out - wanted[0]).norm() / wanted[0].norm())
    assert error < 2 * unit, error
    assert (lse - wanted[1])[~nothing].abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: Shape) -> None:
    x, S = cache(shape, LENGTHS, STARTS), shape.spec.block_size
    lengths, starts = integers(LENGTHS), integers(STARTS)
    reference = torch.full_like(x.pooled, NAN)
    update_pooled(reference, x.k, lengths, CAPACITY, starts, S, backend="reference")
    assert torch.equal(x.pooled.nan_to_num(-7.0), reference.nan_to_num(-7.0))
    blocks = select_blocks_cached(x.q, x.pooled, lengths, shape.spec, starts=starts, backend="triton")
    wanted = select_blocks_cached(x.q, x.pooled, lengths, shape.spec, starts=starts, backend="reference")
    assert int((blocks != wanted).any(-1).sum()) <= max(1, blocks.shape[0] * shape.N * shape.K // 100)  # float32 ties
    oracle = exact(x, LENGTHS, STARTS, blocks, S)
    given = attend_blocks_cached(x.q, x.k, x.v, blocks, S, lengths, starts=starts, backend="triton")
    close(given, oracle, shape.dtype)
    together = decode_attention(
        x.q, x.k, x.v, x.pooled, lengths, shape.spec, starts=starts, return_lse=True, backend="triton"
    )
    close(together, oracle, shape.dtype)
    full = full_decode_attention(x.q, x.k, x.v, lengths, starts=starts, return_lse=True, backend="triton")
    close(full, exact(x, LENGTHS, STARTS, None, S), shape.dtype)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[3]], ids=str)
def test_a_captured_step_serves_other_lengths(shape: Shape) -> None:
    """Captured at short lengths, replayed at long ones: grids come from the capacity, lengths from the device."""
    S = shape.spec.block_size
    x, other = cache(shape, LENGTHS, STARTS), cache(shape, [17, 40, 16, 90, 33, 64], [0] * 6)
    lengths, starts = integers([17, 40, 16, 90, 33, 64]), integers([0] * 6)
    buffers = Cache(*(t.clone() for t in other))

    def step() -> tuple[Tensor, ...]:
        sparse = decode_attention(
            *buffers, lengths, shape.spec, starts=starts, update=True, return_lse=True, backend="triton"
        )
        return (*sparse, *full_decode_attention(*buffers[:3], lengths, starts=starts, return_lse=True))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for values, ends, firsts in ((x, LENGTHS, STARTS), (other, lengths.tolist(), [0] * 6), (x, LENGTHS, STARTS)):
        for to, value in zip(buffers, values, strict=True):
            to.copy_(value)
        lengths.copy_(integers(ends))
        starts.copy_(integers(firsts))
        for _ in range(2):  # a replay leaves its workspace fit for the next
            for b, (end, first) in enumerate(zip(ends, firsts, strict=True)):  # the new token's block has no mean yet
                buffers.pooled[b, max(end - first - 1, 0) // S :] = NAN
            graph.replay()
            assert torch.equal(buffers.pooled.nan_to_num(-7.0), values.pooled.nan_to_num(-7.0))
            blocks = select_blocks_cached(values.q, values.pooled, lengths, shape.spec, starts=starts)
            close((captured[0], captured[1]), exact(values, ends, firsts, blocks, S), shape.dtype)
            close((captured[2], captured[3]), exact(values, ends, firsts, None, S), shape.dtype)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_blocks_and_means_equal_the_prefill(shape: Shape) -> None:
    """Token by token at the end of a document: the same blocks as the prefill's kernels choose."""
    length, S = 1500, shape.spec.block_size
    x = cache(shape, [length], [0], 1504)
    q = torch.randn(1, length, shape.H, shape.D, device="cuda", dtype=shape.dtype)
    whole = select_blocks(q, x.k[:, :length], shape.spec, DocumentLayout.single(1, length), backend="triton")
    wrong = 0
    for t in range(length - 40, length):
        mine = select_blocks_cached(q[:, t : t + 1], x.pooled, integers([t + 1]), shape.spec, backend="triton")
        wrong += int((mine[0, 0] != whole[0, t]).any(-1).sum())
    assert wrong <= 1  # a tie of float32 scores
    assert S == 16


def test_runs_repeat_bit_for_bit() -> None:
    shape = SHAPES[0]
    x, lengths = cache(shape, LENGTHS, [0] * 6), integers(LENGTHS)
    runs = [decode_attention(*x, lengths, shape.spec, return_lse=True, backend="triton") for _ in range(50)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("batch", [1, 5, 48])  # one tile a program, several, and sums by a kernel of their own
def test_long_caches_choose_the_references_blocks_every_time(shape: Shape, batch: int) -> None:
    """Whoever arrives last merges what all have listed: reruns are equal bit for bit, and the blocks are right."""
    length = 131072 // (1 if batch < 48 else 8)
    q = torch.randn(batch, 1, shape.H, shape.D, device="cuda", dtype=shape.dtype)
    k = torch.randn(batch, length, shape.K, shape.D, device="cuda", dtype=shape.dtype)
    lengths = integers([length - 37 * b for b in range(batch)])
    pooled = torch.full((batch, length // 16, shape.K, shape.D), NAN, device="cuda", dtype=shape.dtype)
    update_pooled(pooled, k, lengths, length, None, 16, backend="triton")
    blocks = select_blocks_cached(q, pooled, lengths, shape.spec, backend="triton")
    wanted = select_blocks_cached(q, pooled, lengths, shape.spec, backend="reference")
    assert int((blocks != wanted).any(-1).sum()) <= max(1, batch * shape.K // 50)  # float32 ties
    runs = [
        decode_attention(q, k, k, pooled, lengths, shape.spec, return_lse=True, backend="triton") for _ in range(99)
    ]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
    out, _ = attend_blocks_cached(q, k, k, blocks, 16, lengths, backend="triton")
    assert float((out - runs[0][0]).abs().max()) < 2e-2


def test_a_strided_cache_is_read_in_place() -> None:
    """[B, K, C, D] storage, as transformers keeps it."""
    shape = SHAPES[0]
    x, lengths = cache(shape, LENGTHS, [0] * 6), integers(LENGTHS)
    k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.k, x.v))
    a = decode_attention(*x, lengths, shape.spec, backend="triton")
    assert torch.equal(a, decode_attention(x.q, k, v, x.pooled, lengths, shape.spec, backend="triton"))


def test_long_chunks_of_new_tokens() -> None:
    """400 new tokens at once equal one at a time."""
    shape = SHAPES[0]._replace(N=400)
    x, lengths = cache(shape, [4096, 3000], [0, 100]), integers([4096, 3000])
    starts = integers([0, 100])
    together = decode_attention(*x, lengths, shape.spec, starts=starts, backend="triton")
    for i in (0, 7, 399):
        one = decode_attention(
            x.q[:, i : i + 1], *x[1:], lengths - 399 + i, shape.spec, starts=starts, backend="triton"
        )
        assert float((together[:, i] - one[:, 0]).abs().max()) < 2e-2


def test_compiled() -> None:
    shape = SHAPES[0]
    x, lengths = cache(shape, LENGTHS, [0] * 6), integers(LENGTHS)
    function = torch.compile(
        lambda q: decode_attention(q, *x[1:], lengths, shape.spec) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(function(x.q), decode_attention(*x, lengths, shape.spec) * 2)
