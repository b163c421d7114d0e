"""Small prepared data for the tests of training."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `import tiny_runs`: importlib mode puts no test folder on the path

from tiny_runs import make_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data: 22 training and 6 validation rows of 64 tokens."""
    return make_data(tmp_path_factory.mktemp("data") / "books")
