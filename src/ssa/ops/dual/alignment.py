"""The bidirectional alignment of both streams' outputs (paper Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ssa.errors import InputError

Distance = Literal["smooth_l1", "l2"]
AlignOn = Literal["gated", "raw"]
Directions = Literal["both", "sparsity", "commitment"]
MOST_TILES = 64
SMALLEST_FRACTION = 1 / MOST_TILES


@dataclass(frozen=True)
class AlignmentSpec:
    """How the two streams are pulled together.

    Attributes:
        weight: alpha; 10 in the paper.
        distance: ``"smooth_l1"`` (beta 1) or ``"l2"`` (squared error), mean over elements.
        align_on: ``"gated"`` compares the outputs after the gate, as the published code does, so that the gate
            learns from it too; ``"raw"`` compares them before, as the paper's Algorithm 1 writes it.
        directions: ``"both"``, or one of ``"sparsity"`` (full towards sparse) and ``"commitment"`` (sparse towards
            full). One direction alone is an ablation; the paper reports that it diverges.
        query_fraction: f = 1/n. In sparse steps the full counterpart is computed for a random share f of the query
            rows, and the alignment is an unbiased estimate (docs/alignment.md). Full steps are always exact.
    """

    weight: float = 10.0
    distance: Distance = "smooth_l1"
    align_on: AlignOn = "gated"
    directions: Directions = "both"
    query_fraction: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.weight, (int, float)) or not 0 <= self.weight < float("inf"):
            raise InputError("AlignmentSpec.weight", repr(self.weight), "a finite number of at least 0")
        fraction = self.query_fraction
        if not isinstance(fraction, (int, float)) or not SMALLEST_FRACTION <= fraction <= 1:
            raise InputError("AlignmentSpec.query_fraction", repr(fraction), f"1/n for n from 1 to {MOST_TILES}")
        if abs(1 / fraction - round(1 / fraction)) > 1e-6:
            near = round(1 / fraction)
            raise InputError(
                "AlignmentSpec.query_fraction", repr(fraction), f"1/n for an integer n to {MOST_TILES}", f"1/{near}"
            )
        for name, allowed in (("distance", Distance), ("align_on", AlignOn), ("directions", Directions)):
            if getattr(self, name) not in get_args(allowed):
                raise InputError(f"AlignmentSpec.{name}", repr(getattr(self, name)), f"one of {get_args(allowed)}")


class Alignment(NamedTuple):
    """Alignment of one layer; scalars.

    Attributes:
        loss: ``weight * (sparsity + commitment)`` over the chosen directions, with gradient.
        sparsity: ``d(full, stop(sparse))``, detached.
        commitment: ``d(sparse, stop(full))``, detached.
        attention_sparsity: mean full-attention mass on the selected blocks (Definition 1), detached.
    """

    loss: Tensor
    sparsity: Tensor
    commitment: Tensor
    attention_sparsity: Tensor


def align(full: Tensor, sparse: Tensor, spec: AlignmentSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Loss with gradient and the two detached directions, in float32 (float64 inputs: float64).

    ``full``, ``sparse``: equal shapes. Each direction sends gradient into exactly one of them.
    """
    distance = F.smooth_l1_loss if spec.distance == "smooth_l1" else F.mse_loss
    wide = torch.float64 if full.dtype == torch.float64 else torch.float32
    full, sparse = full.to(wide), sparse.to(wide)
    sparsity = distance(full, sparse.detach())
    commitment = distance(sparse, full.detach())
    parts = {"both": sparsity + commitment, "sparsity": sparsity, "commitment": commitment}
    return spec.weight * parts[spec.directions], sparsity.detach(), commitment.detach()
