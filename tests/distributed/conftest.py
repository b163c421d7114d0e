"""Small prepared data, and `import tiny_runs, many` for the tests of many processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from tiny_runs import make_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data: 22 training and 6 validation rows of 64 tokens."""
    return make_data(tmp_path_factory.mktemp("data") / "books")
