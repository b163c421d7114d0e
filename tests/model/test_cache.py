"""The cache itself: block means, growth, rollback, selection of sequences, refusals."""

import copy

import pytest
import torch

from ssa import DocumentLayout
from ssa.errors import InputError
from ssa.model.cache import BlockCache
from ssa.ops.selection.reference import pool_keys

S = 4


def filled(rows, *, capacity=None, chunks=(1,), batch=2, mask=None, dtype=torch.float32, mean_values=False):
    """A cache of one layer with ``rows`` random rows, written in chunks of the given sizes in turn; and those rows."""
    generator = torch.Generator().manual_seed(rows)
    k, v = (torch.randn(batch, rows, 2, 8, generator=generator).to(dtype) for _ in "kv")
    cache = BlockCache(1, S, capacity=capacity, mean_values=mean_values)
    at, turn = 0, 0
    while at < rows:
        n = min(chunks[turn % len(chunks)], rows - at)
        cache.positions.set_padding(None if mask is None else mask[:, : at + n], n)
        cache.positions.advance(batch, n, k.device)
        cache.layers[0].append(k[:, at : at + n], v[:, at : at + n])
        cache.layers[0].pooled()
        at, turn = at + n, turn + 1
    return cache, k, v


@pytest.mark.parametrize("capacity", [None, 64])
@pytest.mark.parametrize("chunks", [(1,), (4,), (7, 1, 1, 5), (64,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_means_have_the_prefills_bits(capacity, chunks, dtype):
    cache, k, v = filled(30, capacity=capacity, chunks=chunks, dtype=dtype, mean_values=True)
    means = cache.layers[0].pooled()
    for mean, x in zip(means, (k, v), strict=True):
        expected = pool_keys(x, S, DocumentLayout.single(2, 30)).view(2, 8, 2, 8)
        assert torch.equal(mean[:, : 30 // S], expected[:, : 30 // S])


def test_block_means_start_at_the_first_token():
    mask = (torch.arange(30) >= torch.tensor([[9], [2]])).long()  # with chunks of 4 a row begins in the third chunk
    cache, k, _ = filled(30, chunks=(4,), mask=mask)
    assert cache.positions.starts.tolist() == [9, 2]
    for row, start in ((0, 9), (1, 2)):
        blocks = (30 - start) // S
        expected = pool_keys(k[row : row + 1, start:], S, DocumentLayout.single(1, 30 - start))
        assert torch.equal(cache.layers[0].pooled()[0][row, :blocks], expected[:blocks])
    assert cache.positions.places(2).tolist() == [[19, 20], [26, 27]]


@pytest.mark.parametrize("capacity", [None, 40])
def test_rollback_then_other_tokens_equals_a_fresh_cache(capacity):
    cache, k, v = filled(30, capacity=capacity, chunks=(5,))
    for crop, left in ((-3, 27), (0, 27), (22, 22), (-2, 20), (25, 20)):
        cache.crop(crop)
        assert cache.get_seq_length() == left == int(cache.positions.lengths[0])
    k2, v2 = k + 1, v + 1
    cache.positions.advance(2, 9, k.device)
    cache.layers[0].append(k2[:, 20:29], v2[:, 20:29])
    whole = torch.cat([k[:, :20], k2[:, 20:29]], 1)
    assert torch.equal(cache.layers[0].keys[:, :, :29], whole.transpose(1, 2))
    expected = pool_keys(whole, S, DocumentLayout.single(2, 29)).view(2, 8, 2, 8)[:, :7]
    assert torch.equal(cache.layers[0].pooled()[0][:, :7], expected)


@pytest.mark.parametrize("capacity", [None, 40])
def test_sequences_are_reordered_repeated_and_selected_with_all_they_have(capacity):
    mask = (torch.arange(30) >= torch.tensor([[9], [0]])).long()
    cache, k, _ = filled(30, capacity=capacity, chunks=(30,), mask=mask)
    address = cache.layers[0].k.data_ptr()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.layers[0].k.data_ptr() == address  # captured graphs read it there
    assert cache.positions.starts.tolist() == [0, 9]
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1, 2, 3]))
    order = [1, 0, 0]
    assert torch.equal(cache.layers[0].keys[:, :, :30], k[order].transpose(1, 2))
    fresh, *_ = filled(30, chunks=(30,), mask=mask)
    assert torch.equal(cache.layers[0].pooled()[0][:, :5], fresh.layers[0].pooled()[0][order, :5])
    assert cache.positions.starts.tolist() == [0, 9, 9]
    assert cache.batch_size == 3


def test_another_block_size_computes_the_means_anew():
    cache, k, _ = filled(30)
    cache.set_block_size(8)
    assert torch.equal(
        cache.layers[0].pooled()[0][:, :3], pool_keys(k, 8, DocumentLayout.single(2, 30)).view(2, 4, 2, 8)[:, :3]
    )


def test_copies_share_nothing():
    cache, k, v = filled(30)
    cache.graphs["captured"] = object()
    other = copy.deepcopy(cache)
    other.positions.advance(2, 1, k.device)
    other.layers[0].append(k[:, :1], v[:, :1])
    assert (cache.get_seq_length(), other.get_seq_length(), other.layers[0].positions.length) == (30, 31, 31)
    assert not other.graphs


@pytest.mark.parametrize("capacity", [None, 40])
def test_transformers_calls(capacity):
    cache = BlockCache(2, S, capacity=capacity)
    k = torch.randn(1, 2, 5, 8)
    assert cache.get_mask_sizes(5, 0) == (capacity or 5, 0)
    for layer in range(2):
        keys, values = cache.update(k, k + 1, layer)
        assert keys.shape[2] == (capacity or 5)
        assert torch.equal(keys[:, :, :5], k)
        assert torch.equal(values[:, :, :5], k + 1)
        assert keys.ssa_layer is cache.layers[layer]
        assert cache.get_seq_length(layer) == 5
    assert cache.layers[0].get_max_length() == (capacity or -1)
    cache.reset()
    assert cache.get_seq_length() == 0
    cache.update(k, k, 0)
    assert cache.get_seq_length() == 5


def test_refusals():
    cache, k, v = filled(30, capacity=32)
    with pytest.raises(InputError, match=r"30 \+ 3 tokens; expected at most its capacity of 32"):
        cache.positions.advance(2, 3, k.device)
    with pytest.raises(InputError, match="3 sequences"):
        cache.positions.advance(3, 1, k.device)
    cache.positions.advance(2, 1, k.device)
    with pytest.raises(InputError, match="keys of"):
        cache.layers[0].append(k[:, :1].double(), v[:, :1].double())
    for mask, message in (
        (torch.ones(2, 5), "31 cached and 1 new"),
        (torch.arange(32).expand(2, -1) < 31, "padding after the first token of row 0"),
        (torch.arange(32).expand(2, -1) > 3, "other padding"),
    ):
        with pytest.raises(InputError, match=message):
            cache.positions.set_padding(mask, 1)
    with pytest.raises(InputError, match="block_size"):
        BlockCache(1, 5)
    with pytest.raises(InputError, match="at least 1"):
        BlockCache(1, 4, capacity=0)
