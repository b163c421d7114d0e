"""Attention of new tokens against a :class:`BlockCache`: the cached half of the model's forward pass.

Shapes: B sequences, N new tokens, H query heads, K key-value heads, D head dim, C cache rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.errors import InputError
from ssa.model.cache import BlockCache, BlockLayer
from ssa.model.configuration import SSAConfig
from ssa.ops import select_blocks, sparse_attention
from ssa.ops.checks import reads_values
from ssa.ops.decode import attend_blocks_cached, decode_attention, full_decode_attention, select_blocks_cached
from ssa.ops.decode.nsa import compressed_decode_attention, window_decode_attention
from ssa.ops.spec import SparseSpec

WHERE = "SSAForCausalLM"


def open_cache(given: Any, use_cache: bool | None, config: SSAConfig, refused: dict[str, object]) -> BlockCache | None:
    """The cache of a forward pass: the one that is given, a new one if ``use_cache``, or None.

    Args:
        given: ``past_key_values``; use_cache: make one if none is given.
        refused: arguments that a cache cannot go with, by name; None where they are not given.

    Raises:
        InputError: a cache of another kind, of another block size or number of layers, or a refused argument.
    """
    if given is None and not use_cache:
        return None
    for name, value in refused.items():
        if value is not None:
            raise InputError(f"{WHERE}.{name}", "a value together with a key-value cache", "None", "use_cache=False")
    cache = BlockCache.from_config(config) if given is None else given
    if not isinstance(cache, BlockCache):
        raise InputError(
            f"{WHERE}.past_key_values",
            type(cache).__name__,
            "a BlockCache, which keeps block means too",
            "past_key_values=BlockCache.from_config(model.config), or use_cache=True alone",
        )
    if len(cache.layers) != config.num_hidden_layers:
        raise InputError(
            f"{WHERE}.past_key_values", f"{len(cache.layers)} layers", f"the model's {config.num_hidden_layers}"
        )
    if cache.block_size != config.block_size:
        raise InputError(
            f"{WHERE}.past_key_values",
            f"a cache of block size {cache.block_size}",
            f"the model's {config.block_size}",
            f"cache.set_block_size({config.block_size}), which computes the block means anew",
        )
    return cache


def advance(cache: BlockCache, x: Tensor, mask: Tensor | None, position_ids: Tensor | None, config: SSAConfig) -> None:
    """Make room in ``cache`` for the tokens ``x [B, N, C]`` that go on after what it holds; check what is said of them.

    Raises:
        InputError: padding that is not on the left, other positions than the cache's, more than the model's context.
    """
    place, new = cache.positions, x.shape[1]
    if new < 1:
        raise InputError(WHERE, "no new tokens", "at least one")
    place.set_padding(mask, new)
    longest = place.length + new - place.first
    if longest > config.max_position_embeddings:
        raise InputError(
            WHERE,
            f"{longest} tokens in the cache",
            f"at most max_position_embeddings = {config.max_position_embeddings}",
            "RoPE scaling (rope_parameters) with a larger max_position_embeddings",
        )
    place.advance(x.shape[0], new, x.device)
    if position_ids is not None and reads_values(position_ids):
        expected = place.places(new)
        real = expected > 0  # padding has no place of its own
        if bool((position_ids.expand_as(expected) != expected)[real].any()):
            place.crop(place.length - new)
            raise InputError(
                f"{WHERE}.position_ids",
                "other positions than the cache's",
                "each sequence counted from its first token",
            )


def attend(q: Tensor, cache: BlockCache, layer: int, main: str, spec: SparseSpec, heads: Sequence[int]) -> Tensor:
    """Newest tokens ``q [B, N, H, D]`` over a layer's cache, in full (``main == "full"``) or over chosen blocks.

    ``heads``: blocks of each KV head where they differ, else empty.

    Raises:
        InputError: gradients are asked for; the cache does not carry them.
    """
    if torch.is_grad_enabled() and q.requires_grad:
        raise InputError(WHERE, "gradients through a key-value cache", "torch.no_grad()", "use_cache=False in training")
    held = cache.held[layer]
    k, v, lengths, starts = _parts(held)
    if main == "full":
        return full_decode_attention(q, k, v, lengths, starts=starts)
    plain = cache.mass is None and not heads
    update = plain and held.lacks(q.shape[1])  # this call makes the new tokens' means too: a launch less
    pooled = held.pooled(up_to_date=not update)[0]
    bounds = held.bounds() if spec.max_dropped_mass is not None and spec.flavour == "certified" else None
    if plain:
        out = decode_attention(q, k, v, pooled, lengths, spec, starts=starts, bounds=bounds, update=update)
        held.pooled_rows = held.positions.length
        return out
    if heads:
        indices = by_head(
            lambda q, mean, part: select_blocks_cached(q, mean, lengths, part, starts=starts), q, pooled, spec, heads
        )
    else:
        indices = select_blocks_cached(q, pooled, lengths, spec, starts=starts, k=k, bounds=bounds)
    out, lse = attend_blocks_cached(q, k, v, indices, spec.block_size, lengths, starts=starts)
    if cache.mass is not None:
        whole = full_decode_attention(q, k, v, lengths, starts=starts, return_lse=True)[1]
        real = whole.isfinite()  # not in the padding
        cache.mass.append((-torch.expm1(lse - whole))[real].mean().clamp(min=0.0))
        cache.taken.append((indices >= 0).sum(-1)[real[..., :: q.shape[2] // k.shape[2]]].float().mean())
    return out


def attend_nsa(
    q: Tensor, cache: BlockCache, layer: int, spec: SparseSpec, heads: Sequence[int], window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """NSA's branches of the newest tokens: compression, selection, sliding window."""
    selected = attend(q, cache, layer, "sparse", spec, heads)
    held = cache.held[layer]
    k, v, lengths, starts = _parts(held)
    mean_k, mean_v = held.pooled()
    return (
        compressed_decode_attention(q, mean_k, mean_v, lengths, spec.block_size, starts=starts),
        selected,
        window_decode_attention(q, k, v, lengths, window, starts=starts),
    )


def prefill(q: Tensor, k: Tensor, v: Tensor, spec: SparseSpec, heads: Sequence[int], layout: DocumentLayout) -> Tensor:
    """Sparse attention of whole documents, ``[B, T, H, D]``; ``heads`` as in :func:`attend`."""
    if heads:
        indices = by_head(lambda q, k, part: select_blocks(q, k, part, layout), q, k, spec, heads)
    else:
        indices = select_blocks(q, k, spec, layout)
    return sparse_attention(q, k, v, indices, spec.block_size, layout)


def by_head(select: Any, q: Tensor, keys: Tensor, spec: SparseSpec, heads: Sequence[int]) -> Tensor:
    """Selection with another number of blocks for each KV head: int32 ``[B, N, K, max(heads)]``, padded with -1.

    Args:
        select: ``(q, keys, spec) -> indices`` for some of the heads.
        q: ``[B, N, H, D]``; keys: ``[B, rows, K, D]`` keys or block means; heads: K budgets.
    """
    K = keys.shape[2]
    out = torch.full((*q.shape[:2], K, max(heads)), -1, dtype=torch.int32, device=q.device)
    grouped = q.unflatten(2, (K, -1))
    for budget in sorted(set(heads)):
        mine = [i for i, n in enumerate(heads) if n == budget]
        part = grouped[:, :, mine].flatten(2, 3)
        out[:, :, mine, :budget] = select(part, keys[:, :, mine].contiguous(), replace(spec, num_blocks=budget))
    return out


def _parts(held: BlockLayer) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    assert held.k is not None
    assert held.v is not None
    assert held.positions.lengths is not None
    return held.k, held.v, held.positions.lengths, held.positions.starts
