"""The comparison of adaptive and fixed budgets: its arithmetic, and what it measures of a layer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ssa.documents import DocumentLayout
from ssa.ops import SparseSpec


@pytest.fixture(scope="module")
def adaptive() -> ModuleType:
    import sys

    path = Path(__file__).parents[2] / "benchmarks" / "adaptive.py"
    spec = importlib.util.spec_from_file_location("adaptive", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["adaptive"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_fixed_budgets_are_interpolated_at_equal_cost(adaptive: ModuleType) -> None:
    fixed = [{"blocks": b, "perplexity": p} for b, p in ((2.0, 30.0), (4.0, 20.0), (8.0, 16.0))]
    assert adaptive.at_equal_cost(fixed, 3.0, "perplexity") == 25.0
    assert adaptive.at_equal_cost(fixed, 6.0, "perplexity") == 18.0
    assert adaptive.at_equal_cost(fixed, 9.0, "perplexity") is None


@pytest.mark.parametrize("flavour", ["estimated", "certified"])
def test_a_layer_is_measured(adaptive: ModuleType, flavour: str) -> None:
    q, k, v = torch.randn(1, 128, 4, 16) * 2, torch.randn(1, 128, 2, 16), torch.randn(1, 128, 2, 16)
    layout = DocumentLayout.single(1, 128)
    spec = SparseSpec(8, 16, max_dropped_mass=0.1, flavour=flavour)
    layer = adaptive.Layer()
    adaptive.observe_into([layer], spec, True)(0, q, k, v, layout)
    row = layer.row()
    assert layer.queries == (128 - adaptive.FEWEST * 8) * 2
    assert 1 <= row["blocks"] <= 16
    assert row["dropped_mass"] <= row["worst_dropped_mass"]
    assert row["exceeded"] == 0 if flavour == "certified" else row["exceeded"] > 0
    fixed = adaptive.Layer()
    adaptive.observe_into([fixed], SparseSpec(8, 1), False)(0, q, k, v, layout)
    assert fixed.row()["blocks"] == 1
    assert fixed.row()["dropped_mass"] > row["dropped_mass"]
