"""Block selection against hand-computed cases, brute force and a plain simulation of the published streaming merge."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from oracles import (
    LargestTensor,
    document_scores,
    document_slices,
    fuzz,
    integer_qk,
    layouts,
    pooled_means,
    qkv,
    tokens,
)
from ssa.documents import DocumentLayout
from ssa.ops import SparseSpec, select_blocks
from ssa.ops.selection import reference
from ssa.ops.selection.reference import pool_keys

pytestmark = pytest.mark.usefixtures("poisoned_memory")
TIE = 1e-6  # scores this close may be ordered either way in float32; a group sums up to 6 of them


def select(q: Tensor, k: Tensor, spec: SparseSpec, layout: DocumentLayout | None = None, scale: float = 1.0) -> Tensor:
    return select_blocks(q, k, spec, layout, scale=scale, backend="reference")


def one_head(queries: list[float], keys: list[float]) -> tuple[Tensor, Tensor]:
    """``q`` and ``k`` of one sequence, one head, one dimension."""
    return tuple(torch.tensor(x, dtype=torch.float32).view(1, -1, 1, 1) for x in (queries, keys))  # type: ignore[return-value]


# ---------------------------------------------------------------------- by hand
def test_top_k_by_hand() -> None:
    # block means 1, 3, 2, 0, 9: the best previous block beside the own one
    q, k = one_head([1.0] * 10, [1, 1, 2, 4, 1, 3, 0, 0, 9, 9])
    picked = select(q, k, SparseSpec(2, 2))[0, :, 0].tolist()
    none = -1
    assert picked == [[0, none], [0, none], [0, 1], [0, 1], [1, 2], [1, 2], [1, 3], [1, 3], [1, 4], [1, 4]]


def test_a_negative_query_prefers_the_smallest_key() -> None:
    q, k = one_head([-1.0] * 8, [1, 1, -2, -2, 5, 5, 0, 0])
    assert select(q, k, SparseSpec(2, 2))[0, -1, 0].tolist() == [1, 3]


def test_early_tokens_take_what_exists() -> None:
    q, k = one_head([1.0] * 8, [float(i) for i in range(8)])
    picked = select(q, k, SparseSpec(2, 4))[0, :, 0]
    for t in range(8):
        own = t // 2
        assert picked[t].tolist() == [*range(own + 1), *[-1] * (3 - own)]


def test_ties_go_to_the_lowest_index() -> None:
    q, k = one_head([1.0] * 12, [5.0] * 12)  # every score is the same
    assert select(q, k, SparseSpec(2, 3))[0, -1, 0].tolist() == [0, 1, 5]


@pytest.mark.parametrize("rule", ["exact", "official"])
def test_ties_among_hundreds_of_blocks_go_to_the_lowest_index(rule: str) -> None:
    """Sorting is stable by luck up to 16 entries, so the tied row must be longer."""
    keys = torch.tensor([float(n % 7 == 3) for n in range(300)]).repeat_interleave(2)
    q, k = one_head([1.0] * 600, keys.tolist())
    picked = select(q, k, SparseSpec(2, 2, rule=rule) if rule == "official" else SparseSpec(2, 6))[0, -1, 0]
    assert picked.tolist() == ([3, 299] if rule == "official" else [3, 10, 17, 24, 31, 299])


def test_ties_are_broken_among_the_tied_only() -> None:
    q, k = one_head([1.0] * 12, [1, 1, 2, 2, 1, 1, 2, 2, 2, 2, 0, 0])  # means 1 2 1 2 2 own
    assert select(q, k, SparseSpec(2, 3))[0, -1, 0].tolist() == [1, 3, 5]


def test_scores_that_underflow_stay_selectable() -> None:
    q, k = one_head([1.0] * 8, [0, 0, 500, 500, 0, 0, 0, 0])  # exp(-500) is 0 in float32: blocks 0 and 2 tie at 0
    assert select(q, k, SparseSpec(2, 3))[0, -1, 0].tolist() == [0, 1, 3]


def test_the_own_block_joins_the_normaliser_at_its_last_token() -> None:
    # Head 0 has logits (2, 0) on blocks 0 and 1 and 6 on the own block, head 1 has (0, 1) and 0.
    # Own block incomplete (t = 4): sums .88 + .27 against .12 + .73, block 0 wins.
    # Complete (t = 5): head 0 gives nearly everything to the own block; sums .02 + .21 against .00 + .58, block 1 wins.
    keys = torch.tensor([[2.0, 0], [2, 0], [0, 1], [0, 1], [6, 0], [6, 0]]).view(1, 6, 1, 2)
    queries = torch.eye(2).expand(1, 6, 2, 2)
    picked = select(queries, keys, SparseSpec(2, 2))[0, :, 0].tolist()
    assert picked[4] == [0, 2]
    assert picked[5] == [1, 2]


def test_a_group_shares_the_sum_of_its_heads_probabilities() -> None:
    # Head 0: logits (9, 0, 0), nearly all mass on block 0. Heads 1 and 2: (0, 2, 0), .79 each on block 1.
    # Sum 1.21 against 1.58: block 1. A sum of logits (9 against 4) or a maximum would take block 0.
    keys = torch.tensor([[9.0, 0], [0, 2], [0, 0], [0, 0]]).repeat_interleave(2, 0).view(1, 8, 1, 2)
    queries = torch.tensor([[1.0, 0], [0, 1], [0, 1]]).expand(1, 8, 3, 2)
    assert select(queries, keys, SparseSpec(2, 2))[0, 6, 0].tolist() == [1, 3]


def test_each_kv_head_selects_for_its_own_query_heads() -> None:
    # query heads 0-1 belong to KV head 0, heads 2-3 to KV head 1
    keys = torch.tensor([[4.0, 0], [0, 4], [0, 0]]).repeat_interleave(2, 0)  # [6, K]
    queries = torch.ones(1, 6, 4, 1)
    assert select(queries, keys.view(1, 6, 2, 1), SparseSpec(2, 2))[0, -1].tolist() == [[0, 2], [1, 2]]


def test_documents_restart_the_grid() -> None:
    layout = DocumentLayout.from_lengths([3, 5])
    q, k = one_head([1.0] * 8, [9, 9, 9, 1, 1, 2, 2, 0])
    picked = select(q, k, SparseSpec(2, 2), layout)[0, :, 0].tolist()
    assert picked == [[0, -1], [0, -1], [0, 1], [0, -1], [0, -1], [0, 1], [0, 1], [1, 2]]


@pytest.mark.parametrize(
    ("first", "local", "budget", "expected"),
    [
        (1, 1, 3, [0, 3, 5]),  # block 0 forced, own 5, best of the rest is 3
        (0, 3, 4, [3, 4, 5, 1]),  # 3, 4, 5 forced, next best 1
        (2, 2, 4, [0, 1, 4, 5]),
        (2, 2, 5, [0, 1, 3, 4, 5]),
    ],
)
def test_forced_blocks(first: int, local: int, budget: int, expected: list[int]) -> None:
    q, k = one_head([1.0] * 12, [-9, -9, 3, 3, 1, 1, 5, 5, -9, -9, 0, 0])  # means -9 3 1 5 -9 own
    picked = select(q, k, SparseSpec(2, budget, first_blocks=first, local_blocks=local))[0, -1, 0]
    assert picked.tolist() == sorted(expected)


def test_forced_blocks_that_do_not_exist_yet() -> None:
    q, k = one_head([1.0] * 6, [0.0] * 6)
    picked = select(q, k, SparseSpec(2, 4, first_blocks=2, local_blocks=2))[0, :, 0]
    assert picked[0].tolist() == [0, -1, -1, -1]
    assert picked[-1].tolist() == [0, 1, 2, -1]


def test_scale_sharpens_the_normalised_scores() -> None:
    # Head 0: logits (9, 0) * scale, heads 1 and 2: (0, 2) * scale.
    # Scale .1: .71 + 2 * .45 = 1.61 against 1.39, block 0. Scale 1: 1.00 + 2 * .12 = 1.24 against 1.76, block 1.
    keys = torch.tensor([[9.0, 0], [0, 2], [0, 0]]).repeat_interleave(2, 0).view(1, 6, 1, 2)
    queries = torch.tensor([[1.0, 0], [0, 1], [0, 1]]).expand(1, 6, 3, 2)
    assert select(queries, keys, SparseSpec(2, 2), scale=0.1)[0, 4, 0].tolist() == [0, 2]
    assert select(queries, keys, SparseSpec(2, 2), scale=1.0)[0, 4, 0].tolist() == [1, 2]


def test_the_default_scale() -> None:
    layout = DocumentLayout.single(1, 40)
    q, k, _ = qkv(layout, 3, 1, 5, torch.float32)
    default = select_blocks(q, k, SparseSpec(2, 2))
    assert torch.equal(default, select(q, k, SparseSpec(2, 2), scale=5**-0.5))
    assert not torch.equal(default, select(q, k, SparseSpec(2, 2), scale=5.0))


# ---------------------------------------------------------------------- brute force
def assert_is_a_top_k(picked: Tensor, score: Tensor, own: int, spec: SparseSpec) -> None:
    """``picked [k]`` of one query is a selection under ``score [N]``, up to ties."""
    chosen = [n for n in picked.tolist() if n >= 0]
    assert picked.tolist() == chosen + [-1] * (spec.num_blocks - len(chosen)), "-1 fills the end"
    assert chosen == sorted(set(chosen)), "ascending, none twice"
    assert len(chosen) == min(spec.num_blocks, own + 1), "takes what exists"
    assert own in chosen
    forced = {n for n in range(own + 1) if n < spec.first_blocks or n > own - spec.local_blocks}
    assert forced <= set(chosen)
    free = [float(score[n]) for n in chosen if n not in forced]
    left = [float(score[n]) for n in range(own) if n not in chosen]
    assert max(left, default=-1.0) <= min(free, default=float("inf")) + TIE


@fuzz(200)
@given(st.data())
def test_equals_brute_force(data: st.DataObject) -> None:
    S = data.draw(st.sampled_from([1, 2, 4]))
    layout = data.draw(layouts(S))
    group, kv_heads = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 2))
    first, local, more = data.draw(st.integers(0, 1)), data.draw(st.integers(1, 2)), data.draw(st.integers(0, 2))
    spec = SparseSpec(S, first + local + more, first_blocks=first, local_blocks=local)
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    q, k, _ = qkv(layout, group * kv_heads, kv_heads, 3, dtype, data.draw(st.integers(0, 10**6)))
    picked = select(2 * q, k, spec, layout, scale=0.7)
    assert picked.dtype == torch.int32
    assert picked.shape == (layout.batch, layout.tokens, kv_heads, spec.num_blocks)
    for row, document in document_slices(layout):
        pooled = pooled_means(k[row, document], S).to(dtype)  # the definition rounds the mean to the keys' dtype
        score = document_scores(2 * q[row, document], pooled, S, 0.7)
        for t in range(len(score)):
            for g in range(kv_heads):
                assert_is_a_top_k(picked[row, document][t, g], score[t, g], t // S, spec)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_scores_are_exact_on_pooled_keys_of_the_keys_dtype(dtype: torch.dtype) -> None:
    """Pooled keys are rounded to the keys' dtype (part of the definition); nothing else is, outside float32 ties."""
    layout, spec = DocumentLayout.single(1, 320), SparseSpec(4, 6)
    q, k, _ = qkv(layout, 4, 1, 8, dtype)
    score = document_scores(q[0], pooled_means(k[0], 4).to(dtype), 4, 1.0)
    for t, picked in enumerate(select(q, k, spec)[0, :, 0]):
        assert_is_a_top_k(picked, score[t, 0], t // 4, spec)


def streaming_merge(score: list[float], own: int, S: int) -> list[int]:
    """The published top-k of one query, step by step (kernels.md section 0): a buffer of S entries.

    Chunk after chunk of S blocks; the first fills the buffer, every later one leaves the S/2 best of the buffer and
    the S/2 best of the chunk.
    """
    best = [(-float("inf") if n == own else -score[n], n) for n in range(own + 1)]  # sorts best first, ties low first
    buffer = sorted(best[:S])
    for first in range(S, own + 1, S):
        buffer = sorted(buffer[: S // 2] + sorted(best[first : first + S])[: S // 2])
    return [n for _, n in buffer]


@pytest.mark.parametrize(("S", "k", "lengths"), [(2, 2, [23, 9]), (4, 4, [80, 7]), (8, 6, [150]), (8, 8, [200])])
@pytest.mark.parametrize("group", [1, 2])
def test_official_rule_is_the_streaming_merge(S: int, k: int, lengths: list[int], group: int) -> None:
    layout = DocumentLayout.from_lengths(lengths)
    q, keys, _ = qkv(layout, group, 1, 3, torch.float32, seed=S + group)
    picked = select(q, keys, SparseSpec(S, k, rule="official"), layout)
    exact = select(q, keys, SparseSpec(S, k), layout)
    assert not torch.equal(picked, exact), "long enough for the merge to lose blocks"
    for row, document in document_slices(layout):
        score = document_scores(q[row, document], pooled_means(keys[row, document], S), S, 1.0)
        for t in range(len(score)):
            chosen = sorted(streaming_merge(score[t, 0].tolist(), t // S, S)[:k])
            assert picked[row, document][t, 0].tolist() == chosen + [-1] * (k - len(chosen)), f"token {t}"


def test_official_rule_is_exact_within_one_chunk() -> None:
    layout = DocumentLayout.from_lengths([16, 10])
    q, k, _ = qkv(layout, dtype=torch.float32)
    assert torch.equal(select(q, k, SparseSpec(4, 3, rule="official"), layout), select(q, k, SparseSpec(4, 3), layout))


def test_official_rule_at_the_papers_size_keeps_eight_old_blocks() -> None:
    layout = DocumentLayout.single(1, 600)
    q, k, _ = qkv(layout, 2, 1, 4, torch.float32)
    picked = select(q, k, SparseSpec(16, 16, rule="official"))[0, :, 0]
    own = torch.arange(600) // 16
    for t in (255, 256, 300, 511, 512, 599):
        newest = int(own[t]) // 16 * 16
        chosen = [n for n in picked[t].tolist() if n >= 0]
        old = [n for n in chosen if n < newest]
        assert len(old) == (8 if own[t] >= 16 else 0)
        assert len(chosen) - len(old) == min(int(own[t]) - newest + 1, 8 if own[t] >= 16 else 16)


# ---------------------------------------------------------------------- invariances
@pytest.mark.parametrize("rule", ["exact", "official"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (4, 1)])
def test_packed_equals_separate(rule: str, heads: int, kv_heads: int) -> None:
    lengths = [1, 3, 4, 5, 37, 12]
    layout = DocumentLayout.from_lengths([lengths, lengths[::-1]])
    spec = SparseSpec(4, 3, rule=rule)  # type: ignore[arg-type]
    q, k, _ = qkv(layout, heads, kv_heads, 5, torch.float32, seed=heads)
    packed = select(q, k, spec, layout)
    for row, document in document_slices(layout):
        alone = select(q[row : row + 1, document], k[row : row + 1, document], spec)
        assert torch.equal(packed[row, document], alone[0])


def test_batch_equals_separate() -> None:
    layout = DocumentLayout.single(3, 29)
    q, k, _ = qkv(layout, 4, 2, 5, torch.float32)
    together = select(q, k, SparseSpec(4, 3))
    for row in range(3):
        assert torch.equal(together[row : row + 1], select(q[row : row + 1], k[row : row + 1], SparseSpec(4, 3)))


@fuzz(25)
@given(st.sampled_from([2, 4]).flatmap(lambda S: st.tuples(st.just(S), layouts(S))), st.integers(0, 10**6))
def test_chunks_do_not_change_results(case: tuple[int, DocumentLayout], seed: int) -> None:
    S, layout = case
    q, k = integer_qk(layout, 4, 2, 3, S, seed)
    spec, elements = SparseSpec(S, 2), reference.CHUNK_ELEMENTS
    whole = select(q, k, spec, layout)
    try:
        for reference.CHUNK_ELEMENTS in (1, 50):
            assert torch.equal(select(q, k, spec, layout), whole)
    finally:
        reference.CHUNK_ELEMENTS = elements


@fuzz(25)
@given(st.sampled_from([2, 4]).flatmap(lambda S: st.tuples(st.just(S), layouts(S))), st.integers(0, 10**6))
def test_integer_ties_go_to_the_lowest_index(case: tuple[int, DocumentLayout], seed: int) -> None:
    """One head: the order of scores is the order of exact integer logits, so the answer is known to the last tie."""
    S, layout = case
    q, k = integer_qk(layout, 1, 1, 2, S, seed)
    picked = select(q, k, SparseSpec(S, 3), layout)
    for row, document in document_slices(layout):
        for t, (query, chosen) in enumerate(zip(q[row, document, 0], picked[row, document, 0], strict=True)):
            logits = (k[row, document, 0][: t // S * S : S] @ query).tolist()
            best = sorted(sorted(range(t // S), key=lambda n: (-logits[n], n))[:2])
            expected = [*best, t // S]
            assert chosen.tolist() == expected + [-1] * (3 - len(expected))


def test_noncontiguous_inputs() -> None:
    layout = DocumentLayout.from_lengths([7, 13])
    q, k, _ = qkv(layout, 4, 2, 6, torch.float32)
    q_, k_ = q.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([k, k], -1)[..., 0]
    assert not q_.is_contiguous()
    assert not k_.is_contiguous()
    assert torch.equal(select(q_, k_, SparseSpec(4, 2), layout), select(q, k, SparseSpec(4, 2), layout))


def test_carries_no_gradient() -> None:
    q, k, _ = (x.requires_grad_() for x in qkv(DocumentLayout.single(1, 8)))
    assert not select(q, k, SparseSpec(2, 2)).requires_grad


def test_a_budget_above_the_block_count_takes_every_block() -> None:
    q, k, _ = qkv(DocumentLayout.single(1, 9))
    picked = select(q, k, SparseSpec(2, 50))
    assert picked.shape[-1] == 50
    assert picked[0, -1, 0].tolist() == [0, 1, 2, 3, 4] + [-1] * 45


def test_the_newest_token_decides_nothing_for_blocks_before_it() -> None:
    """Pooling reads a block only once it is complete, except the own block, which is forced and never compared."""
    q, k, _ = qkv(DocumentLayout.single(1, 11), dtype=torch.float32)
    before = select(q, k, SparseSpec(4, 2))
    k[0, 10] = 1e4
    assert torch.equal(select(q, k, SparseSpec(4, 2)), before)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1 << 18)
    q, k, _ = qkv(DocumentLayout.single(1, 2048), 2, 1, 4, torch.float32)
    with LargestTensor() as largest:
        select(q, k, SparseSpec(2, 4))
    # all scores at once: 2048 * 1024 * 2 heads * 4 bytes = 16 MiB; sorted positions are int64, one KV head of two
    assert largest.nbytes <= 4 * reference.CHUNK_ELEMENTS


# ---------------------------------------------------------------------- pooled keys
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_pool_keys_sums_in_token_order_and_rounds_once(dtype: torch.dtype) -> None:
    layout, S = DocumentLayout.from_lengths([[5, 8, 1], [14]]), 4
    _, k, _ = qkv(layout, 2, 2, 3, torch.float64)
    k = (k * torch.logspace(-3, 3, 14, dtype=torch.float64)[None, :, None, None]).to(dtype)  # order matters
    wide = np.float64 if dtype == torch.float64 else np.float32
    expected = []
    for row, document in document_slices(layout):
        keys = k[row, document].to(torch.float64).numpy().astype(wide)
        for first in range(0, len(keys), S):
            total = np.zeros(keys.shape[1:], dtype=wide)
            for key in keys[first : first + S]:
                total = total + key
            expected.append(torch.from_numpy(total / wide(len(keys[first : first + S]))).to(dtype))
    pooled = pool_keys(k, S, layout)
    assert pooled.dtype == dtype
    assert torch.equal(pooled, torch.stack(expected))


def test_pool_keys_averages_a_short_last_block_over_its_own_tokens() -> None:
    layout = DocumentLayout.from_lengths([3, 2])
    k = torch.tensor([2.0, 4, 7, 1, 3]).view(1, 5, 1, 1)
    assert pool_keys(k, 2, layout).flatten().tolist() == [3, 7, 2]


def test_pool_keys_ignores_other_documents_nan() -> None:
    layout = DocumentLayout.from_lengths([3, 4])
    k = torch.ones(1, 7, 1, 1)
    k[0, 3:] = float("nan")
    pooled = pool_keys(k, 2, layout).flatten()
    assert pooled[:2].tolist() == [1, 1]
    assert pooled[2:].isnan().all()


def test_oracle_tokens_agree_with_the_layout_used_here() -> None:
    """The oracle counts by itself; if it were wrong, every comparison above would be too."""
    document, position = tokens(DocumentLayout.from_lengths([[2, 1], [3]]))
    assert document.tolist() == [[0, 0, 1], [2, 2, 2]]
    assert position.tolist() == [[0, 1, 0], [0, 1, 2]]
