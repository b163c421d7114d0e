"""What a wheel holds, and that it runs away from the sources. `make wheel-check` does it in an empty environment."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import ssa

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "ssa"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, built from a copy of what the project holds."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("needs setuptools in this environment")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(SOURCE, folder / "src" / "ssa", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(folder / done.stdout.split()[-1]) as wheel:
        wheel.extractall(folder / "unpacked")
    return folder / "unpacked"


def run(unpacked: Path, *argv: str) -> str:
    """Python with the wheel's package before any other, in a folder without sources."""
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run([sys.executable, *argv], cwd=unpacked.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_holds_every_file_of_the_package(unpacked: Path) -> None:
    def files(folder: Path) -> set[str]:
        found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {path.relative_to(folder).as_posix() for path in found}

    assert files(SOURCE) == files(unpacked / "ssa")
    assert "py.typed" in files(unpacked / "ssa")
    assert {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"} == {"ssa"}


def test_metadata_names_version_command_and_plug_in(unpacked: Path) -> None:
    (info,) = unpacked.glob("*.dist-info")
    metadata = (info / "METADATA").read_text()
    assert f"\nVersion: {ssa.__version__}\n" in metadata
    assert "Typing :: Typed" in metadata
    entries = (info / "entry_points.txt").read_text()
    assert "ssa = ssa.cli:main" in entries
    assert "ssa = ssa.evaluate.harness:SSALM" in entries


def test_it_runs_away_from_the_sources(unpacked: Path) -> None:
    assert run(unpacked, "-m", "ssa", "--version") == f"ssa {ssa.__version__}\n"
    code = "import ssa.ops; from ssa.train.recipe_file import load_recipe, shipped_recipes; "
    code += "from ssa.evaluate.tasks import templates; print(ssa.__file__, len(templates()), "
    code += "len([load_recipe(name) for name in shipped_recipes()]))"
    where, tasks, recipes = run(unpacked, "-c", code).split()
    assert Path(where).is_relative_to(unpacked)
    assert (int(tasks), int(recipes) > 20) == (5, True)


def test_every_public_name_can_be_loaded() -> None:
    for name in ssa.__all__:
        assert getattr(ssa, name) is not None
