"""Decoding against a cache equals attention over the whole sequence, whatever unused rows hold."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.errors import InputError
from ssa.ops import (
    SparseSpec,
    compressed_attention,
    explain,
    full_attention,
    select_blocks,
    sparse_attention,
    window_attention,
)
from ssa.ops.decode import (
    attend_blocks_cached,
    decode_attention,
    full_decode_attention,
    select_blocks_cached,
    update_pooled,
)
from ssa.ops.decode.nsa import compressed_decode_attention, window_decode_attention
from ssa.ops.selection.reference import pool_keys

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NAN = float("nan")


class Case(NamedTuple):
    """Sequences and a cache that holds them, garbage everywhere else."""

    queries: list[Tensor]  # [1, L, H, D] each
    keys: list[Tensor]
    values: list[Tensor]
    k: Tensor
    v: Tensor
    pooled: Tensor
    pooled_v: Tensor
    lengths: Tensor
    starts: Tensor | None


def case(
    lengths: list[int], pads: list[int] | None, S: int, capacity: int, *, H=4, K=2, D=8, dtype=torch.float32, step=1
) -> Case:
    """Fill a poisoned cache ``step`` tokens at a time (the last step may be shorter), pooled means kept on the way."""
    queries, keys, values = ([torch.randn(1, n, h, D, dtype=dtype) for n in lengths] for h in (H, K, K))
    B, first = len(lengths), pads or [0] * len(lengths)
    k, v = torch.full((2, B, capacity, K, D), NAN, dtype=dtype)
    pooled, pooled_v = torch.full((2, B, -(-capacity // S), K, D), NAN, dtype=dtype)
    starts = None if pads is None else torch.tensor(pads, dtype=torch.int32)
    filled = 0
    longest = max(p + n for p, n in zip(first, lengths, strict=True))
    while filled < longest:
        new = min(step, longest - filled)
        filled += new
        for row, (pad, key, value) in enumerate(zip(first, keys, values, strict=True)):
            end = min(pad + key.shape[1], filled)
            if end > pad:
                k[row, pad:end], v[row, pad:end] = key[0, : end - pad], value[0, : end - pad]
        at = torch.tensor([filled] * B, dtype=torch.int32)
        begin = None if starts is None else torch.minimum(starts, at)
        update_pooled(pooled, k, at, new, begin, S)
        update_pooled(pooled_v, v, at, new, begin, S)
    ends = torch.tensor([p + n for p, n in zip(first, lengths, strict=True)], dtype=torch.int32)
    return Case(queries, keys, values, k, v, pooled, pooled_v, ends, starts)


def newest(x: Case, N: int) -> Tensor:
    """``[B, N, H, D]``: the queries of the last N tokens; NaN where a sequence has fewer."""
    out = torch.full((len(x.queries), N, *x.queries[0].shape[2:]), NAN, dtype=x.k.dtype)
    for row, q in enumerate(x.queries):
        out[row, max(0, N - q.shape[1]) :] = q[0, -N:]
    return out


def expected(x: Case, N: int, one) -> Tensor:
    """``one(q, k, v) [1, L, ...]`` of each sequence, its last N tokens; 0 where it has fewer."""
    rows = []
    for q, k, v in zip(x.queries, x.keys, x.values, strict=True):
        whole = one(q, k, v)[0]
        rows.append(torch.cat([whole.new_zeros(max(0, N - len(whole)), *whole.shape[1:]), whole[-N:]]))
    return torch.stack(rows)


SHAPES = [
    ([1, 1], None, 1),
    ([3, 3], None, 1),
    ([4, 4], None, 1),  # one block, just completed
    ([17, 17], None, 1),
    ([40, 40], None, 5),
    ([33, 33], None, 33),  # everything is new
    ([30, 17, 4], [0, 13, 26], 1),  # left padding
    ([30, 17, 4], [0, 13, 26], 9),  # the last row's first new tokens are padding
    ([30, 17, 4], None, 3),  # ragged, as in serving
]


@pytest.mark.parametrize(("lengths", "pads", "N"), SHAPES)
@pytest.mark.parametrize("spec", [SparseSpec(4, 3), SparseSpec(4, 4, 1, 2), SparseSpec(4, 3, rule="official")])
def test_sparse_decoding_equals_the_whole_sequence(lengths, pads, N, spec):
    x = case(lengths, pads, 4, 43)
    if pads is None and len(set(lengths)) > 1:  # rows of their own lengths: fill each alone
        x = ragged(lengths, 4, 43)
    q = newest(x, N)
    indices = select_blocks_cached(q, x.pooled, x.lengths, spec, starts=x.starts)
    wanted = expected(x, N, lambda q, k, v: select_blocks(q, k, spec).long() + 1) - 1  # 0 becomes -1: no blocks
    assert torch.equal(indices.long(), wanted)
    out, lse = decode_attention(q, x.k, x.v, x.pooled, x.lengths, spec, starts=x.starts, return_lse=True)
    given = attend_blocks_cached(q, x.k, x.v, indices, 4, x.lengths, starts=x.starts)
    for together, alone in zip((out, lse), given, strict=True):
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-6)

    def sparse(q, k, v, part):
        return sparse_attention(q, k, v, select_blocks(q, k, spec), 4, return_lse=True)[part]

    torch.testing.assert_close(out, expected(x, N, lambda *t: sparse(*t, 0)), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse.exp(), expected(x, N, lambda *t: sparse(*t, 1).exp()), atol=1e-6, rtol=1e-5)


def ragged(lengths: list[int], S: int, capacity: int) -> Case:
    cases = [case([n], None, S, capacity) for n in lengths]
    lists = ([c[i][0] for c in cases] for i in range(3))
    return Case(*lists, *(torch.cat([c[i] for c in cases]) for i in range(3, 8)), None)


@pytest.mark.parametrize(("lengths", "pads", "N"), SHAPES)
def test_full_decoding_equals_the_whole_sequence(lengths, pads, N):
    x = ragged(lengths, 4, 43) if pads is None else case(lengths, pads, 4, 43)
    q = newest(x, N)
    out, lse = full_decode_attention(q, x.k, x.v, x.lengths, starts=x.starts, return_lse=True)
    torch.testing.assert_close(out, expected(x, N, full_attention), atol=1e-6, rtol=1e-5)
    whole = expected(x, N, lambda q, k, v: full_attention(q, k, v, return_lse=True)[1].exp())
    torch.testing.assert_close(lse.exp(), whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("lengths", "pads", "N"), SHAPES)
def test_nsa_branches_equal_the_whole_sequence(lengths, pads, N):
    x = ragged(lengths, 4, 43) if pads is None else case(lengths, pads, 4, 43)
    q = newest(x, N)
    out = compressed_decode_attention(q, x.pooled, x.pooled_v, x.lengths, 4, starts=x.starts)
    wanted = expected(x, N, lambda q, k, v: compressed_attention(q, k, v, 4))
    torch.testing.assert_close(out, wanted, atol=1e-6, rtol=1e-5)
    for window in (1, 6, 64):
        out = window_decode_attention(q, x.k, x.v, x.lengths, window, starts=x.starts)
        wanted = expected(x, N, lambda q, k, v, w=window: window_attention(q, k, v, w))
        torch.testing.assert_close(out, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("step", [1, 3, 16, 100])
@pytest.mark.parametrize("S", [1, 4, 16])
def test_completed_means_have_the_bits_of_the_prefill(dtype, step, S):
    x = case([61, 40, 3], [0, 21, 58], S, 64, dtype=dtype, step=step)
    for row, key in enumerate(x.keys):
        complete = key.shape[1] // S
        grid = pool_keys(key, S, DocumentLayout.single(1, key.shape[1]))
        assert torch.equal(x.pooled[row, :complete], grid[:complete])
        assert x.pooled[row, complete:].isnan().all()  # nothing else is written


def test_a_full_cache_completes_its_last_block():
    x = case([32], None, 4, 32, step=3)
    assert torch.equal(x.pooled[0], pool_keys(x.keys[0], 4, DocumentLayout.single(1, 32)))


def test_a_budget_over_all_blocks_equals_full_decoding():
    x = case([41, 30], [0, 11], 4, 48)
    q = newest(x, 3)
    full = full_decode_attention(q, x.k, x.v, x.lengths, starts=x.starts)
    sparse = decode_attention(q, x.k, x.v, x.pooled, x.lengths, SparseSpec(4, 12), starts=x.starts)
    torch.testing.assert_close(sparse, full, atol=1e-6, rtol=1e-5)


def test_slabs_of_queries_change_nothing(monkeypatch):
    x = case([61], None, 4, 64)
    q, spec = newest(x, 61), SparseSpec(4, 5)
    run = lambda: decode_attention(q, x.k, x.v, x.pooled, x.lengths, spec)  # noqa: E731
    full = full_decode_attention(q, x.k, x.v, x.lengths)
    whole = run()
    monkeypatch.setattr("ssa.ops.decode.reference.CHUNK_ELEMENTS", 700)
    monkeypatch.setattr("ssa.ops.sparse.reference.CHUNK_ELEMENTS", 700)
    torch.testing.assert_close(run(), whole, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(full_decode_attention(q, x.k, x.v, x.lengths), full, atol=1e-6, rtol=1e-6)


def test_an_unused_row_of_the_batch_gives_zero():
    x = case([20, 20], None, 4, 24)
    lengths = torch.tensor([20, 0], dtype=torch.int32)
    q = newest(x, 2)
    for out in (
        decode_attention(q, x.k, x.v, x.pooled, lengths, SparseSpec(4, 3)),
        full_decode_attention(q, x.k, x.v, lengths),
    ):
        assert not out[1].any()
        assert out[0].isfinite().all()


def test_operations_are_explained():
    assert "reference" in str(explain("decode_attention"))
    assert explain("full_decode_attention").chosen != "none"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.tensor([9, 9])}, "lengths: got torch.int64"),
        ({"lengths": torch.tensor([9], dtype=torch.int32)}, r"int32 \[B\]"),
        ({"lengths": torch.tensor([9, 25], dtype=torch.int32)}, "length 25 of sequence 1"),
        ({"starts": torch.tensor([0, 21], dtype=torch.int32)}, "start 21 and length 20"),
        ({"k": torch.zeros(2, 24, 2, 8, dtype=torch.float64)}, "q of dtype torch.float32 and k of torch.float64"),
        ({"k": torch.zeros(3, 24, 2, 8)}, "equal B and head dimension"),
        ({"v": torch.zeros(2, 20, 2, 8)}, "equal shapes"),
        ({"q": torch.zeros(2, 1, 3, 8)}, "divisible"),
        ({"q": torch.zeros(2, 0, 4, 8)}, "none empty"),
        ({"pooled": torch.zeros(2, 5, 2, 8)}, r"pooled: got 5 blocks of 4; expected at least ceil\(24 / 4\)"),
        ({"pooled": torch.zeros(2, 6, 1, 8)}, "pooled with 1 heads"),
    ],
)
def test_bad_input_is_refused(change, message):
    x = case([20, 20], None, 4, 24)
    given = {"q": newest(x, 1), "k": x.k, "v": x.v, "pooled": x.pooled, "lengths": x.lengths, "starts": None}
    given |= change
    starts = given.pop("starts")
    with pytest.raises(InputError, match=message):
        decode_attention(**given, spec=SparseSpec(4, 3), starts=starts)


@pytest.mark.parametrize("limit", [None, 0.1])
def test_update_makes_the_means_that_the_new_tokens_lack(limit: float | None) -> None:
    x = case([48, 31], [0, 3], 16, 64)
    spec = SparseSpec(16, 2, max_dropped_mass=limit)
    q = torch.randn(2, 1, 4, 8)
    lacking = x.pooled.clone()
    lacking[0, 2], lacking[1, 1] = NAN, NAN  # the first is completed by the new token, the second is not complete
    out = decode_attention(q, x.k, x.v, lacking, x.lengths, spec, starts=x.starts, update=True)
    assert torch.equal(lacking[0, :3], x.pooled[0, :3])
    assert lacking[1, 1].isnan().all()
    assert torch.equal(out, decode_attention(q, x.k, x.v, x.pooled, x.lengths, spec, starts=x.starts))
