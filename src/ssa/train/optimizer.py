"""AdamW, its learning-rate schedule, and the guard that leaves non-finite steps out without asking the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ssa.train.recipe import OptimizerSection, Recipe
from ssa.train.sharding import local

MAX_SKIPS_IN_ROW = 3


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of ``step``, counted from 1; a pure function.

    Warm-up reaches the peak at its last step. The cosine would reach ``final_fraction`` one step after the last,
    so that no step is spent at a rate of 0.
    """
    section, warmup = recipe.optimizer, recipe.warmup_steps
    if step <= warmup:
        return section.learning_rate * step / warmup
    if section.schedule == "constant":
        return section.learning_rate
    progress = (step - warmup) / (recipe.steps + 1 - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return section.learning_rate * (section.final_fraction + (1 - section.final_fraction) * cosine)


def build_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices only, since norms have no scale to regularise."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=section.learning_rate, betas=section.betas, eps=section.epsilon, fused=True)


@dataclass(frozen=True)
class Skips:
    """Steps that were left out since the last reading, and whether training has to stop."""

    steps: tuple[int, ...]
    stop: bool


class StepGuard:
    """Decides on the device which steps are applied, so that a healthy step never waits for the host.

    A step with a non-finite loss or gradient is left out. After three in a row the guard shuts: it leaves out every
    later step too, until the host reads it and stops. Weights therefore stay as the last good step left them.

    Attributes:
        total: steps left out in the whole run, as of the last :meth:`read`.
        in_row: steps left out up to the last one read.
    """

    def __init__(self, device: torch.device, total: int = 0, in_row: int = 0) -> None:
        self.total, self.in_row = total, in_row
        self._in_row = torch.tensor(in_row, device=device)
        self._unread: list[tuple[int, Tensor]] = []

    def judge(self, step: int, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """1.0 if the step is to be left out, else 0.0, as the fused optimiser's ``found_inf`` wants it."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(gradient_norm))
        shut = self._in_row >= MAX_SKIPS_IN_ROW
        self._in_row = torch.where(shut, self._in_row, torch.where(bad, self._in_row + 1, 0))
        self._unread.append((step, bad))
        return (bad | shut).float()

    def read(self) -> Skips:
        """What happened since the last reading. Waits for the device."""
        flags = torch.stack([bad for _, bad in self._unread]).tolist() if self._unread else []
        steps = [step for step, _ in self._unread]
        self._unread.clear()
        skipped = []
        for step, bad in zip(steps, flags, strict=True):
            self.in_row = self.in_row + 1 if bad else 0
            if bad:
                skipped.append(step)
            if self.in_row >= MAX_SKIPS_IN_ROW:
                break  # the guard shut here: later steps were left out whatever their numbers
        self.total += len(skipped)
        return Skips(tuple(skipped), self.in_row >= MAX_SKIPS_IN_ROW)


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """Norm of this rank's gradients, float32 on the device; of all gradients where nothing is sharded."""
    return get_total_norm(_gradients(optimizer))


def apply_gradients(
    optimizer: torch.optim.AdamW, guard: StepGuard, recipe: Recipe, step: int, loss: Tensor, norm: Tensor
) -> None:
    """Clip, let the guard judge, and update weights and moments unless it objects.

    Args:
        loss, norm: of the whole step and all ranks, so that all of them clip and skip alike.
    """
    factor = (recipe.optimizer.gradient_clip / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(_gradients(optimizer), factor)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step)
    # Gradient scalers use the same attribute: the fused kernel then leaves weights, moments and step count as they are.
    optimizer.found_inf = guard.judge(step, loss, norm)  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [local(p.grad) for p in parameters if p.grad is not None]
