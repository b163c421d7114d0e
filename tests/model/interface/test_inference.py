"""Stock models with our attention: what they compute, with and without caches, padding and packing."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

import ssa
from ssa.errors import ConfigError, InputError

from .stock import logits, ours, plain, stock, tokens

FAMILIES = ["Llama", "Qwen2", "Qwen3", "Mistral", "SmolLM3", "Olmo", "Olmo2", "Phi3", "Gemma", "Granite", "GPTNeoX"]
CHANGES = {"Mistral": {"sliding_window": None}, "Granite": {"attention_multiplier": 0.2}}


def kind(family: str) -> type[transformers.PreTrainedConfig]:
    return getattr(transformers, f"{family}Config")


@pytest.mark.parametrize("family", FAMILIES)
def test_full_and_whole_budget_are_the_models_own_attention(family: str) -> None:
    model, ids = plain(kind(family), **CHANGES.get(family, {})), tokens(2, 37)
    expected = logits(model, ids)
    ssa.configure(model, mode="full", block_size=4, num_blocks=3)
    torch.testing.assert_close(logits(model, ids), expected, atol=5e-5, rtol=1e-5)
    with ssa.attention_mode(model, "sparse", num_blocks=10):
        torch.testing.assert_close(logits(model, ids), expected, atol=5e-5, rtol=1e-5)
    with ssa.attention_mode(model, "sparse"):
        assert (logits(model, ids) - expected).abs().max() > 0.05  # 3 blocks of 10: another function


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_it_is_what_our_own_class_computes(mode: str) -> None:
    model, ids = stock(settings={"mode": mode}), tokens(2, 37)
    torch.testing.assert_close(logits(model, ids), logits(ours(model, inference_mode=mode), ids), atol=1e-6, rtol=0)


# ---------------------------------------------------------------------- caches
@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("pieces", [[1] * 23, [9, 1, 1, 5, 7], [23]])
@pytest.mark.parametrize("kind_of_cache", ["dynamic", "static"])
def test_cached_logits_are_those_of_one_pass(mode: str, pieces: list[int], kind_of_cache: str) -> None:
    model, ids = stock(settings={"mode": mode}), tokens(2, 23)
    cache = DynamicCache(config=model.config) if kind_of_cache == "dynamic" else StaticCache(model.config, 31)
    found, at = [], 0
    for n in pieces:
        found.append(logits(model, ids[:, at : at + n], past_key_values=cache, use_cache=True))
        at += n
    torch.testing.assert_close(torch.cat(found, 1), logits(model, ids), atol=2e-5, rtol=1e-5)


WAYS = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "chunked prefill": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("way", WAYS)
def test_generation_is_that_without_a_cache(way: str) -> None:
    model, ids = stock(), tokens(1, 14)
    if way == "prompt lookup":
        ids[:, 7:] = ids[:, :7]
    beams = {"num_beams": 3} if way == "beams" else {}
    fixed = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    expected = model.generate(ids, use_cache=False, **beams, **fixed)
    assert torch.equal(model.generate(ids, **WAYS[way], **fixed), expected)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Phi3", "SmolLM3", "Olmo2", "Gemma"])
def test_generation_of_other_families(family: str) -> None:
    model, ids = stock(kind(family)), tokens(2, 14)
    fixed = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **fixed), model.generate(ids, use_cache=False, **fixed))


# ---------------------------------------------------------------------- padding and packing
@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("pads", [1, 4, 6])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(mode: str, pads: int, side: str) -> None:
    """Also where the pads are no multiple of a block: the block grid starts at a row's first token."""
    model, ids = stock(settings={"mode": mode}), tokens(2, 22)
    where = slice(pads, None) if side == "left" else slice(0, 22 - pads)
    mask = torch.ones_like(ids)
    mask[0] = 0
    mask[0, where] = 1
    alone = logits(model, ids[:1, where])
    padded = logits(model, ids.masked_fill(mask == 0, 0), attention_mask=mask)
    torch.testing.assert_close(padded[:1, where], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded[1:], logits(model, ids[1:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_under_left_padding(cache: str) -> None:
    model, ids = stock(), tokens(2, 15)
    ids[0, :6] = 0
    fixed = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0}
    batch = model.generate(ids, attention_mask=(ids != 0).long(), cache_implementation=cache, **fixed)
    alone = model.generate(ids[:1, 6:], **fixed)
    assert torch.equal(batch[:1, 15 : 15 + alone.shape[1] - 9], alone[:, 9:])


@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("told", ["position_ids", "cu_seq_lens"])
def test_packed_documents_are_computed_as_if_alone(mode: str, told: str) -> None:
    """With the default use_cache=True too, where transformers drops its own document mask."""
    model, lengths = stock(settings={"mode": mode}), [5, 17, 9]
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    keywords = {"position_ids": positions}
    if told == "cu_seq_lens":
        cu = torch.tensor([0, 5, 22, 31], dtype=torch.int32)
        keywords |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 17, "max_length_k": 17}
    packed = logits(model, ids, **keywords).split(lengths, 1)
    for document, found in zip(ids.split(lengths, 1), packed, strict=True):
        torch.testing.assert_close(found, logits(model, document), atol=1e-5, rtol=1e-5)


def test_positions_far_from_zero_are_one_document() -> None:
    model, ids = stock(), tokens(1, 20)
    torch.testing.assert_close(
        logits(model, ids, position_ids=torch.arange(50, 70)[None]), logits(model, ids), atol=1e-4, rtol=1e-4
    )


# ---------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("Mistral", {"sliding_window": 8}, "sliding_window=8"),
        ("Gemma2", {}, "sliding_window|softcap"),
        ("Gemma2", {"layer_types": ["full_attention"] * 2}, "softcap"),
        ("Gemma3Text", {}, "sliding_window"),
        ("Olmo3", {}, "sliding_window"),
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "sliding_window|s_aux"),
    ],
)
def test_attention_that_is_not_a_plain_softmax_is_refused(
    family: str, changes: dict[str, object], message: str
) -> None:
    config = kind(family)(**{**{k: v for k, v in stock().config.to_dict().items() if k in SIZES}, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="ssa").eval()
    with pytest.raises(InputError, match=message):
        model(tokens(1, 12))


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"attention_mask": torch.ones(1, 1, 12, 12)}, r"expected \[B, T\]"),
        ({"ssa_mode": "full"}, "keyword ssa_mode=full"),
        ({"softcap": 30.0}, "softcap"),
        ({"stream": "both"}, "stream: got 'both'"),
        ({"is_causal": False}, "a token sees a later one"),
    ],
)
def test_keywords_that_ask_for_something_else(keywords: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        stock()(tokens(1, 12), **keywords)


def test_padding_in_the_middle_is_refused_in_decoding() -> None:
    model, ids = stock(), tokens(1, 8)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1, 1]])
    cache = DynamicCache(config=model.config)
    logits(model, ids, past_key_values=cache, use_cache=True)
    with pytest.raises(InputError, match="padding_side='left'"):
        model(tokens(1, 1), past_key_values=cache, attention_mask=mask, use_cache=True)


def test_gradients_through_a_cache_are_refused() -> None:
    model, cache = stock(), DynamicCache()
    model(tokens(1, 8), past_key_values=cache, use_cache=True)
    with pytest.raises(InputError, match="gradients through a key-value cache"):
        model(tokens(1, 1), past_key_values=cache, use_cache=True)


def test_a_vocabulary_of_settings() -> None:
    with pytest.raises(ConfigError, match=r"ssa\.configure\.blocksize: got an unknown setting"):
        ssa.configure(plain(), blocksize=4)
    with pytest.raises(ConfigError, match="ssa_mode: got 'dense'; expected one of"):
        ssa.configure(plain(), mode="dense")
    with pytest.raises(ConfigError, match=r"SparseSpec\.block_size: got 24"):
        ssa.configure(plain(), block_size=24)
    model = stock()
    model.config.ssa_topk = 8
    with pytest.raises(ConfigError, match=r"config\.ssa_topk: got an unknown key"):
        model(tokens(1, 4))
    with pytest.raises(ConfigError, match="ssa_mode: got 'dense'"), ssa.attention_mode(stock(), "dense"):
        pass


def test_a_mode_ends_with_its_block() -> None:
    model, ids = stock(), tokens(1, 30)
    before, keys = logits(model, ids), model.config.to_dict()
    with ssa.attention_mode(model, "full"):
        full = logits(model, ids)
    with ssa.attention_mode(model, num_blocks=8):
        torch.testing.assert_close(logits(model, ids), full, atol=5e-5, rtol=1e-5)
    assert torch.equal(logits(model, ids), before)
    assert model.config.to_dict() == keys
