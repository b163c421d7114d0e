"""One optimiser step's forward and backward passes, split into micro-batches without changing the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssa.data import Batch
from ssa.ops.dual.alignment import Directions
from ssa.train.ranks import Ranks
from ssa.train.sharding import sync_gradients
from ssa.train.streams import Stream

Context = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class StepSize:
    """What a step's losses are divided by: its whole size, over all micro-batches and ranks.

    Attributes:
        targets: next-token targets.
        rows: rows.
    """

    targets: int
    rows: int

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> StepSize:
        """Of some micro-batches alone."""
        return cls(sum(batch.targets for batch in batches), sum(batch.rows for batch in batches))


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
    model: nn.Module,
    batches: Sequence[Batch],
    stream: Stream,
    device: torch.device,
    context: Context,
    size: StepSize | None = None,
    sample_seed: int = 0,
) -> StepSums:
    """Run this rank's micro-batches of one step and add up their gradients.

    Cross-entropy is divided by the targets of the whole step, and alignment (a mean over elements) is weighted with
    the micro-batch's share of the step's rows. Neither depends on how the step is split over micro-batches and ranks.

    Args:
        size: of the whole step; default: these batches are all of it.
        sample_seed: of the step; every micro-batch derives its own.
    """
    size = size or StepSize.of(batches)
    targets = max(size.targets, 1)  # a step of one-token documents alone has no target: loss 0
    zero = torch.zeros((), device=device)
    sums = StepSums(zero, zero)
    for number, batch in enumerate(batches, 1):
        share = batch.rows / size.rows
        sync_gradients(model, number == len(batches))
        with context():
            output = model(
                batch.input_ids.to(device, non_blocking=True),
                labels=batch.labels.to(device, non_blocking=True),
                layout=batch.layout,
                stream=stream,
                num_items_in_batch=targets,
                alignment_scale=share,
                sample_seed=sample_seed + (number << 32),  # far beyond what the layers add to it
            )
        output.loss.backward()
        sums.loss = sums.loss + output.loss.detach()
        sums.cross_entropy = sums.cross_entropy + output.cross_entropy * (batch.targets / targets)
        for name in ("sparsity_loss", "commitment_loss", "attention_sparsity"):
            value, so_far = getattr(output, name), getattr(sums, name)
            if value is not None:
                setattr(sums, name, value * share if so_far is None else so_far + value * share)
    return sums


def sum_over_ranks(sums: StepSums, norm: Tensor, copies: int, ranks: Ranks) -> tuple[StepSums, Tensor]:
    """The sums and the gradient norm of the whole step, the same bits on every rank. One communication.

    Args:
        norm: of this rank's part of the gradients.
        copies: ranks that hold each part, so that its square counts once.
    """
    if ranks.world.size == 1:
        return sums, norm
    given = {name: value for name, value in vars(sums).items() if value is not None}
    packed = torch.cat([norm.double().square().view(1) / copies, *(v.double().view(-1) for v in given.values())])
    square, *totals = ranks.sum(packed).split([1, *(value.numel() for value in given.values())])
    shaped = (total.view_as(value).to(value.dtype) for total, value in zip(totals, given.values(), strict=True))
    return StepSums(**dict(zip(given, shaped, strict=True))), square[0].sqrt().to(norm.dtype)


def alignment_fields(sums: StepSums, directions: Directions) -> dict[str, Any]:
    """The alignment fields of a step record; null where the method does not align. Waits for the device.

    ``alignment`` is unweighted and holds the directions that are trained.
    """
    sparsity, commitment = sums.sparsity_loss, sums.commitment_loss
    layers = {"sparsity_loss": sparsity, "commitment_loss": commitment, "attention_sparsity": sums.attention_sparsity}
    layers["alignment"] = None
    if sparsity is not None and commitment is not None:
        parts = {"both": sparsity + commitment, "sparsity": sparsity, "commitment": commitment}
        layers["alignment"] = parts[directions]
    record: dict[str, Any] = {name: None if x is None else float(x.mean()) for name, x in layers.items()}
    mass = record["attention_sparsity"]
    record["dropped_mass"] = None if mass is None else 1.0 - mass
    for name in ("alignment", "attention_sparsity"):
        values = layers[name]
        record[f"{name}_per_layer"] = None if values is None else values.tolist()
    return record
