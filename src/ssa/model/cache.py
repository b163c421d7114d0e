"""Key-value cache that also holds each completed block's mean key, so that a new token can choose its blocks.

Built on transformers' ``Cache``: :class:`BlockCache` works in our model and, with ``attn_implementation="ssa"``, in
stock models. It holds everything, so the mode, the budget and even the block size may change in mid-sequence.

Shapes: B sequences, N new tokens, C rows of capacity, K key-value heads, D head dim, S block size, P = ceil(C / S).
Every sequence has the same number of rows, as in transformers; ``starts`` says where its left padding ends.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ssa.errors import InputError
from ssa.model.positions import Positions, selected
from ssa.ops.budget.api import empty_block_bounds, update_block_bounds
from ssa.ops.budget.reference import BlockBounds
from ssa.ops.decode import update_pooled
from ssa.ops.spec import BLOCK_SIZES

GROWTH = 4  # a full dynamic cache grows by a quarter: copies cost O(1) per token, slack stays below 25 %
LEAST_ROWS = 256


class BlockLayer(CacheLayerMixin):
    """One layer: keys and values ``[B, C, K, D]`` and block means ``[B, P, K, D]``, computed when they are asked for.

    Attributes:
        k, v: the buffers; ``keys``, ``values``: the filled rows in transformers' order ``[B, K, rows, D]``.
        block_size: tokens per block S.
        positions: shared by all layers of the cache.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False  # a step is captured as a CUDA graph (ssa.model.graph), not traced

    def __init__(self, positions: Positions, block_size: int, mean_values: bool, first: bool) -> None:
        self.positions, self.block_size, self.mean_values, self.first = positions, block_size, mean_values, first
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Drop all memory."""
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self._means: tuple[Tensor, ...] = ()
        self._bounds: BlockBounds | None = None
        self.pooled_rows = self.bounded_rows = 0  # means and bounds cover the blocks completed within this many rows
        self.is_initialized = False

    # ------------------------------------------------------------------ what it holds
    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        return None if self.k is None else self._filled(self.k)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return None if self.v is None else self._filled(self.v)

    def _filled(self, x: Tensor) -> Tensor:
        rows = x.shape[1] if self.positions.capacity is not None else self.positions.length
        return x[:, :rows].transpose(1, 2)

    def pooled(self, up_to_date: bool = True) -> tuple[Tensor, ...]:
        """Block means of the keys, and of the values if the cache keeps them, brought up to date unless told not to."""
        place = self.positions
        assert self.k is not None
        assert self.v is not None
        assert place.lengths is not None
        if not self._means:
            blocks = -(-self.k.shape[1] // self.block_size)
            self._means = tuple(
                x.new_empty(x.shape[0], blocks, *x.shape[2:])
                for x in ((self.k, self.v) if self.mean_values else (self.k,))
            )
        if up_to_date and (new := place.length - self.pooled_rows) > 0:
            for mean, x in zip(self._means, (self.k, self.v), strict=False):
                update_pooled(mean, x, place.lengths, new, place.starts, self.block_size)
            self.pooled_rows = place.length
        return self._means

    def lacks(self, new: int) -> bool:
        """Whether the block means are those before the ``new`` newest tokens, so that decoding may add theirs."""
        return len(self._means) == 1 and self.positions.length - self.pooled_rows == new

    def bounds(self) -> BlockBounds:
        """Bounds of every block's keys, for certified budgets, brought up to date."""
        mean, place = self.pooled()[0], self.positions
        if self._bounds is None:
            self._bounds, self.bounded_rows = empty_block_bounds(mean), 0
        if (new := place.length - self.bounded_rows) > 0:
            assert self.k is not None
            assert place.lengths is not None
            update_block_bounds(self._bounds, mean, self.k, place.lengths, new, place.starts, self.block_size)
            self.bounded_rows = place.length
        return self._bounds

    def set_block_size(self, block_size: int) -> None:
        """Another block grid; the means are computed anew when they are asked for."""
        if block_size != self.block_size:
            self.block_size, self._means, self.pooled_rows, self._bounds = block_size, (), 0, None

    def forget(self, length: int) -> None:
        """Means and bounds cover no more than ``length`` rows."""
        self.pooled_rows, self.bounded_rows = min(self.pooled_rows, length), min(self.bounded_rows, length)

    # ------------------------------------------------------------------ writing
    def append(self, k: Tensor, v: Tensor) -> None:
        """Write the newest tokens ``[B, N, K, D]`` into the rows that ``positions.advance`` made room for."""
        place, new = self.positions, k.shape[1]
        if self.k is None or self.v is None:
            self.lazy_initialization(k.transpose(1, 2), v.transpose(1, 2))
        assert self.k is not None
        assert self.v is not None
        if k.shape[2:] != self.k.shape[2:] or k.dtype != self.k.dtype:
            raise InputError(
                "BlockCache",
                f"keys of {tuple(k.shape[2:])} [K, D], {k.dtype}",
                f"the cache's {tuple(self.k.shape[2:])}, {self.k.dtype}",
                "the model that filled it, or a new cache",
            )
        if place.rows is not None:  # a static cache: the place is read on the device, so that a graph may replay it
            self.k.index_copy_(1, place.rows, k.detach())
            self.v.index_copy_(1, place.rows, v.detach())
            return
        if place.length > self.k.shape[1]:
            self.k, self.v = self._grown(self.k, place.length), self._grown(self.v, place.length)
            blocks = -(-self.k.shape[1] // self.block_size)
            self._means, self._bounds = tuple(_resized(x, blocks) for x in self._means), None
        rows = slice(place.length - new, place.length)
        self.k[:, rows], self.v[:, rows] = k.detach(), v.detach()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate, for ``[B, K, N, D]`` (transformers' order)."""
        rows = self.positions.capacity or max(self.positions.length, key_states.shape[2])
        make = torch.zeros if self.positions.capacity else torch.empty  # stock attention reads unused static rows
        self.k, self.v = (
            make((x.shape[0], rows, x.shape[1], x.shape[3]), dtype=x.dtype, device=x.device)
            for x in (key_states, value_states)
        )
        self.device, self.dtype, self.is_initialized = key_states.device, key_states.dtype, True

    @staticmethod
    def _grown(x: Tensor, rows: int) -> Tensor:
        return _resized(x, max(rows, x.shape[1] + max(x.shape[1] // GROWTH, LEAST_ROWS)))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """transformers' call: write ``[B, K, N, D]``, return all keys and values ``[B, K, rows, D]``.

        The keys carry this layer as ``ssa_layer``: an attention function is given keys, not the cache.
        """
        if self.first:
            self.positions.advance(key_states.shape[0], key_states.shape[2], key_states.device)
        self.append(key_states.transpose(1, 2), value_states.transpose(1, 2))
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        keys.ssa_layer = self  # type: ignore[attr-defined]
        return keys, values

    # ------------------------------------------------------------------ what transformers asks for
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.positions.capacity or self.positions.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.positions.length

    def get_max_length(self) -> int:
        return self.positions.capacity or -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.17

    def select(self, index: Tensor) -> None:
        """Sequences ``index`` in the place of all; in place where their number stays."""
        rows = self.positions.length
        self.k, self.v = selected(self.k, index, rows), selected(self.v, index, rows)
        blocks = rows // self.block_size
        self._means = tuple(x for x in (selected(mean, index, blocks) for mean in self._means) if x is not None)
        self._bounds = None


class BlockCache(Cache):
    """Keys, values and block means of every layer. See the module.

    Args:
        layers: layers of the model.
        block_size: tokens per block S; must be the model's.
        capacity: rows for a static cache, allocated once (CUDA graphs need it); None grows.
        mean_values: keep block means of the values too (method ``"nsa"``).

    Raises:
        InputError: an impossible block size or capacity.
    """

    def __init__(
        self, layers: int, block_size: int = 16, *, capacity: int | None = None, mean_values: bool = False
    ) -> None:
        if block_size not in BLOCK_SIZES:
            raise InputError("BlockCache.block_size", block_size, f"one of {BLOCK_SIZES}")
        if layers < 1 or (capacity is not None and capacity < 1):
            raise InputError("BlockCache", f"{layers} layers, capacity {capacity}", "both at least 1")
        self.positions = Positions(capacity)
        self.graphs: dict[Any, Any] = {}  # captured decode steps (ssa.model.graph); they live as long as the buffers
        self.mass: list[Tensor] | None = None  # see report_mass
        self.taken: list[Tensor] = []
        super().__init__(layers=[BlockLayer(self.positions, block_size, mean_values, i == 0) for i in range(layers)])

    @classmethod
    def from_config(cls, config: Any, capacity: int | None = None) -> BlockCache:
        """The cache of an :class:`SSAForCausalLM` with this config."""
        nsa = getattr(config, "method", None) == "nsa"
        return cls(config.num_hidden_layers, config.block_size, capacity=capacity, mean_values=nsa)

    @property
    def held(self) -> list[BlockLayer]:
        """``layers``, typed."""
        return cast("list[BlockLayer]", self.layers)

    @property
    def block_size(self) -> int:
        return self.held[0].block_size

    def set_block_size(self, block_size: int) -> None:
        """Another block grid, for example before running at another block size; means are computed anew."""
        for layer in self.held:
            layer.set_block_size(block_size)
        self.graphs.clear()

    def report_mass(self, on: bool = True) -> None:
        """Measure what every sparse step drops and takes from here on (full attention runs beside it)."""
        self.mass, self.taken = [] if on else None, []

    def dropped_mass(self) -> float | None:
        """Mean dropped mass of the measured steps, None if there is none. Waits for the device."""
        return float(torch.stack(self.mass).mean()) if self.mass else None

    def blocks_taken(self) -> float | None:
        """Mean number of blocks that a query of the measured steps read, None likewise."""
        return float(torch.stack(self.taken).mean()) if self.taken else None

    # ------------------------------------------------------------------ what transformers asks for
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.positions.length

    @property
    def batch_size(self) -> int:
        return -1 if self.positions.lengths is None else len(self.positions.lengths)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: ``-n`` removes n, a positive number is the length that stays (transformers before
        5.17). Block means of what stays are kept: a block that completes again is summed again.
        """
        length, removed = self.positions.length, int(tokens_to_remove)  # transformers 5.17 counts in a tensor
        keep = removed if removed > 0 else max(length + removed, 0)
        self.positions.crop(keep)
        for layer in self.held:
            layer.forget(self.positions.length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence ``beam_idx[i]`` becomes sequence i (beam search)."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence ``repeats`` times."""
        if self.positions.lengths is not None:
            index = torch.arange(len(self.positions.lengths), device=self.positions.lengths.device)
            self._select(index.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences."""
        self._select(indices)

    def _select(self, index: Tensor) -> None:
        if self.positions.lengths is None:
            return
        index = index.to(self.positions.lengths.device)
        if index.dtype == torch.bool:
            index = index.nonzero().flatten()
        if len(index) != len(self.positions.lengths):
            self.graphs.clear()  # their buffers are replaced
        for layer in self.held:
            layer.select(index)
        self.positions.select(index)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "graphs": {}}  # copies (of a prompt's cache, say) have other buffers

    def reset(self) -> None:
        """Empty it; a static cache keeps its memory."""
        self.positions.reset()
        for layer in self.held:
            layer.forget(0)
            if self.positions.capacity is None:
                layer.reset_buffers()
        if self.positions.capacity is None:
            self.positions.lengths = self.positions.starts = None


def _resized(x: Tensor, rows: int) -> Tensor:
    bigger = x.new_empty(x.shape[0], rows, *x.shape[2:])
    bigger[:, : x.shape[1]] = x
    return bigger
