"""Attention statistics of a model on text: AttnSparsity, dropped mass, entropy, Theorem 1, selected blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssa.documents import DocumentLayout
from ssa.evaluate.running import Setting, precision, running
from ssa.model import SSAForCausalLM
from ssa.ops import SparseSpec, attention_entropy, error_bound, select_blocks

STATISTICS = ("attention_sparsity", "dropped_mass", "entropy_bits", "bound_share", "bound_tightness")


@dataclass
class AttentionStatistics:
    """Sums over queries and heads, per layer: ``totals [layers, 5]`` in the order of ``STATISTICS``.

    ``bound_tightness`` is the mean of error / bound over queries that drop something; 1 would be a bound that is met
    exactly. ``bound_share`` is the share of queries with ``error <= bound`` up to rounding.
    """

    totals: Tensor
    queries: Tensor
    dropping: Tensor

    def rows(self) -> list[dict[str, float]]:
        """One dict per layer, as in ``ssa.evaluation/1``."""
        out = []
        for layer in range(self.totals.shape[0]):
            means = self.totals[layer] / self.queries[layer]
            means[4] = self.totals[layer, 4] / self.dropping[layer].clamp(min=1)
            out.append({"layer": layer, **dict(zip(STATISTICS, means.tolist(), strict=True))})
        return out

    def mean(self) -> dict[str, float]:
        """Mean over layers."""
        rows = self.rows()
        return {name: sum(row[name] for row in rows) / len(rows) for name in STATISTICS}


def attention_statistics(
    model: SSAForCausalLM, batches: Iterable[Any], spec: SparseSpec, mode: str
) -> AttentionStatistics:
    """Statistics of every layer on ``batches`` (``ssa.data.loader.Batch``), run in ``mode``.

    In both modes each layer's full attention is compared with the blocks that ``spec`` selects on the same q, k, v.
    """
    layers = model.config.num_hidden_layers
    totals = torch.zeros(layers, len(STATISTICS), dtype=torch.float64)
    queries, dropping = torch.zeros(layers, dtype=torch.float64), torch.zeros(layers, dtype=torch.float64)
    real = torch.zeros(0)

    def observe(layer: int, q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout) -> None:
        with torch.autocast(q.device.type, enabled=False):
            indices = select_blocks(q, k, spec, layout)  # as the model itself selects, in its own precision
            q, k, v = q.float(), k.float(), v.float()
            bound = error_bound(q, k, v, indices, spec.block_size, layout)
            entropy = attention_entropy(q, k, layout)
        # Rounding of ||h_full - h_sparse|| is relative to the outputs, not to their difference.
        holds = bound.error <= bound.bound * (1 + 1e-4) + 1e-5 * v.norm(dim=-1).amax()
        drops = (bound.dropped_mass > 1e-4) & real[..., None]
        tightness = torch.where(drops, bound.error / bound.bound.clamp(min=1e-30), 0.0)
        values = (1 - bound.dropped_mass, bound.dropped_mass, entropy, holds.float(), tightness)
        totals[layer] += torch.stack([(x * real[..., None]).sum() for x in values]).double().cpu()
        queries[layer] += float(real.sum()) * q.shape[2]
        dropping[layer] += float(drops.sum())

    setting = Setting(model.config.inference_mode if model.config.method == "nsa" else mode, model.config.block_size)
    with running(model, setting), model.observe_attention(observe):
        for batch in batches:
            real = (batch.labels >= 0).to(model.device)  # padding is no query
            model(batch.input_ids.to(model.device), layout=batch.layout, logits_to_keep=1)
    return AttentionStatistics(totals, queries, dropping)


@torch.no_grad()
def selection_map(model: SSAForCausalLM, batch: Any, spec: SparseSpec, layer: int, kv_head: int = 0) -> dict[str, Any]:
    """Share of the queries of block i that select block j, in the longest document of ``batch``.

    Returns the ``selection_map`` object of ``ssa.evaluation/1``; ``picked_share`` is ``[N][N]``, 0 above the diagonal.
    """
    found: dict[str, Any] = {}

    def observe(index: int, q: Tensor, k: Tensor, v: Tensor, layout: DocumentLayout) -> None:
        if index != layer:
            return
        longest = max(range(len(layout.lengths)), key=layout.lengths.__getitem__)
        first, length = sum(layout.lengths[:longest]), layout.lengths[longest]
        rows = select_blocks(q, k, spec, layout).flatten(0, 1)[first : first + length, kv_head].long()
        blocks = -(-length // spec.block_size)
        picked = torch.zeros(length, blocks + 1, device=q.device).scatter_(1, torch.where(rows >= 0, rows, blocks), 1.0)
        owner = torch.arange(length, device=q.device) // spec.block_size
        share = torch.zeros(blocks, blocks, device=q.device).index_add_(0, owner, picked[:, :blocks])
        share /= torch.bincount(owner, minlength=blocks)[:, None]
        found["picked_share"] = [[round(x, 4) for x in row] for row in share.tolist()]

    model.eval()
    with precision(model), model.observe_attention(observe):
        model(batch.input_ids.to(model.device), layout=batch.layout, logits_to_keep=1)
    return {"layer": layer, "kv_head": kv_head, "block_size": spec.block_size, **found}
