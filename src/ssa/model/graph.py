"""A whole decode step as one CUDA graph: static cache, one new token per sequence, no launch from the host.

A step of a small model is bound by launching hundreds of kernels; a graph launches them at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssa.errors import InputError
from ssa.model.cache import BlockCache

if TYPE_CHECKING:
    from ssa.model.modeling import SSAForCausalLM

WARM_UPS = 2  # compile kernels and fill the allocator before the capture


class DecodeGraph:
    """One step captured for one cache at one mode and budget: :meth:`step` replays it.

    The graph reads and writes the cache's buffers; crop, reorder and padding change them in place, so it stays valid.

    Args:
        model: the language model, on a GPU; its mode and budget now are captured.
        cache: a static :class:`BlockCache` that holds the prompt.

    Raises:
        InputError: no GPU, a cache that grows or is empty, or one that measures dropped mass.
    """

    def __init__(self, model: SSAForCausalLM, cache: BlockCache) -> None:
        place = cache.positions
        if model.device.type != "cuda":
            raise InputError("DecodeGraph", f"a model on {model.device}", "a CUDA device")
        if place.capacity is None or place.lengths is None or not place.length or cache.mass is not None:
            raise InputError(
                "DecodeGraph", "a dynamic, empty or measuring cache", "a static cache that holds the prompt"
            )
        self.cache = cache
        self.sparse = model.config.inference_mode == "sparse"
        self.ids = torch.zeros(len(place.lengths), 1, dtype=torch.int64, device=model.device)
        if self.sparse:
            for layer in cache.held:
                layer.pooled()  # the graph adds one token's worth; the prompt's means are made here
        pooled = [layer.pooled_rows for layer in cache.held]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._forward(model)
                self._undo(pooled, on_device=True)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph):
            self.logits = self._forward(model)
            self.greedy = self.logits.argmax(-1)
        self._undo(pooled, on_device=False)  # a capture runs nothing
        self.greedy.zero_()  # nor does it fill its results

    def _forward(self, model: SSAForCausalLM) -> Tensor:
        logits = model(self.ids, past_key_values=self.cache).logits
        assert logits is not None
        return logits

    def _undo(self, pooled: list[int], *, on_device: bool) -> None:
        place = self.cache.positions
        if on_device:
            place.crop(place.length - 1)
        else:
            place.length -= 1
        for layer, rows in zip(self.cache.held, pooled, strict=True):
            layer.pooled_rows = rows

    def step(self, ids: Tensor) -> Tensor:
        """Logits ``[B, 1, vocabulary]`` after the tokens ``ids [B, 1]``; overwritten by the next step.

        ``self.greedy [B, 1]`` holds the most probable next tokens.

        Raises:
            InputError: the cache is full.
        """
        place = self.cache.positions
        if place.length + 1 > (place.capacity or 0):
            raise InputError("DecodeGraph", f"{place.length} + 1 tokens", f"at most the capacity {place.capacity}")
        if self.sparse:
            for layer in self.cache.held:  # a crop or full steps since the last replay left means to make
                if layer.pooled_rows < place.length:
                    layer.pooled()
        self.ids.copy_(ids)
        self.graph.replay()
        place.length += 1
        if self.sparse:
            for layer in self.cache.held:
                layer.pooled_rows = place.length
        return self.logits


def graph_of(model: SSAForCausalLM, cache: BlockCache) -> DecodeGraph:
    """The captured step for the model's mode and budget now; captured at the first call."""
    config, place = model.config, cache.positions
    specs = tuple((config.sparse_spec(i), config.head_budgets(i)) for i in range(config.num_hidden_layers))
    key: tuple[Any, ...] = (id(model), config.inference_mode, specs, place.starts is None)
    if key not in cache.graphs:
        cache.graphs[key] = DecodeGraph(model, cache)
    found: DecodeGraph = cache.graphs[key]
    return found
