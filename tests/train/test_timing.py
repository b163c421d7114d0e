"""Attention's share of the forward pass, on a clock that we turn by hand; the window of losses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_runs import VOCABULARY, metrics, poison, results, tiny
from torch import Tensor

from ssa.model import SSAForCausalLM
from ssa.train import loop, spikes
from ssa.train.build import build_model, recompute_activations
from ssa.train.loop import train
from ssa.train.spikes import LossWindow
from ssa.train.timing import AttentionClock

NOW = 0.0


class Mark:
    def record(self) -> None:
        self.at = NOW

    def elapsed_time(self, end_event: Mark) -> float:
        return end_event.at - self.at


def slow(module: torch.nn.Module, seconds: float) -> None:
    def wait(*_: object) -> None:
        global NOW
        NOW += seconds

    module.register_forward_hook(wait)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_share_is_that_of_the_forward_pass(recompute: bool, data: Path) -> None:
    model = build_model(tiny(data).model_config(VOCABULARY), 0).train()
    if recompute:  # the second forward pass of a layer, in the backward pass, does not count
        recompute_activations(model)
    for layer in model.model.layers:
        slow(layer.self_attn, 3.0)
        slow(layer.mlp, 1.0)
    clock = AttentionClock(model, Mark)
    ids = torch.randint(0, VOCABULARY, (1, 16))

    def step(model: SSAForCausalLM = model) -> None:
        loss: Tensor = model(ids, labels=ids, stream="full").loss
        loss.backward()

    step()
    assert clock.read() is None
    clock.start()
    step()
    step()
    assert clock.read() == pytest.approx(3.0 / 4.0)
    step()
    assert clock.read() is None  # the hooks are gone


def test_nothing_is_timed_on_a_cpu_nor_in_compiled_layers(data: Path) -> None:
    model = build_model(tiny(data).model_config(VOCABULARY), 0)
    model.model.layers[0].compile()
    for clock in (AttentionClock(build_model(tiny(data).model_config(VOCABULARY), 0)), AttentionClock(model, Mark)):
        clock.start()
        assert not clock._hooks
        assert clock.read() is None


# ---------------------------------------------------------------------- spikes
def feed(window: LossWindow, losses: list[float], first: int = 1) -> list[spikes.Spike]:
    for step, loss in enumerate(losses, first):
        window.add(step, torch.tensor(loss))
    return window.read()


def test_a_spike_is_a_loss_far_above_the_median_of_a_full_window() -> None:
    window = LossWindow(2.0)
    assert not feed(window, [100.0, *[1.0] * (spikes.WINDOW - 2)])  # not full
    assert not feed(window, [1.9, 1.9, math.nan, math.inf], 64)
    assert feed(window, [2.1, 1.0, 300.0], 68) == [(68, pytest.approx(2.1), 1.0), (70, 300.0, 1.0)]
    assert not feed(LossWindow(None, [1.0] * spikes.WINDOW), [1e9])


def test_a_spike_is_told_and_the_window_survives_a_resume(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spikes, "WINDOW", 4)
    original, count = loop.accumulate_gradients, 0

    def spiked(*arguments: object) -> object:
        nonlocal count
        count += 1
        sums = original(*arguments)  # type: ignore[arg-type]
        sums.loss = sums.loss * (100.0 if count in (6, 10) else 1.0)
        return sums

    monkeypatch.setattr(loop, "accumulate_gradients", spiked)
    recipe = tiny(data, training__validate_every=0, training__steps=8)
    train(recipe, tmp_path / "run")
    train(tiny(data, training__validate_every=0), tmp_path / "run", "latest")
    told = [record for record in metrics(tmp_path / "run") if record["event"] == "spike"]
    assert [record["step"] for record in told] == [6, 10]
    assert all(record["loss"] > 50 * record["median"] for record in told)
    assert [record["skipped"] for record in results(tmp_path / "run") if record["event"] == "step"] == [0] * 12
    state = loop.read_state(tmp_path / "run" / "checkpoints" / "step-00000012")
    assert len(state.losses) == 4


def test_a_step_that_is_left_out_is_no_spike(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spikes, "WINDOW", 4)
    poison(monkeypatch, {8}, "loss")
    train(tiny(data, training__validate_every=0), tmp_path / "run")
    assert [r["event"] for r in metrics(tmp_path / "run") if r["event"] in ("spike", "skip")] == ["skip"]
