"""One thread, fixed seeds and one hypothesis profile for every test."""

from __future__ import annotations

import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# `import oracles` without putting this folder on the path, where tests/evaluate or tests/data would pass for packages
_spec = importlib.util.spec_from_file_location("oracles", Path(__file__).with_name("oracles.py"))
assert _spec is not None
assert _spec.loader is not None
sys.modules["oracles"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["oracles"])

torch.set_num_threads(1)  # xdist already uses every core; results then do not depend on the machine's thread count

# "ci" repeats the same examples in every run, so a red test is a changed program; "nightly" looks for new ones.
_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("ci", max_examples=200, derandomize=True, database=None, **_common)
settings.register_profile("nightly", max_examples=5000, print_blob=True, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _fixed_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(0)
    torch.manual_seed(0)
    monkeypatch.delenv("SSA_CHECK", raising=False)


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """Fill ``torch.empty`` with NaN (or the largest integer): a row that nobody writes cannot look right by chance."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
