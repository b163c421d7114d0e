"""The model with a cache: equal to recomputation at every step, in both modes, however the tokens arrive."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from ssa import DocumentLayout
from ssa.errors import ConfigError, InputError
from ssa.model.cache import BlockCache

from .tiny import tiny_config, tiny_model, tokens

MODES = [("ssa", "full"), ("ssa", "sparse"), ("nsa", "sparse")]
BUDGETS = {"layers": [2, 4], "heads": [[1, 3], 2]}
MASK = (torch.arange(30) >= torch.tensor([[0], [9], [2]])).long()


def run(model, ids, chunks, *, mask=None, capacity=None, cache=None):
    """Logits of ``ids`` fed in chunks of the given sizes in turn, and the cache."""
    cache = cache or BlockCache.from_config(model.config, capacity)
    at, turn, parts = cache.get_seq_length(), 0, []
    with torch.no_grad():
        while at < ids.shape[1]:
            n = min(chunks[turn % len(chunks)], ids.shape[1] - at)
            given = None if mask is None else mask[:, : at + n]
            parts.append(model(ids[:, at : at + n], attention_mask=given, past_key_values=cache).logits)
            at, turn = at + n, turn + 1
    return torch.cat(parts, 1), cache


def uncached(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits


def close(a, b, mask=None):
    """Equal to 1e-5 of the largest logit: float32 sums in another order differ by a few units in the last place."""
    keep = torch.ones(a.shape[:2], dtype=torch.bool) if mask is None else mask[:, -a.shape[1] :].bool()
    torch.testing.assert_close(a[keep], b[keep], atol=1e-5 * float(b[keep].abs().max()), rtol=0)


@pytest.mark.parametrize(("method", "mode"), MODES)
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("chunks", [(1,), (5, 1, 1, 1), (3, 7), (13, 1)])
@pytest.mark.parametrize("capacity", [None, 33], ids=["dynamic", "static"])
def test_cached_equals_uncached_at_every_token(method, mode, mask, chunks, capacity):
    model, ids = tiny_model(method=method, inference_mode=mode, window_size=6), tokens(3, 30)
    close(run(model, ids, chunks, mask=mask, capacity=capacity)[0], uncached(model, ids, mask), mask)


@pytest.mark.parametrize("options", [{"first_blocks": 1}, {"local_blocks": 2}, {"selection_rule": "official"}])
def test_cached_equals_uncached_under_other_selections(options):
    model, ids = tiny_model(**options), tokens(2, 40)
    close(run(model, ids, (6, 1, 1))[0], uncached(model, ids))


@pytest.mark.parametrize("budgets", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("method", ["ssa", "nsa"])
def test_budgets_of_layers_and_heads(budgets, method):
    model, ids = tiny_model(method=method, budgets=budgets), tokens(2, 40)
    expected = uncached(model, ids)
    close(run(model, ids, (6, 1, 1))[0], expected)
    with model.attention_mode(num_blocks=3):  # an explicit budget wins inside the `with`
        plain = uncached(tiny_model(method=method, num_blocks=3), ids)
        close(uncached(model, ids), plain)
    assert not torch.allclose(expected, plain, atol=1e-3)
    with model.attention_mode(budgets=[3, [3, 3]]):
        close(uncached(model, ids), plain)
    assert model.config.budgets == budgets


@pytest.mark.parametrize("flavour", ["estimated", "certified"])
@pytest.mark.parametrize("method", ["ssa", "nsa"])
@pytest.mark.parametrize("mask", [None, MASK[1:]], ids=["whole", "padded"])
def test_adaptive_budgets(flavour, method, mask):
    model, ids = tiny_model(method=method), tokens(2, 30)
    with model.attention_mode(max_dropped_mass=0.3, flavour=flavour):
        assert model.config.num_blocks == 32  # no cap
        cached, cache = run(model, ids, (6, 1, 1, 2), mask=mask)
        close(cached, uncached(model, ids, mask), mask)
        cache.crop(-7)
        close(run(model, ids, (1, 2), mask=mask, cache=cache)[0], uncached(model, ids, mask)[:, 23:], mask)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.crop(-3)
        cache.report_mass()
        flipped = None if mask is None else mask.flip(0)
        close(
            run(model, ids.flip(0), (1,), mask=flipped, cache=cache)[0], uncached(model, ids.flip(0), flipped)[:, 27:]
        )
        assert 1 < cache.blocks_taken() < 8
        assert cache.dropped_mass() < (0.3 if flavour == "certified" else 0.6)
    assert model.config.max_dropped_mass is None
    assert model.config.num_blocks == 3
    with pytest.raises(ConfigError, match="budgets and max_dropped_mass"):
        tiny_config(budgets=[2, 3], max_dropped_mass=0.1)


def test_equal_budgets_per_head_are_one_budget():
    ids = tokens(2, 40)
    model = tiny_model(budgets=[[2, 5], [5, 2]])
    mixed = uncached(model, ids)
    for i, layer_budgets in enumerate(((2, 5), (5, 2))):
        assert model.config.head_budgets(i) == layer_budgets
        assert model.config.sparse_spec(i).num_blocks == 5
    assert tiny_config(budgets=[3, [3, 3]]).head_budgets(1) == ()
    assert not torch.allclose(mixed, uncached(tiny_model(num_blocks=5), ids), atol=1e-3)


@pytest.mark.parametrize("budgets", [[3], [3, 0], [3, [1, 2, 3]], [3, [1, True]], [3, "4"]])
def test_bad_budgets_are_refused(budgets):
    with pytest.raises(Exception, match="budgets"):
        tiny_config(budgets=budgets)


def test_budgets_per_head_are_not_trained():
    model, ids = tiny_model(budgets=[[1, 3], 2]), tokens(1, 12)
    with pytest.raises(InputError, match="budgets per head in training"):
        model(ids, labels=ids, stream="sparse")


def test_a_budget_over_all_blocks_makes_sparse_equal_full():
    model, ids = tiny_model(num_blocks=10), tokens(2, 40)
    sparse, cache = run(model, ids[:, :30], (7, 1))
    with model.attention_mode("full"):
        close(run(model, ids[:, :30], (7, 1))[0], sparse)
        full_rest = run(model, ids, (1,), cache=copy.deepcopy(cache))[0]
    close(run(model, ids, (1,), cache=cache)[0], full_rest)


def test_mode_budget_and_block_size_change_in_mid_sequence():
    """A prompt read in one mode may be continued in another: the cache then holds that mode's keys, and all blocks."""
    model, ids = tiny_model(num_hidden_layers=1), tokens(2, 40)  # one layer: its keys are the same in every mode
    _, cache = run(model, ids[:, :25], (25,))
    for step, (mode, blocks, size) in enumerate(
        [("full", 3, 4), ("sparse", 2, 4), ("sparse", 3, 4), ("full", 3, 4), ("sparse", 3, 8), ("sparse", 2, 4)]
    ):
        with model.attention_mode(mode, num_blocks=blocks, block_size=size):
            if cache.block_size != size:
                with pytest.raises(InputError, match=rf"try cache.set_block_size\({size}\)"):
                    run(model, ids[:, : 25 + 2 * step + 2], (1,), cache=cache)
                cache.set_block_size(size)
            upto = ids[:, : 25 + 2 * step + 2]
            close(run(model, upto, (1,), cache=cache)[0], uncached(model, upto)[:, -2:])


def test_rollback_reorder_and_copies_continue_as_if_fresh():
    model, ids = tiny_model(), tokens(2, 40)
    _, cache = run(model, ids[:, :30], (9,))
    saved = copy.deepcopy(cache)
    cache.crop(-11)
    other = torch.cat([ids[:, :19], tokens(2, 21, seed=7)], 1)
    close(run(model, other, (2, 1), cache=cache)[0], uncached(model, other)[:, 19:])
    saved.reorder_cache(torch.tensor([1, 0]))
    close(run(model, ids.flip(0), (1,), cache=saved)[0], uncached(model, ids.flip(0))[:, 30:])


def test_left_padding_is_no_context():
    """Whatever stands in the padding, and however much of it there is, changes nothing."""
    model, ids = tiny_model(), tokens(1, 21)
    expected = run(model, ids, (8, 1))[0]
    for padding in (1, 5, 11):
        mask = F.pad(torch.ones_like(ids), (padding, 0))
        padded = torch.cat([tokens(1, padding, seed=3), ids], 1)
        close(run(model, padded, (8, 1), mask=mask)[0][:, padding:], expected)


def test_measured_dropped_mass():
    model, ids = tiny_model(), tokens(2, 40)
    _, cache = run(model, ids[:, :30], (30,))
    cache.report_mass()
    assert cache.dropped_mass() is None
    seen = []
    model_full = copy.deepcopy(model)
    run(model, ids[:, :33], (1,), cache=cache)
    assert len(cache.mass) == 3 * model.config.num_hidden_layers
    with model.observe_attention(lambda layer, q, k, v, layout: seen.append((q, k))), torch.no_grad():
        model(ids[:, :33])
    from ssa.ops import dropped_mass, full_attention, select_blocks, sparse_attention

    masses = []
    for q, k in seen:
        indices = select_blocks(q, k, model.config.sparse_spec())
        sparse = sparse_attention(q, k, k, indices, 4, return_lse=True)[1]
        masses.append(dropped_mass(sparse, full_attention(q, k, k, return_lse=True)[1])[:, 30:])
    assert cache.dropped_mass() == pytest.approx(float(torch.stack(masses).mean()), abs=1e-5)
    assert 0.01 < cache.dropped_mass() < 0.99
    del model_full
    with model.attention_mode(num_blocks=10):
        cache.report_mass()
        run(model, ids, (1,), cache=cache)
        assert cache.dropped_mass() == pytest.approx(0.0, abs=1e-5)
        assert cache.blocks_taken() == pytest.approx(67 / 7)  # 3 queries in block 8, 4 in block 9


@pytest.mark.parametrize("chunks", [(1,), (6,)])
def test_inputs_embeds(chunks):
    model, ids = tiny_model(), tokens(2, 12)
    cache = BlockCache.from_config(model.config)
    parts, at = [], 0
    with torch.no_grad():
        while at < 12:
            x = model.model.embed_tokens(ids[:, at : at + chunks[0]])
            parts.append(model(inputs_embeds=x, past_key_values=cache).logits)
            at += chunks[0]
    close(torch.cat(parts, 1), uncached(model, ids))


def test_use_cache_makes_one_and_both_names_hold_it():
    model, ids = tiny_model(), tokens(1, 12)
    with torch.no_grad():
        out = model(ids, use_cache=True)
        assert out.past_key_values is out.cache
        assert out.cache.get_seq_length() == 12
        again = model(ids[:, :1], cache=out.cache)
        assert again.cache is out.cache
        assert model(ids).cache is None
    close(again.logits, uncached(model, torch.cat([ids, ids[:, :1]], 1))[:, -1:])


def goes_on(model, **given):
    """Two more tokens after a cache of five, or what ``given`` says instead."""
    with torch.no_grad():
        cache = model(tokens(1, 5), use_cache=True).cache
        return model(**{"input_ids": tokens(1, 2), "past_key_values": cache, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"past_key_values": DynamicCache()}, "got DynamicCache; expected a BlockCache"),
        ({"past_key_values": BlockCache(2, 8)}, "a cache of block size 8; expected the model's 4"),
        ({"past_key_values": BlockCache(3, 4)}, "3 layers; expected the model's 2"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0]])}, "padding after the first token of row 0"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1]])}, "other padding than the cached tokens had"),
        ({"attention_mask": torch.tensor([[1, 1]])}, "5 cached and 2 new"),
        ({"position_ids": torch.tensor([[0, 1]])}, "other positions than the cache's"),
        ({"layout": DocumentLayout.single(1, 2)}, "layout: got a value together with a key-value cache"),
        ({"labels": tokens(1, 2)}, "labels: got a value together"),
        ({"input_ids": tokens(1, 124)}, "129 tokens in the cache; expected at most max_position_embeddings = 128"),
        ({"input_ids": tokens(2, 2)}, "2 sequences"),
        ({"input_ids": tokens(1, 0)}, "no new tokens"),
    ],
)
def test_bad_input_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        goes_on(tiny_model(), **given)


def test_right_padding_and_packed_prompts_are_refused():
    model, ids = tiny_model(), tokens(1, 6)
    with torch.no_grad():
        with pytest.raises(InputError, match="padding_side='left'"):
            model(ids, attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]), use_cache=True)
        with pytest.raises(InputError, match="packed documents with a key-value cache"):
            model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=True)
    with pytest.raises(InputError, match="gradients through a key-value cache"):
        model(ids[:, :1], past_key_values=model(ids, use_cache=True).cache)
    with pytest.raises(ConfigError, match="block_size"), model.attention_mode(block_size=5):
        pass
