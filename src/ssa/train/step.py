"""One optimiser step's forward and backward passes, split into micro-batches without changing the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssa.data import Batch
from ssa.train.streams import Stream

Context = Callable[[], AbstractContextManager[object]]


@dataclass
class StepSums:
    """Sums over a step's micro-batches, on the device and detached.

    Attributes:
        loss: the step's loss, whose gradient was accumulated.
        cross_entropy: mean over the step's targets, nats.
        sparsity_loss, commitment_loss, attention_sparsity: ``[layers]``, means over the step's rows; None where the
            method does not align.
    """

    loss: Tensor
    cross_entropy: Tensor
    sparsity_loss: Tensor | None = None
    commitment_loss: Tensor | None = None
    attention_sparsity: Tensor | None = None


def accumulate_gradients(
    model: nn.Module, batches: Sequence[Batch], stream: Stream, device: torch.device, context: Context
) -> StepSums:
    """Run the micro-batches of one step and add up their gradients.

    Cross-entropy is divided by the targets of the whole step, and alignment (a mean over elements) is weighted with
    the micro-batch's share of the step's rows. Neither depends on how the step is split.
    """
    targets, rows = sum(batch.targets for batch in batches), sum(batch.rows for batch in batches)
    zero = torch.zeros((), device=device)
    sums = StepSums(zero, zero)
    for batch in batches:
        share = batch.rows / rows
        with context():
            output = model(
                batch.input_ids.to(device, non_blocking=True),
                labels=batch.labels.to(device, non_blocking=True),
                layout=batch.layout,
                stream=stream,
                num_items_in_batch=max(targets, 1),  # a step of one-token documents alone has no target: loss 0
                alignment_scale=share,
            )
        output.loss.backward()
        sums.loss = sums.loss + output.loss.detach()
        sums.cross_entropy = sums.cross_entropy + output.cross_entropy * (batch.targets / max(targets, 1))
        for name in ("sparsity_loss", "commitment_loss", "attention_sparsity"):
            value, so_far = getattr(output, name), getattr(sums, name)
            if value is not None:
                setattr(sums, name, value * share if so_far is None else so_far + value * share)
    return sums
