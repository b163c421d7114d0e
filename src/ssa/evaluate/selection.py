"""What a model's block selection looks like: how far blocks lie, how much neighbouring tokens share, and sinks.

Kernels need the sharing: a tile of n tokens loads the union of their blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ssa.data.loader import Batch
from ssa.documents import DocumentLayout, run_view
from ssa.evaluate.running import Setting, running
from ssa.model import SSAForCausalLM
from ssa.ops import SparseSpec, full_attention, select_blocks

NEIGHBOURS = (2, 4, 8, 16, 32)


class SelectionSums:
    """Sums of one layer over documents. Queries in a document's first half are left out: they have little to choose.

    Attributes:
        union: neighbouring tokens n -> summed union sizes and number of groups.
        distance: summed picks by distance in blocks: 0 (own), 1, 2-3, 4-7, ... (powers of two).
        popular: summed share of the queries that pick a document's most picked block.
        first_token, first_block: summed full-attention mass on a document's first token and block.
    """

    def __init__(self) -> None:
        self.union = {n: [0.0, 0] for n in NEIGHBOURS}
        self.distance: list[float] = []
        self.popular, self.documents = 0.0, 0
        self.first_token, self.first_block, self.queries = 0.0, 0.0, 0

    def add_picks(self, indices: Tensor, block_size: int) -> None:
        """``indices [L, K, k]`` of one document's queries, -1 where there is none."""
        length, heads, _ = indices.shape
        blocks, half = -(-length // block_size), length // 2
        slots = torch.where(indices >= 0, indices, blocks).long()
        picked = torch.zeros(length, heads, blocks + 1, dtype=torch.bool, device=indices.device)
        picked = picked.scatter_(-1, slots, True)[half:, :, :blocks]
        for n in NEIGHBOURS:
            if groups := len(picked) // n:
                union = picked[: groups * n].unflatten(0, (groups, n)).any(1).sum(-1)  # [groups, K]
                self.union[n][0] += float(union.sum())
                self.union[n][1] += union.numel()
        own = torch.arange(half, length, device=indices.device) // block_size
        away = own[:, None, None] - torch.arange(blocks, device=indices.device)
        # 0 -> 0, 1 -> 1, 2-3 -> 2, 4-7 -> 3, ...
        classes = torch.where(away > 0, away.clamp(min=1).log2().floor() + 1, 0).long().expand_as(picked)
        counts = torch.bincount(classes[picked], minlength=1).tolist()
        self.distance += [0.0] * (len(counts) - len(self.distance))
        for distance, count in enumerate(counts):
            self.distance[distance] += count
        self.popular += float(picked.float().mean(0).amax(-1).mean())
        self.documents += 1

    def add_sinks(self, q: Tensor, k: Tensor, lse: Tensor, block_size: int) -> None:
        """``q [L, H, D]``, ``k [L, K, D]``, ``lse [L, H]`` of one document."""
        half = len(q) // 2
        keys = k[:block_size].repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = torch.einsum("thd,shd->ths", q[half:], keys) * q.shape[-1] ** -0.5
        mass = (logits - lse[half:, :, None]).exp()
        self.first_token += float(mass[..., 0].sum())
        self.first_block += float(mass.sum())
        self.queries += mass.shape[0] * mass.shape[1]

    def row(self, layer: int) -> dict[str, Any]:
        """A layer of a ``suite.selection`` entry of ``ssa.evaluation/1``."""
        picks = sum(self.distance) or 1.0
        return {
            "layer": layer,
            "union": {str(n): total / groups for n, (total, groups) in self.union.items() if groups},
            "distance": {str(2**i // 2): count / picks for i, count in enumerate(self.distance)},
            "most_popular": self.popular / max(self.documents, 1),
            "first_token_mass": self.first_token / max(self.queries, 1),
            "first_block_mass": self.first_block / max(self.queries, 1),
        }


def selection_statistics(model: SSAForCausalLM, batches: Iterable[Batch], setting: Setting) -> dict[str, Any]:
    """Selection statistics of every layer on ``batches``, hidden states from ``setting``, selection at its budget.

    Full runs select with the model's own budget on the same q and k.

    Returns:
        A ``suite.selection`` entry of ``ssa.evaluation/1``.
    """
    size, count = setting.block_size, setting.num_blocks or model.config.num_blocks
    spec = SparseSpec(size, count)
    sums = [SelectionSums() for _ in range(model.config.num_hidden_layers)]

    def observe(layer: int, q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout) -> None:
        with torch.autocast(q.device.type, enabled=False):
            indices = select_blocks(q, k, spec, layout)
            _, lse = full_attention(q, k, v, layout, return_lse=True)
            add(layer, indices, q, k, lse, layout)

    def add(layer: int, indices: Tensor, q: Tensor, k: Tensor, lse: Tensor, layout: DocumentLayout) -> None:
        for run in layout.runs():
            if run[2] < 2 * size:
                continue
            parts = [run_view(x, run) for x in (indices, q.float(), k.float(), lse.float())]
            for picks, query, key, normaliser in zip(*parts, strict=True):
                sums[layer].add_picks(picks, size)
                sums[layer].add_sinks(query, key, normaliser, size)

    with running(model, setting), model.observe_attention(observe):
        for batch in batches:
            model(batch.input_ids.to(model.device), layout=batch.layout, logits_to_keep=1)
    rows = [layer.row(number) for number, layer in enumerate(sums)]
    return {**setting.facts(), "block_size": size, "num_blocks": count, "layers": rows}
