"""transformers' ``generate`` with our cache: every way of decoding gives what recomputation gives."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ssa.errors import InputError
from ssa.model.cache import BlockCache
from ssa.model.generation import CACHE_NAME
from ssa.model.graph import DecodeGraph

from .tiny import tiny_model, tokens

MODES = [("ssa", "full"), ("ssa", "sparse"), ("nsa", "sparse")]
IDS = tokens(3, 13)
MASK = (torch.arange(13) >= torch.tensor([[5], [0], [2]])).long()


def generate(model, ids=IDS, mask=MASK, **options):
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, **options)


@pytest.mark.parametrize(
    ("method", "mode", "prompts", "static"),
    [
        ("ssa", "full", 50, False),
        ("ssa", "sparse", 50, False),
        ("ssa", "sparse", 50, True),
        ("nsa", "sparse", 10, False),
    ],
)
def test_fifty_prompts_of_128_greedy_tokens(method, mode, prompts, static):
    """Prompts of 1 to 25 tokens, left padded. What uncached greedy decoding would choose follows from one pass over
    the result, because no token sees a later one. Two logits closer than rounding may change places."""
    model = tiny_model(method=method, inference_mode=mode, max_position_embeddings=160)
    model.generation_config.eos_token_id = None
    lengths = torch.arange(prompts) * 7 % 25 + 1
    ids = tokens(prompts, 25, seed=2)
    mask = (torch.arange(25) >= 25 - lengths[:, None]).long()
    out = generate(model, ids, mask, max_new_tokens=128, cache_implementation="static" if static else None)
    assert out.shape == (prompts, 153)
    with torch.no_grad():
        whole = torch.cat([mask, torch.ones(prompts, 128, dtype=torch.long)], 1)
        logits = model(out, attention_mask=whole).logits[:, 24:-1]
    chosen = logits.gather(-1, out[:, 25:, None])[..., 0]
    assert (chosen >= logits.amax(-1) - 1e-4).all()
    assert len(out[:, 25:].unique()) > 20  # the models do not just repeat themselves


@pytest.mark.parametrize(("method", "mode"), MODES)
@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"prefill_chunk_size": 5, "cache_implementation": "static"},
        {"prefill_chunk_size": 64},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "cache_implementation": "static"},
        {"do_sample": True, "num_return_sequences": 2},
        {"repetition_penalty": 1.3, "min_new_tokens": 4, "eos_token_id": 7},
    ],
    ids=str,
)
def test_every_way_of_decoding_equals_no_cache(method, mode, options):
    model = tiny_model(method=method, inference_mode=mode)
    plain = {k: v for k, v in options.items() if k not in ("cache_implementation", "prefill_chunk_size")}
    torch.manual_seed(3)
    expected = generate(model, use_cache=False, **plain)
    torch.manual_seed(3)
    assert torch.equal(generate(model, **options), expected)


@pytest.mark.parametrize(("method", "mode"), MODES)
@pytest.mark.parametrize("static", [False, True])
def test_prompt_lookup_and_draft_models_roll_back(method, mode, static):
    model = tiny_model(method=method, inference_mode=mode)
    ids, mask = torch.cat([IDS[1:2]] * 2, 1), None  # repeats, so that candidates are found
    expected = generate(model, ids, mask, use_cache=False)
    cache = {CACHE_NAME: BlockCache.from_config(model.config, 64 if static else None)}
    assert torch.equal(generate(model, ids, mask, prompt_lookup_num_tokens=4, **cache), expected)
    draft = tiny_model(method=method, inference_mode=mode, num_hidden_layers=1)
    assert torch.equal(generate(model, ids, mask, assistant_model=draft), expected)


def test_a_conversation_goes_on_in_its_cache_and_in_another_mode():
    model = tiny_model(num_hidden_layers=1)
    cache = BlockCache.from_config(model.config)
    first = generate(model, max_new_tokens=6, **{CACHE_NAME: cache})
    assert cache.get_seq_length() == first.shape[1] - 1  # the last token has not been read yet
    asked = torch.cat([first, tokens(3, 5, seed=9)], 1)
    mask = torch.cat([MASK, torch.ones(3, 11, dtype=torch.long)], 1)
    prefix = copy.deepcopy(cache)
    for options in ({}, {"mode": "full"}, {"num_blocks": 1}):
        with model.attention_mode(**options):
            again = generate(model, asked, mask, max_new_tokens=9, **{CACHE_NAME: copy.deepcopy(prefix)})
            assert torch.equal(again, generate(model, asked, mask, max_new_tokens=9, use_cache=False))


class Recorder(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self):
        self.ids, self.ended = [], False

    def put(self, value):
        self.ids.append(value.flatten())

    def end(self):
        self.ended = True


class StopAt(StoppingCriteria):
    """Stops every sequence at a length."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 17)


def test_streaming_and_stopping():
    model, streamer = tiny_model(), Recorder()
    ids = IDS[1:2]
    out = generate(model, ids, None, streamer=streamer, stopping_criteria=StoppingCriteriaList([StopAt()]))
    assert out.shape == (1, 17)
    assert torch.equal(torch.cat(streamer.ids), out[0])
    assert streamer.ended
    end = int(out[0, 15])
    ended = generate(model, ids, None, eos_token_id=end)
    assert ended.shape[1] == 13 + out[0, 13:].tolist().index(end) + 1


def test_scores_and_cache_are_returned():
    model = tiny_model()
    out = generate(model, return_dict_in_generate=True, output_logits=True)
    held = getattr(out, CACHE_NAME)
    assert isinstance(held, BlockCache)
    with torch.no_grad():
        mask = torch.cat([MASK, torch.ones(3, 20, dtype=torch.long)], 1)
        expected = model(out.sequences, attention_mask=mask).logits[:, 12:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=1e-4, rtol=1e-4)


def test_refusals():
    model = tiny_model()
    with pytest.raises(InputError, match="cache_implementation: got 'quantized'"):
        generate(model, cache_implementation="quantized")
    with pytest.raises(InputError, match="a cache and cache_implementation='static'; expected one of them"):
        generate(model, cache_implementation="static", **{CACHE_NAME: BlockCache.from_config(model.config)})
    with pytest.raises(InputError, match="padding on the left only"):
        generate(model, mask=MASK.flip(1))
    with pytest.raises(InputError, match=r"129 tokens in the cache; expected at most max_position_embeddings = 128"):
        generate(model, max_new_tokens=130)
    with pytest.raises(InputError, match="DecodeGraph: got a model on cpu; expected a CUDA device"):
        DecodeGraph(model, BlockCache.from_config(model.config, 16))


def test_steps_are_captured_on_a_gpu_only():
    model = tiny_model()
    held = {CACHE_NAME: BlockCache.from_config(model.config, 16)}
    assert not model._valid_auto_compile_criteria(held, SimpleNamespace(disable_compile=False))


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 5}], ids=str)
def test_generate_asks_for_captured_steps_and_not_for_a_compiled_model(options, monkeypatch):
    """What a GPU takes, with an eager step in place of the graph."""
    model, replayed = tiny_model(), []
    expected = generate(model, use_cache=False)

    class Step:
        def __init__(self, cache):
            self.cache = cache

        def step(self, ids):
            replayed.append(ids.shape)
            return model(ids, past_key_values=self.cache).logits

    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda *_: True)
    monkeypatch.setattr("ssa.model.generation.graph_of", lambda _, cache: Step(cache))
    cache = BlockCache.from_config(model.config, 64)
    out = generate(model, **{CACHE_NAME: cache}, **options)
    assert torch.equal(out, expected)
    assert replayed == [(3, 1)] * 19
