"""Schedule, decay groups, and the guard against non-finite steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ssa.train.optimizer import StepGuard, apply_gradients, build_optimizer, gradient_norm, learning_rate
from ssa.train.recipe import OptimizerSection
from ssa.train.recipe_file import load_recipe

RECIPE = load_recipe("quickstart/ssa", {"training.steps": 100, "optimizer.warmup_fraction": 0.1})


def test_learning_rate_rises_to_the_peak_and_falls_towards_the_end() -> None:
    peak = RECIPE.optimizer.learning_rate
    rates = [learning_rate(RECIPE, step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(peak / 10)
    assert rates[9] == peak
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 1e-3 * peak
    assert rates[9 + 45] == pytest.approx(peak * 0.5 * (1 + math.cos(math.pi * 45 / 91)))


def test_learning_rate_ends_at_the_final_fraction_or_stays_constant() -> None:
    floor = load_recipe("quickstart/ssa", {"optimizer.final_fraction": 0.1, "training.steps": 300})
    assert learning_rate(floor, 300) == pytest.approx(0.1 * floor.optimizer.learning_rate, rel=1e-2)
    constant = load_recipe("quickstart/ssa", {"optimizer.schedule": "constant", "optimizer.warmup_steps": 0})
    assert {learning_rate(constant, step) for step in range(1, 100)} == {constant.optimizer.learning_rate}


def test_only_matrices_decay() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    decay = {
        p: group["weight_decay"]
        for group in build_optimizer(model, OptimizerSection()).param_groups
        for p in group["params"]
    }
    assert {name: decay[p] for name, p in model.named_parameters()} == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }


class Steps:
    """A tiny model that takes steps with gradients we choose."""

    def __init__(self) -> None:
        self.model = nn.Linear(4, 3)
        self.optimizer = build_optimizer(self.model, RECIPE.optimizer)
        self.guard = StepGuard(torch.device("cpu"))
        self.number = 0

    def take(self, gradient: float = 1.0, loss: float = 1.0) -> None:
        self.number += 1
        for p in self.model.parameters():
            p.grad = torch.full_like(p, 1.0)
        next(self.model.parameters()).grad[0, 0] = gradient  # type: ignore[index]
        norm = gradient_norm(self.optimizer)
        apply_gradients(self.optimizer, self.guard, RECIPE, self.number, torch.tensor(loss), norm)

    def snapshot(self) -> list[Tensor]:
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return [value.detach().clone() for value in (*self.model.parameters(), *states)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("gradient", "loss"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf)])
def test_a_non_finite_step_changes_no_bit_and_the_next_one_counts(gradient: float, loss: float) -> None:
    steps = Steps()
    steps.take()
    before = steps.snapshot()
    steps.take(gradient, loss)
    assert same(steps.snapshot(), before)
    steps.take()
    assert not same(steps.snapshot(), before)
    skips = steps.guard.read()
    assert (skips.steps, skips.stop, steps.guard.total, steps.guard.in_row) == ((2,), False, 1, 0)


def test_a_skipped_step_leaves_the_later_ones_as_if_it_had_not_been() -> None:
    skipping, clean = Steps(), Steps()
    clean.model.load_state_dict(skipping.model.state_dict())
    skipping.take()
    skipping.take(math.nan)
    skipping.take()
    clean.take()
    clean.number += 1  # the learning rate follows the step number
    clean.take()
    assert same(skipping.snapshot(), clean.snapshot())


def test_the_guard_shuts_at_the_third_in_a_row_and_protects_until_it_is_read() -> None:
    steps = Steps()
    for gradient in (1.0, math.nan, 1.0, math.nan, math.nan):
        steps.take(gradient)
    before = steps.snapshot()
    steps.take(math.nan)
    steps.take()  # healthy, but nobody has looked yet
    assert same(steps.snapshot(), before)
    skips = steps.guard.read()
    assert (skips.steps, skips.stop, steps.guard.total) == ((2, 4, 5, 6), True, 4)


def test_a_row_of_skips_goes_on_across_readings_and_resumes() -> None:
    steps = Steps()
    steps.take(math.nan)
    steps.take(math.nan)
    assert not steps.guard.read().stop
    steps.guard = StepGuard(torch.device("cpu"), steps.guard.total, steps.guard.in_row)  # as a resumed run makes it
    steps.take(math.nan)
    assert steps.guard.read().stop
    assert steps.guard.total == 3


def test_gradients_are_clipped_to_the_global_norm() -> None:
    model = nn.Linear(2, 2, bias=False)
    optimizer = build_optimizer(model, RECIPE.optimizer)
    model.weight.grad = torch.full_like(model.weight, 30.0)
    norm = gradient_norm(optimizer)
    apply_gradients(optimizer, StepGuard(torch.device("cpu")), RECIPE, 1, torch.tensor(1.0), norm)
    assert norm == 60.0
    first_moment = optimizer.state[model.weight]["exp_avg"]
    assert torch.allclose(first_moment, torch.full_like(first_moment, 0.1 * 0.5), rtol=1e-4)
