"""Captured decode steps on a GPU: the same logits as eager steps, whatever happens to the cache in between.

``python -m pytest tests/gpu/test_generation.py`` takes about a minute, most of it kernels being compiled. In float32,
and with room for a few rows: random weights have many nearly equal blocks, and rounding decides which of two is chosen.
"""

from __future__ import annotations

import pytest
import torch

from ssa.model import SSAConfig, SSAForCausalLM
from ssa.model.cache import BlockCache
from ssa.model.generation import CACHE_NAME
from ssa.model.graph import graph_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MODES = ("full", "sparse")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = SSAConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        num_blocks=8,
    )
    built: torch.nn.Module = SSAForCausalLM(config)
    for parameter in built.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    return built.cuda().eval()


def prompt(batch=3, length=700):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 512, (batch, length), generator=generator).cuda()


def filled(model, ids, mask=None, capacity=1024):
    cache = BlockCache.from_config(model.config, capacity)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    return cache


def relative(a, b):
    """Errors of the rows."""
    return ((a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1)).flatten()


def padding(padded):
    return (torch.arange(700) >= torch.tensor([[0], [33], [190]])).long().cuda() if padded else None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padded", [False, True])
def test_cached_equals_uncached(model, mode, padded):
    """Every step after the same history, whose rows the pass before it wrote."""
    ids, mask, errors = prompt(), padding(padded), []
    with torch.no_grad(), model.attention_mode(mode):
        for end in range(651, 701):
            cache = BlockCache.from_config(model.config, 1024)
            seen = None if mask is None else mask[:, :end]
            expected = model(ids[:, :end], attention_mask=seen, past_key_values=cache, logits_to_keep=1).logits
            cache.crop(-1)
            errors.append(relative(model(ids[:, end - 1 : end], past_key_values=cache).logits, expected))
    wrong = torch.cat(errors) > 1e-4
    assert int(wrong.sum()) <= 3, torch.cat(errors)[wrong]


@pytest.mark.parametrize("padded", [False, True])
def test_captured_steps_equal_eager_ones_through_every_change(model, padded):
    """Steps, rollback, another mode, another budget, reordered sequences, a chunk in between."""
    ids, mask = prompt(), padding(padded)
    eager, captured = filled(model, ids, mask), filled(model, ids, mask)
    new = prompt(3, 60)

    def both(at, **options):
        with torch.no_grad(), model.attention_mode(**options):
            expected = model(new[:, at : at + 1], past_key_values=eager).logits
            got = graph_of(model, captured).step(new[:, at : at + 1])
        assert float(relative(got, expected).max()) < 1e-5, (at, options)  # the same kernels
        assert eager.get_seq_length() == captured.get_seq_length() == int(captured.positions.lengths[0])

    for at in range(20):
        both(at, mode="sparse")
    for cache in (eager, captured):
        cache.crop(-11)
    for at in range(20, 30):
        both(at, mode="full")
    for at in range(30, 40):
        both(at, mode="sparse", num_blocks=4)
    for cache in (eager, captured):
        cache.reorder_cache(torch.tensor([2, 0, 0], device="cuda"))
        with torch.no_grad():
            model(new[:, 40:47], past_key_values=cache)
    for at in range(47, 60):
        both(at, mode="sparse")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 300}], ids=str)
def test_generate_with_captured_steps(model, mode, options):
    """What captured steps chose has the largest logit of an uncached pass, up to rounding, in all but a few rows."""
    ids = prompt()
    given = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": 511}
    cache = BlockCache.from_config(model.config, 800)
    with model.attention_mode(mode), torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **given, **options, **{CACHE_NAME: cache})
        logits = model(out).logits[:, 699:-1].float()
    assert cache.graphs
    assert out.shape == (3, 740)
    chosen = logits.gather(-1, out[:, 700:, None])[..., 0]
    missed = logits[..., :511].amax(-1) - chosen > 1e-3 * float(logits.abs().max())
    assert float(missed.float().mean()) < 0.05, missed.nonzero().tolist()
