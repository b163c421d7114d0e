"""Cross-entropy on a few rows of the valid split during training."""

from __future__ import annotations

import torch

from ssa.data import Batch
from ssa.model import SSAForCausalLM
from ssa.train.ranks import Ranks
from ssa.train.sharding import reshard
from ssa.train.step import Context


@torch.no_grad()
def validate(
    model: SSAForCausalLM, batches: list[Batch], device: torch.device, context: Context, ranks: Ranks | None = None
) -> dict[str, float]:
    """Mean cross-entropy over the targets of ``batches`` in nats, by inference mode; the same on every rank.

    Both modes are run, full attention and sparse at the training budget; NSA has the sparse one only. The batches are
    dealt out to the ranks. Sharded weights travel in every forward pass, so a rank that has one batch less repeats
    one for nothing.
    """
    ranks = ranks or Ranks()
    rank, size = ranks.world.rank, ranks.world.size
    turns = [(i, batches[i % len(batches)]) for i in range(rank, -(-len(batches) // size) * size, size)]
    modes = ("sparse",) if model.config.method == "nsa" else ("full", "sparse")
    targets = sum(batch.targets for batch in batches)
    results = {}
    model.eval()
    for mode in modes:
        total = torch.zeros((), dtype=torch.float64, device=device)
        with model.attention_mode(mode):
            for i, batch in turns:
                ids, labels = batch.input_ids.to(device), batch.labels.to(device)
                with context():
                    output = model(ids, labels=labels, layout=batch.layout, skip_logits=True)
                if i < len(batches):
                    total += output.cross_entropy.double() * batch.targets
        results[mode] = float(ranks.sum(total)) / max(targets, 1)
    reshard(model)
    model.train()
    return results
