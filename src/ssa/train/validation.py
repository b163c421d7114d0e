"""Cross-entropy on a few rows of the valid split during training."""

from __future__ import annotations

import torch

from ssa.data import Batch
from ssa.model import SSAForCausalLM
from ssa.train.step import Context


@torch.no_grad()
def validate(model: SSAForCausalLM, batches: list[Batch], device: torch.device, context: Context) -> dict[str, float]:
    """Mean cross-entropy over the targets of ``batches`` in nats, by inference mode.

    Both modes are run, full attention and sparse at the training budget; NSA has the sparse one only.
    """
    modes = ("sparse",) if model.config.method == "nsa" else ("full", "sparse")
    targets = sum(batch.targets for batch in batches)
    results = {}
    model.eval()
    for mode in modes:
        total = torch.zeros((), dtype=torch.float64, device=device)
        with model.attention_mode(mode):
            for batch in batches:
                ids, labels = batch.input_ids.to(device), batch.labels.to(device)
                with context():
                    output = model(ids, labels=labels, layout=batch.layout)
                total += output.cross_entropy.double() * batch.targets
        results[mode] = float(total) / max(targets, 1)
    model.train()
    return results
