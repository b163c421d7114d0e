"""Stock models with our cache: the same as without one, and block means are not computed anew."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from ssa.model.cache import BlockCache
from ssa.model.generation import CACHE_NAME

from .stock import logits, stock, tokens


@pytest.fixture(autouse=True)
def _no_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("block means were computed anew")

    monkeypatch.setattr(sys.modules["ssa.model.interface.attention"], "update_pooled", refuse)


@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("pieces", [[1] * 23, [9, 1, 1, 5, 7], [23]])
@pytest.mark.parametrize("capacity", [None, 31])
def test_cached_logits_are_those_of_one_pass(mode: str, pieces: list[int], capacity: int | None) -> None:
    model, ids = stock(settings={"mode": mode}), tokens(2, 23)
    cache, found, at = BlockCache(2, 4, capacity=capacity), [], 0
    for n in pieces:
        found.append(logits(model, ids[:, at : at + n], **{CACHE_NAME: cache}, use_cache=True))
        at += n
    torch.testing.assert_close(torch.cat(found, 1), logits(model, ids), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("capacity", [None, 60])
@pytest.mark.parametrize(
    "way", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_generation_under_left_padding(capacity: int | None, way: dict[str, int]) -> None:
    model, ids = stock(), tokens(2, 15)
    ids[0, :6] = 0
    if "prompt_lookup_num_tokens" in way:
        ids = torch.cat([ids[1:, :8]] * 2, 1)
    fixed = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0, "attention_mask": (ids != 0).long()}
    beams = {"num_beams": 3} if "num_beams" in way else {}
    expected = model.generate(ids, use_cache=False, **beams, **fixed)
    cache = BlockCache(2, 16, capacity=capacity)  # of another block size: the means follow the model's settings
    assert torch.equal(model.generate(ids, **{CACHE_NAME: cache}, **way, **fixed), expected)
