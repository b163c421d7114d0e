"""A model under an adaptive budget, whole and with a cache."""

from __future__ import annotations

import pytest
import torch

from ssa.errors import ConfigError
from ssa.model.cache import BlockCache

from .tiny import tiny_config, tiny_model, tokens


def test_a_limit_of_zero_is_the_full_mode() -> None:
    ids, model = tokens(2, 40), tiny_model(num_blocks=99, max_dropped_mass=0.0)
    with torch.no_grad(), model.attention_mode("full"):
        full = model(ids).logits
    for flavour in ("estimated", "certified"):
        model.config.budget_flavour = flavour
        with torch.no_grad(), model.attention_mode("sparse"):
            torch.testing.assert_close(model(ids).logits, full, atol=1e-4, rtol=1e-4)


def test_a_cache_gives_what_the_whole_gives() -> None:
    ids, model = tokens(2, 40), tiny_model(num_blocks=99, max_dropped_mass=0.3)
    cache = BlockCache.from_config(model.config)
    with torch.no_grad():
        whole = model(ids).logits
        parts = [model(ids[:, i : i + 5], past_key_values=cache).logits for i in range(0, 40, 5)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)


def test_bad_limits_are_refused_with_the_configuration() -> None:
    with pytest.raises(ConfigError, match="max_dropped_mass"):
        tiny_config(max_dropped_mass=1.5)
