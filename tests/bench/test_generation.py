"""The suite ``generate`` at a size that takes a second: what it times, what it refuses to time, what it records."""

import pytest
import torch

from ssa.bench import generation
from ssa.bench.generation import Case, Model
from ssa.bench.runner import Options
from ssa.bench.targets import TARGETS
from ssa.model.positions import Positions

TINY = Model("tiny", 32, 48, 2, 4, 2, 8, 97)
CASES = tuple(Case(TINY, kind, 1024, 2) for kind in ("attention", "decode", "prefill"))


def records(say=lambda line: None):
    return generation.run(Options(torch.device("cpu"), 5.0, say), CASES)


def test_every_mode_is_checked_and_timed():
    lines = []
    found = records(lines.append)
    assert [(r["direction"], r["backend"]) for r in found] == [
        ("attention", "full"),
        ("attention", "sdpa"),
        ("attention", "sparse"),
        ("decode", "full"),
        ("decode", "sparse"),
        ("prefill", "full"),
        ("prefill", "sparse"),
    ]
    for record in found:
        assert record["status"] == "ok", record
        assert all(error <= limit for error, limit in record["check"]["errors"].values())
        assert ("ratio" in record) == (record["backend"] == "sparse")
    assert "tokens/s" in lines[-1]


def test_a_wrong_cache_has_no_time(monkeypatch):
    places = Positions.places
    monkeypatch.setattr(Positions, "places", lambda self, new: places(self, new) + 3)
    found = [r for r in records() if r["direction"] != "attention"]
    assert {r["status"] for r in found} == {"wrong"}
    assert "sparse cached" in found[0]["reason"]


def test_a_failure_says_why_and_the_rest_goes_on(monkeypatch):
    def out_of_memory(model, case):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(generation, "prefilling", out_of_memory)
    found = records()
    assert [r["status"] for r in found] == ["ok"] * 5 + ["failed"] * 2
    assert "out of memory" in found[-1]["reason"]


@pytest.mark.parametrize(
    "name", ["1B decode 64K b16", "1B prefill 128K b1", "64M decode 32K b1", "64M attention 32K b1"]
)
def test_the_rows_of_the_record_are_found(name):
    """A renamed case would leave its row unmeasured without a word."""
    case = next(c for c in generation.GPU_CASES + generation.CPU_CASES if c.name == name)
    timing = {"median": 2.0, "wall": 1.0, "low": 1, "high": 1, "host": 1, "repeats": 3}
    found = [
        generation._record(case, {"mode": mode, "status": "ok", "timing": {**timing, "median": time}})
        for mode, time in (("full", 9.0), ("sparse", 2.0))
    ]
    figures = {t.id: t.figure(found) for t in TARGETS}
    measured = {key: value for key, value in figures.items() if value is not None}
    assert set(measured.values()) <= {4.5, 2.0}
    assert len(measured) == (2 if "prefill" in name else 1)
