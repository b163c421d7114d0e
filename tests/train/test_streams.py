"""The stream of a step is a pure function of seed and step."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from ssa.train.streams import draw_sample_seed, draw_stream


@pytest.mark.parametrize("probability", [0.25, 0.5, 0.75])
def test_frequency(probability: float) -> None:
    n = 20000
    share = sum(draw_stream(3, step, probability) == "full" for step in range(n)) / n
    assert abs(share - probability) < 4 * (probability * (1 - probability) / n) ** 0.5


def test_certain_probabilities_are_certain() -> None:
    assert {draw_stream(seed, step, 1.0) for seed in range(5) for step in range(500)} == {"full"}
    assert {draw_stream(seed, step, 0.0) for seed in range(5) for step in range(500)} == {"sparse"}


def test_neighbouring_steps_and_seeds_are_independent() -> None:
    n = 4000
    for other in (lambda step: draw_stream(0, step + 1, 0.5), lambda step: draw_stream(1, step, 0.5)):
        equal = sum(draw_stream(0, step, 0.5) == other(step) for step in range(n))
        assert abs(equal / n - 0.5) < 4 * 0.5 / n**0.5


def test_neither_order_nor_global_generators_matter() -> None:
    steps = list(range(200))
    before = [draw_stream(7, step, 0.5) for step in steps]
    random.seed(1)
    shuffled = random.sample(steps, len(steps))
    after = {step: draw_stream(7, step, 0.5) for step in shuffled}
    assert [after[step] for step in steps] == before


def test_another_process_draws_the_same() -> None:
    code = "from ssa.train.streams import draw_stream; print(*(draw_stream(7, s, 0.5)[0] for s in range(64)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out == [draw_stream(7, s, 0.5)[0] for s in range(64)]


def test_sample_seeds_differ_by_step_and_run_and_are_drawn_apart_from_streams() -> None:
    seeds = [draw_sample_seed(seed, step) for seed in range(20) for step in range(200)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert draw_sample_seed(3, 7) == draw_sample_seed(3, 7)
    high = sum((draw_sample_seed(0, step) >= 2**62) == (draw_stream(0, step, 0.5) == "full") for step in range(4000))
    assert abs(high / 4000 - 0.5) < 4 * 0.5 / 4000**0.5
